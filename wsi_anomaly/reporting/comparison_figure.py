"""Draw a slide beside the heatmaps of several detectors and what was annotated. Knows arrays; knows no slide reader."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from wsi_anomaly.reporting.colours import Z_SCALE, z_colours
from wsi_anomaly.reporting.page import (
    FAINT_INK,
    INK,
    RULE,
    Lettering,
    Page,
    blank_page,
    round_length,
    shortened,
    text_width_px,
)
from wsi_anomaly.reporting.plot import draw_line

Ring = Float[np.ndarray, "_ xy"]
"""A closed line; the last corner need not repeat the first."""

_MARGIN_PX, _GAP_PX = 40, 24
_ROOM_PX, _LEAST_COLUMN_PX, _MOST_PANEL_PX, _LARGE_PANEL_PX = (1840, 1400), 220, 760, 400
"""For all panels; and of one the width, at least that of its text, and the longer side that is wanted."""
_TITLE_PX, _ABOVE_PANEL_PX, _BELOW_PANEL_PX = 48, 34, 38
_TITLE, _NAME, _TEXT = Lettering(24, bold=True), Lettering(18, bold=True), Lettering(18)
_SMALL = Lettering(15, FAINT_INK)
_ABNORMAL, _EXCLUDED = "#000000", "#009e73"
"""Green of Okabe and Ito. Cased in white, both are seen on any colour of a heatmap."""
_CASING_PX, _OUTLINE_PX = 4.0, 2.0
_LEGEND_ROW_PX, _BETWEEN_ITEMS_PX, _LEAST_WIDTH_PX = 58, 56, 440
_SAMPLE_PX, _MOST_SCALE_BAR_PX = 44, 240
_BAR_PX, _BAR_THICK_PX, _BAR_STEPS = 300, 16, 4
_MISSING = "\N{EN DASH}"


@dataclass(frozen=True, slots=True)
class ComparedMap:
    """What one detector found on the slide."""

    detector: str
    z: Float32[np.ndarray, "tile_row tile_column"]
    """NaN where there is no tile."""
    extent_px: tuple[float, float, float, float]
    """Left, top, right and bottom of the grid of tiles in pixels of the overview."""
    z_99: float | None
    dice: float | None
    """None where nothing abnormal is annotated."""


def write_comparison(
    path: Path,
    overview: UInt8[np.ndarray, "row column rgb"],
    maps: Sequence[ComparedMap],
    *,
    abnormal: Sequence[Ring],
    excluded: Sequence[Ring],
    slide_id: str,
    overview_mpp: float,
) -> None:
    """Draw the slide, then a heatmap for each detector, all in one size, with (Z_99, Dice) below.

    Rings are in pixels of the overview; those of what is `abnormal`, and of its holes, are drawn in black, `excluded`
    ones in green. Colours are those of every heatmap, so that slides can be compared by eye.
    """
    _comparison(overview, maps, (abnormal, excluded), slide_id=slide_id, overview_mpp=overview_mpp).save(path)


@dataclass(frozen=True, slots=True)
class _Layout:
    """How panels stand on the page."""

    columns: int
    rows: int
    scale: float
    """Page pixels in a pixel of the overview."""
    panel_px: tuple[int, int]

    @property
    def column_px(self) -> int:
        """At least as wide as the text of a panel."""
        return max(self.panel_px[0], _LEAST_COLUMN_PX)

    @property
    def width_px(self) -> int:
        """Of all columns."""
        return self.columns * (self.column_px + _GAP_PX) - _GAP_PX

    @property
    def row_px(self) -> int:
        """With the text above and below."""
        return _ABOVE_PANEL_PX + self.panel_px[1] + _BELOW_PANEL_PX

    def corner_px(self, panel: int) -> tuple[int, int]:
        """Left and top of a panel, counted from the first one's column and row."""
        row, column = divmod(panel, self.columns)
        inset_px = (self.column_px - self.panel_px[0]) // 2
        return column * (self.column_px + _GAP_PX) + inset_px, row * (self.row_px + _GAP_PX) + _ABOVE_PANEL_PX


