"""How unlikely a vector is among those of normal tiles: mixtures, flows, neighbours. Knows no tiles and no network."""

import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, Float64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import KFold
from sklearn.neighbors import KDTree
from threadpoolctl import threadpool_limits

from wsi_anomaly.detectors.flow import Flow, fit_flow
from wsi_anomaly.detectors.weights import write_whole
from wsi_anomaly.devices import in_fixed_chunks
from wsi_anomaly.errors import CohortError, ModelError

DensityName = Literal["gmm", "flow", "knn"]
Arrays = Mapping[str, np.ndarray]
Vectors = Float64[np.ndarray, "item d"]
Chunk = Float64[torch.Tensor, "chunk d"]
Surprise = Callable[[Chunk], Float64[torch.Tensor, " chunk"]]

DENSITY = "density.safetensors"
FORMAT_VERSION = 1
FEWEST_ITEMS: Mapping[DensityName, int] = {"gmm": 8, "flow": 32, "knn": 6}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Density:
    """A fitted density. What it says of a vector does not depend on the vectors that come with it."""

    name: DensityName
    arrays: Arrays
    """All that defines it."""
    surprise: Surprise
    """-log p in nats, or the distance, of standardised vectors; of a mixture or a flow it can be differentiated."""

    def anomaly(self, vectors: Float32[np.ndarray, "item d"]) -> Float32[np.ndarray, " item"]:
        """-log p of each vector once standardised ("gmm", "flow"), or the distance to its fifth neighbour ("knn").

        NaN for a vector that is not finite.
        """
        finite = np.isfinite(vectors).all(axis=1)
        numbers = np.where(finite[:, None], vectors, 0).astype(np.float64)  # others must not suffer from its company
        values = in_fixed_chunks(self.of, numbers, _CPU, size=_CHUNK_ITEMS)
        return np.where(finite, np.clip(values, -_LARGEST, _LARGEST), np.nan).astype(np.float32)

    def of(self, vectors: Chunk) -> Float64[torch.Tensor, " chunk"]:
        """The same in float64, for tensors, whose gradient it keeps."""
        middle, scale = (torch.from_numpy(self.arrays[name]) for name in ("middle", "scale"))
        return self.surprise((vectors - middle) / scale)


def fit_density(name: DensityName, vectors: Float32[np.ndarray, "item d"], *, seed: int) -> Density:
    """The density of these vectors, each of their columns brought to mean 0 and deviation 1 first.

    "gmm" is a mixture of Gaussians with full covariances, whose number and ridge are those of the best held-out
    likelihood; "flow" a neural spline flow; "knn" keeps the vectors and measures distances to them. Vectors that are
    not finite are left out.

    Raises:
        CohortError: there are too few vectors.
    """
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        log.warning("%d of %d vectors are no finite numbers: left out", np.sum(~finite), len(vectors))
        vectors = vectors[finite]
    require_items(name, len(vectors), total=len(vectors))
    values = vectors.astype(np.float64)
    middle, deviation = values.mean(axis=0), values.std(axis=0)
    # Constant columns have the deviation of their rounding, or none.
    scale = np.where(deviation > _ROUNDING * np.abs(middle), deviation, 1.0)
    with threadpool_limits(1):  # partial sums of several threads are added in no fixed order
        arrays = _FITS[name]((values - middle) / scale, seed)
    return _density(name, {"middle": middle, "scale": scale, **arrays})


def require_items(name: DensityName, count: int, *, total: int) -> None:
    """Refuse what `fit_density` would refuse, before anything long is begun; `count` tiles are held out of the total.

    Raises:
        CohortError: there are too few vectors.
    """
    least = FEWEST_ITEMS[name]
    if count < least:
        held_out, remedy = "", f"Add normal slides: better some hundreds of tiles than {least}."
        if count < total:
            held_out = f" (held out of {total})"
            remedy = (
                f"Add normal slides until there are about {math.ceil(least * total / max(count, 1))} tiles in all, "
                "better some hundreds, or raise held_out_fraction."
            )
        raise CohortError(
            f"normal tiles to estimate a density '{name}' from: {count}{held_out}, needed: at least {least}. {remedy}"
        )


def save_density(density: Density, folder: Path) -> None:
    """Write all that defines it into `folder`, as one file."""
    label = json.dumps({"format_version": FORMAT_VERSION, "density": density.name}, sort_keys=True)
    content = save({name: np.ascontiguousarray(array) for name, array in density.arrays.items()}, {_LABEL: label})
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / DENSITY, lambda file: file.write(content))


def load_density(folder: Path) -> Density:
    """What `save_density` left in `folder`.

    Raises:
        ModelError: it is missing, damaged or of another format.
    """
    path = folder / DENSITY
    label, arrays = _read(path)
    if label.get("format_version") != FORMAT_VERSION or label.get("density") not in _SURPRISES:
        raise ModelError(
            f"{path}: holds format version {label.get('format_version')} of a density '{label.get('density')}', this "
            f"version of wsi-anomaly reads {FORMAT_VERSION} of {', '.join(_SURPRISES)}. Fit the model again."
        )
    try:
        return _density(label["density"], arrays)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: is damaged ({error}). Copy the model anew, or fit it again.") from error


