"""A page in pixels from its top left, and text measured before it is drawn. Knows no slide, tile or keyword."""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

INK, FAINT_INK, RULE, TRACK = "#1a1a1a", "#5f5f5f", "#d0d0d0", "#ececec"
BLUE, ORANGE = "#0072b2", "#e69f00"
"""Of Okabe and Ito: told apart with any colour vision, and by lightness in grey print."""
_DPI = 128
"""A power of two: a whole number of pixels stays whole as inches and back."""
_FONT = "DejaVu Sans"
"""Comes with matplotlib, so that text is as wide on every machine."""
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Lettering:
    """How text looks."""

    size_px: int
    colour: str = INK
    bold: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """A white page; x runs right and y down, both in pixels."""

    figure: "Figure"
    axes: "Axes"

    def write(
        self,
        x_px: int,
        baseline_px: int,
        text: str,
        lettering: Lettering,
        *,
        align: Literal["left", "center", "right"] = "left",
    ) -> None:
        """One line of text that begins, has its middle or ends at `x_px`. Dollars and backslashes are themselves."""
        self.axes.text(
            x_px,
            baseline_px,
            printable(text),
            font=_font(lettering),
            color=lettering.colour,
            ha=align,
            va="baseline",
            parse_math=False,
            usetex=False,
        )

    def fill(self, left_px: int, top_px: int, width_px: int, height_px: int, colour: str) -> None:
        """A rectangle."""
        from matplotlib.patches import Rectangle

        self.axes.add_patch(Rectangle((left_px, top_px), width_px, height_px, facecolor=colour, edgecolor="none"))

    def show(
        self, left_px: int, top_px: int, pixels: UInt8[np.ndarray, "y x rgb"], *, size_px: tuple[int, int]
    ) -> None:
        """A picture, resized."""
        resized = np.asarray(Image.fromarray(pixels).resize(size_px, Image.Resampling.BICUBIC))
        extent = (left_px, left_px + size_px[0], top_px + size_px[1], top_px)
        limits = self.axes.get_xlim(), self.axes.get_ylim()
        self.axes.imshow(resized, extent=extent, aspect="auto", interpolation="nearest", zorder=1)  # as rectangles
        self.axes.set(xlim=limits[0], ylim=limits[1])

    def save(self, path: Path) -> None:
        """As PNG; equal pages are equal files."""
        save_picture(self.figure, path)


def blank_page(width_px: int, height_px: int) -> Page:
    """A page with nothing on it."""
    from matplotlib.figure import Figure

    figure = Figure((width_px / _DPI, height_px / _DPI), dpi=_DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width_px), ylim=(height_px, 0))
    axes.set_axis_off()
    return Page(figure, axes)


def save_picture(figure: "Figure", path: Path) -> None:
    """As PNG without the name and version of the drawing library: equal pictures are equal files."""
    unfinished = path.with_name(f"{path.name}.partial")
    # Compressing harder would take as long again as drawing, to save a sixth.
    figure.savefig(unfinished, format="png", metadata={"Software": None}, pil_kwargs={"compress_level": 2})
    unfinished.replace(path)


def printable(text: str) -> str:
    """In one line, and with a mark in place of each character that the font has not."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(_font(Lettering(12))))
    return "".join(one if font.get_char_index(ord(one)) else _UNKNOWN for one in " ".join(text.split()))


def text_width_px(text: str, lettering: Lettering) -> int:
    """Of one line."""
    measure = _renderer().get_text_width_height_descent
    width, _, _ = measure(printable(text), _font(lettering), ismath=False)  # type: ignore[no-untyped-call]
    return ceil(width)


def shortened(text: str, width_px: int, lettering: Lettering, *, keep_end: bool = False) -> str:
    """The text if it is no wider, else its beginning, or its beginning and end, with an ellipsis."""

    def cut(count: int) -> str:
        kept = len(text) - count
        end = kept // 2 if keep_end else 0
        return f"{text[: kept - end].rstrip()}…{text[len(text) - end :].lstrip()}"

    if text_width_px(text, lettering) <= width_px:
        return text
    return cut(bisect_left(range(len(text)), -width_px, key=lambda count: -text_width_px(cut(count), lettering)))


def wrapped(text: str, width_px: int, lettering: Lettering, *, most_lines: int) -> list[str]:
    """Its lines, broken between words; an ellipsis ends the last one where there are more."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else ""
        if longer and text_width_px(longer, lettering) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    kept, rest = lines[: most_lines - 1], lines[most_lines - 1 :]
    return [shortened(line, width_px, lettering) for line in [*kept, *([" ".join(rest)] if rest else [])]]


def round_length(longest: float) -> float:
    """The longest of 1, 2 or 5 times a power of ten that is not above."""
    power = 10.0 ** np.floor(np.log10(longest))
    return float(max(factor * power for factor in (1, 2, 5) if factor * power <= longest))


@cache
def _font(lettering: Lettering) -> "FontProperties":
    from matplotlib.font_manager import FontProperties

    weight = "bold" if lettering.bold else "normal"
    return FontProperties(family=_FONT, size=lettering.size_px * 72 / _DPI, weight=weight)


@cache
def _renderer() -> "RendererAgg":
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(1, 1, _DPI)  # type: ignore[no-untyped-call]
