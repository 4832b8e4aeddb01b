from pathlib import Path

import numpy as np
import pytest

from wsi_anomaly.errors import MissingOutputError
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
            writer.append(np.full((tile_px, tile_px, 3), index % 251, np.uint8), status)
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
    import zarr

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
