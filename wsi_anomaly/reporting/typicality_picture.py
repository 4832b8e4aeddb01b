"""Show a map of kinds of tissue: borders, z, hits of groups, and real tiles. Knows arrays and text; knows no slide."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from wsi_anomaly.reporting.colours import Z_SCALE, z_colours
from wsi_anomaly.reporting.page import (
    FAINT_INK,
    INK,
    ORANGE,
    RULE,
    Lettering,
    Page,
    blank_page,
    round_length,
    shortened,
    wrapped,
)
from wsi_anomaly.reporting.plot import fitted_header

_MARGIN_PX, _WIDTH_PX = 36, 1840
_PANELS_IN_A_ROW, _BETWEEN_PANELS_PX, _BELOW_PANEL_PX = 4, 56, 108
_FIGURES_PX = 34
"""Left of a panel and above it, for the numbers of rows and columns."""
_HEAD_PX, _LINE_PX = 34, 20
_LEAST_BAR_PX, _BAR_PX = 280, 12
_FEW_CELLS = 12
"""Along the longer side: then each has its number."""
_MOST_BLOCKS = (7, 10)
"""Real tiles down and across."""
_MOST_TILE_PX, _GAP_PX, _Z_PX, _CAPTION_PX = 300, 8, 12, 48
_HEADING, _NOTE, _SMALL = Lettering(18, bold=True), Lettering(15, FAINT_INK), Lettering(13, FAINT_INK)
_CAPTION = Lettering(13)
_DISTANCE_COLOURS, _HITS_COLOURS = "Greys", "Blues"
"""Of ColorBrewer, like the colours of z: the more the darker, for any colour vision and in grey print."""
_MINUS, _TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
_GUIDE = (
    "Each cell is a kind of tissue, and its neighbours are like it. Rows and columns count from 0, as in the table. "
    "Dark ridges of the first map part kinds that differ. Hits darken with the root of their share; a frame marks the "
    "cell with most."
)


@dataclass(frozen=True, slots=True)
class PrototypeTile:
    """The real tile nearest to the prototype of a cell."""

    block: tuple[int, int]
    """Where it stands among the others: row and column."""
    row: int
    column: int
    pixels: UInt8[np.ndarray, "y x rgb"]
    hits: int
    """How many tiles the cell has."""
    z: float
    """Their mean; NaN where none has a z."""


def choose_cells(hits: Int64[np.ndarray, "row column"]) -> dict[tuple[int, int], tuple[int, int]]:
    """Of square blocks of cells, at most 7 by 10, each one's cell with most hits; none of a block without any.

    Blocks and cells are rows and columns.
    """
    side = _block_side(hits.shape)
    chosen = {}
    for top in range(0, hits.shape[0], side):
        for left in range(0, hits.shape[1], side):
            block = hits[top : top + side, left : left + side]
            down, across = np.unravel_index(block.argmax(), block.shape)
            if block.any():
                chosen[top // side, left // side] = (top + int(down), left + int(across))
    return chosen


def write_typicality_page(
    path: Path,
    *,
    u_matrix: Float64[np.ndarray, "row column"],
    mean_z: Float64[np.ndarray, "row column"],
    hits: Mapping[str, Int64[np.ndarray, "row column"]],
    prototypes: Sequence[PrototypeTile],
    title: str,
    header: str,
    tile_mpp: float,
) -> None:
    """Draw the maps side by side, and below them real tiles in the places of their cells.

    `hits` are by the name of the group; they are shown as shares of its group. Where
    nothing has a z there is no map of it.
    """
    _page(u_matrix, mean_z, hits, prototypes, header=(title, header), tile_mpp=tile_mpp).save(path)


@dataclass(frozen=True, slots=True)
class _Panel:
    """One map in colours, and what they mean."""

    title: str
    colours: UInt8[np.ndarray, "row column rgb"]
    ramp: UInt8[np.ndarray, "1 step rgb"]
    ends: tuple[str, str]
    frame: tuple[int, int] | None = None
    """A cell to point at: row and column."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where all maps have their cells, and how large real tiles are."""

    shape: tuple[int, int]
    panels_in_a_row: int
    cell_px: int
    block_side: int
    tile_px: int

    @property
    def panel_px(self) -> tuple[int, int]:
        """Width and height of a map."""
        return self.cell_px * self.shape[1], self.cell_px * self.shape[0]

    @property
    def panel_row_px(self) -> int:
        """From one row of maps to the next."""
        return _HEAD_PX + _FIGURES_PX + self.panel_px[1] + _BELOW_PANEL_PX

    @property
    def tile_row_px(self) -> int:
        """From one row of real tiles to the next."""
        return _Z_PX + self.tile_px + _CAPTION_PX

    def panel_place(self, number: int) -> tuple[int, int]:
        """Left and top of the cells of a map, from the left and top of all maps."""
        step_px = (_WIDTH_PX + _BETWEEN_PANELS_PX) // self.panels_in_a_row
        left_px = number % self.panels_in_a_row * step_px + _FIGURES_PX
        return left_px, number // self.panels_in_a_row * self.panel_row_px + _HEAD_PX + _FIGURES_PX


