"""Score stores: what a detector says of each tile of a slide, in the order of the tile store."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Bool, Float32, Shaped, UInt8

from wsi_anomaly.storage.arrays import COMPRESSOR, open_arrays, read_array
from wsi_anomaly.storage.shards import ShardedArray


class ScoreStatus(IntEnum):
    """What became of a tile."""

    SCORED = 0
    CORRUPT = 1
    """It cannot be read."""
    FAILED = 2
    """The detector found no number for it."""


@dataclass(frozen=True, slots=True)
class TileOutputs:
    """What a detector says of some tiles; None: it does not, or that is not kept."""

    scores: Float32[np.ndarray, "tile score"]
    vectors: Float32[np.ndarray, "tile value"] | None = None
    """What scores are made of; where some batches have them, all have, be it of no tiles."""
    maps: Float32[np.ndarray, "tile y x"] | None = None
    reconstructions: UInt8[np.ndarray, "tile y x rgb"] | None = None


class ScoreWriter:
    """Fills a new store batch by batch. Tiles without pixels get NaN scores, NaN maps and black reconstructions.

    Vectors are NaN wherever there is no score.
    """

    def __init__(
        self,
        path: Path,
        *,
        tiles: int,
        tile_px: int,
        attributes: Mapping[str, Any],
        maps: bool,
        reconstructions: bool,
    ) -> None:
        self._group = zarr.create_group(path, attributes=dict(attributes))
        self._scores: list[Float32[np.ndarray, "tile score"]] = []
        self._vectors: list[Float32[np.ndarray, "tile value"]] = []
        self._readable: list[Bool[np.ndarray, " tile"]] = []
        side = (tile_px, tile_px)
        self._maps = ShardedArray(self._group, "maps", (tiles, *side), "float16") if maps else None
        self._reconstructions = (
            ShardedArray(self._group, "reconstructions", (tiles, *side, 3), "uint8") if reconstructions else None
        )
        self.tiles_done = 0

    def append(self, readable: Bool[np.ndarray, " tile"], outputs: TileOutputs) -> None:
        """The next `len(readable)` tiles; `outputs` are only of those that are readable."""
        self._scores.append(_spread(outputs.scores, readable, np.nan))
        self._readable.append(readable)
        if outputs.vectors is not None:
            scored = np.isfinite(outputs.scores).all(axis=1, keepdims=True)
            self._vectors.append(_spread(np.where(scored, outputs.vectors, np.float32(np.nan)), readable, np.nan))
        if self._maps is not None:
            self._maps.append(_spread_or_fill(self._maps, outputs.maps, readable, np.nan))
        if self._reconstructions is not None and outputs.reconstructions is not None:
            self._reconstructions.append(_spread_or_fill(self._reconstructions, outputs.reconstructions, readable, 0))
        self.tiles_done += len(readable)

    @property
    def scores(self) -> Float32[np.ndarray, "tile score"]:
        """Of all tiles so far."""
        return np.concatenate(self._scores)

    @property
    def status(self) -> UInt8[np.ndarray, " tile"]:
        """A `ScoreStatus` for each tile so far."""
        failed = np.where(np.isfinite(self.scores).all(axis=1), ScoreStatus.SCORED, ScoreStatus.FAILED)
        return np.where(np.concatenate(self._readable), failed, ScoreStatus.CORRUPT).astype(np.uint8)

    def keep(self, tile: int, reconstruction: UInt8[np.ndarray, "y x rgb"]) -> None:
        """The reconstruction of one tile, where only some are kept; in ascending order."""
        assert self._reconstructions is not None  # noqa: S101 - for the type checker
        self._reconstructions.skip_to(tile)
        self._reconstructions.append(reconstruction[None])

    def __enter__(self) -> "ScoreWriter":  # noqa: PYI034 - the type checker of the tests cannot check Self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Write what is known only at the end."""
        for array in (self._maps, self._reconstructions):
            if array is not None:
                array.close()
        if kind is None:
            self._group.create_array("scores", data=self.scores, compressors=COMPRESSOR)
            self._group.create_array("status", data=self.status, compressors=COMPRESSOR)
            if self._vectors:
                self._group.create_array("vectors", data=np.concatenate(self._vectors), compressors=COMPRESSOR)


def read_scores(path: Path) -> tuple[Float32[np.ndarray, "tile score"], tuple[str, ...]]:
    """The scores of a slide, NaN for unreadable tiles, and their names."""
    return read_array(path, "scores"), tuple(open_arrays(path).attrs["score_names"])  # type: ignore[arg-type]


def has_vectors(path: Path) -> bool:
    """Whether it was kept what the scores of a slide are made of."""
    return "vectors" in open_arrays(path)


def read_vectors(path: Path) -> Float32[np.ndarray, "tile value"]:
    """What the scores of a slide are made of, where that was kept; NaN where there is no score."""
    return read_array(path, "vectors")


def _spread_or_fill(
    array: ShardedArray,
    values: Shaped[np.ndarray, "readable ..."] | None,
    readable: Bool[np.ndarray, " tile"],
    missing: float,
) -> Shaped[np.ndarray, "tile ..."]:
    """`values` in their places; a batch without any readable tile has none."""
    if values is None:
        return np.full((len(readable), *array.item_shape), missing, array.dtype)
    return _spread(values.astype(array.dtype), readable, missing)


def _spread(
    values: Shaped[np.ndarray, "readable ..."], readable: Bool[np.ndarray, " tile"], missing: float
) -> Shaped[np.ndarray, "tile ..."]:
    if readable.all():
        return values
    out = np.full((len(readable), *values.shape[1:]), missing, values.dtype)
    out[readable] = values
    return out
