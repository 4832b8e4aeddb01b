"""Tile stores: the pixels of a slide's tiles, where they lie, and whether they could be read.

Tile i means the same tile here, in the scores, in the CSV and in the GeoJSON. One shard (file) holds 1,024 tiles and
one chunk holds one tile, so that a store has few files and any tile can be read alone.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Bool, Float32, Int32, Int64, UInt8, UInt64
from pydantic import TypeAdapter

from wsi_anomaly.imaging.geometry import Grid
from wsi_anomaly.storage.arrays import COMPRESSOR, open_arrays
from wsi_anomaly.storage.shards import ShardedArray

_GRID = TypeAdapter(Grid)


class TileStatus(IntEnum):
    """How the reading of a tile went."""

    OK = 0
    PADDED = 1
    """It overhangs the slide; what lies outside has the background colour."""
    CORRUPT = 2
    """It cannot be read: zeros, left out of every statistic."""


@dataclass(frozen=True, slots=True)
class TilePlaces:
    """Where the tiles of a slide lie."""

    origins: Int64[np.ndarray, "tile xy"]
    """Top left corner in level-0 pixels."""
    cells: Int32[np.ndarray, "tile rowcol"]
    """Row and column on the slide's tile grid."""
    tissue_fraction: Float32[np.ndarray, " tile"]

    def __len__(self) -> int:
        return len(self.origins)


class TileWriter:
    """Fills a new store run by run; its memory does not grow with the slide."""

    def __init__(self, path: Path, places: TilePlaces, *, tile_px: int, attributes: Mapping[str, Any]) -> None:
        self.slide_id = str(attributes["slide_id"])
        self._group = zarr.create_group(path, attributes=dict(attributes))
        self._pixels = ShardedArray(self._group, "pixels", (len(places), tile_px, tile_px, 3), "uint8")
        self._status: list[TileStatus] = []
        for name in ("origins", "cells", "tissue_fraction"):
            self._group.create_array(name, data=getattr(places, name), compressors=COMPRESSOR)

    def append(self, chunks: Sequence[bytes], status: Sequence[TileStatus]) -> None:
        """The next tiles in the order of the places: their pixels as `shards.compressed` makes them."""
        self._pixels.append_compressed(chunks)
        self._status.extend(status)

    def __enter__(self) -> "TileWriter":  # noqa: PYI034 - the type checker of the tests cannot check Self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Write what is known only at the end."""
        self._pixels.close()
        if kind is None:
            self._group.create_array("status", data=np.array(self._status, np.uint8), compressors=COMPRESSOR)


class TileStore:
    """The tiles of one slide, for reading."""

    def __init__(self, path: Path) -> None:
        self._group = open_arrays(path)
        self._pixels = self._array("pixels")
        self.attributes: dict[str, Any] = dict(self._group.attrs)

    def __len__(self) -> int:
        return int(self._pixels.shape[0])

    @property
    def tile_px(self) -> int:
        """The side of a tile in pixels."""
        return int(self._pixels.shape[1])

    @cached_property
    def grid(self) -> Grid:
        """The grid that the tiles lie on."""
        return _GRID.validate_python(self.attributes["grid"])

    @cached_property
    def places(self) -> TilePlaces:
        """Where the tiles lie."""
        return TilePlaces(*(np.asarray(self._array(name)[...]) for name in ("origins", "cells", "tissue_fraction")))

    @cached_property
    def status(self) -> UInt8[np.ndarray, " tile"]:
        """A `TileStatus` for each tile."""
        return np.asarray(self._array("status")[...])

    @property
    def readable(self) -> Bool[np.ndarray, " tile"]:
        """The tiles that have pixels."""
        return np.asarray(self.status != TileStatus.CORRUPT)

    def read(self, indices: Int64[np.ndarray, " tile"]) -> UInt8[np.ndarray, "tile y x rgb"]:
        """The pixels of some tiles, in the order of `indices`."""
        out = np.empty((len(indices), *self._pixels.shape[1:]), np.uint8)
        for position, run in _runs(indices):
            out[position : position + len(run)] = self._pixels[int(run[0]) : int(run[-1]) + 1]
        return out

    def seeds(self, indices: Int64[np.ndarray, " tile"], run_seed: int) -> UInt64[np.ndarray, " tile"]:
        """A number for each tile's noise: of run seed, slide and origin, never of batch or order."""
        slide_id = self.attributes["slide_id"]
        origins = self.places.origins[indices].tolist()
        return np.array([_seed(run_seed, slide_id, x, y) for x, y in origins], np.uint64)

    def _array(self, name: str) -> zarr.Array:  # type: ignore[type-arg]
        array = self._group[name]
        assert isinstance(array, zarr.Array)  # noqa: S101 - for the type checker
        return array


def _runs(indices: Int64[np.ndarray, " tile"]) -> Iterator[tuple[int, Int64[np.ndarray, " tile"]]]:
    """Stretches of consecutive numbers with their positions: one read of zarr costs much more than one chunk."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    position = 0
    for run in np.split(indices, breaks):
        if len(run):
            yield position, run
        position += len(run)


def _seed(run_seed: int, slide_id: str, x: int, y: int) -> int:
    name = f"{run_seed}|{slide_id}|{x}|{y}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
