"""Draw how z-scores lie: normal tiles against abnormal ones, and slide by slide. Knows figures; knows no slide file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64, Int64

from wsi_anomaly.reporting.page import (
    BLUE,
    FAINT_INK,
    INK,
    ORANGE,
    Lettering,
    Page,
    blank_page,
    round_length,
    shortened,
    text_width_px,
)
from wsi_anomaly.reporting.plot import Axis, Plot, draw_line, even_axis, fitted_header

Z_EDGES = np.linspace(-20.0, 100.0, 12001)
"""Bins fine enough for every quantile that is shown."""

_MARGIN_PX, _GAP_PX, _AXIS_LEFT_PX = 40, 30, 62
_NAME, _TEXT, _FAINT = Lettering(18, bold=True), Lettering(16), Lettering(16, FAINT_INK)
_SWATCH_PX, _TEXT_LINE_PX = 14, 24
_GROUPS = (("normal", BLUE), ("abnormal", ORANGE))
_MINUS = "\N{MINUS SIGN}"
_NAN = float("nan")

_HISTOGRAM_PX, _HISTOGRAM_ABOVE_PX, _HISTOGRAM_BELOW_PX = (500, 270), 92, 76
_TAIL, _ENDS_Z = 0.005, ((-8.0, -2.0), (4.0, 24.0))
"""The share that may be folded into an end bin, and between where these lie."""
_BINS_PER_TICK, _COARSE_TICK = (10, 20), 2.0
_FLAT, _FLAT_SHARE = 0.02, 0.05
"""Bins below this part of the highest cannot be seen; heights are logarithmic where they hold more of a group."""
_MOST_DECADES = 5
_DENSITY = "Density of tiles over z, with an area of 1 for each group; triangles and lines: medians."

_CALIBRATION_PX, _LEAST_CALIBRATION_PX, _CALIBRATION_ABOVE_PX, _CALIBRATION_BELOW_PX = (1440, 250), 760, 56, 62
_PITCH_PX, _MOST_BOX_PX, _AROUND_GROUP = (2, 32), 18, 1
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MEDIAN, _FARTHEST = 2, 3
_BOXES = "Of the tiles of a slide: median (dark), 25 to 75 % (box), 5 to 95 % (line). Dashed: 0 ± 1 of the reference."
_CUT = "Lines that meet the upper or lower border go on."


@dataclass(frozen=True, slots=True)
class ZCounts:
    """How many tiles have a z between two edges."""

    edges: Float64[np.ndarray, " edge"]
    counts: Int64[np.ndarray, " bin"]

    @property
    def below(self) -> Int64[np.ndarray, " edge"]:
        """How many lie below each edge."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)])

    def quantile(self, share: float) -> float:
        """As finely as the edges allow; NaN without tiles."""
        below = self.below
        return float(np.interp(share * below[-1], below, self.edges)) if below[-1] else _NAN


@dataclass(frozen=True, slots=True)
class SlideZ:
    """The z of the tiles of one slide."""

    slide_id: str
    abnormal: bool
    quantiles_z: tuple[float, ...]
    """Of 5, 25, 50, 75 and 95 %; NaN where no tile has a z."""


def count_z(z: Float[np.ndarray, " tile"]) -> ZCounts:
    """In the bins of `Z_EDGES`, so that counts of slides can be added. NaN is left out; what lies beyond is not."""
    inside = np.clip(z[~np.isnan(z)], Z_EDGES[0], Z_EDGES[-1])
    return ZCounts(Z_EDGES, np.histogram(inside, Z_EDGES)[0].astype(np.int64))


def slide_z(slide_id: str, z: Float[np.ndarray, " tile"], *, abnormal: bool) -> SlideZ:
    """From all z that are known."""
    known = z[np.isfinite(z)]
    return SlideZ(slide_id, abnormal, tuple(np.quantile(known, _QUANTILES).tolist()) if len(known) else (_NAN,) * 5)


def write_histograms(
    path: Path, counts: Mapping[str, tuple[ZCounts, ZCounts]], *, title: str, subtitle: str = ""
) -> None:
    """Draw by detector how the z of normal and of abnormal tiles are spread, with the same axes for all of them.

    Heights are logarithmic where a part of a group could not be seen else; what lies beyond is in the end bins.
    """
    _histograms(counts, (title, subtitle)).save(path)


