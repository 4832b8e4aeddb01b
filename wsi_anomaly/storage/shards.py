"""Write large arrays shard by shard: the sharding codec of zarr v3, streamed.

zarr itself writes a shard from one buffer that holds all of it, copies it twice and takes Python's lock for each chunk;
that halved the speed of tiling and cost half a gigabyte. Here whoever makes a chunk compresses it, in whatever thread,
and the bytes go straight to the file. The metadata is zarr's own, and zarr reads the result like any other array.

A shard is its chunks one after another, then an index of (offset, length) for each place, then the index's CRC32C
(zarr v3 specification, codec `sharding_indexed`). Places without a chunk have 2**64 - 1 twice.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import zarr
from google_crc32c import value as crc32c
from jaxtyping import Shaped
from numcodecs import blosc

from wsi_anomaly.storage.arrays import COMPRESSOR

TILES_PER_SHARD = 1024

# With threads of its own, Blosc puts blocks in the order in which they are done, and equal pixels give other bytes.
blosc.use_threads = False
_BLOSC = blosc.Blosc(COMPRESSOR.cname.value, COMPRESSOR.clevel, blosc.BITSHUFFLE)
_NOWHERE = np.iinfo(np.uint64).max


class ShardedArray:
    """One value a tile, written in order: one chunk a tile, `TILES_PER_SHARD` tiles a file, no shard in memory."""

    def __init__(self, group: zarr.Group, name: str, shape: tuple[int, ...], dtype: str) -> None:
        group.create_array(
            name,
            shape=shape,
            chunks=(1, *shape[1:]),
            shards=(TILES_PER_SHARD, *shape[1:]),
            dtype=dtype,
            compressors=COMPRESSOR,
        )
        self.item_shape, self.dtype = shape[1:], dtype
        self._folder = Path(str(group.store_path).removeprefix("file://")) / name / "c"
        self._file: BinaryIO | None = None
        self._index = np.full((TILES_PER_SHARD, 2), _NOWHERE, "<u8")
        self._written = 0

    def append(self, values: Shaped[np.ndarray, "tile ..."]) -> None:
        """The values of the next tiles."""
        self.append_compressed(compressed(values))

    def append_compressed(self, chunks: Iterable[bytes]) -> None:
        """The values of the next tiles, each as `compressed` makes it."""
        for chunk in chunks:
            place = self._written % TILES_PER_SHARD
            if self._file is None:
                self._file = self._new_shard()
            self._index[place] = self._file.tell(), len(chunk)
            self._file.write(chunk)
            self._written += 1
            if place == TILES_PER_SHARD - 1:
                self.close()

    def skip_to(self, tile: int) -> None:
        """Leave out the tiles before this one: they read as zeros and take no room."""
        if self._file is not None and tile // TILES_PER_SHARD > self._written // TILES_PER_SHARD:
            self.close()
        self._written = tile

    def close(self) -> None:
        """Finish the shard that is being written.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        if self._file is None:
            return
        with self._file as file:
            index = self._index.tobytes()
            file.write(index)
            file.write(crc32c(index).to_bytes(4, "little"))
        self._file = None
        self._index[:] = _NOWHERE

    def _new_shard(self) -> BinaryIO:
        path = self._folder.joinpath(str(self._written // TILES_PER_SHARD), *("0" for _ in self.item_shape))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")


def compressed(values: Shaped[np.ndarray, "tile ..."]) -> list[bytes]:
    """The chunks of some tiles. Takes no lock, so that threads may do it beside each other."""
    return [_BLOSC.encode(np.ascontiguousarray(value)) for value in values]
