"""What can be seen on the pictures, read back from their pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsi_anomaly.reporting.colours import z_colours
from wsi_anomaly.reporting.page import round_length
from wsi_anomaly.reporting.pictures import ZSummary, _edges, write_heatmap, write_overview

SUMMARY = ZSummary(z_max=9.0, z_99=4.0, threshold_z=3.0, area_over_um2=1.25e6, z_from="held-out normal slides")


def glass(rows: int = 300, columns: int = 200) -> Any:
    """A picture of an empty slide."""
    return np.full((rows, columns, 3), 240, np.uint8)


def heatmap_of(z: Any, path: Path, overview: Any = None, slide_id: str = "S1") -> Any:
    """The pixels of the heatmap of a slide whose tiles cover all of it."""
    overview = glass() if overview is None else overview
    height, width = overview.shape[:2]
    write_heatmap(
        path,
        overview,
        np.asarray(z, dtype=np.float32),
        overview_mpp=8.0,
        grid_extent_px=(0.0, 0.0, float(width), float(height)),
        slide_id=slide_id,
        summary=SUMMARY,
    )
    return np.asarray(Image.open(path).convert("RGB"))


def overview_of(path: Path, overview: Any, tissue: Any, origins: Any) -> Any:
    """The pixels of the overview with tiles of 20 pixels."""
    write_overview(
        path,
        overview,
        tissue,
        overview_mpp=8.0,
        tile_origins_px=np.asarray(origins, dtype=np.float64).reshape(-1, 2),
        tile_size_px=(20.0, 20.0),
        slide_id="S1",
    )
    return np.asarray(Image.open(path).convert("RGB"))


def right_panel(picture: Any, row: float, column: float) -> Any:
    """The colour at a place of the coloured panel, by fractions of it: two panels of 733 x 1100, margins of 24."""
    return picture[78 + int(1100 * row), 24 + 733 + 24 + int(733 * column)].astype(int)


def saturation(colour: Any) -> int:
    """Zero for grey."""
    return int(colour.max() - colour.min())


def test_a_hot_tile_is_red_where_it_lies_and_glass_stays_grey(tmp_path: Path) -> None:
    """Colour stands at the place of the tile, and nowhere without a tile."""
    z = np.full((3, 2), np.nan)
    z[0, 0], z[2, 1] = 9.0, 0.0
    picture = heatmap_of(z, tmp_path / "a.png")
    hot, normal, nothing = (right_panel(picture, *place) for place in ((1 / 6, 1 / 4), (5 / 6, 3 / 4), (1 / 2, 1 / 4)))
    assert hot[0] > 2 * max(hot[1:])
    assert saturation(nothing) == 0
    assert 0 < saturation(normal) < saturation(hot) / 3


def test_a_score_has_the_same_colour_on_every_slide(tmp_path: Path) -> None:
    """Pictures can be compared by eye: the scale does not follow the slide's own maximum."""
    mild = heatmap_of([[4.0, 1.0], [1.0, 1.0]], tmp_path / "a.png")
    wild = heatmap_of([[4.0, 1.0], [1.0, 60.0]], tmp_path / "b.png")
    assert np.array_equal(right_panel(mild, 0.25, 0.25), right_panel(wild, 0.25, 0.25))


def test_normal_tissue_stays_in_sight_beneath_its_score(tmp_path: Path) -> None:
    """Dark and light tissue of the same low score can be told apart."""
    tissue = glass()
    tissue[:, :100] = (120, 60, 140)
    picture = heatmap_of([[0.5, 0.5]], tmp_path / "a.png", tissue)
    assert (right_panel(picture, 0.5, 0.75) - right_panel(picture, 0.5, 0.25)).min() > 50


def test_what_is_over_the_threshold_is_outlined_on_both_panels(tmp_path: Path) -> None:
    """Black along the border of the region, also on the plain panel; nothing where all is normal."""
    z = np.zeros((10, 10))
    z[4:6, 4:6] = 5.0
    plain_with = heatmap_of(z, tmp_path / "a.png")[100:1150, 40:740]
    plain_without = heatmap_of(np.zeros((10, 10)), tmp_path / "b.png")[100:1150, 40:740]
    rows, columns = np.nonzero((plain_with != plain_without).any(axis=2))
    assert plain_with.min() < 40
    assert (rows.min() + 100 - 78, rows.max() + 100 - 78) == pytest.approx((440, 660), abs=4)
    assert (columns.min() + 40 - 24, columns.max() + 40 - 24) == pytest.approx((293, 440), abs=4)


