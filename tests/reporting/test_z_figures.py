"""What can be read on the pictures of z-scores: extents of text, places of bins and boxes; and what is counted."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from wsi_anomaly.reporting.page import BLUE, INK, ORANGE, Page
from wsi_anomaly.reporting.z_figures import (
    Z_EDGES,
    SlideZ,
    ZCounts,
    _bins,
    _calibration,
    _density,
    _histograms,
    count_z,
    slide_z,
    write_calibration,
    write_histograms,
)

MINUS = "\N{MINUS SIGN}"
Texts = Callable[[Page], list[str]]
HEADER = ("z", "of two slides")


def normal_z(count: int = 5000, mean: float = 0.0, deviation: float = 1.0, seed: int = 1) -> Any:
    """Random ones."""
    return np.random.default_rng(seed).normal(mean, deviation, count)


def groups(mean: float = 2.0, abnormal: int = 500) -> tuple[ZCounts, ZCounts]:
    """Of normal and of abnormal tiles."""
    return count_z(normal_z()), count_z(normal_z(abnormal, mean, 1.5))


def slides(normal: int, abnormal: int, spread: float = 0.3) -> list[SlideZ]:
    """Whose medians differ a bit."""
    shifts = np.random.default_rng(2).normal(0, spread, normal + abnormal)
    return [
        slide_z(f"slide_{i}", normal_z(200, shift + 2 * (i >= normal), seed=i), abnormal=i >= normal)
        for i, shift in enumerate(shifts.tolist())
    ]


def drawn_lines(page: Page, colour: str) -> list[Any]:
    """The points of each line of a colour, in pixels of the page; markers are none."""
    return [
        line.get_xydata()
        for line in page.axes.lines
        if to_hex(line.get_color()) == colour and line.get_marker() == "None"
    ]


def bars(page: Page, colour: str) -> list[Any]:
    """Upper and lower ends of each set of upright lines of a colour: whiskers, then boxes, for each group."""
    return [
        np.array(collection.get_segments())
        for collection in page.axes.collections
        if to_hex(collection.get_color()[0]) == colour
    ]


HISTOGRAMS: dict[str, Callable[[str], Page]] = {
    "none": lambda _: _histograms({}, HEADER),
    "one": lambda _: _histograms({"a": groups()}, HEADER),
    "two": lambda _: _histograms({"a": groups(), "b": groups(40.0)}, ("z", "")),
    "six": lambda name: _histograms({f"{i} {name}": groups(float(i)) for i in range(6)}, (name, name)),
    "logarithmic": lambda _: _histograms({"a": groups(9.0, 20), "b": groups(-9.0)}, HEADER),
    "millions": lambda _: _histograms({"a": (ZCounts(Z_EDGES, groups()[0].counts * 10**7), groups()[1])}, HEADER),
    "empty": lambda _: _histograms(
        {"a": (groups()[0], count_z(np.empty(0))), "b": (count_z(np.empty(0)),) * 2}, HEADER
    ),
    "constant": lambda _: _histograms({"a": (count_z(np.zeros(9)), count_z(np.full(9, 3.0)))}, HEADER),
}
CALIBRATIONS: dict[str, Callable[[str], Page]] = {
    "none": lambda _: _calibration({}, HEADER),
    "no slide": lambda _: _calibration({"a": []}, HEADER),
    "one slide": lambda _: _calibration({"a": slides(0, 1)}, HEADER),
    "two slides": lambda name: _calibration({name: slides(1, 1)}, (name, name * 3)),
    "normal only": lambda _: _calibration({"a": slides(30, 0), "b": slides(20, 10)}, HEADER),
    "abnormal last": lambda _: _calibration({"a": slides(60, 1)}, HEADER),
    "far off": lambda _: _calibration({"a": slides(10, 10, spread=50.0)}, HEADER),
    "six times 400": lambda _: _calibration({f"d{i}": slides(240, 160) for i in range(6)}, HEADER),
}


@pytest.mark.parametrize("draw", [*HISTOGRAMS.values(), *CALIBRATIONS.values()], ids=[*HISTOGRAMS, *CALIBRATIONS])
def test_no_text_leaves_the_page_or_meets_another_or_a_line(
    draw: Callable[[str], Page], long_name: str, require_readable: Callable[..., None]
) -> None:
    """However many, far or empty the groups are."""
    page = draw(long_name)
    require_readable(page, [*page.axes.lines, *page.axes.collections])
    assert page.figure.get_size_inches()[0] * page.figure.dpi < 2000


def test_z_are_counted_once_and_nan_is_not() -> None:
    """What lies beyond the edges is in the last bins."""
    counted = count_z(np.array([np.nan, -1e9, -np.inf, 0.01, 0.01, 5.0, 1e9, np.inf], np.float32))
    assert counted.counts.sum() == 7
    assert (counted.counts[0], counted.counts[-1]) == (2, 2)
    assert counted.counts[np.searchsorted(Z_EDGES, 0.01) - 1] == 2


def test_quantiles_of_counts_are_those_of_the_values() -> None:
    """As finely as the bins; NaN without tiles."""
    z = normal_z(100_000)
    for share in (0.005, 0.5, 0.995):
        assert count_z(z).quantile(share) == pytest.approx(np.quantile(z, share), abs=0.02)
    assert np.isnan(count_z(np.empty(0)).quantile(0.5))


@pytest.mark.parametrize("edges", [Z_EDGES, np.linspace(-33.3, 45.6, 3001)])
def test_densities_hold_every_tile_once(edges: Any) -> None:
    """An area of 1 however the tiles were counted, and a bell where there is one."""
    z = np.concatenate([normal_z(100_000), np.full(1000, 30.0), np.full(500, -15.0)])
    shown = np.linspace(-4.0, 8.0, 61)
    density = _density(ZCounts(edges, np.histogram(z, edges)[0]), shown)
    assert (density * 0.2).sum() == pytest.approx(1)
    assert density[[0, -1]] * 0.2 == pytest.approx([500 / 101_500, 1000 / 101_500], abs=2e-4)
    assert density[20] == pytest.approx(np.exp(-0.005) / np.sqrt(2 * np.pi), abs=0.02)


def test_ends_of_the_axis_say_what_they_hold() -> None:
    """A sign only where tiles lie beyond."""
    inside = _bins([count_z(np.linspace(-2.5, 3.5, 100))])
    assert [text for _, text in inside.x.ticks][:: len(inside.x.ticks) - 1] == [f"{MINUS}3", "4"]
    beyond = _bins([count_z(np.concatenate([normal_z(), [-19.0, 99.0]]))])
    assert beyond.x.ticks[0][1].startswith(f"≤ {MINUS}")
    assert beyond.x.ticks[-1][1].startswith("≥ ")


def test_a_detector_far_off_does_not_squeeze_the_others() -> None:
    """The axis ends, and what lies beyond is folded."""
    bins = _bins([count_z(normal_z()), count_z(normal_z(1000, 90.0))])
    assert -10 <= bins.x.low < -2
    assert 20 <= bins.x.high <= 30


def test_heights_are_logarithmic_only_where_something_would_not_be_seen(texts: Texts) -> None:
    """Two bells can; a tenth of the abnormal tiles spread over twenty z cannot."""
    tail = np.concatenate([normal_z(4500), np.linspace(4, 24, 500)])
    linear, logarithmic = _bins(groups()), _bins([count_z(normal_z(10**6)), count_z(tail)])
    assert not linear.y.logarithmic
    assert logarithmic.y.logarithmic
    (share,) = logarithmic.y.share(np.array([0.1 / 20]))
    assert share > 0.2
    assert "Heights are logarithmic." in " ".join(
        texts(_histograms({"a": (count_z(normal_z()), count_z(tail))}, HEADER))
    )


def test_all_detectors_share_their_axes() -> None:
    """So that panels can be compared; a figure is at the same place in each."""
    page = _histograms({"a": groups(1.0), "b": groups(8.0)}, HEADER)
    ticks = [text for text in page.axes.texts if text.get_text() == "0.1"]
    assert len({text.get_position()[1] for text in ticks}) == 1
    assert len(ticks) == 2
    first, second = drawn_lines(page, BLUE)[::2]
    assert second - first == pytest.approx(np.tile([592, 0], (len(first), 1)))


def test_medians_are_drawn_and_written(texts: Texts) -> None:
    """In the colours of their groups, and never as a negative zero."""
    page = _histograms({"a": (count_z(np.linspace(-3.0, 2.998, 999)), count_z(np.full(1, 4.0)))}, HEADER)
    assert "normal: 999 tiles, median 0.00" in texts(page)
    assert {"abnormal: 1 tile, median 4.00", "abnormal: 1 tile, median 4.01"} & set(texts(page))
    (axis_left, axis_right) = (
        next(text.get_position()[0] for text in page.axes.texts if text.get_text() == figure) for figure in ("0", "4")
    )
    for colour, at_px in ((BLUE, axis_left), (ORANGE, axis_right)):
        median = drawn_lines(page, colour)[1]
        assert median[:, 0] == pytest.approx(np.full(2, at_px), abs=2)


def test_a_group_without_tiles_is_named_and_not_drawn(texts: Texts) -> None:
    """A cohort may have no abnormal slide."""
    page = _histograms({"a": (groups()[0], count_z(np.full(3, np.nan)))}, HEADER)
    assert "abnormal: 0 tiles" in texts(page)
    assert not drawn_lines(page, ORANGE)


def test_slides_stand_in_the_order_of_their_medians_normal_ones_first() -> None:
    """Each with its quantiles above one another."""
    page = _calibration({"a": slides(12, 7)}, HEADER)
    blue, orange, medians = bars(page, BLUE), bars(page, ORANGE), bars(page, INK)
    assert [len(one) for one in (*blue, *orange, *medians)] == [12, 12, 7, 7, 12, 7]
    for whiskers, box, median in ((*blue, medians[0]), (*orange, medians[1])):
        assert (np.diff(median[:, 0, 0]) > 0).all()
        middles = median[:, :, 1].mean(axis=1)
        assert (np.diff(middles) <= 0).all()
        heights = [whiskers[:, 0, 1], box[:, 0, 1], middles, box[:, 1, 1], whiskers[:, 1, 1]]
        assert (np.diff(heights, axis=0) < 0).all()
    assert blue[0][:, 0, 0].max() < orange[0][:, 0, 0].min()


def test_boxes_are_where_their_quantiles_are() -> None:
    """On the axis whose figures are written, around the reference's 0 and 1."""
    given = SlideZ("a", abnormal=False, quantiles_z=(-1.0, 0.0, 1.0, 2.0, 4.0))
    page = _calibration({"a": [given]}, HEADER)
    at_px = {text.get_text(): text.get_position()[1] - 6 for text in page.axes.texts}
    (whisker,), (box,) = bars(page, BLUE)
    assert whisker[0, 1] - whisker[1, 1] == pytest.approx(5 * (at_px["0"] - at_px["2"]) / 2, abs=2)
    assert box[:, 1] == pytest.approx([at_px["0"], at_px["2"]], abs=1)
    levels = sorted(line[0, 1] for line in drawn_lines(page, INK))
    assert levels == pytest.approx([(at_px["0"] + at_px["2"]) / 2, at_px["0"], whisker[0, 1]], abs=1)


