"""Write a table of measures as Markdown and as LaTeX. Knows figures and text; knows no detector, slide or file."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite, isnan
from typing import Literal
from unicodedata import combining, east_asian_width

_DECIMALS = 3
_MISSING = "\N{EN DASH}"
_MARKS = ("†", "‡", "§", "¶")
_BETWEEN_HEADS = " · "

_IN_MARKDOWN = re.compile(r"[\\|*`<\[\]~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|^(?:[#>+-]|\d+[.)])(?=\s)")
"""What Markdown would take for its own; not the underscore of Z_MAX, which stays readable as plain text."""
_SYMBOLS = "†‡§¶\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}±\N{MULTIPLICATION SIGN}·≥≤∞µ²"
_AS_LATEX = (
    r"\textdagger{} \textdaggerdbl{} \S{} \P{} -- --- $-$ $\pm$ $\times$ $\cdot$ $\ge$ $\le$ $\infty$ $\mu$ $^2$"
)
_IN_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    '"': "''",
    "--": "-{}-",  # two hyphens, not a dash
    **{one: f"\\{one}" for one in "_%&#${}"},
    **{one: f"{{{one}}}" for one in "[]*"},  # a line break takes one that follows for its option
    **dict(zip(_SYMBOLS, _AS_LATEX.split(), strict=True)),
}
_NOT_LATEX = re.compile("|".join(map(re.escape, _IN_LATEX)))


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure: a measure, or a count where it is an int."""

    value: float | int | None = None
    """None or NaN where there is none."""
    interval: tuple[float, float] | None = None
    """Its low and high end, shown in brackets."""
    deviation: float | None = None
    """Shown as ±."""
    warning: str = ""
    """Becomes a footnote; such a value is never shown as the best."""


@dataclass(frozen=True, slots=True)
class Column:
    """A measure; its last head is its name, those before are of all its neighbours that share them."""

    heads: tuple[str, ...]
    better: Literal["higher", "lower"] | None = "higher"
    """Which value of the column is shown as the best; None for none."""


@dataclass(frozen=True, slots=True)
class Row:
    """A detector, or whatever else was measured."""

    name: str
    cells: tuple[Cell, ...]
    """One for each column."""
    warning: str = ""
    """About all of its cells."""


@dataclass(frozen=True, slots=True)
class Table:
    """Measures in columns, what was measured in rows.

    Raises:
        ValueError: a row has not as many cells as there are columns.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    caption: str
    notes: tuple[str, ...] = ()
    """The choices that have to be known to compare the figures with others."""
    corner: str = "Detector"
    """What the rows are."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(f"row {row.name!r}: {len(row.cells)} cells for {len(self.columns)} columns")


def to_markdown(table: Table, *, turned: bool = False) -> str:
    """A GitHub table that can be read as plain text too, its caption above, its notes below.

    Intervals follow their value. `turned` puts the measures into lines and what was measured into columns.
    """
    marks, best = _marks(table), _best(table)
    heads = [_BETWEEN_HEADS.join(column.heads) for column in table.columns]
    names = [row.name + marks.get(row.warning, "") for row in table.rows]
    cells = [
        [_markdown_cell(cell, marks, best=(i, j) in best) for j, cell in enumerate(row.cells)]
        for i, row in enumerate(table.rows)
    ]
    lines = [list(map(_markdown_text, ["" if turned else table.corner, *heads]))]
    lines += [[_markdown_text(name), *line] for name, line in zip(names, cells, strict=True)]
    if turned:
        lines = [list(line) for line in zip(*lines, strict=True)]
    parts = [_markdown_text(table.caption), "\n".join(_aligned(lines))]
    notes = [f"- {_markdown_text(note)}" for note in _notes(table, marks)]
    return "\n\n".join(filter(None, [*parts, "\n".join(notes)])) + "\n"


