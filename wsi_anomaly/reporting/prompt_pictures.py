"""Show tiles of a slide beside the keywords of their prompts. Knows arrays and text; knows no model and no stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from wsi_anomaly.reporting.page import (
    BLUE,
    FAINT_INK,
    INK,
    RULE,
    TRACK,
    Lettering,
    Page,
    blank_page,
    round_length,
    shortened,
    wrapped,
)

_TILE_PX, _BESIDE_PX, _PANEL_PX = 368, 20, 320
_CARD_PX = _TILE_PX + _BESIDE_PX + _PANEL_PX
_MARGIN_PX, _BETWEEN_COLUMNS_PX, _BETWEEN_ROWS_PX = 36, 44, 30
_CAPTION_PX, _FOOTER_PX = 26, 96
_MOST_COLUMNS = 3
_TITLE = Lettering(24, bold=True)
_SUBTITLE, _SUBTITLE_LINE_PX = Lettering(16, FAINT_INK), 22
_CAPTION = Lettering(14, FAINT_INK)
_KEYWORD, _KEYWORD_LINE_PX = Lettering(15), 17
_COSINE = Lettering(13, FAINT_INK)
_WEIGHT = Lettering(14, bold=True)
_BAR_PX, _ABOVE_BAR_PX, _BELOW_BAR_PX = 8, 4, 9
_TRACK_PX = 204
_LEAST_ROWS = 5
_TIMES, _MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"


PromptKeyword = tuple[str, float, float]
"""A keyword, its weight in the tile's prompt (1 being plain), and the cosine similarity of tile and keyword."""


def choose_tiles(embeddings: Float32[np.ndarray, "tile d"], count: int) -> Int64[np.ndarray, " chosen"]:
    """Positions, ascending, of `count` tiles that span the variety of a slide, or of all readable ones if fewer.

    `embeddings` are unit vectors, NaN for a tile that could not be read. The first choice is the tile nearest to the
    mean, each further one the farthest from all choices before (farthest-point sampling, Gonzalez 1985).
    """
    readable = np.flatnonzero(np.isfinite(embeddings).all(axis=1))
    vectors = embeddings if len(readable) == len(embeddings) else embeddings[readable]
    nearest = np.full(len(vectors), -np.inf, np.float32)  # cosine with the nearest choice
    chosen: list[int] = []
    for _ in range(min(count, len(vectors))):
        newest = int(np.argmin(nearest) if chosen else np.argmax(vectors @ vectors.mean(axis=0)))
        chosen.append(newest)
        nearest = np.maximum(nearest, vectors @ vectors[newest])
        nearest[newest] = np.inf  # a tile that looks just like it is another tile
    return np.sort(readable[chosen]).astype(np.int64)


def write_prompt_sheet(
    path: Path,
    tiles: UInt8[np.ndarray, "tile y x rgb"],
    keywords: Sequence[Sequence[PromptKeyword]],
    *,
    captions: Sequence[str],
    slide_id: str,
    tile_mpp: float,
    header: str,
) -> None:
    """Draw a dozen tiles, each beside its keywords, nearest first, with cosines as bars and weights as figures.

    `header` is the line below the slide's name: which model, which weighting. Bars are of one scale on the whole sheet.
    """
    _sheet(tiles, keywords, captions, header=(slide_id, header), tile_mpp=tile_mpp).save(path)


@dataclass(frozen=True, slots=True)
class _Rows:
    """How keywords stand in a panel: alike in all of them, so that one can look along a line."""

    pitch_px: int
    most_lines: int
    full_cosine: float
    """Of a bar that fills its track."""