def test_a_single_tile_among_a_hundred_thousand_is_still_found(tmp_path: Path) -> None:
    """Where tiles are smaller than a line, the outline keeps a distance that can be seen."""
    z = np.zeros((300, 400))
    z[150, 200] = 5.0
    overview = glass(1200, 1600)
    spotted = heatmap_of(z, tmp_path / "a.png", overview)
    plain = heatmap_of(np.zeros((300, 400)), tmp_path / "b.png", overview)
    rows, columns = np.nonzero((spotted != plain).any(axis=2)[:, : spotted.shape[1] // 2])
    assert np.ptp(rows) >= 8
    assert np.ptp(columns) >= 8


def test_outlines_run_along_the_sides_of_cells() -> None:
    """A ring of cells has an outer and an inner border."""
    ring = np.ones((3, 3), dtype=bool)
    ring[1, 1] = False
    edges = _edges(ring)
    assert len(edges) == 12 + 4
    assert np.abs(edges[:, 1] - edges[:, 0]).sum(axis=1).tolist() == [1.0] * 16
    assert (edges.min(), edges.max()) == (0.0, 3.0)


def test_the_overview_shows_the_tissue_outline_and_the_tiles(tmp_path: Path) -> None:
    """Blue along the border of the tissue, a tint within tiles, and the slide unchanged elsewhere."""
    tissue = np.zeros((300, 200), dtype=bool)
    tissue[100:200, 50:150] = True
    picture = overview_of(tmp_path / "a.png", glass(), tissue, [(80, 140)])
    scale = 1300 / 300
    at = {
        name: picture[int(78 + y * scale), int(24 + x * scale)] for name, x, y in (("tile", 90, 150), ("glass", 20, 20))
    }
    border = picture[int(78 + 150 * scale), int(24 + 45 * scale) : int(24 + 55 * scale)].astype(int)
    assert at["glass"].tolist() == [240, 240, 240]
    assert at["tile"][2] > at["tile"][0]
    assert (border[:, 2] - border[:, 0]).max() > 100


@pytest.mark.parametrize("write", ["overview", "heatmap"])
def test_pictures_are_equal_byte_for_byte_on_repetition(write: str, tmp_path: Path) -> None:
    """No date and no version gets into the file, and nothing unfinished stays."""
    contents = []
    for _ in range(2):
        path = tmp_path / "a.png"
        if write == "overview":
            overview_of(path, glass(), np.ones((300, 200), dtype=bool), [(0, 0)])
        else:
            heatmap_of([[1.0, 5.0]], path)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    assert b"oftware" not in contents[0]
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("shape", [(1, 1), (3, 2000), (2000, 3), (40, 60), (3000, 2500)])
def test_any_shape_of_slide_gives_a_picture_that_fits_a_screen(shape: tuple[int, int], tmp_path: Path) -> None:
    """Neither tiny nor endless slides break the page, tissue and tiles or not."""
    overview = glass(*shape)
    no_tissue = np.zeros(shape, dtype=bool)
    for picture in (
        overview_of(tmp_path / "a.png", overview, no_tissue, []),
        overview_of(tmp_path / "b.png", overview, ~no_tissue, [(0, 0)]),
        heatmap_of([[np.nan, np.nan]], tmp_path / "c.png", overview, slide_id="a $x^ slide " * 20),
    ):
        assert max(picture.shape) < 2000
        assert min(picture.shape[:2]) > 100


def test_the_scale_bar_is_of_around_length() -> None:
    """1, 2 or 5 of a unit, as long as there is room for."""
    assert [round_length(um) for um in (1.0, 199.0, 200.0, 4999.0, 0.7)] == [1.0, 100.0, 200.0, 2000.0, 0.5]


def test_colours_darken_with_z_and_end_with_the_scale() -> None:
    """The order of scores can be seen without colour vision; beyond the scale nothing changes."""
    colours = z_colours(np.array([np.nan, -5.0, 0.0, 2.0, 4.0, 6.0, 8.0, np.inf]))
    lightness = colours @ np.array([0.2126, 0.7152, 0.0722])
    assert np.array_equal(colours[0], colours[2])
    assert np.array_equal(colours[1], colours[2])
    assert np.array_equal(colours[-1], colours[-2])
    assert (np.diff(lightness[2:-1]) < -10).all()