def to_latex(table: Table, *, label: str, turned: bool = False) -> str:
    r"""A `table` environment that needs the package booktabs; `label` is what `\ref` calls it.

    Intervals stand in small type below their row, or the table would be wider than a page. `turned` puts the measures
    into lines and what was measured into columns.
    """
    marks, best = _marks(table), _best(table)
    body = _latex_turned(table, marks, best) if turned else _latex_upright(table, marks, best)
    notes = [rf"{_latex_text(note)}\par" for note in _notes(table, marks)]
    return "\n".join(
        [
            r"\begin{table}[tbp]",
            r"\centering",
            rf"\caption{{{_latex_text(table.caption)}}}",
            rf"\label{{{label}}}",
            r"\smallskip\small",
            *body,
            *([r"\par\medskip", r"\begin{minipage}{\linewidth}\footnotesize", *notes, r"\end{minipage}"] * bool(notes)),
            r"\end{table}",
            "",
        ]
    )


def _marks(table: Table) -> dict[str, str]:
    """By warning, in reading order: † ‡ § ¶, then doubled."""
    said = [text for row in table.rows for text in (row.warning, *(cell.warning for cell in row.cells))]
    warnings = list(dict.fromkeys(filter(None, said)))
    return {warning: _MARKS[i % len(_MARKS)] * (1 + i // len(_MARKS)) for i, warning in enumerate(warnings)}


def _best(table: Table) -> set[tuple[int, int]]:
    """Row and column of the best values as printed, so that equal ones share the rank; of one alone there is none."""
    best = set()
    for j, column in enumerate(table.columns):
        sign = {"higher": 1, "lower": -1, None: 0}[column.better]
        ranks = {
            i: sign * round(row.cells[j].value or 0, _DECIMALS)
            for i, row in enumerate(table.rows)
            if _known(row.cells[j]) and not row.warning and not row.cells[j].warning
        }
        if sign and sum(_known(row.cells[j]) for row in table.rows) > 1:
            best |= {(i, j) for i, rank in ranks.items() if rank == max(ranks.values())}
    return best


def _known(cell: Cell) -> bool:
    return cell.value is not None and not isnan(cell.value)


def _notes(table: Table, marks: dict[str, str]) -> list[str]:
    """Warnings first: they change what the figures mean."""
    cells = [cell for row in table.rows for cell in row.cells]
    notes = [f"{mark} {warning}" for warning, mark in marks.items()] + list(table.notes)
    if _best(table):
        notes.append(f"Bold: the best value of a measure{', of those without a warning' * bool(marks)}.")
    return notes + [f"{_MISSING}: not available."] * (not all(map(_known, cells)))


def _figure(value: float | int | None) -> str:  # noqa: PYI041 - an int is a count
    if value is None or isnan(value):
        return _MISSING
    form = "," if isinstance(value, int) or not isfinite(value) else f".{_DECIMALS}f"
    text = format(value, form).replace("-", "\N{MINUS SIGN}").replace("inf", "\N{INFINITY}")
    return text if text.strip("\N{MINUS SIGN}0.") else text.lstrip("\N{MINUS SIGN}")  # no negative zero


def _uncertainty(cell: Cell) -> str:
    """The interval or the deviation, empty where there is neither or where there is no value."""
    if not _known(cell):
        return ""
    shown = [f"± {_figure(cell.deviation)}"] if cell.deviation is not None else []
    if cell.interval:
        shown.append(f"({_figure(cell.interval[0])}\N{EN DASH}{_figure(cell.interval[1])})")
    return " ".join(shown)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _markdown_text(text: str) -> str:
    return _IN_MARKDOWN.sub(r"\\\g<0>", _one_line(text))


def _markdown_cell(cell: Cell, marks: dict[str, str], *, best: bool) -> str:
    value = f"**{_figure(cell.value)}**" if best else _figure(cell.value) + marks.get(cell.warning, "")
    return f"{value} {_uncertainty(cell)}".rstrip()


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """As lines of text: the first column to the left, figures to the right."""
    widths = [max(3, *map(_width, column)) for column in zip(*lines, strict=True)]
    padded = [
        [
            text + " " * (width - _width(text)) if i == 0 else " " * (width - _width(text)) + text
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:])]


def _width(text: str) -> int:
    """In the columns of a terminal."""
    return sum(0 if combining(one) else 2 if east_asian_width(one) in "WF" else 1 for one in text)


def _latex_text(text: str) -> str:
    return _NOT_LATEX.sub(lambda found: _IN_LATEX[found.group()], _one_line(text))


def _latex_upright(table: Table, marks: dict[str, str], best: set[tuple[int, int]]) -> list[str]:
    heads = _heads(table)
    above = [line for level in range(len(heads[0]) - 1) for line in _latex_groups(heads, level)]
    names = _latex_line(map(_latex_text, [table.corner, *(head[-1] for head in heads)]))
    lines = [
        _latex_cells([_latex_name(row, marks)], [(cell, (i, j) in best) for j, cell in enumerate(row.cells)], marks)
        for i, row in enumerate(table.rows)
    ]
    return _tabular(f"l{'r' * len(heads)}", [*above, names], [line for pair in lines for line in pair])


def _latex_turned(table: Table, marks: dict[str, str], best: set[tuple[int, int]]) -> list[str]:
    heads = _heads(table)
    depth = len(heads[0])
    lines: list[str] = []
    for j, head in enumerate(heads):
        new = [not j or head[: level + 1] != heads[j - 1][: level + 1] for level in range(depth)]
        if new[0] and j and depth > 1:
            lines.append(r"\addlinespace")
        shown = [_latex_text(one) if fresh else "" for one, fresh in zip(head, [*new[:-1], True], strict=True)]
        lines += _latex_cells(shown, [(row.cells[j], (i, j) in best) for i, row in enumerate(table.rows)], marks)
    names = _latex_line([*[""] * depth, *(_latex_name(row, marks) for row in table.rows)])
    return _tabular("l" * depth + "r" * len(table.rows), [names], lines)


def _heads(table: Table) -> list[tuple[str, ...]]:
    """Of all columns, as many for each."""
    depth = max(len(column.heads) for column in table.columns)
    return [("",) * (depth - len(column.heads)) + column.heads for column in table.columns]


def _latex_groups(heads: Sequence[tuple[str, ...]], level: int) -> list[str]:
    """The heads above columns that share them, each over a rule."""
    cells, rules, first = [""], [], 2
    for shared, group in groupby(heads, key=lambda head: head[: level + 1]):
        count = len(list(group))
        cells.append(rf"\multicolumn{{{count}}}{{c}}{{{_latex_text(shared[-1])}}}")
        rules += [rf"\cmidrule(lr){{{first}-{first + count - 1}}}"] * bool(shared[-1])
        first += count
    return [_latex_line(cells), "".join(rules)]


def _latex_cells(names: Sequence[str], cells: Sequence[tuple[Cell, bool]], marks: dict[str, str]) -> list[str]:
    """A line of values and, where there are any, a line of their uncertainties."""
    values = [_latex_value(cell, marks, best=best) for cell, best in cells]
    below = [_uncertainty(cell) for cell, _ in cells]
    small = [rf"{{\scriptsize {_latex_text(text)}}}" if text else "" for text in below]
    return [_latex_line([*names, *values]), *[_latex_line([*[""] * len(names), *small]) + "[2pt]"] * any(below)]


def _latex_value(cell: Cell, marks: dict[str, str], *, best: bool) -> str:
    value = _latex_text(_figure(cell.value))
    mark = rf"\rlap{{{_latex_mark(cell.warning, marks)}}}" if cell.warning else ""  # figures stay below one another
    return rf"\textbf{{{value}}}" if best else value + mark


def _latex_name(row: Row, marks: dict[str, str]) -> str:
    return _latex_text(row.name) + _latex_mark(row.warning, marks)


def _latex_mark(warning: str, marks: dict[str, str]) -> str:
    return rf"\textsuperscript{{{_latex_text(marks[warning])}}}" if warning else ""


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _tabular(columns: str, head: Sequence[str], body: Sequence[str]) -> list[str]:
    begin = rf"\begin{{tabular}}{{{columns}}}"
    return [begin, r"\toprule", *head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
