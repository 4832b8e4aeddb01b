"""Draw where tissue was found and how abnormal it is. Knows arrays; knows no slide reader and no stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image
from scipy import ndimage
from skimage.morphology import disk

from wsi_anomaly.reporting.colours import Z_COLOUR_MAP, Z_SCALE, z_colours
from wsi_anomaly.reporting.page import round_length, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 100
_MARGIN_PX, _HEADER_PX, _FOOTER_PX = 24.0, 78.0, 74.0
_LEAST_WIDTH_PX = 860.0
_TISSUE_COLOUR = "#0072B2"
_LONGEST_TITLE = 90
_GRID_FROM_PX = 6
"""The least side of a tile in the picture at which its border is drawn."""
_OUTLINE_GAP_PX = 4
"""What lies nearer to one another than twice this shares an outline, where single tiles could hardly be seen."""


@dataclass(frozen=True, slots=True)
class ZSummary:
    """The figures that stand above a heatmap."""

    z_max: float
    z_99: float
    threshold_z: float
    area_over_um2: float
    """Of the tissue at or above the threshold."""
    z_from: str
    """What z-scores are measured against."""


def write_overview(
    path: Path,
    overview: UInt8[np.ndarray, "row column rgb"],
    tissue: Bool[np.ndarray, "row column"],
    *,
    overview_mpp: float,
    tile_origins_px: Float[np.ndarray, "tile xy"],
    tile_size_px: tuple[float, float],
    slide_id: str,
) -> None:
    """Draw the outline of the tissue and the grid of tiles over a picture of the slide, in pixels of that picture."""
    n = len(tile_origins_px)
    page = _page(overview, panels=1)
    _write_header(page, slide_id, f"{n:,} tile{'' if n == 1 else 's'} to score within the tissue outline (blue)")
    (panel,) = page.panels
    panel.imshow(_shrunk(overview, page), extent=page.extent, aspect="auto", interpolation="bilinear")
    _draw_tiles(page, tile_origins_px, tile_size_px)
    _draw_tissue(page, tissue)
    _draw_scale_bar(page, overview_mpp)
    save_picture(page.figure, path)


def write_heatmap(
    path: Path,
    overview: UInt8[np.ndarray, "row column rgb"],
    z: Float32[np.ndarray, "tile_row tile_column"],
    *,
    overview_mpp: float,
    grid_extent_px: tuple[float, float, float, float],
    slide_id: str,
    summary: ZSummary,
) -> None:
    """Draw the slide with its regions outlined, and beside it the z-scores over a grey copy.

    `z` is NaN where there is no tile; `grid_extent_px` is left, top, right and bottom of its grid in pixels of
    `overview`. Colours mean the same on every slide.
    """
    page = _page(overview, panels=2)
    area = _area_text(summary.area_over_um2)
    _write_header(
        page,
        slide_id,
        f"Z_MAX {summary.z_max:.2f}     Z_99 {summary.z_99:.2f}     {area} at z ≥ {summary.threshold_z:g} (outlined)"
        f"     measured against {summary.z_from}",
    )
    small = _shrunk(overview, page)
    plain, coloured = page.panels
    plain.imshow(small, extent=page.extent, aspect="auto", interpolation="bilinear")
    coloured.imshow(_faded(small), extent=page.extent, aspect="auto", interpolation="bilinear")
    _draw_z(page, z, grid_extent_px)
    _draw_outlines(page, z >= summary.threshold_z, grid_extent_px)
    _draw_scale_bar(page, overview_mpp)
    _draw_colour_bar(page, summary.threshold_z)
    save_picture(page.figure, path)


@dataclass(frozen=True, slots=True)
class _Page:
    """A figure with equal panels below a header and above a footer; one figure pixel is `1 / scale` overview pixels."""

    figure: "Figure"
    panels: "list[Axes]"
    size_px: tuple[int, int]
    """Of the overview."""
    scale: float

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top of the overview in its pixels."""
        return (0.0, float(self.size_px[0]), float(self.size_px[1]), 0.0)


