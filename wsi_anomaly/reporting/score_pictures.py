"""Show tiles beside what a model rebuilt of them and its maps. Knows arrays and text; knows no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8
from PIL import Image

from wsi_anomaly.reporting.colours import z_colours
from wsi_anomaly.reporting.map_scale import MapScale, draw_colour_bar, map_picture, scale_of
from wsi_anomaly.reporting.page import (
    FAINT_INK,
    INK,
    RULE,
    TRACK,
    Lettering,
    Page,
    blank_page,
    round_length,
    shortened,
    text_width_px,
    wrapped,
)

_PANEL_PX, _GAP_PX = 368, 12
_MARGIN_PX, _BETWEEN_GROUPS_PX, _BETWEEN_ROWS_PX = 36, 60, 34
_GROUP_HEAD_PX, _CARD_HEAD_PX, _ON_LINE_PX, _TEXT_LINE_PX, _LEGEND_PX = 50, 38, 23, 20, 44
_MOST_TILES_PER_ROW = 3
_MOST_HEADER_LINES, _MOST_SCORE_LINES, _MOST_PROMPT_LINES = 3, 2, 10
_TITLE = Lettering(24, bold=True)
_SUBTITLE, _SUBTITLE_LINE_PX = Lettering(16, FAINT_INK), 22
_GROUP = Lettering(20, bold=True)
_Z_SIZE_PX, _Z_LABEL_PX, _AROUND_Z_PX = 22, 30, 10
_PANEL_NAME, _PROMPT, _SMALL = Lettering(14, FAINT_INK), Lettering(15), Lettering(13, FAINT_INK)
_RECONSTRUCTION, _RESIDUAL = "Reconstruction", "Residual"
_READABLE_LUMINANCE = 0.2
"""From here on dark text is easier to read on a colour than white text."""


@dataclass(frozen=True, slots=True)
class ExplainedTile:
    """A tile with all that says why its z is what it is."""

    pixels: UInt8[np.ndarray, "y x rgb"]
    rebuilt: UInt8[np.ndarray, "y x rgb"] | None
    abnormality: Float32[np.ndarray, "y x"] | None
    """The detector's map of it; NaN where it is not known."""
    prompt: str
    """Empty where the model uses none."""
    z: float
    scores: Mapping[str, float]
    """Raw, by name."""
    caption: str


def choose_explained(
    z: Float64[np.ndarray, " tile"], count: int
) -> tuple[Int64[np.ndarray, " highest"], Int64[np.ndarray, " median"]]:
    """Positions of the `count` tiles of highest z, descending, and of the `count` others nearest to the median z.

    Only finite z count, for the median too; the earlier tile wins a tie. Where tiles are too few for both, the highest
    come first.
    """
    known = np.flatnonzero(np.isfinite(z))
    order = known[np.argsort(-z[known], kind="stable")]
    highest, others = order[:count], np.sort(order[count:])
    if len(others):
        others = others[np.argsort(np.abs(z[others] - np.median(z[known])), kind="stable")]
    return highest.astype(np.int64), others[:count].astype(np.int64)


def write_score_sheet(
    path: Path,
    *,
    highest: Sequence[ExplainedTile],
    median: Sequence[ExplainedTile],
    slide_id: str,
    tile_mpp: float,
    header: str,
    map_meaning: str,
) -> None:
    """Draw two groups of tiles, each tile beside its reconstruction and its map, with z, scores and prompt.

    `header` is the line below the slide's name; `map_meaning` says what maps show, and begins with "Residual" where it
    is how far tile and reconstruction differ. Tiles are of one scale on the whole sheet, and so are the colours of
    maps. What no tile has is left out; where there is neither reconstruction nor map, tiles stand side by side.
    """
    _sheet(highest, median, header=(slide_id, header), tile_mpp=tile_mpp, map_meaning=map_meaning).save(path)


@dataclass(frozen=True, slots=True)
class _Layout:
    """What is one for all tiles of a sheet."""

    beside: tuple[str, ...]
    """The names of the panels beside a tile: what was rebuilt of it, its map, both or none."""
    per_row: int
    """Tiles of a group side by side."""
    magnification: float
    """Page pixels in a pixel of a tile."""
    scale: MapScale | None
    """Of all maps, where there are any."""

    @property
    def card_px(self) -> int:
        """The width of all that belongs to a tile."""
        return (1 + len(self.beside)) * (_PANEL_PX + _GAP_PX) - _GAP_PX

    @property
    def group_px(self) -> int:
        """The width of a group."""
        return self.per_row * (self.card_px + _GAP_PX) - _GAP_PX

    def size_px(self, tile: ExplainedTile) -> tuple[int, int]:
        """Width and height of a tile on the page."""
        height, width = tile.pixels.shape[:2]
        return max(round(width * self.magnification), 1), max(round(height * self.magnification), 1)


