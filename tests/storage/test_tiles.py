from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from wsi_anomaly.errors import MissingOutputError
from wsi_anomaly.storage.shards import ShardedArray, compressed
from wsi_anomaly.storage.tiles import TilePlaces, TileStatus, TileStore, TileWriter


def make_store(path: Path, count: int, *, tile_px: int = 4) -> TileStore:
    """Tile i is filled with i modulo 251; tile 1 is corrupt."""
    places = TilePlaces(
        origins=np.column_stack([np.arange(count) * 8, np.zeros(count)]).astype(np.int64),
        cells=np.column_stack([np.zeros(count), np.arange(count)]).astype(np.int32),
        tissue_fraction=np.linspace(0.5, 1, count, dtype=np.float32),
    )
    with TileWriter(path, places, tile_px=tile_px, attributes={"slide_id": "a"}) as writer:
        for index in range(count):
            status = TileStatus.CORRUPT if index == 1 else TileStatus.OK
            writer.append(compressed(np.full((1, tile_px, tile_px, 3), index % 251, np.uint8)), [status])
    return TileStore(path)


def test_tiles_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    """Runs, single tiles, backwards, across shards."""
    store = make_store(tmp_path / "tiles.zarr", 2500)
    wanted = np.array([5, 6, 7, 2499, 0, 1024, 1023, 5])
    assert (store.read(wanted)[:, 0, 0, 0] == wanted % 251).all()


def test_a_thousand_tiles_share_a_file(tmp_path: Path) -> None:
    """Parallel file systems forbid a file for each tile."""
    make_store(tmp_path / "tiles.zarr", 2500)
    files = [path for path in (tmp_path / "tiles.zarr" / "pixels").rglob("*") if path.is_file()]
    assert len(files) == 3 + 1  # shards and metadata


def test_a_store_has_zarr_format_three_and_one_chunk_a_tile(tmp_path: Path) -> None:
    """Any tile can be read alone."""
    make_store(tmp_path / "tiles.zarr", 3)
    array = zarr.open_group(tmp_path / "tiles.zarr")["pixels"]
    assert isinstance(array, zarr.Array)
    assert array.metadata.zarr_format == 3
    assert array.chunks == (1, 4, 4, 3)


def test_corrupt_tiles_are_not_readable(tmp_path: Path) -> None:
    """They are left out of every statistic."""
    store = make_store(tmp_path / "tiles.zarr", 4)
    assert store.readable.tolist() == [True, False, True, True]


def test_seeds_depend_on_slide_origin_and_run_alone(tmp_path: Path) -> None:
    """Not on the batch or the order."""
    store = make_store(tmp_path / "tiles.zarr", 5)
    together = store.seeds(np.arange(5), 0)
    assert (store.seeds(np.array([3, 1]), 0) == together[[3, 1]]).all()
    assert len(set(together.tolist())) == 5
    assert (store.seeds(np.arange(5), 1) != together).all()


def test_a_missing_store_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    """Not a traceback of zarr."""
    with pytest.raises(MissingOutputError, match="Run again"):
        TileStore(tmp_path / "slide" / "tiles.zarr")


@pytest.mark.parametrize(("dtype", "count"), [("uint8", 1), ("uint8", 1024), ("float16", 1500)])
def test_zarr_itself_reads_our_shards_and_checks_their_index(tmp_path: Path, dtype: str, count: int) -> None:
    """Every value, also where the last shard is not full; a damaged index is noticed."""
    values = np.random.default_rng(0).integers(0, 255, (count, 3, 5)).astype(dtype)
    array = ShardedArray(zarr.create_group(tmp_path / "group.zarr"), "values", values.shape, dtype)
    for start in range(0, count, 100):
        array.append(values[start : start + 100])
    array.close()
    read = zarr.open_array(tmp_path / "group.zarr" / "values")
    assert (np.asarray(read[...]) == values).all()
    shard = tmp_path / "group.zarr" / "values" / "c" / "0" / "0" / "0"
    damaged = bytearray(shard.read_bytes())
    damaged[-10] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match="checksum"):
        read[...]


def test_equal_values_give_equal_bytes_from_any_thread() -> None:
    """Compression uses no threads of its own."""
    values = np.random.default_rng(0).integers(0, 40, (64, 256, 256, 3)).astype(np.uint8)
    with ThreadPoolExecutor(4) as pool:
        there = list(pool.map(lambda value: compressed(value[None])[0], values))
    assert there == compressed(values)
