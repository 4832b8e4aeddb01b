"""Draw ROC, precision-recall and FROC curves of several detectors. Knows points and areas; does not measure them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float64

from wsi_anomaly.imaging.froc import FALSE_POSITIVES
from wsi_anomaly.reporting.page import FAINT_INK, Lettering, Page, blank_page, shortened, text_width_px, wrapped
from wsi_anomaly.reporting.plot import (
    DETECTOR_COLOURS,
    LINE_STYLES,
    Axis,
    LineStyle,
    Plot,
    draw_line,
    even_axis,
    fitted_header,
)

CurveKind = Literal["roc", "pr", "froc"]

_MARGIN_PX, _GAP_PX, _SIDE_PX = 40, 18, 660
_AXIS_LEFT_PX, _AXIS_ABOVE_PX, _AXIS_BELOW_PX = 52, 34, 56
_SAMPLE_PX, _LINE_PX, _MOST_NAME_PX = 56, 32, 320
_NOTE_LINE_PX, _MOST_NOTE_LINES = 26, 6
_TEXT, _FAINT = Lettering(18), Lettering(18, FAINT_INK)
_CHANCE_PX, _DOT_PX = 1.5, (13, 5)
"""Of a line the width; of dots the largest, and the smallest: those of the next detector are seen on the last one's."""
_FROC_NOTE = "Dots: the six rates whose mean sensitivity is the score of Camelyon16."
_MISSING = "\N{EN DASH}"
_FROC_RATES = {0.125: "1/8", 0.25: "1/4", 0.5: "1/2", 1.0: "1", 2.0: "2", 4.0: "4", 8.0: "8"}
_OFFICIAL_RATES = np.array(FALSE_POSITIVES)
_SAME_POINT = 4096
"""Points of a curve are one where they agree to this part of an axis: millions of thresholds need not be drawn."""
_SHARES = even_axis(0.0, 1.0, 0.2)
_AXES = {
    "roc": (("False positive rate", "True positive rate"), "AUROC"),
    "pr": (("Recall", "Precision"), "AUPR"),
    "froc": (("False positives per slide", "Sensitivity"), "Score"),
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One detector's: false and true positive rate, recall and precision, or false positives per slide and sensitivity.

    Points go along the curve from either end. Without points only its name is in the legend.
    """

    x: Float64[np.ndarray, " point"]
    y: Float64[np.ndarray, " point"]
    area: float | None
    """AUROC, AUPR or FROC score."""
    interval: tuple[float, float] | None = None


def write_curves(
    path: Path,
    curves: Mapping[str, Curve],
    kind: CurveKind,
    *,
    title: str,
    subtitle: str = "",
    prevalence: float | None = None,
    level: float = 0.95,
) -> None:
    """Draw the curves of all detectors, by name, in one square, and their areas with intervals in its legend.

    `prevalence` is the share of what is abnormal: the precision of chance. `level` is that of the intervals. Of FROC
    curves the six points are marked whose mean sensitivity is the score of Camelyon16.
    """
    _curves(curves, kind, header=(title, subtitle), prevalence=prevalence, level=level).save(path)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of the legend."""

    name: str
    value: str
    colour: str
    style: LineStyle = ()
    line_px: float = 2.5
    lettering: Lettering = _TEXT


def _curves(
    curves: Mapping[str, Curve],
    kind: CurveKind,
    *,
    header: tuple[str, str],
    prevalence: float | None = None,
    level: float = 0.95,
) -> Page:
    entries = _entries(curves)
    legend = [*entries, *_chance_entry(kind, prevalence)]
    name_px = max(text_width_px(_short(entry.name), entry.lettering) for entry in legend) if legend else 0
    values = [_value_head(kind, curves, level), *(entry.value for entry in legend)]
    legend_px = _SAMPLE_PX + name_px + 2 * _GAP_PX + max(text_width_px(value, _FAINT) for value in values)
    width_px = _AXIS_LEFT_PX + _SIDE_PX + 2 * _GAP_PX + legend_px
    head = fitted_header(*header, width_px)
    top_px = _MARGIN_PX + head.height_px + _AXIS_ABOVE_PX
    height_px = max(_SIDE_PX + _AXIS_BELOW_PX, _LINE_PX * (len(legend) + 2) + _NOTE_LINE_PX * _MOST_NOTE_LINES)
    page = blank_page(width_px + 2 * _MARGIN_PX, top_px + height_px + _MARGIN_PX)
    head.draw(page, _MARGIN_PX, _MARGIN_PX)
    plot = Plot(page, _MARGIN_PX + _AXIS_LEFT_PX, top_px, (_SIDE_PX, _SIDE_PX), *_axes(kind))
    plot.draw_axes()
    _draw_chance(plot, kind, prevalence)
    drawn = list(enumerate(zip(curves.values(), entries, strict=True)))
    for i, (curve, entry) in sorted(drawn, key=lambda one: bool(one[1][1].style)):  # unbroken lines show between dashes
        _draw_curve(plot, curve, kind, entry, dot_px=max(_DOT_PX[0] - 2 * i, _DOT_PX[1]))
    legend_left_px = plot.left_px + _SIDE_PX + 2 * _GAP_PX
    _draw_legend(page, (legend_left_px, top_px), legend, name_px, values[0])
    if kind == "froc":
        for i, line in enumerate(wrapped(_FROC_NOTE, legend_px, _FAINT, most_lines=_MOST_NOTE_LINES), start=1):
            page.write(legend_left_px, top_px + 12 + (len(legend) + 1) * _LINE_PX + i * _NOTE_LINE_PX, line, _FAINT)
    return page


def _axes(kind: CurveKind) -> tuple[Axis, Axis]:
    (x_label, y_label), _ = _AXES[kind]
    y = Axis(0.0, 1.0, _SHARES.ticks, y_label)
    if kind == "froc":
        return Axis(min(_FROC_RATES), max(_FROC_RATES), tuple(_FROC_RATES.items()), x_label, logarithmic=True), y
    return Axis(0.0, 1.0, _SHARES.ticks, x_label), y


def _entries(curves: Mapping[str, Curve]) -> list[_Entry]:
    """By place, so that a detector looks the same on every page that has the same detectors."""
    return [
        _Entry(
            name,
            _value(curve),
            DETECTOR_COLOURS[i % len(DETECTOR_COLOURS)] if len(curve.x) else "none",
            LINE_STYLES[i % len(LINE_STYLES)],
            lettering=_TEXT if len(curve.x) else _FAINT,
        )
        for i, (name, curve) in enumerate(curves.items())
    ]


def _chance_entry(kind: CurveKind, prevalence: float | None) -> list[_Entry]:
    if kind == "froc" or (kind == "pr" and prevalence is None):
        return []
    value = f"{prevalence:.3f}" if kind == "pr" else "0.500"
    return [_Entry("chance", value, FAINT_INK, line_px=_CHANCE_PX, lettering=_FAINT)]


def _value(curve: Curve) -> str:
    if curve.area is None or isnan(curve.area):
        return _MISSING
    interval = f" ({curve.interval[0]:.3f}\N{EN DASH}{curve.interval[1]:.3f})" if curve.interval else ""
    return f"{curve.area:.3f}{interval}"


def _value_head(kind: CurveKind, curves: Mapping[str, Curve], level: float) -> str:
    interval = f" ({100 * level:g} % interval)" if any(curve.interval for curve in curves.values()) else ""
    return _AXES[kind][1] + interval


def _short(name: str) -> str:
    return shortened(name, _MOST_NAME_PX, _TEXT, keep_end=True)


def _draw_chance(plot: Plot, kind: CurveKind, prevalence: float | None) -> None:
    heights = {"roc": (0.0, 1.0), "pr": (prevalence, prevalence)}.get(kind)
    if heights and None not in heights:
        ends = plot.x_px(np.array([0.0, 1.0])), plot.y_px(np.array(heights, np.float64))
        draw_line(plot.page, *ends, FAINT_INK, width_px=_CHANCE_PX)


def _draw_curve(plot: Plot, curve: Curve, kind: CurveKind, entry: _Entry, *, dot_px: int) -> None:
    x, y = _drawn(curve, kind)
    if not len(x):
        return
    draw_line(plot.page, plot.x_px(x), plot.y_px(y), entry.colour, width_px=entry.line_px, style=entry.style)
    if kind == "froc":
        marked = np.interp(_OFFICIAL_RATES, *_ascending(curve))
        points_px, size = (plot.x_px(_OFFICIAL_RATES), plot.y_px(marked)), dot_px * 72 / plot.page.figure.dpi
        plot.page.axes.plot(*points_px, "o", color=entry.colour, markersize=size, markeredgewidth=0)


def _ascending(curve: Curve) -> tuple[Float64[np.ndarray, " point"], Float64[np.ndarray, " point"]]:
    """The points that are known, from low to high x."""
    known = np.isfinite(curve.x) & np.isfinite(curve.y)
    x, y = curve.x[known], curve.y[known]
    return (x[::-1], y[::-1]) if len(x) and x[0] > x[-1] else (x, y)


def _drawn(curve: Curve, kind: CurveKind) -> tuple[Float64[np.ndarray, " drawn"], Float64[np.ndarray, " drawn"]]:
    """The points to draw straight lines between.

    A precision holds back to the recall before it, and of several with one recall the first counts, as in average
    precision; that of no recall is a convention and is not drawn. A sensitivity is interpolated over
    the rate of false positives, which is curved on a logarithmic axis, and stays where a detector has no more of them.
    """
    x, y = _ascending(curve)
    if not len(x):
        return x, y
    if kind == "froc":
        ends = min(_FROC_RATES), max(_FROC_RATES)
        own = x[(x > ends[0]) & (x < ends[1])]
        rates = np.unique(np.concatenate([np.geomspace(*ends, _SAME_POINT // 4), np.nextafter(own, 0), own]))
        return rates, np.interp(rates, x, y)
    cells = np.rint(np.stack([x, y]) * _SAME_POINT)
    kept = np.ones(len(x), bool)
    kept[1:-1] = (np.diff(cells)[:, :-1] != 0).any(axis=0)
    x, y = x[kept], y[kept]
    if kind == "roc":
        return x, y
    x, first = np.unique(x, return_index=True)
    return np.repeat(x, 2)[1:-1], np.repeat(y[first], 2)[2:]


def _draw_legend(
    page: Page, left_top_px: tuple[int, int], entries: list[_Entry], name_px: int, value_head: str
) -> None:
    """A sample of each line, its name and its value, in columns."""
    left_px, top_px = left_top_px
    names_px = left_px + _SAMPLE_PX + _GAP_PX
    values_px = names_px + name_px + _GAP_PX
    page.write(values_px, top_px + 12, value_head, _FAINT)
    for i, entry in enumerate(entries, start=1):
        y_px = top_px + 12 + i * _LINE_PX
        draw_line(
            page,
            [left_px, left_px + _SAMPLE_PX],
            [y_px - 6, y_px - 6],
            entry.colour,
            width_px=entry.line_px,
            style=entry.style,
        )
        page.write(names_px, y_px, _short(entry.name), entry.lettering)
        page.write(values_px, y_px, entry.value, entry.lettering)