def _layout(groups: Sequence[Sequence[ExplainedTile]], map_meaning: str) -> _Layout:
    tiles = [tile for group in groups for tile in group]
    maps = _maps(tiles)
    rebuilt = (_RECONSTRUCTION,) if any(tile.rebuilt is not None for tile in tiles) else ()
    beside = (*rebuilt, _map_name(map_meaning)) if maps else rebuilt
    return _Layout(
        beside=beside,
        per_row=1 if beside else min(max(map(len, groups), default=1), _MOST_TILES_PER_ROW),
        magnification=_PANEL_PX / max((max(tile.pixels.shape[:2]) for tile in tiles), default=1),
        scale=scale_of(maps),
    )


def _maps(tiles: Sequence[ExplainedTile]) -> list[Float32[np.ndarray, "y x"]]:
    return [tile.abnormality for tile in tiles if tile.abnormality is not None]


def _map_name(meaning: str) -> str:
    return "Residual map" if meaning.startswith(_RESIDUAL) else "Map"


def _notes(tiles: Sequence[ExplainedTile], map_meaning: str) -> list[str]:
    """What has to be known to read the sheet, in lines."""
    maps = _maps(tiles)
    notes = []
    if any(tile.rebuilt is not None for tile in tiles):
        notes.append("Reconstruction: the tile as the model draws it from what it knows of normal tissue.")
    if maps:
        notes.append(f"{map_meaning}; one scale for all maps.")
    if not all(np.isfinite(one).all() for one in maps):
        notes.append("Hatched: not known.")
    return notes or ["This model makes no reconstructions." if tiles else "No tile has a z-score."]


