"""Show how often each keyword stands in the prompts of a cohort. Knows shares and text; knows no slide and no stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isnan
from pathlib import Path

import numpy as np
from jaxtyping import Float

from wsi_anomaly.reporting.page import (
    BLUE,
    FAINT_INK,
    INK,
    ORANGE,
    TRACK,
    Lettering,
    Page,
    blank_page,
    round_length,
    shortened,
    text_width_px,
    wrapped,
)

_MARGIN_PX, _GAP_PX = 36, 14
_BARS_PX, _VALUE_PX = 520, 56
"""The longest bar, and room for the figure at its end."""
_MOST_KEYWORD_PX, _MOST_CATEGORY_PX = 420, 200
_BAR_PX, _LINE_PX, _BETWEEN_ROWS_PX = 12, 17, 9
_AXIS_PX = 26
_TITLE = Lettering(22, bold=True)
_KEYWORD = Lettering(14)
_FAINT = Lettering(14, FAINT_INK)
_VALUE = Lettering(11, FAINT_INK)
_COLOURS = (BLUE, ORANGE, INK)


def write_keyword_chart(
    path: Path,
    shares: Mapping[str, Float[np.ndarray, " keyword"]],
    keywords: Sequence[str],
    *,
    categories: Sequence[str],
    counts: Mapping[str, int],
) -> None:
    """Draw for each keyword the share of tiles whose prompt holds it: a bar for each of one to three groups of slides.

    `shares` (of 1) and `counts` (of tiles) are by the name of the group, `categories` by keyword. Keywords stand in the
    order of the first group's shares; those that no prompt holds are named below.
    """
    _chart(shares, keywords, categories, counts).save(path)


@dataclass(frozen=True, slots=True)
class _Row:
    """A keyword that some prompt holds."""

    lines: list[str]
    category: str
    percents: list[float]

    @property
    def height_px(self) -> int:
        """Of its text or of its bars, with the space below."""
        return max(_LINE_PX * len(self.lines), _BAR_PX * len(self.percents)) + _BETWEEN_ROWS_PX


@dataclass(frozen=True, slots=True)
class _Scale:
    """From percent to pixels."""

    left_px: int
    step: float
    steps: int

    def x_px(self, percent: float) -> int:
        """Where a bar of that length ends."""
        return self.left_px + round(_BARS_PX * percent / (self.step * self.steps))


def _chart(
    shares: Mapping[str, Float[np.ndarray, " keyword"]],
    keywords: Sequence[str],
    categories: Sequence[str],
    counts: Mapping[str, int],
) -> Page:
    percents = 100 * np.stack([shares[group] for group in shares], axis=1)
    rows, unused = _rows(percents, keywords, categories)
    category_px = _widest_px([row.category for row in rows], _FAINT, _MOST_CATEGORY_PX)
    keyword_px = _widest_px([line for row in rows for line in row.lines], _KEYWORD, _MOST_KEYWORD_PX)
    scale = _scale(_MARGIN_PX + category_px + keyword_px + _GAP_PX, float(np.nan_to_num(percents).max(initial=0)))
    width_px = scale.left_px + _BARS_PX + _VALUE_PX + _MARGIN_PX
    paragraph = wrapped(_unused_text(unused), width_px - 2 * _MARGIN_PX, _FAINT, most_lines=len(unused) + 1)
    rows_top_px = _MARGIN_PX + 82 + 22 * len(shares) + _AXIS_PX
    rows_px = sum(row.height_px for row in rows)
    page = blank_page(width_px, rows_top_px + rows_px + _AXIS_PX + 24 + 20 * len(paragraph) + _MARGIN_PX)
    _draw_header(page, counts, list(shares), width_px)
    _draw_axis(page, scale, rows_top_px, rows_px)
    _draw_rows(page, rows, scale, rows_top_px, keyword_right_px=_MARGIN_PX + keyword_px - _GAP_PX)
    for i, line in enumerate(paragraph):
        page.write(_MARGIN_PX, rows_top_px + rows_px + _AXIS_PX + 36 + 20 * i, line, _FAINT)
    return page


def _rows(
    percents: Float[np.ndarray, "keyword group"], keywords: Sequence[str], categories: Sequence[str]
) -> tuple[list[_Row], list[str]]:
    """The keywords of some prompt, most frequent first, and the names of the others."""
    known = np.nan_to_num(percents)
    rows, unused = [], []
    for i in np.argsort(-known[:, 0], kind="stable"):
        if known[i].any():
            lines = wrapped(keywords[i], _MOST_KEYWORD_PX, _KEYWORD, most_lines=3)
            rows.append(_Row(lines, shortened(categories[i], _MOST_CATEGORY_PX, _FAINT), percents[i].tolist()))
        else:
            unused.append(keywords[i])
    return rows, unused


def _widest_px(texts: Sequence[str], lettering: Lettering, most_px: int) -> int:
    """The width of a column with the gap to its right; none if there is nothing to write in it."""
    widest_px = max((text_width_px(text, lettering) for text in texts), default=0)
    return min(widest_px, most_px) + _GAP_PX if widest_px else 0


def _scale(left_px: int, most_percent: float) -> _Scale:
    """In three to seven round steps."""
    step = round_length(most_percent / 2.5) if most_percent else 1.0
    return _Scale(left_px, step, max(ceil(most_percent / step), 1))


def _unused_text(unused: Sequence[str]) -> str:
    return f"In no prompt ({len(unused)}): {'; '.join(unused)}" if unused else ""


def _draw_header(page: Page, counts: Mapping[str, int], groups: Sequence[str], width_px: int) -> None:
    page.write(_MARGIN_PX, _MARGIN_PX + 17, "Keywords of the prompts", _TITLE)
    page.write(_MARGIN_PX, _MARGIN_PX + 46, "Share of tiles whose prompt holds the keyword, in percent", _FAINT)
    for i, (group, colour) in enumerate(zip(groups, _COLOURS[: len(groups)], strict=True)):
        y_px = _MARGIN_PX + 76 + 22 * i
        legend = f"{group}, {counts[group]:,} {'tile' if counts[group] == 1 else 'tiles'}"
        page.fill(_MARGIN_PX, y_px - 10, 26, _BAR_PX - 1, colour)
        page.write(_MARGIN_PX + 34, y_px, shortened(legend, width_px - 2 * _MARGIN_PX - 34, _KEYWORD), _KEYWORD)


def _draw_axis(page: Page, scale: _Scale, top_px: int, height_px: int) -> None:
    """A line for each step, with its percent above and below."""
    for i in range(scale.steps + 1 if height_px else 0):
        x_px = scale.x_px(i * scale.step)
        page.fill(x_px, top_px - 6, 1, height_px + 6, TRACK)
        for baseline_px in (top_px - 12, top_px + height_px + 16):
            page.write(x_px, baseline_px, f"{i * scale.step:g} %", _VALUE, align="center")


def _draw_rows(page: Page, rows: Sequence[_Row], scale: _Scale, top_px: int, *, keyword_right_px: int) -> None:
    """Text and bars of a row share their middle."""
    for row in rows:
        middle_px = top_px + (row.height_px - _BETWEEN_ROWS_PX) // 2
        first_line_px = middle_px - _LINE_PX * len(row.lines) // 2 + 13
        page.write(keyword_right_px + _GAP_PX, middle_px + 5, row.category, _FAINT)
        for i, line in enumerate(row.lines):
            page.write(keyword_right_px, first_line_px + _LINE_PX * i, line, _KEYWORD, align="right")
        bar_top_px = middle_px - _BAR_PX * len(row.percents) // 2
        for percent, colour in zip(row.percents, _COLOURS[: len(row.percents)], strict=True):
            end_px = scale.x_px(0.0 if isnan(percent) else percent)
            page.fill(scale.left_px, bar_top_px, end_px - scale.left_px, _BAR_PX - 1, colour)
            page.write(end_px + 6, bar_top_px + 9, _percent_text(percent), _VALUE)
            bar_top_px += _BAR_PX
        top_px += row.height_px


def _percent_text(percent: float) -> str:
    """Short, and never "0" for what is there."""
    if isnan(percent):
        return "\N{EN DASH}"
    if 0 < percent < 0.05:  # noqa: PLR2004 - would round to nothing
        return "<0.1"
    return f"{percent:.1f}" if percent else "0"
