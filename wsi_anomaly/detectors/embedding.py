"""The embedding detector: tiles that an image-text model sees far from all normal ones are abnormal.

Any method of PyOD (Zhao et al., "PyOD: A Python Toolbox for Scalable Outlier Detection", JMLR 2019) on the vectors that
the prompt stage stores. The default, the distance to near neighbours, is that of Ramaswamy et al. (SIGMOD 2000).
"""

import json
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float32
from pydantic import Field, JsonValue, PositiveInt, field_validator
from safetensors import SafetensorError, safe_open
from torch import nn

from wsi_anomaly.detectors.coreset import coreset
from wsi_anomaly.detectors.gathered import forget, gathered
from wsi_anomaly.detectors.outlier_methods import LearntMethod, canonical_name, learnt, require_parameters
from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.sampling import even_sample
from wsi_anomaly.detectors.training import HISTORY, fit_identity, is_finished
from wsi_anomaly.detectors.weights import WEIGHTS, load_weights, save_weights, write_whole
from wsi_anomaly.devices import resolve_device
from wsi_anomaly.errors import CohortError, OptionsError
from wsi_anomaly.options import Options

log = logging.getLogger(__name__)

CANDIDATES = 5
"""A coreset is chosen among so many times as many tiles, taken evenly."""


class EmbeddingTraining(Options):
    """Which normal tiles are remembered. Time and memory to score grow with their number for most methods."""

    subset: Literal["even", "coreset"] = "even"
    """"even": as many tiles of each slide. "coreset": those that lie near all others; for methods that measure
    distances (knn), not for those that measure how dense normal tissue is (lof, kde, gmm, ecod)."""
    most_tiles: PositiveInt = 20_000
    seed: int = Field(0, ge=0)
    """Decides which tiles, and all that the method draws. In a pipeline file, the pipeline's own where not given."""


class Embedding(Options):
    """Remembers how an image-text model sees normal tiles; scores how far off others are, by any PyOD method."""

    score_names: ClassVar[tuple[str, ...]] = ("outlierness",)
    paper: ClassVar[str] = "Zhao et al., JMLR 2019"
    licence_of: ClassVar[str] = "CONCH: CC BY-NC-ND 4.0"
    needs: ClassVar[tuple[str, ...]] = ("embeddings",)

    method: str = "KNN"
    """A class of PyOD, upper or lower case. ECOD and COPOD compare a tile with all remembered ones, number by number:
    a tenth of a second for each thousand of 512 numbers, so lower most_tiles. So do it for KDE, which compares all
    remembered tiles with each other each time a model is loaded (2000 of 512 numbers take seven seconds, twice as many
    four times as long), and for KPCA, whose kernel of 20,000 tiles has 3.2 GB and which takes 26 ms for a tile to score
    where it remembers 2000. LUNAR, AutoEncoder and DeepSVDD train a network, on the CPU, and do so again each time a
    model is loaded."""
    parameters: dict[str, JsonValue] = Field({})
    """Of that class, such as { n_neighbors = 10 }."""
    unit_length: bool = True
    """Whether only the direction of an embedding counts, as for keywords."""
    training: EmbeddingTraining = EmbeddingTraining()

    @field_validator("method")
    @classmethod
    def _is_known(cls, value: str) -> str:
        return canonical_name(value)

    @field_validator("parameters")
    @classmethod
    def _are_known(cls, value: dict[str, JsonValue], info: Any) -> dict[str, JsonValue]:  # noqa: ANN401 - as pydantic has it
        if value and "method" in info.data:
            require_parameters(info.data["method"], value)
        return value

    def fit(self, tiles: TileSource, checkpoint: Path, *, device: str) -> None:
        """Leave the embeddings of some normal tiles in the folder `checkpoint`.

        Goes on from an unfinished fit with the same options. The method learns them once, to see that it can.

        Raises:
            CohortError: there are too few tiles for the method.
            OptionsError: the device does not exist, the pipeline stores no embeddings, or the method cannot learn them.
            MissingExtraError: the method's package is not installed.
        """
        resolve_device(device)
        training = self.training
        _require_tiles(tiles)
        identity = fit_identity(tiles, {"options": self.model_dump(mode="json"), "ends": _ends(tiles)})
        if is_finished(checkpoint, identity, weights=WEIGHTS):
            return
        for name in (WEIGHTS, HISTORY):  # of an earlier fit: nobody shall take them for this one's
            (checkpoint / name).unlink(missing_ok=True)
        candidates = training.most_tiles * (CANDIDATES if training.subset == "coreset" else 1)
        chosen = even_sample(tiles.slides, candidates, seed=training.seed)
        vectors = gathered(tiles, chosen, embeddings_of, folder=checkpoint, identity=identity)
        if len(vectors) > training.most_tiles:
            log.info("remembering a coreset of %d of these", training.most_tiles)
        vectors = vectors[coreset(self._seen(vectors), training.most_tiles, seed=training.seed)]
        self._learnt(vectors)
        save_weights(Vectors(torch.from_numpy(vectors)), checkpoint, _ARCHITECTURE)
        forget(checkpoint)
        content = {"identity": identity, "tiles": {"train": len(vectors), "offered": len(tiles)}}
        write_whole(checkpoint / HISTORY, lambda file: file.write(f"{json.dumps(content, indent=1)}\n".encode()))

    def load(self, checkpoint: Path, *, device: str) -> "EmbeddingScorer":
        """The scorer of what `fit` left in `checkpoint`: the method learns it anew.

        Raises:
            ModelError: the vectors are missing, damaged, of another format or of another detector.
            OptionsError: the device does not exist, or the method cannot learn the vectors.
            MissingExtraError: the method's package is not installed.
        """
        resolve_device(device)
        stored = Vectors(torch.zeros(_stored_shape(checkpoint / WEIGHTS)))
        load_weights(stored, checkpoint, _ARCHITECTURE)
        vectors = stored.vectors.numpy()
        return EmbeddingScorer(self, self._learnt(vectors), vectors.shape[1])

    def _learnt(self, vectors: Float32[np.ndarray, "row d"]) -> LearntMethod:
        return learnt(self.method, self.parameters, self._seen(vectors), seed=self.training.seed)

    def _seen(self, vectors: Float32[np.ndarray, "row d"]) -> Float32[np.ndarray, "row d"]:
        return unit_vectors(vectors) if self.unit_length else vectors


