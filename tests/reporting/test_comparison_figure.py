"""What can be seen when detectors are compared on a slide: pixels of panels, outlines, extents of text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image

from wsi_anomaly.reporting.colours import z_colours
from wsi_anomaly.reporting.comparison_figure import ComparedMap, _comparison, write_comparison
from wsi_anomaly.reporting.page import Page

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
Texts = Callable[[Page], list[str]]
GREEN = "#009e73"


def glass(rows: int = 300, columns: int = 400) -> Any:
    """A picture of a slide of one light colour."""
    return np.full((rows, columns, 3), (240, 230, 235), np.uint8)


def square(left: float, top: float, side: float = 50.0) -> Any:
    """A closed line."""
    return np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * side + (left, top)


def found(
    z: Any, extent_px: tuple[float, float, float, float] = (0.0, 0.0, 400.0, 300.0), **fields: Any
) -> ComparedMap:
    """What a detector called AE found."""
    given = {"detector": "AE", "z_99": 2.314, "dice": 0.541} | fields
    return ComparedMap(z=np.asarray(z, np.float32), extent_px=extent_px, **given)


def page_of(*maps: ComparedMap, overview: Any = None, mpp: float = 8.0, **fields: Any) -> Page:
    """Of a slide called S1 that has an outline of each kind."""
    given = {"outlines": ([square(100, 100)], [square(250, 150)]), "slide_id": "S1"} | fields
    return _comparison(glass() if overview is None else overview, maps, overview_mpp=mpp, **given)


def panels(page: Page) -> list[Any]:
    """The pictures on a page without the colour bar, in the order in which they were drawn."""
    return [np.asarray(image.get_array()) for image in page.axes.images][:-1]


def places(page: Page) -> list[tuple[float, float]]:
    """Left and top of those pictures."""
    return [(image.get_extent()[0], image.get_extent()[3]) for image in page.axes.images][:-1]


def rendered(page: Page) -> Any:
    """Its pixels."""
    canvas = FigureCanvasAgg(page.figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


@pytest.mark.parametrize("shape", [(300, 400), (1, 1), (40, 2000), (2000, 40), (3000, 1000), (900, 2600)])
@pytest.mark.parametrize("count", [1, 4, 6])
def test_no_text_leaves_the_page_or_meets_another_or_a_panel(
    count: int, shape: tuple[int, int], long_name: str, require_readable: Callable[..., None]
) -> None:
    """However many detectors there are and whatever the shape of the slide."""
    names = [f"{long_name if i else 'AE'} {i}" for i in range(count)]
    maps = [found([[1.0, np.nan]], detector=name, z_99=-123.4, dice=None) for name in names]
    page = page_of(*maps, overview=glass(*shape), slide_id=long_name * 3)
    require_readable(page, (), page.axes.images)
    assert page.figure.get_size_inches()[0] * page.figure.dpi <= 1920
    assert len(panels(page)) == count + 1


@pytest.mark.parametrize(("count", "columns"), [(1, 2), (2, 3), (3, 4), (4, 3), (5, 3), (6, 4)])
def test_the_slide_is_at_the_left_and_panels_stay_large(count: int, columns: int) -> None:
    """Side by side as long as they can be read, then in a second row; all of one size."""
    page = page_of(*[found([[1.0]])] * count)
    first, *others = places(page)
    assert first == min([first, *others])
    assert len({left for left, _ in places(page)}) == columns
    (shape,) = {panel.shape for panel in panels(page)}
    assert shape[1] >= 400


def test_tall_slides_stand_in_one_row() -> None:
    """Narrow as they are."""
    assert len({top for _, top in places(page_of(*[found([[1.0]])] * 6, overview=glass(3000, 1000)))}) == 1


def test_heatmaps_have_the_colours_of_the_colour_bar() -> None:
    """At the places of the tiles; where there is none, the slide is seen, in grey."""
    z = np.array([[np.nan, 0.0, 2.0], [4.0, 8.0, 99.0]])
    slide, heatmap = panels(page_of(found(z)))
    rows, columns = heatmap.shape[:2]
    expected = z_colours(np.nan_to_num(z).ravel()).reshape(2, 3, 3)
    for (row, column), value in np.ndenumerate(z):
        colour = heatmap[int((row + 0.5) * rows / 2), int((column + 0.5) * columns / 3)]
        if np.isnan(value):
            assert len(set(colour.tolist())) == 1
            assert colour[0] > 230
        else:
            assert np.array_equal(colour, expected[row, column])
    assert (slide == (240, 230, 235)).all()


def test_a_grid_may_end_beyond_or_within_the_slide() -> None:
    """Its tiles keep their places."""
    beyond, within = (
        panels(page_of(found([[8.0, 0.0]], extent_px=extent)))[1]
        for extent in ((-100.0, -50.0, 500.0, 350.0), (200.0, 150.0, 400.0, 300.0))
    )
    rows, columns = beyond.shape[:2]
    hot = z_colours(np.array([8.0]))[0]
    is_hot = (beyond == hot).all(axis=2)
    assert is_hot[:, : columns // 2 - 1].all()
    assert not is_hot[:, columns // 2 + 1 :].any()
    is_hot = (within == hot).all(axis=2)
    assert np.argwhere(is_hot).min(axis=0) == pytest.approx([rows // 2, columns // 2], abs=2)
    assert is_hot.mean() == pytest.approx(1 / 8, abs=0.01)


def test_tiles_smaller_than_a_pixel_share_it() -> None:
    """Half of them hot, and no pixel is as hot or as cold as they."""
    z = np.zeros((3000, 4000), np.float32)
    z[:, ::2] = 8.0
    heatmap = panels(page_of(found(z)))[1].astype(int)
    mean = z_colours(np.array([0.0, 8.0])).mean(axis=0)
    assert np.abs(heatmap - mean).max() < 60
    assert np.abs(heatmap.mean(axis=(0, 1)) - mean).max() < 2


def test_outlines_are_drawn_on_every_panel_where_they_lie() -> None:
    """Black for what is abnormal and green for what is excluded, both cased in white."""
    page = page_of(found(np.full((3, 4), 5.0)))
    pixels = rendered(page)
    scale = panels(page)[0].shape[1] / 400
    for left, top in places(page):
        for ring, colour in ((square(100, 100), (0, 0, 0)), (square(250, 150), (0, 158, 115))):
            (x, y), side = ring[0] * scale + (left, top), 50 * scale
            across = pixels[round(y + side / 2), round(x) - 5 : round(x) + 6]
            assert np.abs(across - colour).sum(axis=1).min() < 60
            assert across.sum(axis=1).max() > 3 * 240
        inside = pixels[round(top + 125 * scale), round(left + 125 * scale)]
        assert inside.min() > 20


def test_outlines_do_not_leave_their_panel() -> None:
    """An annotation may lie beyond the slide."""
    far = [np.array([(-300.0, 100.0), (700.0, 100.0), (700.0, 2000.0), (-300.0, 2000.0)])]
    page, plain = (page_of(found([[1.0]]), outlines=(rings, [])) for rings in (far, [square(900, 900)]))
    changed = np.argwhere((rendered(page) != rendered(plain)).any(axis=2))
    height, width = panels(page)[0].shape[:2]
    within = np.zeros(len(changed), bool)
    for left, top in places(page):
        y, x = (changed - (top, left)).T
        within |= (x >= 0) & (x < width) & (y >= 0) & (y < height)
    assert len(changed) > 1000
    assert within.all()


def test_z_99_and_dice_stand_below_each_heatmap(texts: Texts) -> None:
    """A dash where there is none: on a normal slide there is no Dice."""
    maps = (found([[1.0]]), found([[1.0]], detector="VAE", z_99=-0.5, dice=None), found([[1.0]], dice=float("nan")))
    written = texts(page_of(*maps))
    figures = ["(Z_99 2.31, Dice 0.54)", f"(Z_99 {MINUS}0.50, Dice {DASH})", f"(Z_99 2.31, Dice {DASH})"]
    assert written[:8] == ["S1", "Slide", "AE", figures[0], "VAE", figures[1], "AE", figures[2]]


def test_the_legend_names_what_is_drawn(texts: Texts) -> None:
    """One scale bar, one colour bar, and an outline only where there is one."""
    both, abnormal, none = (
        texts(page_of(found([[1.0]]), outlines=outlines))
        for outlines in (([square(1, 1)], [square(2, 2)]), ([square(1, 1)], []), ([], []))
    )
    assert both[-8:] == ["annotated as abnormal", "excluded annotation", "z-score", "≤ 0", "2", "4", "6", "≥ 8"]
    assert "annotated as abnormal" in abnormal
    assert "excluded annotation" not in abnormal
    assert "annotated as abnormal" not in none
    colours = [to_hex(line.get_color()) for line in page_of(found([[1.0]])).axes.lines]
    assert colours == ["#000000", GREEN]


@pytest.mark.parametrize(("mpp", "label"), [(8.0, "1 mm"), (16.0, "2 mm"), (0.5, "50 µm")])
def test_the_scale_bar_is_of_a_round_length_in_every_panel(mpp: float, label: str, texts: Texts) -> None:
    """Whatever the resolution of the overview."""
    page = page_of(found([[1.0]]), mpp=mpp)
    (bar,) = [patch for patch in page.axes.patches if patch.get_height() == 5]
    length, unit = label.split()
    assert label in texts(page)
    scale = panels(page)[0].shape[1] / 400
    assert bar.get_width() / scale * mpp == pytest.approx(float(length) * (1000 if unit == "mm" else 1), rel=0.01)


def test_a_real_slide_is_shown_as_it_is(shared_data: Path, tmp_path: Path) -> None:
    """The mask of a Camelyon17 slide as its z: red where it is, and the same file each time."""
    with Image.open(shared_data / "annotations" / "mask_patient_051_node_2.jpg") as picture:
        mask = np.asarray(picture.resize((464, 350)))
    overview = np.repeat(255 - mask[..., None] // 2, 3, axis=2)
    z = (mask[::10, ::10] / 255 * 8).astype(np.float32)
    contents = []
    for _ in range(2):
        write_comparison(
            tmp_path / "a.png",
            overview,
            [found(z, (0.0, 0.0, 470.0, 350.0))],
            abnormal=[square(100, 100)],
            excluded=[],
            slide_id="patient_051_node_2",
            overview_mpp=20.0,
        )
        contents.append((tmp_path / "a.png").read_bytes())
    assert contents[0] == contents[1]
    assert b"oftware" not in contents[0]
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 1000