def write_calibration(path: Path, slides: Mapping[str, Sequence[SlideZ]], *, title: str, subtitle: str = "") -> None:
    """Draw by detector where the z of each slide lie, in the order of their medians, normal slides first.

    Where a detector is calibrated, normal slides stay around 0 as the reference does.
    """
    _calibration(slides, (title, subtitle)).save(path)


@dataclass(frozen=True, slots=True)
class _Bins:
    """What all histograms of a page share."""

    edges: Float64[np.ndarray, " edge"]
    x: Axis
    y: Axis


def _density(counts: ZCounts, edges: Float64[np.ndarray, " edge"]) -> Float64[np.ndarray, " bin"]:
    """Per unit of z; a bin that was counted across an edge is divided."""
    below = counts.below
    shares = np.interp(edges, counts.edges, below) / max(below[-1], 1)
    shares[0], shares[-1] = 0, float(below[-1] > 0)
    return np.diff(shares) / np.diff(edges)


def _bins(groups: Sequence[ZCounts]) -> _Bins:
    """Over all that more than a few tiles have, within limits."""
    known = [group for group in groups if group.counts.any()]
    ends = [
        float(np.clip(worst([group.quantile(share) for group in known], default=0.0), *limits))
        for share, worst, limits in ((_TAIL, min, _ENDS_Z[0]), (1 - _TAIL, max, _ENDS_Z[1]))
    ]
    tick = round_length((ends[1] - ends[0]) / 4)
    first, last = int(np.floor(ends[0] / tick)), int(np.ceil(ends[1] / tick))
    edges = np.linspace(first * tick, last * tick, (last - first) * _BINS_PER_TICK[bool(tick > _COARSE_TICK)] + 1)
    return _Bins(edges, _z_axis(known, edges, tick), _height_axis([_density(group, edges) for group in known]))


def _z_axis(groups: Sequence[ZCounts], edges: Float64[np.ndarray, " edge"], tick: float) -> Axis:
    """Its ends say where they stand for all beyond."""
    axis = even_axis(float(edges[0]), float(edges[-1]), tick, label="z-score")
    cells = [np.interp([axis.low, axis.high], group.edges, group.below) / group.below[-1] for group in groups]
    under, over = any(cell[0] > 0 for cell in cells), any(cell[1] < 1 for cell in cells)
    (low, low_text), *middle, (high, high_text) = axis.ticks
    ends = (low, f"≤ {low_text}" if under else low_text), (high, f"≥ {high_text}" if over else high_text)
    return Axis(axis.low, axis.high, (ends[0], *middle, ends[1]), axis.label)


def _height_axis(densities: Sequence[Float64[np.ndarray, " bin"]]) -> Axis:
    top = max((float(density.max()) for density in densities), default=1.0)
    flat = max((float(density[density < _FLAT * top].sum() / density.sum()) for density in densities), default=0.0)
    if flat <= _FLAT_SHARE:
        step = round_length(top / 3)
        return even_axis(0.0, step * float(np.ceil(top / step)), step)
    least = min(float(density[density > 0].min()) for density in densities)
    high = int(np.ceil(np.log10(top)))
    low = max(int(np.floor(np.log10(least))), high - _MOST_DECADES)
    ticks = tuple((10.0**power, f"{10.0**power:.{max(-power, 0)}f}") for power in range(low, high + 1))
    return Axis(10.0**low, 10.0**high, ticks, logarithmic=True)