def test_four_hundred_slides_lie_apart() -> None:
    """A pixel of white between any two boxes."""
    page = _calibration({"a": slides(240, 160)}, HEADER)
    at_px = np.concatenate([box[:, 0, 0] for box in (bars(page, BLUE)[1], bars(page, ORANGE)[1])])
    (box_px,) = {round(float(one.get_linewidths()[0]) * 128 / 72) for one in page.axes.collections[1::3]}
    assert np.diff(at_px).min() >= box_px + 1
    assert np.allclose(at_px % 1, 0.5)


def test_the_normal_slides_to_look_at_are_named(texts: Texts) -> None:
    """Those farthest from 0 on either side, whatever abnormal ones do."""
    medians = {"a": 0.1, "b": -3.0, "c": 2.0, "d": 0.5, "far": 9.0, "lost": float("nan")}
    given = [SlideZ(name, name == "far", (z - 2, z - 1, z, z + 1, z + 2)) for name, z in medians.items()]
    page = _calibration({"detector": given}, HEADER)
    assert f"Medians of normal slides farthest from 0: b ({MINUS}3.00), c (2.00), d (0.50)" in texts(page)
    assert {"4 normal slides", "1 abnormal slide"} <= set(texts(page))
    assert "No normal slide has a z." in texts(_calibration({"detector": given[4:]}, HEADER))


