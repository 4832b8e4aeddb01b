"""What can be read on the pictures of curves: extents of text, points of lines, colours and dashes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from wsi_anomaly.imaging.froc import FALSE_POSITIVES, SlideFindings, froc
from wsi_anomaly.reporting.evaluation_figures import Curve, CurveKind, _curves, write_curves
from wsi_anomaly.reporting.page import FAINT_INK, Page
from wsi_anomaly.reporting.plot import DETECTOR_COLOURS, LINE_STYLES, Axis, even_axis

DASH = "\N{EN DASH}"
Texts = Callable[[Page], list[str]]
KINDS: tuple[CurveKind, ...] = ("roc", "pr", "froc")


def curve(x: Any, y: Any, area: float | None = 0.5, interval: tuple[float, float] | None = None) -> Curve:
    """From lists."""
    return Curve(np.array(x, np.float64), np.array(y, np.float64), area, interval)


def page_of(curves: Mapping[str, Curve], kind: CurveKind = "roc", prevalence: float | None = None) -> Page:
    """With a short title."""
    return _curves(curves, kind, header=("Tiles", "of two slides"), prevalence=prevalence)


def lines(page: Page) -> list[tuple[str, Any]]:
    """Colour and points of each curve, from 0 to 1 along both sides of the square."""
    ticks = {text.get_text(): text for text in page.axes.texts}
    bottom_px = float(max(patch.get_y() for patch in page.axes.patches if patch.get_width() == 661))
    left_px = float(min(patch.get_x() for patch in page.axes.patches))
    assert {"0", "1"} <= set(ticks)
    drawn = []
    for line in page.axes.lines:
        points = (line.get_xydata() - (left_px, bottom_px)) / (660, -660)
        if points[0, 0] <= 1.01 and line.get_marker() == "None":
            drawn.append((to_hex(line.get_color()), points))
    return drawn


def points_of(page: Page, colour: str = DETECTOR_COLOURS[0]) -> Any:
    """Those of the curve of a colour."""
    (points,) = [points for name, points in lines(page) if name == colour]
    return points


def many(count: int, second: str = "Detector") -> dict[str, Curve]:
    """Curves of several detectors, some without interval, one without points."""
    curves = {
        f"{second if i == 1 else 'Detector'} {i}": curve(
            [0, 0.2 + i / 20, 1], [0, 0.9 - i / 20, 1], 0.9 - i / 20, (0.8 - i / 20, 1.0) if i % 2 else None
        )
        for i in range(count)
    }
    return curves | ({"empty": curve([], [], None)} if count > 2 else {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 2, 6, 24])
def test_no_text_leaves_the_page_or_meets_another_or_a_line(
    kind: CurveKind, count: int, long_name: str, require_readable: Callable[..., None]
) -> None:
    """However many and however named the detectors are."""
    header = (long_name, f"{long_name} " * 4) if count == 6 else ("Tiles", "")
    page = _curves(many(count, long_name), kind, header=header, prevalence=0.2)
    require_readable(page, page.axes.lines)


def test_every_detector_looks_different_and_the_same_on_each_page() -> None:
    """In colour and in dashes, in the order given; 42 of them are told apart."""
    styles = {(DETECTOR_COLOURS[i % len(DETECTOR_COLOURS)], LINE_STYLES[i % len(LINE_STYLES)]) for i in range(42)}
    assert len(styles) == 42
    roc, pr = (page_of(many(3), kind) for kind in ("roc", "pr"))
    for i in range(3):
        assert points_of(roc, DETECTOR_COLOURS[i])[1] == pytest.approx((0.2 + i / 20, 0.9 - i / 20), abs=1e-3)
        assert len(points_of(pr, DETECTOR_COLOURS[i]))


def test_the_legend_gives_areas_with_their_intervals(texts: Texts) -> None:
    """A dash where there is none, without a line that could be looked for in vain."""
    page = page_of({"a": curve([0, 1], [0, 1], 0.51234, (0.4, 0.6)), "b": curve([], [], None), "c": curve([0], [0])})
    start = texts(page).index("AUROC (95 % interval)")
    assert texts(page)[start + 1 :] == ["a", f"0.512 (0.400{DASH}0.600)", "b", DASH, "c", "0.500", "chance", "0.500"]
    samples = [line.get_color() for line in page.axes.lines if line.get_xdata()[0] > 740]
    assert samples == [DETECTOR_COLOURS[0], "none", DETECTOR_COLOURS[2], FAINT_INK]
    assert "AUPR" in texts(page_of({"a": curve([0, 1], [1, 0])}, "pr"))
    other_level = _curves({"a": curve([0, 1], [0, 1], 0.5, (0.4, 0.6))}, "roc", header=("", ""), level=0.9)
    assert "AUROC (90 % interval)" in texts(other_level)


def test_a_roc_curve_is_where_its_points_are() -> None:
    """From either end, without the points that are not known."""
    expected = np.array([[0, 0], [0.1, 0.6], [0.5, 0.9], [1, 1]])
    for order in (1, -1):
        x, y = expected[::order].T
        given = curve([*x[:2], np.nan, *x[2:]], [*y[:2], 0.3, *y[2:]])
        assert points_of(page_of({"a": given})) == pytest.approx(expected, abs=1e-9)


def test_chance_lies_on_the_diagonal_or_at_the_prevalence(texts: Texts) -> None:
    """And is named with its value; a FROC curve has none."""
    given = {"a": curve([0, 1], [1, 0.3])}
    assert dict(lines(page_of(given)))[FAINT_INK] == pytest.approx(np.array([[0, 0], [1, 1]]))
    with_prevalence = page_of(given, "pr", 0.1882)
    assert dict(lines(with_prevalence))[FAINT_INK] == pytest.approx(np.array([[0, 0.1882], [1, 0.1882]]))
    assert texts(with_prevalence)[-2:] == ["chance", "0.188"]
    for page in (page_of(given, "pr"), page_of(given, "froc", 0.2)):
        assert "chance" not in texts(page)
        assert FAINT_INK not in dict(lines(page))


def test_the_area_below_a_drawn_curve_is_the_one_that_is_measured() -> None:
    """AUROC between straight lines, average precision below steps, also of a hundred thousand thresholds."""
    random = np.random.default_rng(1)
    labels = random.random(100_000) < 0.1
    scores = random.normal(size=100_000) + labels
    rates = roc_curve(labels, scores, drop_intermediate=False)
    precision, recall, _ = precision_recall_curve(labels, scores)
    roc, pr = (page_of({"a": curve(x, y)}, kind) for x, y, kind in ((*rates[:2], "roc"), (recall, precision, "pr")))
    areas = [float(np.trapezoid(points[:, 1], points[:, 0])) for points in (points_of(roc), points_of(pr))]
    assert areas[0] == pytest.approx(roc_auc_score(labels, scores), abs=2e-4)
    assert areas[1] == pytest.approx(average_precision_score(labels, scores), abs=2e-3)
    assert len(points_of(roc)) < 20_000


def test_a_precision_holds_back_to_the_recall_before() -> None:
    """The first of those with one recall; that of no recall is a convention and is not drawn."""
    recall, precision = [0, 0, 0.5, 0.5, 1, 1], [1, 0, 0.5, 0.25, 0.4, 0.2]
    expected = np.array([[0, 0.5], [0.5, 0.5], [0.5, 0.4], [1, 0.4]])
    assert points_of(page_of({"a": curve(recall, precision)}, "pr")) == pytest.approx(expected, abs=1e-9)


def test_curves_that_coincide_are_all_seen() -> None:
    """Dashes lie on the unbroken line, and the dots of each detector on larger ones."""
    page = page_of({"a": curve([0, 1], [0.5, 0.5]), "b": curve([0, 1], [0.5, 0.5])}, "froc")
    assert [colour for colour, _ in lines(page)][:2] == list(DETECTOR_COLOURS[:2])
    first, second = dots(page)
    assert first.get_markersize() > second.get_markersize()
    assert first.get_zorder() == second.get_zorder()
    seventh = page_of({str(i): curve([0, 1], [0.5, 0.5]) for i in range(8)})
    assert [colour for colour, _ in lines(seventh)][1:3] == [DETECTOR_COLOURS[0], DETECTOR_COLOURS[6]]


def dots(page: Page) -> list[Any]:
    """Those of each detector."""
    return [line for line in page.axes.lines if line.get_marker() == "o"]


@pytest.mark.parametrize(
    "slides",
    [
        [SlideFindings(np.array([3.0, 1.0, -np.inf]), np.array([2.0, 0.5])), SlideFindings(np.array([]), np.ones(3))],
        [SlideFindings(np.array([1.0, 2.0, 3.0]), np.array([]))],
        [SlideFindings(np.array([-np.inf]), np.array([]))],
        [SlideFindings(np.arange(4.0), np.linspace(0.5, 3.5, 8) + shift) for shift in (0.0, 0.1, 0.2)],
    ],
    ids=["ties", "no false positive", "nothing found", "many"],
)
def test_a_froc_curve_is_drawn_as_it_is_read(slides: list[SlideFindings], texts: Texts) -> None:
    """On a logarithmic axis from an eighth to eight; the six points of Camelyon16 are marked, the last one flat."""
    measured = froc(slides)
    assert measured is not None
    page = page_of({"a": curve(measured.false_positives, measured.sensitivity, measured.score)}, "froc")
    points = points_of(page)
    rates = 2.0 ** (points[:, 0] * 6 - 3)
    assert (rates.min(), rates.max()) == pytest.approx((1 / 8, 8))
    nearly = np.maximum(np.abs([measured.at(rate * nudge) for rate in rates for nudge in (1 - 1e-9, 1 + 1e-9)]), 0)
    off = np.abs(nearly.reshape(-1, 2) - points[:, 1:])
    assert off.min(axis=1).max() < 1e-6  # on either side of a step
    left_px = float(min(patch.get_x() for patch in page.axes.patches))
    bottom_px = float(max(patch.get_y() for patch in page.axes.patches if patch.get_width() == 661))
    (drawn,) = dots(page)
    marked = (drawn.get_xydata() - (left_px, bottom_px)) / (660, -660)
    assert marked[:, 0] == pytest.approx(np.arange(1, 7) / 6)
    assert marked[:, 1] == pytest.approx([measured.at(rate) for rate in FALSE_POSITIVES])
    assert marked[:, 1].mean() == pytest.approx(measured.score)
    assert {"1/8", "1/4", "1/2", "2", "4", "8", "False positives per slide"} <= set(texts(page))


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_equal_byte_for_byte_on_repetition(kind: CurveKind, tmp_path: Path) -> None:
    """No date and no version gets into the file, and nothing unfinished stays."""
    path = tmp_path / "a.png"
    contents = []
    for _ in range(2):
        write_curves(path, many(6), kind, title="Tiles", subtitle="of two slides", prevalence=0.2)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    assert b"oftware" not in contents[0]
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    with Image.open(path) as picture:
        assert max(picture.size) < 2000


def test_an_axis_has_round_figures_between_its_ends() -> None:
    """Also where the ends are not round themselves."""
    assert [text for _, text in even_axis(-3.0, 13.0, 5.0).ticks] == ["0", "5", "10"]
    assert [text for _, text in even_axis(-0.4, 0.4, 0.2).ticks] == [
        "\N{MINUS SIGN}0.4",
        "\N{MINUS SIGN}0.2",
        "0",
        "0.2",
        "0.4",
    ]


def test_what_lies_beyond_an_axis_is_at_its_end() -> None:
    """Also zero on a logarithmic one."""
    values = np.array([-1.0, 0.0, 1.0, 10.0, 1e9])
    assert Axis(0.0, 10.0, ()).share(values) == pytest.approx([0, 0, 0.1, 1, 1])
    assert Axis(0.1, 10.0, (), logarithmic=True).share(values) == pytest.approx([0, 0, 0.5, 1, 1])