def _histograms(counts: Mapping[str, tuple[ZCounts, ZCounts]], header: tuple[str, str]) -> Page:
    bins = _bins([group for groups in counts.values() for group in groups])
    columns = 2 if len(counts) in {2, 4} else min(max(len(counts), 1), 3)
    width, height = _HISTOGRAM_PX
    step_px = (_AXIS_LEFT_PX + width + _GAP_PX, _HISTOGRAM_ABOVE_PX + height + _HISTOGRAM_BELOW_PX)
    inner_px = columns * step_px[0] - _GAP_PX
    note = _DENSITY + " Heights are logarithmic." * bins.y.logarithmic
    head = fitted_header(header[0], f"{header[1]} {note}", inner_px)
    rows = -(-len(counts) // columns)
    page = blank_page(inner_px + 2 * _MARGIN_PX, 2 * _MARGIN_PX + head.height_px + rows * step_px[1])
    head.draw(page, _MARGIN_PX, _MARGIN_PX)
    for i, (name, groups) in enumerate(counts.items()):
        left_px = _MARGIN_PX + i % columns * step_px[0] + _AXIS_LEFT_PX
        top_px = _MARGIN_PX + head.height_px + i // columns * step_px[1] + _HISTOGRAM_ABOVE_PX
        _draw_histogram(Plot(page, left_px, top_px, _HISTOGRAM_PX, bins.x, bins.y), name, groups, bins.edges)
    return page


def _draw_histogram(
    plot: Plot, name: str, groups: tuple[ZCounts, ZCounts], edges: Float64[np.ndarray, " edge"]
) -> None:
    page, left_px, top_px, width_px = plot.page, plot.left_px, plot.top_px, plot.size_px[0]
    page.write(left_px, top_px - _HISTOGRAM_ABOVE_PX + 18, shortened(name, width_px, _NAME, keep_end=True), _NAME)
    plot.draw_axes()
    for i, ((group, colour), counts) in enumerate(zip(_GROUPS, groups, strict=True)):
        tiles, median = int(counts.counts.sum()), counts.quantile(0.5)
        text = f"{group}: {tiles:,} tile{'s' * (tiles != 1)}" + f", median {_signed(median)}" * bool(tiles)
        baseline_px = top_px - _HISTOGRAM_ABOVE_PX + 18 + _TEXT_LINE_PX * (i + 1)
        page.fill(left_px, baseline_px - 12, _SWATCH_PX, _SWATCH_PX, colour)
        page.write(left_px + _SWATCH_PX + 8, baseline_px, text, _TEXT)
        if tiles:
            _draw_group(plot, _density(counts, edges), edges, median, colour)


def _draw_group(
    plot: Plot,
    density: Float64[np.ndarray, " bin"],
    edges: Float64[np.ndarray, " edge"],
    median: float,
    colour: str,
) -> None:
    """Outlined and tinted, so that groups are seen through each other."""
    x_px, y_px = plot.x_px(np.repeat(edges, 2)), plot.y_px(np.pad(np.repeat(density, 2), 1))
    plot.page.axes.fill(x_px, y_px, color=colour, alpha=0.25, linewidth=0)
    draw_line(plot.page, x_px, y_px, colour, width_px=2.0)
    (at_px,) = plot.x_px(np.array([median]))
    draw_line(plot.page, [at_px, at_px], [plot.top_px, plot.top_px + plot.size_px[1]], colour, style=(3.0, 2.0))
    plot.page.axes.plot([at_px], [plot.top_px - 5], "v", color=colour, markersize=6)


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("-", _MINUS)  # no negative zero


def _calibration(slides: Mapping[str, Sequence[SlideZ]], header: tuple[str, str]) -> Page:
    places = max((len(of) for of in slides.values()), default=0) + 3 * _AROUND_GROUP
    width_px = max(places * int(np.clip(_CALIBRATION_PX[0] // places, *_PITCH_PX)), _LEAST_CALIBRATION_PX)
    axes = {name: _quantile_axis(of) for name, of in slides.items()}
    cut = any(_meets_border(of, axes[name]) for name, of in slides.items())
    head = fitted_header(header[0], f"{header[1]} {_BOXES} {_CUT if cut else ''}", _AXIS_LEFT_PX + width_px)
    step_px = _CALIBRATION_ABOVE_PX + _CALIBRATION_PX[1] + _CALIBRATION_BELOW_PX
    height_px = head.height_px + len(slides) * step_px
    page = blank_page(_AXIS_LEFT_PX + width_px + 2 * _MARGIN_PX, height_px + 2 * _MARGIN_PX)
    head.draw(page, _MARGIN_PX, _MARGIN_PX)
    left_px, first_px = _MARGIN_PX + _AXIS_LEFT_PX, _MARGIN_PX + head.height_px + _CALIBRATION_ABOVE_PX
    for i, (name, of) in enumerate(slides.items()):
        size_px, x = (width_px, _CALIBRATION_PX[1]), Axis(0.0, float(places), ())
        _draw_calibration(Plot(page, left_px, first_px + i * step_px, size_px, x, axes[name]), name, of)
    return page


def _quantile_axis(slides: Sequence[SlideZ]) -> Axis:
    """As far as slides need it, within limits."""
    known = [slide.quantiles_z for slide in _known(slides)]
    low = max(min([-2.0, *(z[0] for z in known)]), _ENDS_Z[0][0])
    high = min(max([2.0, *(z[-1] for z in known)]), _ENDS_Z[1][1])
    step = round_length((high - low) / 2)
    fine = step / 5
    return even_axis(fine * float(np.floor(low / fine)), fine * float(np.ceil(high / fine)), step)


def _meets_border(slides: Sequence[SlideZ], y: Axis) -> bool:
    return any(slide.quantiles_z[0] < y.low or slide.quantiles_z[-1] > y.high for slide in slides)


def _draw_calibration(plot: Plot, name: str, slides: Sequence[SlideZ]) -> None:
    page, left_px, (width_px, height_px) = plot.page, plot.left_px, plot.size_px
    title_px, label_px = plot.top_px - _CALIBRATION_ABOVE_PX + 18, plot.top_px + height_px + 26
    page.write(left_px, title_px, shortened(name, width_px, _NAME, keep_end=True), _NAME)
    page.write(left_px, title_px + 22, shortened(_farthest_text(slides), width_px, _FAINT), _FAINT)
    plot.draw_axes(grid=False)
    first, free_px = float(_AROUND_GROUP), left_px
    for i, (group, colour) in enumerate(_GROUPS):
        known = _known([slide for slide in slides if slide.abnormal == bool(i)])
        text = f"{len(known)} {group} slide{'s' * (len(known) != 1)}"
        label_width_px = _SWATCH_PX + 8 + text_width_px(text, _TEXT)
        (start_px,) = plot.x_px(np.array([first]))
        at_px = max(min(round(start_px), left_px + width_px - label_width_px), free_px)
        page.fill(at_px, label_px - 12, _SWATCH_PX, _SWATCH_PX, colour)
        page.write(at_px + _SWATCH_PX + 8, label_px, text, _TEXT)
        _draw_boxes(plot, known, first, colour)
        first, free_px = first + len(known) + _AROUND_GROUP, at_px + label_width_px + _GAP_PX
    for z, style in ((-1.0, (4.0, 3.0)), (0.0, ()), (1.0, (4.0, 3.0))):
        level_px = np.rint(plot.y_px(np.full(2, z))) + 0.5
        draw_line(page, [left_px, left_px + width_px], level_px, INK, width_px=1.0, style=style)


def _known(slides: Sequence[SlideZ]) -> list[SlideZ]:
    """In the order of their medians."""
    known = [slide for slide in slides if np.isfinite(slide.quantiles_z).all()]
    return sorted(known, key=lambda slide: (slide.quantiles_z[_MEDIAN], slide.slide_id))


def _draw_boxes(plot: Plot, slides: Sequence[SlideZ], first: float, colour: str) -> None:
    """One slide after the other, from a place on the axis of x."""
    if not slides:
        return
    pitch_px = plot.size_px[0] / plot.x.high
    x_px = np.floor(plot.x_px(first + 0.5 + np.arange(len(slides), dtype=np.float64))) + 0.5
    y_px = plot.y_px(np.array([slide.quantiles_z for slide in slides]).ravel()).reshape(-1, 5)
    point = 72 / plot.page.figure.dpi
    box_px = min(max(round(pitch_px * 0.6), 1), _MOST_BOX_PX)
    draw = plot.page.axes.vlines
    draw(x_px, y_px[:, 0], y_px[:, 4], colors=colour, linewidths=point, alpha=0.6)
    draw(x_px, y_px[:, 1], y_px[:, 3], colors=colour, linewidths=box_px * point)
    draw(x_px, y_px[:, 2] - 1.5, y_px[:, 2] + 1.5, colors=INK, linewidths=max(box_px, 2) * point)


def _farthest_text(slides: Sequence[SlideZ]) -> str:
    """Which slides to look at first."""
    normal = _known([slide for slide in slides if not slide.abnormal])
    if not normal:
        return "No normal slide has a z."
    farthest = sorted(normal, key=lambda slide: -abs(slide.quantiles_z[_MEDIAN]))[:_FARTHEST]
    named = ", ".join(f"{slide.slide_id} ({_signed(slide.quantiles_z[_MEDIAN])})" for slide in farthest)
    return f"Medians of normal slides farthest from 0: {named}"
