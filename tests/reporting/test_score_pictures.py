"""What can be read on the sheet of scored tiles: pixels, colours of residuals, extents of text; and which tiles."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

from wsi_anomaly.reporting.page import Page
from wsi_anomaly.reporting.score_pictures import ExplainedTile, _sheet, choose_explained, write_score_sheet

SHOWN_PX = 368
KEYWORDS = "an H&E image of (large and small cleaved follicular center cells scant cytoplasm)1.21 (capsule)"
AWKWARD = f"$x_1^{{2$ & <b>naïve ß</b>\n滤泡\t\\alpha_1 100 % {'w' * 200} {' '.join([KEYWORDS] * 12)}"
MINUS = "\N{MINUS SIGN}"


def explained(
    residual: Any = 0.01, *, colour: tuple[int, int, int] = (200, 200, 200), size_px: int = 32, **fields: Any
) -> ExplainedTile:
    """A tile of one colour, rebuilt in the opposite one, with a residual map of one value or as given."""
    pixels = np.full((size_px, size_px, 3), colour, np.uint8)
    residuals = np.full((size_px, size_px), residual, np.float32)
    known = {"prompt": KEYWORDS, "z": 4.25, "scores": {"mse": 0.01, "lpips": 0.3}, "caption": "tile 3 · x 8, y 9"}
    return ExplainedTile(pixels, 255 - pixels, residuals, **{**known, **fields})


def alone(**fields: Any) -> ExplainedTile:
    """A tile of a model that rebuilds nothing."""
    return replace(explained(**fields), rebuilt=None, abnormality=None)


def sheet(
    highest: Sequence[ExplainedTile],
    median: Sequence[ExplainedTile] = (),
    tile_mpp: float = 0.5,
    meaning: str = "Residual: squared error",
) -> Page:
    """Of a slide and a model with short names."""
    return _sheet(highest, median, header=("S1", "some model"), tile_mpp=tile_mpp, map_meaning=meaning)


def picture_of(path: Path, highest: Sequence[ExplainedTile], median: Sequence[ExplainedTile] = ()) -> Any:
    """The pixels of a sheet as a file."""
    write_score_sheet(
        path,
        highest=highest,
        median=median,
        slide_id="S1",
        tile_mpp=0.5,
        header="some model",
        map_meaning="Residual: squared error",
    )
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def texts(page: Page) -> list[str]:
    """All that is written."""
    return [text.get_text() for text in page.axes.texts if text.get_text()]


def panels(page: Page) -> list[Any]:
    """The pictures on a page without the colour bar, in the order in which they were drawn."""
    return [np.asarray(image.get_array()) for image in page.axes.images if image.get_array().shape[0] > 12]


def places(page: Page) -> list[tuple[int, int]]:
    """Top and left of those pictures."""
    extents = [image.get_extent() for image in page.axes.images if image.get_array().shape[0] > 12]
    return [(int(top), int(left)) for left, _, _, top in extents]


def heat(position: float) -> Any:
    """The colour of a residual between 0 and 1 of the scale."""
    return np.array(colormaps["inferno"](position, bytes=True))[:3]


def boxes(page: Page, artists: Sequence[Any]) -> Any:
    """Left, bottom, right and top of each."""
    renderer = FigureCanvasAgg(page.figure).get_renderer()
    return np.array([artist.get_window_extent(renderer).extents for artist in artists]).reshape(-1, 4)


def awkward_sheet(highest: int, median: int, *, make: Callable[..., ExplainedTile] = explained) -> Page:
    """With prompts that are empty, fitting and endless, and names that are too long for every place."""
    scores = {f"score_{i}-of$many": -1e-9 * i for i in range(14)}
    tiles = [
        make(
            prompt=("", KEYWORDS, AWKWARD)[i % 3], z=-(12.3**i), scores=scores if i % 2 else {}, caption="tile 1 · " * i
        )
        for i in range(highest + median)
    ]
    return _sheet(
        tiles[:highest],
        tiles[highest:],
        header=("S_$1$ & " * 60, "model $x$ " * 120),
        tile_mpp=0.5,
        map_meaning="Residual: x",
    )


def mixed_sheet() -> Page:
    """With all that a tile may lack."""
    whole = explained(np.nan)
    return sheet([whole, replace(whole, rebuilt=None), replace(whole, abnormality=None)], [alone(prompt=AWKWARD)])


@pytest.mark.parametrize(
    "draw",
    [
        *(lambda h=h, m=m: awkward_sheet(h, m) for h, m in ((0, 0), (1, 0), (0, 2), (1, 1), (3, 2))),
        *(lambda h=h, m=m: awkward_sheet(h, m, make=alone) for h, m in ((1, 0), (1, 1), (6, 4))),
        *(lambda r=r: sheet([explained(np.linspace(0, r, 32))]) for r in (1e-4, 0.0016, 0.0149, 0.015, 0.3, 1.0)),
        *(
            lambda a=a, b=b: sheet([explained(np.linspace(a, b, 32))], meaning=AWKWARD[:40])
            for a, b in ((-1e-4, 3.0), (-1210, 999), (-3.3, -2.9), (-77777, 100))
        ),
        mixed_sheet,
    ],
)
def test_no_text_leaves_the_page_or_meets_another_or_a_picture(
    draw: Callable[[], Page], pairs_that_meet: Callable[[Any, Any], int]
) -> None:
    """However long, many or strange prompts, names, scores and captions are."""
    page = draw()
    width_px, height_px = page.figure.get_size_inches() * page.figure.dpi
    written = boxes(page, [text for text in page.axes.texts if text.get_text()])
    left, bottom, right, top = written.T
    assert min(left.min(), bottom.min()) >= 16
    assert right.max() <= width_px - 16
    assert top.max() <= height_px - 16
    assert pairs_that_meet(written, written) == len(written)
    assert pairs_that_meet(written, boxes(page, page.axes.images)) == 0


def test_pictures_lie_apart_on_the_page(pairs_that_meet: Callable[[Any, Any], int]) -> None:
    """Also of groups of different size."""
    page = awkward_sheet(3, 1)
    drawn = boxes(page, page.axes.images)
    assert len(drawn) == 3 * 4 + 1
    assert drawn.min() >= 36
    assert pairs_that_meet(drawn, drawn) == len(drawn)


def test_a_tile_its_reconstruction_and_its_residual_stand_side_by_side(tmp_path: Path) -> None:
    """Pixel by pixel where they have the size in which they are shown: nothing is blurred twice."""
    random = np.random.default_rng(1)
    noise = random.integers(0, 256, (2, SHOWN_PX, SHOWN_PX, 3), dtype=np.uint8)
    residual = random.random((SHOWN_PX, SHOWN_PX), np.float32)
    tile = replace(explained(residual, size_px=SHOWN_PX), pixels=noise[0], rebuilt=noise[1])
    picture = picture_of(tmp_path / "a.png", [tile])
    ((top, left), *others) = places(sheet([tile]))
    shown = [picture[y : y + SHOWN_PX, x : x + SHOWN_PX] for y, x in ((top, left), *others)]
    assert np.array_equal(shown[0], noise[0])
    assert np.array_equal(shown[1], noise[1])
    assert np.array_equal(shown[2], colormaps["inferno"](residual, bytes=True)[..., :3])
    assert others == [(top, left + 380), (top, left + 760)]


def test_both_groups_share_their_rows() -> None:
    """So that tiles of highest and of median z can be compared along a line, whatever their prompts."""
    page = sheet([explained(prompt=AWKWARD), explained()], [explained(prompt=""), explained(prompt="")])
    rows = sorted({row for row, _ in places(page)})
    assert len(rows) == 2
    assert rows[1] - rows[0] > SHOWN_PX + 10 * 17
    first = [column for row, column in places(page) if row == rows[0]]
    assert first == [column for row, column in places(page) if row == rows[1]]
    assert len(first) == 6


def test_residuals_of_all_tiles_are_on_one_scale() -> None:
    """The same residual has the same colour in both groups, half of it that of the middle."""
    page = sheet([explained(0.02), explained(0.01)], [explained(0.02), explained(0.0)])
    colours = [panel[5, 5] for panel in panels(page)[2::3]]
    for colour, position in zip(colours, (1.0, 0.5, 1.0, 0.0), strict=True):
        assert np.array_equal(colour, heat(position))
        assert (panels(page)[2::3][0] == heat(1.0)).all()
    assert {"0", "0.01", "≥ 0.02"} <= set(texts(page))


def test_a_few_hot_pixels_do_not_darken_the_rest() -> None:
    """What is above the scale has its last colour."""
    residual = np.tile(np.linspace(0, 0.04, 32, dtype=np.float32), (32, 1))
    residual[3, 3] = 0.9
    page = sheet([explained(residual)], [explained(residual)])
    assert "≥ 0.04" in texts(page)
    assert np.array_equal(panels(page)[2][40, 40], heat(1.0))


@pytest.mark.parametrize("most", [1e-6, 0.00137, 0.0149, 0.1, 0.77, 1.0])
def test_the_scale_is_round_and_ends_near_the_highest_residuals(most: float) -> None:
    """With two to four figures above 0, evenly apart."""
    page = sheet([explained(np.linspace(0, most, 32))])
    figures = [float(text.removeprefix("≥ ")) for text in texts(page)[texts(page).index("0") : -2]]
    assert 3 <= len(figures) <= 5
    assert figures[-1] == pytest.approx(most, rel=0.26)
    assert np.diff(figures) == pytest.approx(figures[1])
    bar = np.asarray(page.axes.images[-1].get_array())
    assert np.array_equal(bar[0, 0], heat(0.0))
    assert np.array_equal(bar[-1, -1], heat(1.0))


@pytest.mark.parametrize("unknown", [np.nan, np.inf])
def test_unknown_residuals_are_hatched_and_not_black(unknown: float) -> None:
    """Grey, which no residual is; and the known ones keep their colours up to the border."""
    residual = np.full((32, 32), 0.02, np.float32)
    residual[:16] = unknown
    page = sheet([explained(residual)], [explained(0.01)])
    shown = panels(page)[2]
    hatched, known = shown[: SHOWN_PX // 2 - 2], shown[SHOWN_PX // 2 + 2 :]
    assert np.ptp(hatched.astype(int), axis=2).max() == 0
    assert len(np.unique(hatched)) == 2
    assert hatched.min() > 128
    assert (known == heat(1.0)).all()
    assert texts(page)[-1] == "Hatched: not known."
    assert texts(page)[:-1] == texts(sheet([explained(0.02)], [explained(0.01)]))


def test_a_model_that_rebuilds_nothing_shows_tiles_alone_and_says_so() -> None:
    """Side by side, without a scale of residuals."""
    page = sheet([alone(caption=f"tile {i}") for i in range(4)], [alone(), alone()])
    assert texts(page)[-1] == "This model makes no reconstructions."
    assert not {"Reconstruction", "Residual map"} & set(texts(page))
    assert not [text for text in texts(page) if text.startswith("≥")]
    rows, columns = (sorted(set(side)) for side in zip(*places(page), strict=True))
    assert (len(page.axes.images), len(rows), len(columns)) == (6, 2, 5)


def test_a_map_without_reconstruction_stands_beside_its_tile_under_what_it_means() -> None:
    """No empty column, and no word of a residual."""
    tiles = [replace(explained(0.5 + i), rebuilt=None) for i in range(2)]
    page = sheet(tiles, meaning="Map: Grad-CAM of the score")
    assert texts(page).count("Map") == 2
    assert not [text for text in texts(page) if "econstruction" in text or "esidual" in text]
    assert texts(page)[-1] == "Map: Grad-CAM of the score; one scale for all maps."
    assert [left - places(page)[0][1] for _, left in places(page)] == [0, 380, 0, 380]


def test_a_model_without_maps_shows_reconstructions_alone() -> None:
    """No empty column either."""
    page = sheet([replace(explained(), abnormality=None)])
    assert not [text for text in texts(page) if "esidual" in text]
    assert len(panels(page)) == len(page.axes.images) == 2


@pytest.mark.parametrize(
    ("least", "most", "figures"),
    [
        (-300.0, 500.0, ["≤ -400", "0", "≥ 600"]),
        (-4.0, 0.0, ["≤ -4", "-2", "≥ 0"]),
        (-12.0, -10.0, ["≤ -12", "-11", "≥ -10"]),
    ],
)
def test_the_scale_of_negative_values_begins_with_the_lowest(least: float, most: float, figures: list[str]) -> None:
    """As -log p may be: what is shown darkest is the least, not all below 0."""
    values = np.repeat(np.linspace(least, most, 64, dtype=np.float32)[None], 64, axis=0)
    page = sheet([explained(values, size_px=64)])
    first, last = (float(one.lstrip("≤≥ ")) for one in (figures[0], figures[-1]))
    shown = panels(page)[2]
    for column, value in ((2, least), (SHOWN_PX // 2, (least + most) / 2)):
        expected = heat((value - first) / (last - first)).astype(int)
        assert np.abs(shown[40, column].astype(int) - expected).max() < 12
    assert {figure.replace("-", MINUS) for figure in figures} <= set(texts(page))


def test_what_a_single_tile_lacks_is_said_in_its_place() -> None:
    """A tile that could not be rebuilt among others that were."""
    page = sheet([explained(), alone()], [replace(explained(), abnormality=None)])
    assert texts(page).count("no reconstruction") == 1
    assert texts(page).count("no residual map") == 2
    assert len(panels(page)) == 3 + 1 + 2


def test_z_scores_and_prompt_are_written_in_full() -> None:
    """The prompt in as many lines as it needs, and nothing where a model uses none."""
    prompt = " ".join([KEYWORDS] * 5)
    tile = explained(prompt=prompt, z=-12.3449, scores={"mse": 0.0123456, "lp-ips": -0.5})
    written = texts(sheet([tile]))
    assert {f"z {MINUS}12.34", "tile 3 · x 8, y 9", f"mse 0.01235 · lp-ips {MINUS}0.5"} <= set(written)
    assert prompt in " ".join(written)
    assert len(texts(sheet([replace(tile, prompt="")]))) < len(written)


@pytest.mark.parametrize("z", [-50.0, 0.0, 2.0, 4.0, 5.0, 5.5, 6.0, 8.0, 99.0])
def test_z_can_be_read_on_its_colour(z: float) -> None:
    """A contrast of 4, where 3 is asked for large text (WCAG 2.2, 1.4.3)."""
    page = sheet([explained(z=z)])
    (label,) = [text for text in page.axes.texts if text.get_text().startswith("z ")]
    (left, bottom, right, top) = boxes(page, [label])[0]
    behind = [patch for patch in page.axes.patches if patch.get_height() == 30]
    (box,) = boxes(page, behind)
    assert box[0] < left < right < box[2]
    assert box[1] < bottom < top < box[3]
    shades = np.array([to_rgb(label.get_color()), to_rgb(behind[0].get_facecolor())])
    linear = np.where(shades <= 0.04045, shades / 12.92, ((shades + 0.055) / 1.055) ** 2.4)
    dark, light = sorted(linear @ np.array([0.2126, 0.7152, 0.0722]) + 0.05)
    assert light / dark > 4


def test_a_group_without_tiles_is_left_out() -> None:
    """One column then; a slide of which nothing could be scored has a sheet that says so."""
    both, one = (sheet([explained()], median) for median in ([explained()], []))
    assert [text for text in texts(both) if text.endswith(" z")] == ["Highest z", "Median z"]
    assert [text for text in texts(one) if text.endswith(" z")] == ["Highest z"]
    assert one.figure.get_figwidth() < 0.52 * both.figure.get_figwidth()
    assert texts(sheet([])) == ["S1", "some model", "No tile has a z-score."]


@pytest.mark.parametrize(("size_px", "mpp", "label"), [(256, 0.5, "50 µm"), (256, 2.0, "200 µm"), (96, 0.97, "20 µm")])
def test_the_scale_bar_is_of_a_round_length_in_the_tiles(size_px: int, mpp: float, label: str) -> None:
    """Whatever the tiles' size and resolution."""
    page = sheet([explained(size_px=size_px)], tile_mpp=mpp)
    (bar,) = [patch for patch in page.axes.patches if patch.get_height() == 4]
    assert label in texts(page)
    assert bar.get_width() * mpp * size_px / SHOWN_PX == pytest.approx(float(label.split(maxsplit=1)[0]), rel=0.01)


