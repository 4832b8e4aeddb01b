"""Groups of arrays on disk as zarr v3. The layout of each group stands in the README's output reference."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Shaped
from zarr.codecs import BloscCodec, BloscShuffle
from zarr.errors import ContainsArrayError, GroupNotFoundError

from wsi_anomaly.errors import MissingOutputError

TILES_PER_SHARD = 1024
COMPRESSOR = BloscCodec(cname="zstd", clevel=1, shuffle=BloscShuffle.shuffle, typesize=1)


def write_arrays(path: Path, arrays: Mapping[str, Shaped[np.ndarray, "..."]], attributes: Mapping[str, Any]) -> None:
    """Write small arrays, each in one chunk, with JSON attributes on the group."""
    group = zarr.create_group(path, attributes=dict(attributes))
    for name, array in arrays.items():
        group.create_array(name, data=array, chunks=tuple(max(1, size) for size in array.shape), compressors=COMPRESSOR)


class ShardedArray:
    """One value a tile, written in order: one chunk a tile, `TILES_PER_SHARD` tiles a file, one shard in memory."""

    def __init__(self, group: zarr.Group, name: str, shape: tuple[int, ...], dtype: str) -> None:
        self._array = group.create_array(
            name,
            shape=shape,
            chunks=(1, *shape[1:]),
            shards=(TILES_PER_SHARD, *shape[1:]),
            dtype=dtype,
            compressors=COMPRESSOR,
        )
        self._count = shape[0]
        self._buffer = np.zeros((min(self._count, TILES_PER_SHARD), *shape[1:]), dtype)
        self._filled = self._written = 0

    def append(self, values: Shaped[np.ndarray, "..."]) -> None:
        """The values of the next tiles."""
        while len(values):
            part, values = np.split(values, [len(self._buffer) - self._filled])
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == len(self._buffer) or self._written + self._filled == self._count:
                self._array[self._written : self._written + self._filled] = self._buffer[: self._filled]
                self._written, self._filled = self._written + self._filled, 0


def read_array(path: Path, name: str) -> Shaped[np.ndarray, "..."]:
    """One array of a group, whole."""
    return np.asarray(open_arrays(path)[name][...])  # type: ignore[index]


def read_attributes(path: Path) -> dict[str, Any]:
    """The attributes of a group."""
    return dict(open_arrays(path).attrs)


def open_arrays(path: Path) -> zarr.Group:
    """A group for reading.

    Raises:
        MissingOutputError: there is none.
    """
    try:
        return zarr.open_group(path, mode="r")
    except (FileNotFoundError, GroupNotFoundError, ContainsArrayError) as error:
        raise MissingOutputError(
            f"{path.parent.name}/{path.name} is missing or damaged. Run again to redo it."
        ) from error
