"""The methods of PyOD by name: one learns vectors and scores others, each for itself. Knows no tiles and no files.

PyOD's models are saved by pickling, which runs code of whoever made the file. So they are never saved here: learning
the same vectors again, from the same seed, gives the same model. Networks learn on the CPU, whatever device there is:
on another one they would become other networks.
"""

import logging
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from wsi_anomaly.devices import reproducible
from wsi_anomaly.errors import CohortError, MissingExtraError, OptionsError
from wsi_anomaly.options import nearest

log = logging.getLogger(__name__)

_TOGETHER, _ALONE = 64, 1
"""How many vectors a method sees at once when scoring, always.

Alone where a vector's score would depend on the others: ECOD and COPOD count them among those learnt, and a matrix
product of PCA with kernels, of a mixture or of a network rounds otherwise.
"""

METHODS: dict[str, tuple[str, int]] = {
    "ABOD": ("abod", _TOGETHER),
    "AutoEncoder": ("auto_encoder", _ALONE),
    "COPOD": ("copod", _ALONE),
    "DeepSVDD": ("deep_svdd", _ALONE),
    "ECOD": ("ecod", _ALONE),
    "GMM": ("gmm", _ALONE),
    "HBOS": ("hbos", _TOGETHER),
    "IForest": ("iforest", _TOGETHER),
    "INNE": ("inne", _TOGETHER),
    "KDE": ("kde", _TOGETHER),
    "KNN": ("knn", _TOGETHER),
    "KPCA": ("kpca", _ALONE),
    "LODA": ("loda", _TOGETHER),
    "LOF": ("lof", _TOGETHER),
    "LUNAR": ("lunar", _ALONE),
    "MCD": ("mcd", _TOGETHER),
    "OCSVM": ("ocsvm", _TOGETHER),
    "PCA": ("pca", _TOGETHER),
    "Sampling": ("sampling", _TOGETHER),
}
"""PyOD's class, its module there, and how many vectors it sees at once.

Not those that need labels, other models or a batch to compare a vector with, nor those that draw when scoring,
nor CBLOF, which fails where there is one cluster.
"""


@dataclass(frozen=True, slots=True)
class LearntMethod:
    """A method that has learnt. The score of a vector does not depend on those it comes with."""

    model: Any
    at_once: int

    def scores(self, vectors: Float32[np.ndarray, "row d"]) -> Float32[np.ndarray, " row"]:
        """Higher is more abnormal; the unit is the method's own."""
        parts = [np.empty(0, np.float32)]
        with reproducible(), _warnings_kept():
            for start in range(0, len(vectors), self.at_once):
                part = vectors[start : start + self.at_once]
                whole = np.pad(part, ((0, self.at_once - len(part)), (0, 0)), mode="edge")
                found = self.model.decision_function(whole.astype(np.float64))
                parts.append(np.asarray(found, np.float32).reshape(-1)[: len(part)])
        return np.concatenate(parts)


def canonical_name(name: str) -> str:
    """PyOD's own spelling of a method's name.

    Raises:
        ValueError: there is none of that name.
    """
    known = {method.lower(): method for method in METHODS}
    if name.lower() not in known:
        raise ValueError(f"PyOD has no such method for tiles ({nearest(name, list(METHODS))})")
    return known[name.lower()]


def require_parameters(name: str, parameters: Mapping[str, Any]) -> None:
    """Refuse what the constructor of a method does not take.

    Raises:
        ValueError: names what is not known, and what is.
        MissingExtraError: PyOD is not installed.
    """
    known = [key for key in signature(_class_of(name)).parameters if key not in _GIVEN_HERE]
    if unknown := [key for key in parameters if key not in known]:
        raise ValueError(f"{name} has no parameter {', '.join(unknown)} (it has: {', '.join(known)})")


def learnt(
    name: str,
    parameters: Mapping[str, Any],
    vectors: Float32[np.ndarray, "row d"],
    *,
    seed: int,
) -> LearntMethod:
    """The method after it has learnt the vectors; the caller's random state stays as it is.

    Raises:
        CohortError: there are too few vectors.
        OptionsError: the method cannot learn them with these parameters.
        MissingExtraError: PyOD is not installed.
    """
    with _own_randomness(seed), reproducible(), _warnings_kept() as kept:
        try:
            model = _made(name, parameters, width=vectors.shape[1], seed=seed)
            _require_enough(name, model, len(vectors))
            model.fit(vectors.astype(np.float64))
            method = LearntMethod(model, METHODS[name][1])
            trial = method.scores(np.concatenate([vectors[:1], np.zeros_like(vectors[:1])]))
        except _FAULTS as error:
            raise OptionsError(_cannot(name, vectors, f"{type(error).__name__}: {error}")) from error
    for text in sorted({str(warning.message) for warning in kept}):
        log.warning("%s: %s", name, text)
    if not np.isfinite(trial).all():
        raise OptionsError(_cannot(name, vectors, "its scores are no finite numbers"))
    return method


def _class_of(name: str) -> type:
    try:
        found: type = getattr(import_module(f"pyod.models.{METHODS[name][0]}"), name)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the method {name} needs the Python package '{error.name}', which is not installed. "
            f"Install it: pip install {error.name}"
        ) from error
    return found


def _made(name: str, parameters: Mapping[str, Any], *, width: int, seed: int) -> Any:  # noqa: ANN401 - PyOD has no types
    method = _class_of(name)
    given = {"random_state": seed, "device": _CPU, "n_features": width, "verbose": 0}
    fitting = {key: value for key, value in given.items() if key in signature(method).parameters}
    model = method(**fitting, **parameters)
    if name == "LUNAR":  # takes a GPU wherever there is one, and cannot be told otherwise
        model.device, model.network = _CPU, model.network.to(_CPU)
    return model


def _require_enough(name: str, model: Any, count: int) -> None:  # noqa: ANN401 - PyOD has no types
    sizes = [size for key in _SIZES if isinstance(size := getattr(model, key, None), int)]
    needed = 1 + max(sizes, default=1)
    if count < needed:
        raise CohortError(
            f"normal tiles to learn from: {count}, needed by {name} with these parameters: at least {needed}, better "
            "some thousands. Add normal slides, or look at the tissue masks of those given."
        )


def _cannot(name: str, vectors: Float32[np.ndarray, "row d"], why: str) -> str:
    rows, width = vectors.shape
    return (
        f"PyOD's {name} cannot learn from {rows} embeddings of {width} numbers ({why}). Change parameters under "
        "[detector] of the pipeline file, choose another method, such as knn, or add normal slides."
    )


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Inside, all that is random is drawn from `seed`: some methods draw from the state that all share."""
    plain, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002 - what PyOD draws from
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)  # noqa: NPY002


@contextmanager
def _warnings_kept() -> Iterator[list[warnings.WarningMessage]]:
    """Inside, warnings of libraries are gathered in place of being shown once for each batch."""
    with warnings.catch_warnings(record=True) as kept:
        warnings.simplefilter("always")
        yield kept


_CPU = torch.device("cpu")
_GIVEN_HERE = ("random_state", "device", "n_features", "verbose")
_SIZES = ("n_neighbors", "n_components", "batch_size", "subset_size")
"""Parameters that no method can have more of than vectors."""
_FAULTS = (ArithmeticError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)
"""What PyOD raises for parameters and vectors that it cannot use."""
