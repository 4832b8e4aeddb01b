"""Fixtures for the tests of stages: what they leave of a slide, without the slide."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import Float64

from wsi_anomaly.imaging.geometry import Grid
from wsi_anomaly.storage.arrays import write_arrays
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.record import Recipe, writing
from wsi_anomaly.storage.tiles import TilePlaces, TileStatus, TileWriter


@pytest.fixture
def write_mapped(tmp_path: Path) -> Callable[..., SlideFolder]:
    """Leaves what `evaluate` reads of a slide, `write_mapped("a", (rows, columns), z)`: 256 px tiles at 0.5 µm/px."""

    def write(slide_id: str, shape: tuple[int, int], z: Float64[np.ndarray, " tile"], origin: int = 0) -> SlideFolder:
        tile_px, mpp = 512.0, 0.25
        folder = RunFolder(tmp_path / "results").slide(slide_id)
        size = (origin + shape[1] * 512, origin + shape[0] * 512)
        grid = Grid((origin, origin), (tile_px, tile_px), (tile_px, tile_px), shape)
        slide = {
            "slide_id": slide_id,
            "mpp": [mpp, mpp],
            "size_level0_px": list(size),
            "bounds_level0_px": [0, 0, *size],
            "overview_downsample": [1024.0, 1024.0],
        }
        tiles = {"tile_px": 256, "tile_mpp": 0.5, "stride_px": 256, "grid": asdict(grid)}
        with writing(folder.root, Recipe("mask", 1)) as work:
            overview = np.full((size[1] // 1024 + 1, size[0] // 1024 + 1, 3), 230, np.uint8)
            write_arrays(work.folder / folder.tissue.name, {"overview": overview}, slide)
        with writing(folder.root, Recipe("tile", 1)) as work:
            cells = grid.cells()
            places = TilePlaces(grid.origins(cells), cells, np.ones(len(cells), np.float32))
            path = work.folder / folder.tiles.name
            with TileWriter(path, places, tile_px=256, attributes=slide | tiles) as writer:
                writer.append([], [TileStatus.OK] * len(cells))
        with writing(folder.root, Recipe("score", 1)) as work:
            scores = {"scores": z[:, None].astype(np.float32)}
            write_arrays(work.folder / folder.scores.name, scores, {"detector": "planted"})
        with writing(folder.root, Recipe("heatmap", 1)) as work:
            write_arrays(work.folder / folder.heatmap.name, {"z_tile": z}, {})
        return folder

    return write