def _page(overview: UInt8[np.ndarray, "row column rgb"], *, panels: int) -> _Page:
    from matplotlib.figure import Figure

    height, width = overview.shape[:2]
    stacked = panels > 1 and width > 1.4 * height
    room = (1500, 1300) if panels == 1 else (1500, 700) if stacked else (900, 1100)
    scale = min(room[0] / width, room[1] / height)
    panel_width, panel_height = max(round(width * scale), 1), max(round(height * scale), 1)
    across, down = (1, panels) if stacked else (panels, 1)
    used = across * panel_width + (across + 1) * _MARGIN_PX
    full_width = max(used, _LEAST_WIDTH_PX)
    full_height = _HEADER_PX + down * panel_height + (down - 1) * _MARGIN_PX + _FOOTER_PX
    figure = Figure((full_width / _DPI, full_height / _DPI), dpi=_DPI, facecolor="white")
    axes = []
    for panel in range(panels):
        column, row = (0, panel) if stacked else (panel, 0)
        left = (full_width - used) / 2 + _MARGIN_PX + column * (panel_width + _MARGIN_PX)
        bottom = _FOOTER_PX + (down - 1 - row) * (panel_height + _MARGIN_PX)
        box = (left / full_width, bottom / full_height, panel_width / full_width, panel_height / full_height)
        axes.append(figure.add_axes(box, xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0), aspect="auto"))
    return _Page(figure, axes, (width, height), scale)


def _place(
    page: _Page, x_px: float, y_px: float, width_px: float, height_px: float
) -> tuple[float, float, float, float]:
    """A box of the figure, given by pixels from its left and bottom."""
    width, height = page.figure.get_size_inches() * _DPI
    return (x_px / width, y_px / height, width_px / width, height_px / height)


def _write_header(page: _Page, slide_id: str, line: str) -> None:
    half = _LONGEST_TITLE // 2
    title = slide_id if len(slide_id) <= _LONGEST_TITLE else f"{slide_id[:half]}…{slide_id[-half:]}"
    height = float(page.figure.get_size_inches()[1]) * _DPI
    for text, from_top_px, style in ((title, 16, {"size": 13, "weight": "bold"}), (line, 46, {"size": 11})):
        x, y, _, _ = _place(page, _MARGIN_PX, height - from_top_px, 0.0, 0.0)
        page.figure.text(x, y, text, va="top", parse_math=False, **style)


def _shrunk(overview: UInt8[np.ndarray, "row column rgb"], page: _Page) -> UInt8[np.ndarray, "y x rgb"]:
    """To the resolution of the panel, never beyond its own."""
    height, width = overview.shape[:2]
    size = (max(round(width * min(page.scale, 1.0)), 1), max(round(height * min(page.scale, 1.0)), 1))
    return np.asarray(Image.fromarray(overview).resize(size, Image.Resampling.BOX))


def _faded(picture: UInt8[np.ndarray, "y x rgb"]) -> UInt8[np.ndarray, "y x rgb"]:
    """Grey and pale, so that every colour on it is a z-score."""
    grey = np.asarray(Image.fromarray(picture).convert("L"), dtype=np.float32)
    pale = (255 - 0.75 * (255 - grey)).astype(np.uint8)
    return np.repeat(pale[..., None], 3, axis=2)


def _draw_tiles(page: _Page, origins_px: Float[np.ndarray, "tile xy"], size_px: tuple[float, float]) -> None:
    """As a grid where its lines can be told apart, else as a tint."""
    from matplotlib.collections import PolyCollection

    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * np.asarray(size_px)
    grid = min(size_px) * page.scale >= _GRID_FROM_PX
    boxes = PolyCollection(
        list(origins_px[:, None] + corners),
        facecolors=(0, 0.45, 0.7, 0.1 if grid else 0.15),
        edgecolors=(0, 0, 0, 0.6) if grid else "none",
        linewidths=0.6,
        antialiaseds=grid,
    )
    page.panels[0].add_collection(boxes, autolim=False)


def _draw_tissue(page: _Page, tissue: Bool[np.ndarray, "row column"]) -> None:
    if not tissue.any():
        return
    width, height = page.size_px
    reduced = Image.fromarray(tissue.astype(np.uint8) * 255).resize(
        (max(round(width * min(page.scale, 1.0)), 1), max(round(height * min(page.scale, 1.0)), 1)),
        Image.Resampling.BOX,
    )
    inside = np.pad(np.asarray(reduced, dtype=np.float32), 1)
    rows, columns = inside.shape
    x = (np.arange(columns) - 0.5) * width / (columns - 2)
    y = (np.arange(rows) - 0.5) * height / (rows - 2)
    page.panels[0].contour(x, y, inside, levels=[127.5], colors=[_TISSUE_COLOUR], linewidths=1.2)