def _read(path: Path) -> tuple[dict[str, Any], Arrays]:
    try:
        with safe_open(path, framework="np") as file:
            label = dict(json.loads((file.metadata() or {}).get(_LABEL, "{}")))
            return label, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise ModelError(f"{path}: is missing: the fit was not finished, or not all of the model copied.") from error
    except (SafetensorError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: is damaged ({error}). Copy the model anew, or fit it again.") from error


def _density(name: DensityName, arrays: Arrays) -> Density:
    _ = arrays["middle"], arrays["scale"]
    return Density(name, arrays, _SURPRISES[name](arrays))


def _fit_mixture(vectors: Vectors, seed: int) -> Arrays:
    """The ridge is chosen for one component, which is quick, and then the number of components."""
    ridge = max(_RIDGES, key=lambda ridge: _likelihood(vectors, 1, ridge, seed=seed))
    most = max(1, len(vectors) // (_ITEMS_A_PARAMETER * (1 + vectors.shape[1])))
    counts = [count for count in _COMPONENTS if count <= most]
    count = max(counts, key=lambda count: _likelihood(vectors, count, ridge, seed=seed))
    log.info("mixture of %d vectors: %d components, ridge %g", len(vectors), count, ridge)
    mixture = _mixture(vectors, count, ridge, seed=seed)
    return {"weights": mixture.weights_, "means": mixture.means_, "roots": mixture.precisions_cholesky_}


def _likelihood(vectors: Vectors, count: int, ridge: float, *, seed: int) -> float:
    """The mean log p of a vector under the mixture of others."""
    parts = KFold(_FOLDS, shuffle=True, random_state=seed).split(vectors)
    return float(np.mean([_mixture(vectors[ours], count, ridge, seed=seed).score(vectors[out]) for ours, out in parts]))


def _mixture(vectors: Vectors, count: int, ridge: float, *, seed: int) -> Any:  # noqa: ANN401 - sklearn has no types
    with warnings.catch_warnings():
        # Equal vectors, or no end after so many steps: held-out likelihood decides whether that did harm.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return GaussianMixture(count, reg_covar=ridge, max_iter=_MOST_STEPS, random_state=seed).fit(vectors)


def _mixture_surprise(arrays: Arrays) -> Surprise:
    weights, means, roots = (torch.from_numpy(arrays[name]) for name in ("weights", "means", "roots"))
    diagonals = torch.diagonal(roots, dim1=1, dim2=2)
    constants = torch.log(weights) + torch.log(diagonals).sum(dim=1) - means.shape[1] / 2 * np.log(2 * np.pi)

    def surprise(vectors: Chunk) -> Float64[torch.Tensor, " chunk"]:
        # Products and sums, no matrix product: its rounding would depend on the place of a row.
        apart = (vectors[:, None] - means)[..., None]
        squares = (apart * roots).sum(dim=2).square().sum(dim=2)
        return -torch.logsumexp(constants - squares / 2, dim=1)

    return surprise


def _fit_flow(vectors: Vectors, seed: int) -> Arrays:
    held_out = np.zeros(len(vectors), bool)
    held_out[np.random.default_rng(seed).permutation(len(vectors))[: -(-len(vectors) // _FOLDS)]] = True
    flow = fit_flow(vectors.astype(np.float32), None, held_out, seed=seed)
    return {name: tensor.numpy() for name, tensor in flow.state_dict().items()}


def _flow_surprise(arrays: Arrays) -> Surprise:
    flow = Flow(len(arrays["middle"]), 0)
    weights = {name: torch.from_numpy(array) for name, array in arrays.items() if name not in {"middle", "scale"}}
    flow.load_state_dict(weights)
    return flow.double().eval().requires_grad_(requires_grad=False)


def _fit_neighbours(vectors: Vectors, seed: int) -> Arrays:  # noqa: ARG001 - nothing is drawn
    return {"vectors": vectors}


def _neighbour_surprise(arrays: Arrays) -> Surprise:
    tree = KDTree(arrays["vectors"])

    def surprise(vectors: Chunk) -> Float64[torch.Tensor, " chunk"]:
        return torch.from_numpy(tree.query(vectors.numpy(), k=_NEIGHBOUR)[0][:, -1].copy())

    return surprise


_FITS: Mapping[DensityName, Callable[[Vectors, int], Arrays]] = {
    "gmm": _fit_mixture,
    "flow": _fit_flow,
    "knn": _fit_neighbours,
}
_SURPRISES: Mapping[DensityName, Callable[[Arrays], Surprise]] = {
    "gmm": _mixture_surprise,
    "flow": _flow_surprise,
    "knn": _neighbour_surprise,
}
_LABEL = "wsi_anomaly"
_CPU = torch.device("cpu")
_CHUNK_ITEMS = 64
_LARGEST = float(np.finfo(np.float32).max)
_ROUNDING = 1e-6
_RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_COMPONENTS = (1, 2, 4, 6, 8, 12, 16, 20)
_ITEMS_A_PARAMETER = 5
_FOLDS = 5
_MOST_STEPS = 300
_NEIGHBOUR = 5