@dataclass(frozen=True, slots=True)
class EmbeddingScorer:
    """A method that has learnt normal embeddings. A tile's score does not depend on the others of its batch."""

    options: Embedding
    method: LearntMethod
    width: int
    """How many numbers an embedding has."""

    def score(self, batch: TileBatch) -> Float32[np.ndarray, "tile 1"]:
        """What the method calls the outlierness of each tile's embedding; knn: a distance.

        Raises:
            OptionsError: the tiles have no embeddings, or those of another image-text model.
        """
        vectors = embeddings_of(batch)
        if vectors.shape[1] != self.width:
            raise OptionsError(
                f"embeddings have {vectors.shape[1]} numbers, and those the model was fitted on {self.width}. Use the "
                "image-text model of the fit under [prompt.model] of the pipeline file."
            )
        seen = unit_vectors(vectors) if self.options.unit_length else vectors
        return self.method.scores(seen)[:, None]


class Vectors(nn.Module):
    """Vectors as the only weights, so that they are kept as weights are."""

    vectors: Float32[torch.Tensor, "row d"]

    def __init__(self, vectors: Float32[torch.Tensor, "row d"]) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors)


def embeddings_of(batch: TileBatch) -> Float32[np.ndarray, "tile d"]:
    """How an image-text model sees each tile.

    Raises:
        OptionsError: no model has looked at them.
    """
    if batch.embeddings is None:
        raise OptionsError(
            "the detector 'embedding' needs embeddings of the tiles, and this pipeline stores none. Add a table "
            '[prompt] to the pipeline file, such as: [prompt] keywords = "lymph_node", [prompt.model] name = "conch".'
        )
    return batch.embeddings


def unit_vectors(vectors: Float32[np.ndarray, "row d"]) -> Float32[np.ndarray, "row d"]:
    """The same directions with length one; zeros stay zeros."""
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))[:, None]
    return (vectors / np.maximum(lengths, _TINY)).astype(np.float32)


def _require_tiles(tiles: TileSource) -> None:
    if len(tiles) < _FEWEST_TILES:
        raise CohortError(
            f"normal tiles to learn from: {len(tiles)}, needed: at least {_FEWEST_TILES}, better some thousands. Add "
            "normal slides, or look at the tissue masks of those given."
        )


def _ends(tiles: TileSource) -> int:
    """What tells the embeddings of one image-text model from those of another."""
    return zlib.crc32(embeddings_of(tiles.read(np.array([0, len(tiles) - 1]))).tobytes())


def _stored_shape(path: Path) -> tuple[int, ...]:
    """How many vectors of how many numbers a fit left; none where that cannot be told, which `load_weights` reports."""
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice("vectors").get_shape())
    except (OSError, SafetensorError):
        return (0, 0)


_ARCHITECTURE = {"detector": "embedding"}
_FEWEST_TILES = 2
_TINY = 1e-12
