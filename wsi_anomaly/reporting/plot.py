"""Axes on a page, from numbers to pixels, and what stands above them. Knows no score, slide or detector."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from wsi_anomaly.reporting.page import BLUE, FAINT_INK, INK, ORANGE, TRACK, Lettering, Page, shortened, wrapped

DETECTOR_COLOURS = (BLUE, "#d55e00", "#009e73", "#cc79a7", INK, ORANGE, "#56b4e9")
"""Of Okabe and Ito, told apart with any colour vision."""
LineStyle = tuple[float, ...]
"""Lengths of dashes and gaps in widths of the line; of an unbroken line none."""
LINE_STYLES: tuple[LineStyle, ...] = ((), (5.0, 1.5), (5.0, 1.5, 1.0, 1.5), (1.2, 1.2), (9.0, 2.0), (3.0, 3.0))
"""As many as are told apart in any print; together with the colours they repeat after 42 lines."""
Points = Sequence[int] | Sequence[float] | Float64[np.ndarray, " point"]
_TITLE, _TITLE_PX = Lettering(24, bold=True), 48
_SUBTITLE, _SUBTITLE_LINE_PX, _MOST_SUBTITLE_LINES = Lettering(16, FAINT_INK), 23, 5
_FIGURE, _LABEL = Lettering(15, FAINT_INK), Lettering(17)
_FIGURE_DOWN_PX, _LABEL_DOWN_PX, _LABEL_UP_PX, _FIGURE_LEFT_PX, _HALF_FIGURE_PX = 22, 48, 16, 9, 6


@dataclass(frozen=True, slots=True)
class Axis:
    """What lies between its ends; what lies beyond is shown at the nearer end."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    label: str = ""
    logarithmic: bool = False

    def share(self, values: Float64[np.ndarray, " value"]) -> Float64[np.ndarray, " value"]:
        """Where on the axis, from 0 to 1."""
        inside = np.clip(values, self.low, self.high)
        if self.logarithmic:
            return np.log(inside / self.low) / np.log(self.high / self.low)
        return (inside - self.low) / (self.high - self.low)


def even_axis(low: float, high: float, step: float, *, label: str = "") -> Axis:
    """With a figure at each multiple of the step."""
    multiples = range(int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9)) + 1)
    return Axis(low, high, tuple((i * step, f"{i * step:g}".replace("-", "\N{MINUS SIGN}")) for i in multiples), label)


@dataclass(frozen=True, slots=True)
class Plot:
    """A rectangle of a page, in pixels, with an axis along two of its sides."""

    page: Page
    left_px: int
    top_px: int
    size_px: tuple[int, int]
    x: Axis
    y: Axis

    def x_px(self, values: Float64[np.ndarray, " value"]) -> Float64[np.ndarray, " value"]:
        """From left to right."""
        return self.left_px + self.x.share(values) * self.size_px[0]

    def y_px(self, values: Float64[np.ndarray, " value"]) -> Float64[np.ndarray, " value"]:
        """From bottom to top."""
        return self.top_px + (1 - self.y.share(values)) * self.size_px[1]

    def draw_axes(self, *, grid: bool = True) -> None:
        """Grid, figures and labels; the label of y stands above its axis, to be read without turning the head."""
        width, height = self.size_px
        bottom_px = self.top_px + height
        for at_px, text in _ticks(self.x, self.x_px):
            if grid:
                self.page.fill(at_px, self.top_px, 1, height, TRACK)
            self.page.fill(at_px, bottom_px, 1, 5, INK)
            self.page.write(at_px, bottom_px + _FIGURE_DOWN_PX, text, _FIGURE, align="center")
        for at_px, text in _ticks(self.y, self.y_px):
            if grid:
                self.page.fill(self.left_px, at_px, width, 1, TRACK)
            self.page.write(self.left_px - _FIGURE_LEFT_PX, at_px + _HALF_FIGURE_PX, text, _FIGURE, align="right")
        self.page.fill(self.left_px, self.top_px, 1, height, INK)
        self.page.fill(self.left_px, bottom_px, width + 1, 1, INK)
        self.page.write(self.left_px + width // 2, bottom_px + _LABEL_DOWN_PX, self.x.label, _LABEL, align="center")
        self.page.write(self.left_px - _FIGURE_LEFT_PX, self.top_px - _LABEL_UP_PX, self.y.label, _LABEL)


def _ticks(
    axis: Axis, to_px: Callable[[Float64[np.ndarray, " value"]], Float64[np.ndarray, " value"]]
) -> list[tuple[int, str]]:
    """Where they are, in whole pixels, and their figures."""
    at_px = to_px(np.array([at for at, _ in axis.ticks], np.float64))
    return [(round(one_px), text) for one_px, (_, text) in zip(at_px.tolist(), axis.ticks, strict=True)]


def draw_line(
    page: Page,
    x_px: Points,
    y_px: Points,
    colour: str,
    *,
    width_px: float = 2.5,
    style: LineStyle = (),
) -> None:
    """From point to point."""
    page.axes.plot(
        x_px,
        y_px,
        color=colour,
        linewidth=width_px * 72 / page.figure.dpi,
        linestyle=(0, style) if style else "-",
        solid_joinstyle="round",
        dash_capstyle="butt",
    )


@dataclass(frozen=True, slots=True)
class Header:
    """What stands above the plots of a page."""

    title: str
    lines: tuple[str, ...]

    @property
    def height_px(self) -> int:
        """With some room below."""
        return _TITLE_PX + _SUBTITLE_LINE_PX * len(self.lines)

    def draw(self, page: Page, left_px: int, top_px: int) -> None:
        """The title, then the lines."""
        page.write(left_px, top_px + _TITLE.size_px, self.title, _TITLE)
        for i, line in enumerate(self.lines, start=1):
            page.write(left_px, top_px + _TITLE.size_px + 6 + i * _SUBTITLE_LINE_PX, line, _SUBTITLE)


def fitted_header(title: str, subtitle: str, width_px: int) -> Header:
    """The title in one line, the rest in as many as it takes, up to a few."""
    lines = wrapped(subtitle, width_px, _SUBTITLE, most_lines=_MOST_SUBTITLE_LINES)
    return Header(shortened(title, width_px, _TITLE, keep_end=True), tuple(lines))