def _draw_z(
    page: _Page, z: Float32[np.ndarray, "tile_row tile_column"], grid_extent_px: tuple[float, float, float, float]
) -> None:
    """More opaque the more abnormal: normal tissue stays in sight, what deviates stands out."""
    left, top, right, bottom = grid_extent_px
    low, high = Z_SCALE
    known = ~np.isnan(z)
    strength = np.clip((np.where(known, z, low) - low) / (high - low), 0.0, 1.0)
    opacity = np.where(known, 0.25 + 0.65 * np.minimum(2 * strength, 1.0), 0.0)
    colours = z_colours(z.ravel()).reshape(*z.shape, 3)
    layer = np.concatenate([colours, np.rint(opacity * 255).astype(np.uint8)[..., None]], axis=2)
    page.panels[1].imshow(layer, extent=(left, right, bottom, top), aspect="auto", interpolation="nearest")


def _draw_outlines(
    page: _Page, over: Bool[np.ndarray, "tile_row tile_column"], grid_extent_px: tuple[float, float, float, float]
) -> None:
    """Along the edges of the tiles, or around groups of tiles too small to see; black in white, for any stain."""
    from matplotlib.collections import LineCollection

    left, top, right, bottom = grid_extent_px
    step_px = np.array([(right - left) / over.shape[1], (bottom - top) / over.shape[0]])
    gap = int(np.ceil(_OUTLINE_GAP_PX / (step_px.min() * page.scale)))
    grouped = np.pad(over, gap)
    if gap > 1:
        grouped = ndimage.binary_erosion(ndimage.binary_dilation(grouped, disk(gap)), disk(gap // 2))
    segments_px = (_edges(grouped) - gap) * step_px + (left, top)
    for panel in page.panels:
        for colour, width in (("white", 2.6), ("black", 1.1)):
            lines = LineCollection(list(segments_px), colors=colour, linewidths=width, capstyle="projecting")
            panel.add_collection(lines, autolim=False)


def _edges(inside: Bool[np.ndarray, "row column"]) -> Float[np.ndarray, "edge end xy"]:
    """The sides between cells inside and outside, in cells from the top left."""
    padded = np.pad(inside, 1)
    rows, columns = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    level = np.stack([np.stack([columns, rows], 1), np.stack([columns + 1, rows], 1)], axis=1)
    rows, columns = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    upright = np.stack([np.stack([columns, rows], 1), np.stack([columns, rows + 1], 1)], axis=1)
    return np.concatenate([level, upright]).astype(np.float64)


def _draw_scale_bar(page: _Page, overview_mpp: float) -> None:
    """Of a round length, below the left panel."""
    panel_px = page.size_px[0] * page.scale
    length_um = round_length(min(panel_px, 400) / page.scale * overview_mpp / 2)
    bar_px = length_um / overview_mpp * page.scale
    axes = page.figure.add_axes(_place(page, _MARGIN_PX, 14.0, bar_px, 46.0), xlim=(0, 1), ylim=(0, 1))
    axes.set_axis_off()
    axes.plot([0, 1], [0.85, 0.85], color="black", linewidth=3, solid_capstyle="butt", clip_on=False)
    label = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"  # noqa: PLR2004 - µm in a mm
    axes.text(0, 0.62, label, va="top", size=11)


def _draw_colour_bar(page: _Page, threshold_z: float) -> None:
    """Below the right, with the threshold marked."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    width_px = float(page.figure.get_size_inches()[0]) * _DPI
    axes = page.figure.add_axes(_place(page, width_px - _MARGIN_PX - 380, 34.0, 340.0, 18.0))
    scalars = ScalarMappable(Normalize(*Z_SCALE), Z_COLOUR_MAP)
    bar = page.figure.colorbar(scalars, cax=axes, orientation="horizontal", extend="both")
    bar.ax.tick_params(labelsize=10)
    bar.ax.axvline(threshold_z, color="black", linewidth=2)
    x, y, _, _ = _place(page, width_px - _MARGIN_PX - 392, 43.0, 0.0, 0.0)
    page.figure.text(x, y, "z-score", ha="right", va="center", size=11)


def _area_text(area_um2: float) -> str:
    return f"{area_um2 / 1e6:.2f} mm²"