def _page(
    u_matrix: Float64[np.ndarray, "row column"],
    mean_z: Float64[np.ndarray, "row column"],
    hits: Mapping[str, Int64[np.ndarray, "row column"]],
    prototypes: Sequence[PrototypeTile],
    *,
    header: tuple[str, str],
    tile_mpp: float,
) -> Page:
    panels = _panels(u_matrix, mean_z, hits)
    layout = _layout(u_matrix.shape, len(panels))
    above = fitted_header(*header, _WIDTH_PX)
    guide = wrapped(_GUIDE, _WIDTH_PX, _NOTE, most_lines=4)
    panels_px = _MARGIN_PX + above.height_px + 24
    tiles_px = panels_px + -(-len(panels) // layout.panels_in_a_row) * layout.panel_row_px
    bottom_px = tiles_px + 2 * _HEAD_PX + -(-layout.shape[0] // layout.block_side) * layout.tile_row_px
    page = blank_page(_WIDTH_PX + 2 * _MARGIN_PX, bottom_px + 40 + _LINE_PX * len(guide) + _MARGIN_PX)
    above.draw(page, _MARGIN_PX, _MARGIN_PX)
    for number, panel in enumerate(panels):
        left_px, top_px = layout.panel_place(number)
        _draw_panel(page, _MARGIN_PX + left_px, panels_px + top_px, panel, layout)
    page.write(_MARGIN_PX, tiles_px + 20, "Real tiles, each nearest to the prototype of its cell", _HEADING)
    below = f"One of each block of {layout.block_side} {_TIMES} {layout.block_side} cells: that with most tiles."
    page.write(_MARGIN_PX, tiles_px + 44, below if layout.block_side > 1 else "Of each cell.", _NOTE)
    for tile in prototypes:
        left_px = _MARGIN_PX + tile.block[1] * (layout.tile_px + _GAP_PX)
        _draw_tile(page, left_px, tiles_px + 2 * _HEAD_PX + tile.block[0] * layout.tile_row_px, tile, layout.tile_px)
    if prototypes:
        _draw_scale_bar(page, bottom_px, layout.tile_px, tile_mpp * max(prototypes[0].pixels.shape[:2]))
    for i, line in enumerate(guide):
        page.write(_MARGIN_PX, bottom_px + 62 + _LINE_PX * i, line, _NOTE)
    return page


def _layout(shape: tuple[int, int], panels: int) -> _Layout:
    in_a_row = min(panels, _PANELS_IN_A_ROW)
    panel_px = (_WIDTH_PX + _BETWEEN_PANELS_PX) // max(in_a_row, 3) - _BETWEEN_PANELS_PX - _FIGURES_PX
    side = _block_side(shape)
    across = -(-shape[1] // side)
    return _Layout(
        shape,
        panels_in_a_row=in_a_row,
        cell_px=max(panel_px // max(shape), 1),
        block_side=side,
        tile_px=min((_WIDTH_PX + _GAP_PX) // across - _GAP_PX, _MOST_TILE_PX),
    )


def _block_side(shape: tuple[int, ...]) -> int:
    return max(-(-side // most) for side, most in zip(shape, _MOST_BLOCKS, strict=True))


def _panels(
    u_matrix: Float64[np.ndarray, "row column"],
    mean_z: Float64[np.ndarray, "row column"],
    hits: Mapping[str, Int64[np.ndarray, "row column"]],
) -> list[_Panel]:
    low, high = float(u_matrix.min()), float(u_matrix.max())
    borders = (u_matrix - low) / ((high - low) or 1.0)
    ends = (f"{low:.2f}: like its neighbours", f"{high:.2f}: unlike")
    panels = [_panel("Distance to neighbours (U-matrix)", borders, _DISTANCE_COLOURS, ends)]
    if np.isfinite(mean_z).any():
        panels.append(_z_panel(mean_z))
    panels.extend(_hits_panel(name, counts) for name, counts in hits.items())
    return panels


def _panel(
    title: str,
    position: Float64[np.ndarray, "row column"],
    colour_map: str,
    ends: tuple[str, str],
    frame: tuple[int, int] | None = None,
) -> _Panel:
    """Of positions from 0 to 1 on a colour map."""
    from matplotlib import colormaps

    colours, ramp = (
        np.asarray(colormaps[colour_map](values, bytes=True))[..., :3] for values in (position, np.linspace(0, 1, 256))
    )
    return _Panel(title, colours, ramp[None], ends, frame)


def _hits_panel(name: str, hits: Int64[np.ndarray, "row column"]) -> _Panel:
    """By the root, so that cells with few tiles are not lost beside those with many."""
    count = int(hits.sum())
    share = hits / max(count, 1)
    most = float(share.max())
    row, column = np.unravel_index(share.argmax(), share.shape)
    title = f"{name}: {count:,} {'tile' if count == 1 else 'tiles'}"
    frame = (int(row), int(column)) if count else None
    return _panel(title, np.sqrt(share / (most or 1.0)), _HITS_COLOURS, ("0", f"{100 * most:.2g} % in a cell"), frame)


def _z_panel(mean_z: Float64[np.ndarray, "row column"]) -> _Panel:
    """White where nothing has a z."""
    colours = z_colours(mean_z.ravel()).reshape(*mean_z.shape, 3)
    colours = np.where(np.isfinite(mean_z)[..., None], colours, np.uint8(255))
    low, high = Z_SCALE
    return _Panel(
        "Mean z", colours, z_colours(np.linspace(low, high, 256))[None], (f"≤ {low:g}", f"≥ {high:g} deviations")
    )


def _draw_panel(page: Page, left_px: int, top_px: int, panel: _Panel, layout: _Layout) -> None:
    """Title, cells with the numbers of rows and columns, and the bar that says what colours mean."""
    width_px, height_px = layout.panel_px
    room_px = (_WIDTH_PX + _BETWEEN_PANELS_PX) // layout.panels_in_a_row - _BETWEEN_PANELS_PX
    title_px = left_px - _FIGURES_PX
    page.write(title_px, top_px - _FIGURES_PX - 12, shortened(panel.title, room_px, _HEADING, keep_end=True), _HEADING)
    page.fill(left_px - 1, top_px - 1, width_px + 2, height_px + 2, RULE)
    cells = panel.colours.repeat(layout.cell_px, axis=0).repeat(layout.cell_px, axis=1)
    page.show(left_px, top_px, cells, size_px=(width_px, height_px))
    if panel.frame is not None:
        _draw_frame(page, left_px, top_px, panel.frame, layout.cell_px)
    step = 5 if max(layout.shape) > _FEW_CELLS else 1
    half_px = layout.cell_px // 2
    for row in range(0, layout.shape[0], step):
        page.write(left_px - 6, top_px + row * layout.cell_px + half_px + 5, str(row), _SMALL, align="right")
    for column in range(0, layout.shape[1], step):
        page.write(left_px + column * layout.cell_px + half_px, top_px - 8, str(column), _SMALL, align="center")
    bar_px = max(width_px, _LEAST_BAR_PX)
    page.show(left_px, top_px + height_px + 22, panel.ramp, size_px=(bar_px, _BAR_PX))
    page.write(left_px, top_px + height_px + 54, panel.ends[0], _SMALL)
    page.write(left_px + bar_px, top_px + height_px + 54, panel.ends[1], _SMALL, align="right")


def _draw_frame(page: Page, left_px: int, top_px: int, cell: tuple[int, int], cell_px: int) -> None:
    """Around a cell, within it."""
    x_px, y_px = left_px + cell[1] * cell_px, top_px + cell[0] * cell_px
    for side in ((0, 0, cell_px, 2), (0, cell_px - 2, cell_px, 2), (0, 0, 2, cell_px), (cell_px - 2, 0, 2, cell_px)):
        page.fill(x_px + side[0], y_px + side[1], side[2], side[3], ORANGE)


def _draw_tile(page: Page, left_px: int, top_px: int, tile: PrototypeTile, side_px: int) -> None:
    """A strip in the colour of the cell's z, the tile, and where its cell lies."""
    (colour,) = z_colours(np.array([tile.z])).tolist() if np.isfinite(tile.z) else [[255] * 3]
    page.fill(left_px - 1, top_px - 1, side_px + 2, _Z_PX + side_px + 2, RULE)
    page.fill(left_px, top_px, side_px, _Z_PX, "#{:02x}{:02x}{:02x}".format(*colour))
    page.show(left_px, top_px + _Z_PX, tile.pixels, size_px=(side_px, side_px))
    z = f"z {round(tile.z, 1) + 0.0:.1f}".replace("-", _MINUS) if np.isfinite(tile.z) else "no z"
    lines = (f"row {tile.row}, column {tile.column}", f"{z} · {tile.hits:,} {'tile' if tile.hits == 1 else 'tiles'}")
    for i, line in enumerate(lines, start=1):
        baseline_px = top_px + _Z_PX + side_px + 2 + i * 17
        page.write(left_px, baseline_px, shortened(line, side_px, _CAPTION), _CAPTION)


def _draw_scale_bar(page: Page, top_px: int, side_px: int, side_um: float) -> None:
    """Of a round length, for all tiles."""
    length_um = round_length(side_um / 2)
    page.fill(_MARGIN_PX, top_px + 8, round(length_um / side_um * side_px), 4, INK)
    page.write(_MARGIN_PX, top_px + 30, f"{length_um:g} µm", _SMALL)
