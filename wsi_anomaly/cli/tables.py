"""Tables that commands print when they are done."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from wsi_anomaly.cli.console import stdout
from wsi_anomaly.storage.slide_table import SlideRow

_UM2_PER_MM2 = 1e6


def print_slides(rows: Iterable[SlideRow], out: Path) -> None:
    """One row a slide, the most abnormal first, failures last with their reasons."""
    rows = sorted(rows, key=lambda row: -(row.z_max if row.z_max is not None else float("-inf")))
    table = Table(box=None, header_style="bold")
    for name in ("slide", "status"):
        table.add_column(name, overflow="fold")
    for name in ("tiles", "Z_MAX", "Z_99", "mm² over threshold"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            escape(row.slide_id),
            row.status,
            "" if row.tiles is None else f"{row.tiles:,}",
            _number(row.z_max),
            _number(row.z_99),
            _number(None if row.area_over_threshold_um2 is None else row.area_over_threshold_um2 / _UM2_PER_MM2),
        )
    stdout.print(table)
    for row in rows:
        if row.status != "done":
            stdout.print(f"{row.status}: {_named(row)}", markup=False, highlight=False, soft_wrap=True)
    if any(row.status == "done" for row in rows):
        line = f"Everything is in {out}: slides.csv, and slides/<slide_id>/ with heatmap.png and GeoJSON for QuPath."
    else:
        line = f"No slide is finished. The reasons are in {out / 'slides.csv'} too."
    stdout.print(line, markup=False, highlight=False, soft_wrap=True)


def _named(row: SlideRow) -> str:
    """The reason with the slide that it is about, once."""
    return row.reason if row.slide_id in row.reason else f"{row.slide_id}: {row.reason}"


def print_metrics(evaluation: Any) -> None:  # noqa: ANN401 - an `Evaluation`, whose module is heavy and imported late
    """The measures that people ask for first: one row each, one column a detector; then the tests between detectors."""
    found = evaluation.findings
    table = Table(box=None, header_style="bold")
    table.add_column("measure")
    for detector in found:
        table.add_column(escape(detector), justify="right")
    for name in _shown(list(dict.fromkeys(name for one in found.values() for name in one.measures))):
        cells = (_measured(one.measures.get(name), one.intervals.get(name)) for one in found.values())
        table.add_row(escape(name.replace("_", " ")), *cells)
    stdout.print(table)
    first = next(iter(found))
    for other, tests in evaluation.comparisons.items():
        for name in _shown(list(tests)):
            line = (
                f"{first} less {other}: {name.replace('_', ' ')} {tests[name].difference:+.3f}, "
                f"p = {tests[name].p_value:.2g} ({tests[name].method})"
            )
            stdout.print(line, markup=False, highlight=False, soft_wrap=True)


def print_listing(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Long texts in columns: no word is ever cut. In a pipe each row is one line."""
    for number, line in enumerate(listing_lines(columns, rows, stdout.width if stdout.is_terminal else None)):
        style = "bold" if number == 0 else ""
        stdout.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def listing_lines(
    columns: Sequence[str], rows: Sequence[Sequence[str]], screen_characters: int | None
) -> Iterator[str]:
    """A table under the names of its columns, where the screen is wide enough; else a paragraph for each row.

    Without a width of the screen nothing is wrapped.
    """
    widths = _column_widths([columns, *rows], screen_characters)
    if widths:
        for row in (columns, *rows):
            wrapped = [_wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
            for cells in zip_longest(*wrapped, fillvalue=""):
                padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
                yield _GAP.join(padded).rstrip()
        return
    for row in rows:
        yield row[0]
        for name, cell in list(zip(columns, row, strict=True))[1:]:
            yield from (f"  {line}" for line in _wrap(f"{name}: {cell}", (screen_characters or 0) - 2))


_GAP = "  "
_LEAST_CHARACTERS = 24
"""A column of long texts is not made narrower: one word a line is hard to read."""


def _column_widths(rows: Sequence[Sequence[str]], screen_characters: int | None) -> list[int]:
    """In characters: enough for the longest word of each column, the rest shared out; none if that is too much."""
    columns = list(zip(*rows, strict=True))
    widest = [max(map(len, column)) for column in columns]
    if screen_characters is None:
        return widest
    words = [max((len(word) for cell in column for word in cell.split()), default=0) for column in columns]
    least = [max(word, min(_LEAST_CHARACTERS, wide)) for word, wide in zip(words, widest, strict=True)]
    spare = screen_characters - len(_GAP) * (len(columns) - 1) - sum(least)
    wanted = [wide - narrow for wide, narrow in zip(widest, least, strict=True)]
    if spare < 0:
        return []
    share = min(1.0, spare / max(1, sum(wanted)))
    return [narrow + int(share * more) for narrow, more in zip(least, wanted, strict=True)]


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(1, width), break_long_words=False, break_on_hyphens=False) or [""]


_SHOWN = (
    *("slides", "abnormal_slides", "slide_auroc_z_max", "slide_aupr_z_max", "slide_auroc_z_99", "slide_aupr_z_99"),
    *("tiles", "abnormal_tiles", "tile_auroc", "tile_aupr", "tile_fpr_at_95_tpr"),
    *("dice_abnormal_slides", "iou_abnormal_slides", "tnr_normal_slides", "pro_auc", "froc_score"),
)
_SHOWN_OF_SUBGROUPS = ("slide_auroc_z_max_", "slide_auroc_z_99_", "dice_abnormal_slides_")


def _shown(names: Sequence[str]) -> Iterator[str]:
    """Each measure that is there with those of its subgroups behind it."""
    for shown in _SHOWN:
        if shown in names:
            yield shown
        if f"{shown}_" in _SHOWN_OF_SUBGROUPS:
            yield from (name for name in names if name.startswith(f"{shown}_"))


def _measured(
    value: float | int | None,  # noqa: PYI041 - beartype takes no int for a float
    interval: tuple[float, float] | None,
) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if interval is None or interval[0] == interval[1]:  # without width it says nothing of how sure the value is
        return f"{value:.3f}"
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