def _sheet(
    highest: Sequence[ExplainedTile],
    median: Sequence[ExplainedTile],
    *,
    header: tuple[str, str],
    tile_mpp: float,
    map_meaning: str,
) -> Page:
    named = [(name, tiles) for name, tiles in (("Highest z", highest), ("Median z", median)) if tiles]
    groups = [tiles for _, tiles in named]
    layout = _layout(groups, map_meaning)
    width_px = max(len(groups), 1) * (layout.group_px + _BETWEEN_GROUPS_PX) - _BETWEEN_GROUPS_PX
    subtitle = wrapped(header[1], width_px, _SUBTITLE, most_lines=_MOST_HEADER_LINES)
    notes = _notes([*highest, *median], map_meaning)
    groups_px = _MARGIN_PX + 52 + _SUBTITLE_LINE_PX * len(subtitle)
    rows_px = _row_tops_px(groups, layout, groups_px + _GROUP_HEAD_PX)
    page = blank_page(width_px + 2 * _MARGIN_PX, rows_px[-1] + _LEGEND_PX + _TEXT_LINE_PX * len(notes) + _MARGIN_PX)
    page.write(_MARGIN_PX, _MARGIN_PX + 20, shortened(header[0], width_px, _TITLE, keep_end=True), _TITLE)
    for i, line in enumerate(subtitle):
        page.write(_MARGIN_PX, _MARGIN_PX + 50 + _SUBTITLE_LINE_PX * i, line, _SUBTITLE)
    for i, (name, tiles) in enumerate(named):
        left_px = _MARGIN_PX + i * (layout.group_px + _BETWEEN_GROUPS_PX)
        page.write(left_px, groups_px + 22, name, _GROUP)
        page.fill(left_px, groups_px + 32, layout.group_px, 1, RULE)
        for j, tile in enumerate(tiles):
            column_px = j % layout.per_row * (layout.card_px + _GAP_PX)
            _draw_card(page, left_px + column_px, rows_px[j // layout.per_row], tile, layout)
    if groups:
        _draw_legend(page, rows_px[-1], layout, tile_mpp)
    for i, line in enumerate(notes, start=1):
        page.write(_MARGIN_PX, rows_px[-1] + _LEGEND_PX + _TEXT_LINE_PX * i - 6, line, _SMALL)
    return page


def _row_tops_px(groups: Sequence[Sequence[ExplainedTile]], layout: _Layout, top_px: int) -> list[int]:
    """Where each row begins, one line for all groups, and where the last one ends."""
    tops_px = [top_px]
    for i in range(0, max(map(len, groups), default=0), layout.per_row):
        row = [tile for group in groups for tile in group[i : i + layout.per_row]]
        panel_px = max(layout.size_px(tile)[1] for tile in row)
        text_px = max(_TEXT_LINE_PX * len(_text_below(tile, layout)) for tile in row)
        tops_px.append(tops_px[-1] + _CARD_HEAD_PX + panel_px + text_px + _BETWEEN_ROWS_PX)
    return tops_px


def _text_below(tile: ExplainedTile, layout: _Layout) -> list[tuple[str, Lettering]]:
    """Scores, then the prompt, in lines that keep away from those of the next card."""
    scores = " · ".join(f"{name} {_figure(score, '.4g')}" for name, score in tile.scores.items())
    paragraphs = ((scores, _SMALL, _MOST_SCORE_LINES), (tile.prompt, _PROMPT, _MOST_PROMPT_LINES))
    return [
        (line, lettering)
        for text, lettering, most_lines in paragraphs
        for line in wrapped(text, layout.card_px - _GAP_PX, lettering, most_lines=most_lines)
    ]


def _draw_card(page: Page, left_px: int, top_px: int, tile: ExplainedTile, layout: _Layout) -> None:
    """The z, and what it is of; the tile, and what stands beside it; scores and prompt."""
    beside_px = _draw_z(page, left_px, top_px, tile.z) + _GAP_PX
    caption = shortened(tile.caption, _PANEL_PX - beside_px, _SMALL)
    size_px = layout.size_px(tile)
    page.write(left_px + beside_px, top_px + _ON_LINE_PX, caption, _SMALL)
    for i, name in enumerate(("", *layout.beside)):
        pixels = _panel_pixels(tile, name, layout)
        x_px = left_px + i * (_PANEL_PX + _GAP_PX)
        page.write(x_px, top_px + _ON_LINE_PX, name, _PANEL_NAME)
        _draw_panel(page, x_px, top_px + _CARD_HEAD_PX, pixels, size_px)
        if pixels is None:
            middle_px = x_px + size_px[0] // 2, top_px + _CARD_HEAD_PX + size_px[1] // 2
            page.write(*middle_px, f"no {name.lower()}", _PANEL_NAME, align="center")
    baseline_px = top_px + _CARD_HEAD_PX + size_px[1] + _TEXT_LINE_PX
    for i, (line, lettering) in enumerate(_text_below(tile, layout)):
        page.write(left_px, baseline_px + i * _TEXT_LINE_PX, line, lettering)


def _panel_pixels(tile: ExplainedTile, name: str, layout: _Layout) -> UInt8[np.ndarray, "y x rgb"] | None:
    if name in {"", _RECONSTRUCTION}:
        return tile.rebuilt if name else tile.pixels
    if tile.abnormality is None or layout.scale is None:
        return None
    return map_picture(tile.abnormality, layout.size_px(tile), layout.scale)


def _draw_z(page: Page, left_px: int, top_px: int, z: float) -> int:
    """On its colour, dark or white, whichever is easier to read. The width of the label."""
    (colour,) = z_colours(np.array([z]))
    luminance = (colour / 255) ** 2.2 @ np.array([0.2126, 0.7152, 0.0722])
    lettering = Lettering(_Z_SIZE_PX, INK if luminance >= _READABLE_LUMINANCE else "#ffffff", bold=True)
    text = f"z {_figure(z, '.2f')}"
    width_px = text_width_px(text, lettering) + 2 * _AROUND_Z_PX
    page.fill(left_px, top_px, width_px, _Z_LABEL_PX, "#{:02x}{:02x}{:02x}".format(*colour.tolist()))
    page.write(left_px + _AROUND_Z_PX, top_px + _ON_LINE_PX, text, lettering)
    return width_px


def _draw_panel(
    page: Page, left_px: int, top_px: int, pixels: UInt8[np.ndarray, "y x rgb"] | None, size_px: tuple[int, int]
) -> None:
    """With a frame, for tiles that are white at their border; grey where there is nothing to show."""
    page.fill(left_px - 1, top_px - 1, size_px[0] + 2, size_px[1] + 2, RULE)
    if pixels is None:
        page.fill(left_px, top_px, *size_px, TRACK)
    else:
        resized = Image.fromarray(pixels).resize(size_px, Image.Resampling.LANCZOS)
        page.show(left_px, top_px, np.asarray(resized), size_px=size_px)


def _draw_legend(page: Page, top_px: int, layout: _Layout, tile_mpp: float) -> None:
    """A scale bar below the first tile, and a colour bar below the first map."""
    page_mpp = tile_mpp / layout.magnification
    length_um = round_length(_PANEL_PX / 2 * page_mpp)
    page.fill(_MARGIN_PX, top_px + 4, round(length_um / page_mpp), 4, INK)
    page.write(_MARGIN_PX, top_px + 28, f"{length_um:g} µm", _SMALL)
    if layout.scale:
        left_px = _MARGIN_PX + len(layout.beside) * (_PANEL_PX + _GAP_PX)
        draw_colour_bar(page, left_px, top_px, layout.scale, width_px=_PANEL_PX, lettering=_SMALL)


def _figure(value: float, form: str) -> str:
    return format(value, form).replace("-", "\N{MINUS SIGN}")