def test_pictures_are_equal_byte_for_byte_on_repetition(tmp_path: Path) -> None:
    """No date and no version gets into the file, and nothing unfinished stays."""
    path = tmp_path / "a.png"
    picture_of(path, [explained(prompt=AWKWARD), alone()], [explained(np.nan)])
    first = path.read_bytes()
    picture_of(path, [explained(prompt=AWKWARD), alone()], [explained(np.nan)])
    assert path.read_bytes() == first
    assert b"oftware" not in first
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_highest_and_median_tiles_are_found() -> None:
    """The highest first, then those nearest to the median first."""
    highest, median = choose_explained(np.array([0.0, 1.0, 2.1, 3.0, 4.0, 50.0, 60.0]), 2)
    assert highest.tolist() == [6, 5]
    assert median.tolist() == [3, 2]
    assert highest.dtype == median.dtype == np.int64


def test_unknown_z_are_never_chosen_and_do_not_move_the_median() -> None:
    """Neither NaN nor infinite ones."""
    z = np.array([np.nan, 5.0, np.inf, 1.0, 2.0, -np.inf, 3.0, np.nan, np.nan])
    highest, median = choose_explained(z, 1)
    assert (highest.tolist(), median.tolist()) == ([1], [4])
    for unknown in (np.full(3, np.nan), np.empty(0)):
        assert [len(chosen) for chosen in choose_explained(unknown, 6)] == [0, 0]


def test_no_tile_is_chosen_twice_and_the_highest_come_first() -> None:
    """Where there are fewer tiles than wanted."""
    z = np.random.default_rng(1).normal(size=9)
    highest, median = choose_explained(z, 6)
    assert highest.tolist() == np.argsort(-z)[:6].tolist()
    assert sorted(median.tolist()) == sorted(np.argsort(-z)[6:].tolist())
    assert [len(chosen) for chosen in choose_explained(z[:4], 6)] == [4, 0]
    assert [len(chosen) for chosen in choose_explained(z, 0)] == [0, 0]


def test_ties_go_to_the_earlier_tile() -> None:
    """Among equals, and among those as far above the median as below."""
    highest, median = choose_explained(np.tile([1.0, 0.0], 100), 40)
    assert highest.tolist() == list(range(0, 80, 2))
    assert median.tolist() == list(range(1, 80, 2))
    _, around = choose_explained(np.array([4.0, 2.0, 9.0, 3.0, 0.0]), 1)
    assert around.tolist() == [3]
    _, around = choose_explained(np.array([4.0, 2.0, 9.0, 3.0, -1.0, 9.0, 9.0, 0.0, 1.0]), 3)
    assert around.tolist() == [3, 0, 1]
