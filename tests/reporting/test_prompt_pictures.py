"""What can be read on the pictures of prompts: pixels of tiles, extents of text, lengths of bars; and which tiles."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image, ImageColor

from wsi_anomaly.reporting.keyword_chart import _chart, write_keyword_chart
from wsi_anomaly.reporting.page import (
    BLUE,
    INK,
    ORANGE,
    Lettering,
    Page,
    blank_page,
    printable,
    shortened,
    text_width_px,
    wrapped,
)
from wsi_anomaly.reporting.prompt_pictures import _sheet, choose_tiles, write_prompt_sheet

LETTERING = Lettering(14)
LONG = "large and small cleaved follicular center cells scant cytoplasm and inconspicuous nucleoli"
AWKWARD = [
    "$x^2_{$ & <b>",
    "\\alpha_1 100 %",
    "naïve ß",
    "滤泡\nand\ttabs",
    "w" * 200,
    LONG,
    f"{LONG} {LONG} {LONG}",
    "B",
]


def pixels_of(path: Path) -> Any:
    """The picture of a file."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def units(rows: int, seed: int = 1) -> Any:
    """Random unit vectors."""
    vectors = np.random.default_rng(seed).normal(size=(rows, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def grey_tiles(count: int, size_px: int = 64) -> Any:
    """Tiles without any colour."""
    return np.full((count, size_px, size_px, 3), 200, np.uint8)


def words(texts: Sequence[str], cosine: float = 0.4) -> list[tuple[str, float, float]]:
    """The keywords of a prompt, each less similar than the one before."""
    return [(text, 1.07 - 0.01 * i, cosine - 0.01 * i) for i, text in enumerate(texts)]


def sheet_of(path: Path, tiles: Any, keywords: Any, slide_id: str = "S1") -> Any:
    """The pixels of a sheet."""
    write_prompt_sheet(
        path,
        tiles,
        keywords,
        captions=[f"tile {i}" for i in range(len(tiles))],
        slide_id=slide_id,
        tile_mpp=0.5,
        header="some model",
    )
    return pixels_of(path)


def chart_of(path: Path, shares: Any, keywords: Sequence[str], categories: Sequence[str] | None = None) -> Any:
    """The pixels of a chart."""
    shares = {group: np.array(values, dtype=np.float64) for group, values in shares.items()}
    counts = dict.fromkeys(shares, 1000)
    write_keyword_chart(path, shares, keywords, categories=categories or [""] * len(keywords), counts=counts)
    return pixels_of(path)


def bars(picture: Any, colour: str) -> list[int]:
    """The lengths of the bars of a colour from top to bottom, without the swatch of the legend."""
    lengths = (picture == ImageColor.getrgb(colour)).all(axis=2).sum(axis=1)
    starts = np.flatnonzero((lengths > 0) & (np.roll(lengths, 1) == 0))
    return [int(lengths[start + 3]) for start in starts][1:]


def extents(page: Page) -> tuple[Any, Any]:
    """Left, bottom, right and top of all that is written, and of all tiles and bars."""
    renderer = FigureCanvasAgg(page.figure).get_renderer()
    solid = [patch for patch in page.axes.patches if to_hex(patch.get_facecolor()) in {BLUE, ORANGE, INK}]
    written = [text for text in page.axes.texts if text.get_text()]
    return tuple(
        np.array([artist.get_window_extent(renderer).extents for artist in artists]).reshape(-1, 4)
        for artists in (written, [*solid, *page.axes.images])
    )


def awkward_sheet(tiles: int) -> Page:
    """With prompts of no, few, five and many keywords, and text that is too long for every place."""
    keywords = [words(AWKWARD[: (0, 2, 5)[i % 3]][::-1]) for i in range(tiles)]
    return _sheet(
        grey_tiles(tiles), keywords, ["tile 1 · " * 20] * tiles, header=("S_$1$ " * 40, "model " * 120), tile_mpp=0.5
    )


def awkward_chart(groups: int) -> Page:
    """Of keywords and categories that are too long for their columns, with shares from nothing to all."""
    shares = {f"group {g} " * (1 + 40 * g): np.linspace(0, 1 - 0.2 * g, len(AWKWARD)) for g in range(groups)}
    return _chart(shares, AWKWARD, [text[::-1] for text in AWKWARD], dict.fromkeys(shares, 123456))


def crowded_sheet() -> Page:
    """With more keywords in a prompt than a tile is high."""
    return _sheet(grey_tiles(2), [words(AWKWARD * 3), words([LONG] * 3)], ["", ""], header=("S1", ""), tile_mpp=0.5)


def paper_like_chart() -> Page:
    """Of 74 keywords in two groups, some never used."""
    shares = np.random.default_rng(1).dirichlet(np.full(74, 0.2), size=2)
    keywords = [f"{LONG[i % 20 : i % 20 + 5 + i]} {i}" for i in range(74)]
    return _chart(
        dict(zip(("train", "test"), np.where(shares > 1e-4, shares, 0), strict=True)),
        keywords,
        ["cells"] * 74,
        {"train": 1, "test": 0},
    )


@pytest.mark.parametrize(
    "page",
    [
        *(lambda n=n: awkward_sheet(n) for n in (1, 5, 12)),
        *(lambda n=n: awkward_chart(n) for n in (1, 2, 3)),
        crowded_sheet,
        paper_like_chart,
    ],
)
def test_no_text_leaves_the_page_or_meets_another_or_a_bar_or_a_tile(
    page: Callable[[], Page], pairs_that_meet: Callable[[Any, Any], int]
) -> None:
    """However long, many or strange the keywords, names and captions are."""
    drawn = page()
    width_px, height_px = drawn.figure.get_size_inches() * drawn.figure.dpi
    written, solid = extents(drawn)
    left, bottom, right, top = written.T
    assert min(left.min(), bottom.min()) >= 16
    assert right.max() <= width_px - 16
    assert top.max() <= height_px - 16
    assert pairs_that_meet(written, written) == len(written)
    assert pairs_that_meet(written, solid) == 0


def test_what_is_drawn_is_what_was_measured() -> None:
    """The extents that keep texts apart hold for the picture."""
    page = blank_page(900, 100)
    page.write(10, 50, LONG, LETTERING)
    ((left, _, right, _),) = extents(page)[0]
    assert left == 10
    assert right - left == pytest.approx(text_width_px(LONG, LETTERING), abs=1)


def test_a_page_has_exactly_the_size_asked_for(tmp_path: Path) -> None:
    """Pixels are not lost on the way through inches."""
    for size in ((1, 1), (29, 57), (697, 1143), (2284, 1902)):
        blank_page(*size).save(tmp_path / "a.png")
        assert pixels_of(tmp_path / "a.png").shape[1::-1] == size


def test_the_pixels_of_each_tile_stand_on_the_sheet(tmp_path: Path) -> None:
    """A saturated square keeps its colour and its place in its tile, in reading order."""
    colours = [(255, 0, 0), (0, 255, 0), (255, 0, 255), (255, 255, 0)]
    tiles = grey_tiles(4, 256)
    for tile, colour in zip(tiles, colours, strict=True):
        tile[128:192, 64:128] = colour
    picture = sheet_of(tmp_path / "a.png", tiles, [words(["a"])] * 4)
    corners = []
    for colour in colours:
        rows, columns = np.nonzero((np.abs(picture.astype(int) - colour) < 12).all(axis=2))
        assert np.ptp(rows) == pytest.approx(64 * 368 / 256, abs=4)
        assert np.ptp(columns) == pytest.approx(64 * 368 / 256, abs=4)
        corners.append((int(rows.min()), int(columns.min())))
    assert corners == sorted(corners)
    assert len({row for row, _ in corners}) == len({column for _, column in corners}) == 2


def test_a_tile_of_the_size_it_is_shown_in_is_copied_pixel_by_pixel(tmp_path: Path) -> None:
    """Nothing is blurred twice."""
    tile = np.random.default_rng(1).integers(0, 256, (1, 368, 368, 3), dtype=np.uint8)
    picture = sheet_of(tmp_path / "a.png", tile, [[]])
    rows, columns = np.nonzero((picture == tile[0, 100, 100]).all(axis=2))
    places = zip(rows.tolist(), columns.tolist(), strict=True)
    found = [picture[row - 100 : row + 268, column - 100 : column + 268] for row, column in places]
    assert any(np.array_equal(part, tile[0]) for part in found)


def test_the_sheet_grows_with_the_number_of_tiles(tmp_path: Path) -> None:
    """Wider up to three columns, then only higher; no tiles are a sheet too."""
    sizes = [sheet_of(tmp_path / "a.png", grey_tiles(n), [[]] * n).shape[:2] for n in (0, 1, 2, 4, 5, 9, 12)]
    heights, widths = zip(*sizes, strict=True)
    assert widths[0] == widths[1] < widths[2] == widths[3] < widths[4] == widths[5] == widths[6]
    assert heights[0] < heights[1] == heights[2] < heights[3] == heights[4] < heights[5] < heights[6]


def test_a_bar_is_as_long_as_the_cosine_and_never_negative(tmp_path: Path) -> None:
    """On one scale for all tiles: half the similarity is half the bar."""
    keywords = [[("a", 1.2, 0.5), ("b", 1.0, 0.25)], [("c", 1.0, 0.125), ("d", 0.9, -0.3)]]
    picture = sheet_of(tmp_path / "a.png", grey_tiles(2), keywords)
    middle = picture.shape[1] // 2
    first, second = (
        (part == ImageColor.getrgb(BLUE)).all(axis=2).sum(axis=1) for part in (picture[:, :middle], picture[:, middle:])
    )
    longest = first.max()
    assert sorted(set(first.tolist())) == [0, longest // 2, longest]
    assert sorted(set(second.tolist())) == [0, pytest.approx(longest / 4, abs=1)]


def test_weight_and_cosine_are_written_beside_the_keyword() -> None:
    """With two decimals, and a tile without keywords says so."""
    page = _sheet(
        grey_tiles(2), [[("plasma cells", 1.0749, -0.3)], []], ["tile 1", "tile 2"], header=("S1", "m"), tile_mpp=0.5
    )
    written = {text.get_text() for text in page.axes.texts}
    assert written >= {"S1", "m", "tile 1", "tile 2", "plasma cells", "\N{MULTIPLICATION SIGN}1.07", "no keyword"}
    assert "\N{MINUS SIGN}0.30" in written


@pytest.mark.parametrize(("size_px", "mpp", "label"), [(256, 0.5, "50 µm"), (256, 2.0, "200 µm"), (96, 0.97, "20 µm")])
def test_the_scale_bar_is_of_a_round_length_in_the_tiles(size_px: int, mpp: float, label: str) -> None:
    """Whatever the tiles' size and resolution."""
    page = _sheet(grey_tiles(1, size_px), [[]], [""], header=("S1", ""), tile_mpp=mpp)
    (bar,) = [patch for patch in page.axes.patches if patch.get_height() == 4]
    assert label in {text.get_text() for text in page.axes.texts}
    assert bar.get_width() * mpp * size_px / 368 == pytest.approx(float(label.split(maxsplit=1)[0]), rel=0.01)


def test_pictures_are_equal_byte_for_byte_on_repetition(tmp_path: Path) -> None:
    """No date and no version gets into the files, and nothing unfinished stays."""
    path = tmp_path / "a.png"
    for draw in (
        lambda: sheet_of(path, grey_tiles(2), [words(AWKWARD), []]),
        lambda: chart_of(path, {"train": [0.1, 0.0], "test": [0.2, 0.0]}, ["a", "b"], ["c", "c"]),
    ):
        draw()
        first = path.read_bytes()
        draw()
        assert path.read_bytes() == first
        assert b"oftware" not in first
        assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_bar_of_the_chart_is_as_long_as_the_share(tmp_path: Path) -> None:
    """Both groups on one scale, keywords in the order of the first group, ties in their own order."""
    shares = {"train": [0.1, 0.4, 0.1, 0.2], "test": [0.4, 0.2, 0.1, 0.0]}
    picture = chart_of(tmp_path / "a.png", shares, ["a", "b", "c", "d"])
    blue, orange = bars(picture, BLUE), bars(picture, ORANGE)
    assert np.array(blue) / 0.4 == pytest.approx(np.array([1, 0.5, 0.25, 0.25]) * blue[0] / 0.4, abs=5)
    assert np.array(orange) == pytest.approx(np.array([0.5, 1, 0.25]) * blue[0], abs=2)


def test_keywords_stand_by_the_share_of_the_first_group_and_unused_ones_below() -> None:
    """All are named; one that only the second group uses keeps its row."""
    shares = {"train": np.array([0.1, 0.0, 0.3, 0.0]), "test": np.array([0.9, 0.0, 0.2, 0.0004])}
    page = _chart(shares, ["aa", "bb", "cc", "dd"], ["cells", "cells", "sinuses", "cells"], {"train": 12345, "test": 1})
    written = [text.get_text() for text in page.axes.texts]
    assert [text for text in written if text in {"aa", "bb", "cc", "dd"}] == ["cc", "aa", "dd"]
    assert {"In no prompt (1): bb", "train, 12,345 tiles", "test, 1 tile", "sinuses", "<0.1"} <= set(written)


def test_keywords_of_equal_share_keep_their_order() -> None:
    """Also where there are many of them."""
    keywords = [f"keyword {i}" for i in range(74)]
    page = _chart({"train": np.full(74, 0.1)}, keywords, [""] * 74, {"train": 10})
    assert [text.get_text() for text in page.axes.texts if text.get_text() in keywords] == keywords


def test_a_group_without_tiles_has_dashes_and_no_bars(tmp_path: Path) -> None:
    """Nothing known is not zero."""
    picture = chart_of(tmp_path / "a.png", {"train": [0.5, 0.2], "test": [np.nan, np.nan]}, ["a", "b"])
    assert len(bars(picture, BLUE)) == 2
    assert bars(picture, ORANGE) == []


def test_a_chart_of_keywords_that_nothing_uses_names_them_all() -> None:
    """A cohort without prompts is no error."""
    page = _chart({"train": np.zeros(3)}, ["aa", "bb", "cc"], ["", "", ""], {"train": 0})
    assert page.axes.texts[-1].get_text() == "In no prompt (3): aa; bb; cc"


def test_the_chart_grows_with_the_keywords_used(tmp_path: Path) -> None:
    """Each has a row of its own."""
    heights = [chart_of(tmp_path / "a.png", {"train": [0.1] * n}, ["a"] * n).shape[0] for n in (1, 2, 74)]
    assert heights[2] - heights[1] == 72 * (heights[1] - heights[0]) > 72 * 20


def test_wrapped_lines_fit_and_keep_the_words() -> None:
    """Until there are too many: then an ellipsis ends the last."""
    lines = wrapped(LONG, 250, LETTERING, most_lines=9)
    assert " ".join(lines) == LONG
    assert max(text_width_px(line, LETTERING) for line in lines) <= 250
    cut = wrapped(LONG, 250, LETTERING, most_lines=2)
    assert cut[0] == lines[0]
    assert cut[1].endswith("…")
    assert LONG.startswith(f"{cut[0]} {cut[1][:-1]}")
    assert wrapped(" ", 250, LETTERING, most_lines=2) == []


def test_a_shortened_text_is_the_longest_that_fits() -> None:
    """One character more would not; with its end kept, it begins and ends as the text."""
    short = shortened(LONG, 200, LETTERING)
    longer = f"{LONG[: len(short) + 1]}…"
    assert text_width_px(short, LETTERING) <= 200 < text_width_px(longer, LETTERING)
    both = shortened(LONG, 200, LETTERING, keep_end=True)
    begin, end = both.split("…")
    assert LONG.startswith(begin)
    assert LONG.endswith(end)
    assert abs(len(begin) - len(end)) <= 2
    assert shortened("short", 200, LETTERING) == "short"


def test_characters_that_the_font_has_not_become_a_mark() -> None:
    """Line breaks and tabs become blanks; nothing warns and nothing is lost unseen."""
    mark = "\N{REPLACEMENT CHARACTER}"
    assert printable("a\n\tµ ≥ ü 滤\udcff") == f"a µ ≥ ü {mark}{mark}"


def test_chosen_tiles_are_distinct_ascending_and_the_same_again() -> None:
    """As many as asked for."""
    vectors = units(500)
    chosen = choose_tiles(vectors, 12)
    assert chosen.dtype == np.int64
    assert len(chosen) == 12
    assert (np.diff(chosen) > 0).all()
    assert np.array_equal(choose_tiles(vectors, 12), chosen)


def test_the_first_choice_is_typical_and_the_second_the_odd_one() -> None:
    """Among many alike, a single planted stranger is always shown."""
    vectors = np.eye(16, dtype=np.float32)[0] + 0.05 * units(300)
    vectors[123] = -np.eye(16, dtype=np.float32)[1]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    (typical,) = choose_tiles(vectors, 1)
    assert vectors[typical] @ vectors.mean(axis=0) == pytest.approx((vectors @ vectors.mean(axis=0)).max())
    assert choose_tiles(vectors, 2).tolist() == sorted([int(typical), 123])


def test_every_kind_of_tile_is_shown() -> None:
    """Twelve clusters of very different size give one tile each."""
    kinds = np.repeat(np.arange(12), [1000, 500, 200, 100, 50, 20, 10, 5, 3, 2, 1, 1])
    vectors = np.eye(16, dtype=np.float32)[kinds] + 0.05 * units(len(kinds))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert sorted(kinds[choose_tiles(vectors, 12)].tolist()) == list(range(12))


def test_unreadable_tiles_are_never_chosen() -> None:
    """Even where more are asked for than there are readable ones."""
    vectors = units(20)
    vectors[::2] = np.nan
    assert choose_tiles(vectors, 4).size == 4
    assert choose_tiles(vectors, 100).tolist() == list(range(1, 20, 2))
    assert choose_tiles(np.full((3, 4), np.nan, np.float32), 2).size == 0
    assert choose_tiles(np.empty((0, 4), np.float32), 2).size == 0


def test_tiles_that_look_alike_are_still_different_tiles() -> None:
    """No position twice, where all vectors are one."""
    assert choose_tiles(np.repeat(units(1), 6, axis=0), 4).size == 4
    assert len(set(choose_tiles(np.repeat(units(1), 6, axis=0), 6).tolist())) == 6
