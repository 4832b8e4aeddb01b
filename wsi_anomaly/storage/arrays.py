"""Groups of arrays on disk as zarr v3. The layout of each group stands in the README's output reference."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Shaped
from zarr.codecs import BloscCodec, BloscShuffle
from zarr.errors import ContainsArrayError, GroupNotFoundError

from wsi_anomaly.errors import MissingOutputError

TILES_PER_SHARD = 1024
# Pixels that came from JPEG hardly compress. On tissue lz4 saves within 4 % of what zstd does, in a third of its time.
COMPRESSOR = BloscCodec(cname="lz4", clevel=5, shuffle=BloscShuffle.bitshuffle, typesize=1)


def write_arrays(path: Path, arrays: Mapping[str, Shaped[np.ndarray, "..."]], attributes: Mapping[str, Any]) -> None:
    """Write small arrays, each in one chunk, with JSON attributes on the group."""
    group = zarr.create_group(path, attributes=dict(attributes))
    for name, array in arrays.items():
        group.create_array(name, data=array, chunks=tuple(max(1, size) for size in array.shape), compressors=COMPRESSOR)


class ShardedArray:
    """One value a tile, written in order: one chunk a tile, `TILES_PER_SHARD` tiles a file.

    While one shard is compressed and written, the next one fills: two shards are in memory, however many tiles come.
    """

    def __init__(self, group: zarr.Group, name: str, shape: tuple[int, ...], dtype: str) -> None:
        self._array = group.create_array(
            name,
            shape=shape,
            chunks=(1, *shape[1:]),
            shards=(TILES_PER_SHARD, *shape[1:]),
            dtype=dtype,
            compressors=COMPRESSOR,
        )
        self.item_shape, self.dtype = shape[1:], dtype
        self._count = shape[0]
        self._filling = np.empty((min(self._count, TILES_PER_SHARD), *shape[1:]), dtype)
        self._spare = np.empty_like(self._filling)
        self._filled = self._started = 0
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def append(self, values: Shaped[np.ndarray, "..."]) -> None:
        """The values of the next tiles."""
        while len(values):
            part, values = np.split(values, [len(self._filling) - self._filled])
            self._filling[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == len(self._filling):
                self._write()

    def close(self) -> None:
        """Write the rest.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        with self._writer:
            if self._filled:
                self._write()
            self._finish_writing()

    def abandon(self) -> None:
        """Write nothing more, so that the folder may be removed."""
        self._writer.shutdown(cancel_futures=True)

    def _write(self) -> None:
        self._finish_writing()
        start, stop = self._started, self._started + self._filled
        self._writing = self._writer.submit(self._array.__setitem__, slice(start, stop), self._filling[: self._filled])
        self._filling, self._spare = self._spare, self._filling
        self._started, self._filled = stop, 0

    def _finish_writing(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None


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