def test_what_leaves_the_axis_is_said(texts: Texts) -> None:
    """Cut lines look as if they ended."""
    said = ["go on" in " ".join(texts(CALIBRATIONS[name]("a"))) for name in ("far off", "two slides")]
    assert said == [True, False]


def test_quantiles_of_a_slide_leave_out_what_is_not_known() -> None:
    """Of 5, 25, 50, 75 and 95 %."""
    z = np.concatenate([np.arange(101), [np.nan, np.nan]]).astype(np.float32)
    assert slide_z("a", z, abnormal=True) == SlideZ("a", abnormal=True, quantiles_z=(5.0, 25.0, 50.0, 75.0, 95.0))
    assert np.isnan(slide_z("a", np.full(3, np.nan), abnormal=False).quantiles_z).all()


def write_both(folder: Path, names: Sequence[str]) -> list[bytes]:
    """A file of each kind, read back."""
    write_histograms(folder / names[0], {"a": groups(), "b": groups(3.0)}, title="z", subtitle="of two slides")
    write_calibration(folder / names[1], {"a": slides(20, 10)}, title="z", subtitle="of two slides")
    return [(folder / name).read_bytes() for name in names]


def test_pictures_are_equal_byte_for_byte_on_repetition(tmp_path: Path) -> None:
    """No date and no version gets into the file, and nothing unfinished stays."""
    names = ("a.png", "b.png")
    first, second = write_both(tmp_path, names), write_both(tmp_path, names)
    assert first == second
    assert b"oftware" not in b"".join(first)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]
    for name in names:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300