def _rows(keywords: Sequence[Sequence[PromptKeyword]]) -> _Rows:
    """As many as the longest prompt needs."""
    around_text_px = _ABOVE_BAR_PX + _BAR_PX + _BELOW_BAR_PX
    count = max([_LEAST_ROWS, *map(len, keywords)])
    pitch_px = max(_TILE_PX // count, _KEYWORD_LINE_PX + around_text_px)
    highest = max((cosine for words in keywords for _, _, cosine in words), default=0.0)
    return _Rows(pitch_px, (pitch_px - around_text_px) // _KEYWORD_LINE_PX, max(ceil(10 * highest), 1) / 10)


def _sheet(
    tiles: UInt8[np.ndarray, "tile y x rgb"],
    keywords: Sequence[Sequence[PromptKeyword]],
    captions: Sequence[str],
    *,
    header: tuple[str, str],
    tile_mpp: float,
) -> Page:
    columns = min(max(ceil(sqrt(len(tiles))), 1), _MOST_COLUMNS)
    width_px = columns * (_CARD_PX + _BETWEEN_COLUMNS_PX) - _BETWEEN_COLUMNS_PX
    subtitle = wrapped(header[1], width_px, _SUBTITLE, most_lines=3)
    rows = _rows(keywords)
    first_row_px = _MARGIN_PX + 52 + _SUBTITLE_LINE_PX * len(subtitle)
    row_px = _CAPTION_PX + max(_TILE_PX, rows.pitch_px * max(map(len, keywords), default=0)) + _BETWEEN_ROWS_PX
    footer_px = first_row_px + ceil(len(tiles) / columns) * row_px
    page = blank_page(width_px + 2 * _MARGIN_PX, footer_px + _FOOTER_PX)
    page.write(_MARGIN_PX, _MARGIN_PX + 20, shortened(header[0], width_px, _TITLE, keep_end=True), _TITLE)
    for i, line in enumerate(subtitle):
        page.write(_MARGIN_PX, _MARGIN_PX + 50 + _SUBTITLE_LINE_PX * i, line, _SUBTITLE)
    for i, (tile, words, caption) in enumerate(zip(tiles, keywords, captions, strict=True)):
        left_px = _MARGIN_PX + i % columns * (_CARD_PX + _BETWEEN_COLUMNS_PX)
        top_px = first_row_px + i // columns * row_px
        page.write(left_px, top_px + 14, shortened(caption, _CARD_PX, _CAPTION), _CAPTION)
        _draw_tile(page, left_px, top_px + _CAPTION_PX, tile)
        _draw_keywords(page, left_px + _TILE_PX + _BESIDE_PX, top_px + _CAPTION_PX, words, rows)
    if len(tiles):
        _draw_scale_bar(page, footer_px, tile_mpp * max(tiles.shape[1:3]) / _TILE_PX)
        _draw_key(page, footer_px, width_px, rows)
    return page


def _draw_tile(page: Page, left_px: int, top_px: int, tile: UInt8[np.ndarray, "y x rgb"]) -> None:
    """With a frame, for tiles that are white at their border."""
    scale = _TILE_PX / max(tile.shape[:2])
    width_px, height_px = round(tile.shape[1] * scale), round(tile.shape[0] * scale)
    page.fill(left_px - 1, top_px - 1, width_px + 2, height_px + 2, RULE)
    page.show(left_px, top_px, tile, size_px=(width_px, height_px))


def _draw_keywords(page: Page, left_px: int, top_px: int, keywords: Sequence[PromptKeyword], rows: _Rows) -> None:
    if not keywords:
        page.write(left_px, top_px + 13, "no keyword", _CAPTION)
    for i, (text, weight, cosine) in enumerate(keywords):
        y_px = top_px + i * rows.pitch_px
        for line in wrapped(text, _PANEL_PX, _KEYWORD, most_lines=rows.most_lines):
            page.write(left_px, y_px + 13, line, _KEYWORD)
            y_px += _KEYWORD_LINE_PX
        y_px += _ABOVE_BAR_PX
        page.fill(left_px, y_px, _TRACK_PX, _BAR_PX, TRACK)
        page.fill(left_px, y_px, round(_TRACK_PX * max(cosine, 0.0) / rows.full_cosine), _BAR_PX, BLUE)
        page.write(left_px + _TRACK_PX + 10, y_px + _BAR_PX, f"{cosine:.2f}".replace("-", _MINUS), _COSINE)
        page.write(left_px + _PANEL_PX, y_px + _BAR_PX, f"{_TIMES}{weight:.2f}", _WEIGHT, align="right")


def _draw_scale_bar(page: Page, top_px: int, page_mpp: float) -> None:
    """Of a round length, below the first tile."""
    length_um = round_length(_TILE_PX / 2 * page_mpp)
    page.fill(_MARGIN_PX, top_px + 4, round(length_um / page_mpp), 4, INK)
    page.write(_MARGIN_PX, top_px + 26, f"{length_um:g} µm", _CAPTION)


def _draw_key(page: Page, top_px: int, width_px: int, rows: _Rows) -> None:
    """What bars and figures mean, below the first keywords."""
    left_px = _MARGIN_PX + _TILE_PX + _BESIDE_PX
    bars = f"Bars: cosine similarity of tile and keyword, from 0 to {rows.full_cosine:g}."
    key = f"{bars} {_TIMES}: weight of the keyword in the prompt."
    for i, line in enumerate(wrapped(key, _MARGIN_PX + width_px - left_px, _COSINE, most_lines=3)):
        page.write(left_px, top_px + 9 + 17 * i, line, _COSINE)