def _layout(size_px: tuple[int, int], panels: int) -> _Layout:
    """In the fewest rows in which panels are large enough; where none is, in those that make them largest."""
    layouts = [_layout_in(size_px, -(-panels // rows), rows) for rows in range(1, panels + 1)]
    wide = [layout for layout in layouts if layout.width_px <= _ROOM_PX[0]]
    large = [layout for layout in wide if max(layout.panel_px) >= _LARGE_PANEL_PX]
    return large[0] if large else max(wide, key=lambda layout: layout.scale)


def _layout_in(size_px: tuple[int, int], columns: int, rows: int) -> _Layout:
    across_px = min((_ROOM_PX[0] + _GAP_PX) / columns - _GAP_PX, _MOST_PANEL_PX)
    down_px = max((_ROOM_PX[1] + _GAP_PX) / rows - _GAP_PX - _ABOVE_PANEL_PX - _BELOW_PANEL_PX, 1.0)
    scale = min(across_px / size_px[0], down_px / size_px[1])
    return _Layout(columns, rows, scale, (max(int(size_px[0] * scale), 1), max(int(size_px[1] * scale), 1)))


def _comparison(
    overview: UInt8[np.ndarray, "row column rgb"],
    maps: Sequence[ComparedMap],
    outlines: tuple[Sequence[Ring], Sequence[Ring]],
    *,
    slide_id: str,
    overview_mpp: float,
) -> Page:
    layout = _layout((overview.shape[1], overview.shape[0]), len(maps) + 1)
    width_px = max(layout.width_px, _LEAST_WIDTH_PX)
    legend = _legend_rows(_legend_items(layout, overview_mpp, outlines), width_px)
    top_px = _MARGIN_PX + _TITLE_PX
    legend_px = top_px + layout.rows * (layout.row_px + _GAP_PX)
    page = blank_page(width_px + 2 * _MARGIN_PX, legend_px + len(legend) * _LEGEND_ROW_PX + _MARGIN_PX)
    page.write(_MARGIN_PX, _MARGIN_PX + 24, shortened(slide_id, width_px, _TITLE, keep_end=True), _TITLE)
    plain = Image.fromarray(overview).resize(layout.panel_px, Image.Resampling.LANCZOS)
    faded = _faded(plain)
    panels = [
        ("Slide", "", plain),
        *((one.detector, _figures(one), _painted(faded, one, layout.scale)) for one in maps),
    ]
    for i, (name, figures, picture) in enumerate(panels):
        x_px, y_px = layout.corner_px(i)
        corner_px = (_MARGIN_PX + x_px, top_px + y_px)
        _draw_panel(page, corner_px, layout, (name, figures, picture))
        _draw_outlines(page, corner_px, layout, outlines)
    for i, row in enumerate(legend):
        for left_px, item in row:
            item.draw(page, _MARGIN_PX + left_px, legend_px + i * _LEGEND_ROW_PX)
    return page


def _figures(one: ComparedMap) -> str:
    z_99, dice = (_MISSING if value is None or isnan(value) else f"{value:.2f}" for value in (one.z_99, one.dice))
    return f"(Z_99 {z_99}, Dice {dice})".replace("-", "\N{MINUS SIGN}")


def _faded(picture: Image.Image) -> Image.Image:
    """Grey and pale, so that every colour on it is a z-score."""
    return picture.convert("L").point(lambda grey: 255 - 0.5 * (255 - grey)).convert("RGB")


def _painted(faded: Image.Image, one: ComparedMap, scale: float) -> Image.Image:
    """Opaque, so that colours are those of the colour bar; tiles smaller than a pixel share it."""
    known = np.where(np.isnan(one.z), 0, 255).astype(np.uint8)
    layer = Image.fromarray(np.dstack([z_colours(one.z.ravel()).reshape(*one.z.shape, 3), known]))
    left, top, right, bottom = (side_px * scale for side_px in one.extent_px)
    width, height = (right - left) / layer.width, (bottom - top) / layer.height
    painted = faded.copy()
    if min(width, height) < 1:
        size_px = max(round(right - left), 1), max(round(bottom - top), 1)
        tiles, corner_px = layer.resize(size_px, Image.Resampling.BOX), (round(left), round(top))
    else:
        box = (-left / width, -top / height, (faded.width - left) / width, (faded.height - top) / height)
        tiles, corner_px = layer.transform(faded.size, Image.Transform.EXTENT, box), (0, 0)
    painted.paste(tiles, corner_px, tiles)
    return painted


def _draw_panel(page: Page, corner_px: tuple[int, int], layout: _Layout, panel: tuple[str, str, Image.Image]) -> None:
    """With a frame, for slides that are white at their border."""
    name, figures, picture = panel
    (left_px, top_px), (width_px, height_px) = corner_px, layout.panel_px
    page.fill(left_px - 1, top_px - 1, width_px + 2, height_px + 2, RULE)
    page.show(left_px, top_px, np.asarray(picture), size_px=layout.panel_px)
    middle_px = left_px + width_px // 2
    page.write(middle_px, top_px - 12, shortened(name, layout.column_px, _NAME, keep_end=True), _NAME, align="center")
    page.write(middle_px, top_px + height_px + 26, figures, _TEXT, align="center")


def _draw_outlines(
    page: Page, corner_px: tuple[int, int], layout: _Layout, outlines: tuple[Sequence[Ring], Sequence[Ring]]
) -> None:
    """Both in white, green above black, as what is excluded is a hole in what is abnormal; none beyond the panel."""
    from matplotlib.collections import PolyCollection
    from matplotlib.transforms import Bbox, TransformedBbox

    panel_px = Bbox.from_bounds(*corner_px, *layout.panel_px)
    rings = [[ring * layout.scale + corner_px for ring in group] for group in outlines]
    casing = (rings[0] + rings[1], "white", _CASING_PX)
    for lines, colour, width_px in (casing, (rings[0], _ABNORMAL, _OUTLINE_PX), (rings[1], _EXCLUDED, _OUTLINE_PX)):
        width = width_px * 72 / page.figure.dpi
        drawn = PolyCollection(lines, facecolors="none", edgecolors=colour, linewidths=width, joinstyle="round")
        page.axes.add_collection(drawn, autolim=False)
        drawn.set_clip_box(TransformedBbox(panel_px, page.axes.transData))


@dataclass(frozen=True, slots=True)
class _LegendItem:
    """Something to be drawn below the panels, at a left and a top."""

    width_px: int
    draw: Callable[[Page, int, int], None]


def _legend_items(
    layout: _Layout, overview_mpp: float, outlines: tuple[Sequence[Ring], Sequence[Ring]]
) -> list[_LegendItem]:
    keys = ((outlines[0], "annotated as abnormal", _ABNORMAL), (outlines[1], "excluded annotation", _EXCLUDED))
    outlined = [_outline_item(text, colour) for rings, text, colour in keys if rings]
    return [_scale_bar_item(layout, overview_mpp), *outlined, _colour_bar_item()]


def _legend_rows(items: Sequence[_LegendItem], width_px: int) -> list[list[tuple[int, _LegendItem]]]:
    """From left to right, and on to the next line where there is no room."""
    rows: list[list[tuple[int, _LegendItem]]] = []
    left_px = 0
    for item in items:
        if not rows or left_px + item.width_px > width_px:
            rows.append([])
            left_px = 0
        rows[-1].append((left_px, item))
        left_px += item.width_px + _BETWEEN_ITEMS_PX
    return rows


def _scale_bar_item(layout: _Layout, overview_mpp: float) -> _LegendItem:
    page_mpp = overview_mpp / layout.scale
    length_um = round_length(min(layout.panel_px[0] / 2, _MOST_SCALE_BAR_PX) * page_mpp)
    text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"  # noqa: PLR2004 - µm in a mm
    bar_px = max(round(length_um / page_mpp), 1)

    def draw(page: Page, left_px: int, top_px: int) -> None:
        page.fill(left_px, top_px + 8, bar_px, 5, INK)
        page.write(left_px + bar_px + 10, top_px + 17, text, _TEXT)

    return _LegendItem(bar_px + 10 + text_width_px(text, _TEXT), draw)


def _outline_item(text: str, colour: str) -> _LegendItem:
    def draw(page: Page, left_px: int, top_px: int) -> None:
        draw_line(page, [left_px, left_px + _SAMPLE_PX], [top_px + 10.5] * 2, colour, width_px=_OUTLINE_PX)
        page.write(left_px + _SAMPLE_PX + 10, top_px + 17, text, _TEXT)

    return _LegendItem(_SAMPLE_PX + 10 + text_width_px(text, _TEXT), draw)


def _colour_bar_item() -> _LegendItem:
    """Its ends stand for all beyond."""
    name_px = text_width_px("z-score", _TEXT) + 26
    low, high = Z_SCALE

    def draw(page: Page, left_px: int, top_px: int) -> None:
        page.write(left_px, top_px + 17, "z-score", _TEXT)
        ramp = z_colours(np.linspace(low, high, _BAR_PX))[None]
        page.show(left_px + name_px, top_px + 3, ramp, size_px=(_BAR_PX, _BAR_THICK_PX))
        for i in range(_BAR_STEPS + 1):
            z, x_px = low + (high - low) * i / _BAR_STEPS, left_px + name_px + round(_BAR_PX * i / _BAR_STEPS)
            sign = {0: "≤ ", _BAR_STEPS: "≥ "}.get(i, "")
            page.write(x_px, top_px + 40, f"{sign}{z:g}", _SMALL, align="center")

    return _LegendItem(name_px + _BAR_PX + 20, draw)
