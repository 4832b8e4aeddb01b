"""Write a table of measures as Markdown and as LaTeX. Knows figures and text; knows no detector, slide or file."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isnan
from unicodedata import combining, east_asian_width

_DECIMALS, _LEAST_P = 3, 0.001
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
    """One figure, of which more is better."""

    value: float | None = None
    """None or NaN where there is none."""
    interval: tuple[float, float] | None = None
    """Its low and high end, shown in brackets."""
    p_value: float | None = None
    """Of the difference from the first row."""


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of one detector."""

    name: str
    cells: tuple[Cell, ...]
    """One for each column."""
    warning: str = ""
    """Becomes a footnote; the figures of such a row are never shown as the best."""


@dataclass(frozen=True, slots=True)
class Table:
    """Measures in columns, detectors in rows.

    Raises:
        ValueError: a row has not as many cells as there are columns.
    """

    columns: tuple[tuple[str, ...], ...]
    """Of each its heads: the last is the name of the measure, those before are of all neighbours that share them."""
    rows: tuple[Row, ...]
    caption: str
    notes: tuple[str, ...] = ()
    """The choices that have to be known to compare the figures with others."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(f"row {row.name!r}: {len(row.cells)} cells for {len(self.columns)} columns")


def to_markdown(table: Table, *, turned: bool) -> str:
    """A GitHub table that can be read as plain text too, its caption above, its notes below.

    Intervals and p-values follow their figure. `turned` puts measures into lines and detectors into columns.
    """
    marks, best = _marks(table), _best(table)
    heads = [_BETWEEN_HEADS.join(filter(None, heads)) for heads in table.columns]
    names = [row.name + marks.get(row.warning, "") for row in table.rows]
    cells = [
        [_markdown_cell(cell, best=(i, j) in best) for j, cell in enumerate(row.cells)]
        for i, row in enumerate(table.rows)
    ]
    lines = [list(map(_markdown_text, ["Measure" if turned else "Detector", *heads]))]
    lines += [[_markdown_text(name), *line] for name, line in zip(names, cells, strict=True)]
    if turned:
        lines = [list(line) for line in zip(*lines, strict=True)]
    parts = [_markdown_text(table.caption), "\n".join(_aligned(lines))]
    notes = [f"- {_markdown_text(note)}" for note in _notes(table, marks)]
    return "\n\n".join(filter(None, [*parts, "\n".join(notes)])) + "\n"


def to_latex(table: Table, *, label: str, turned: bool) -> str:
    r"""A `table` environment that needs the package booktabs; `label` is what `\ref` calls it.

    Intervals and p-values stand in small type below their figure, or the table would be wider than a page. `turned`
    puts measures into lines and detectors into columns.
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
    warnings = list(dict.fromkeys(row.warning for row in table.rows if row.warning))
    return {warning: _MARKS[i % len(_MARKS)] * (1 + i // len(_MARKS)) for i, warning in enumerate(warnings)}


def _best(table: Table) -> set[tuple[int, int]]:
    """Row and column of the best values as printed, so that equal ones share the rank; of one alone there is none."""
    best = set()
    for j in range(len(table.columns)):
        known = {
            i: round(row.cells[j].value or 0, _DECIMALS) for i, row in enumerate(table.rows) if _known(row.cells[j])
        }
        trusted = {i: value for i, value in known.items() if not table.rows[i].warning}
        if len(known) > 1:
            best |= {(i, j) for i, value in trusted.items() if value == max(trusted.values())}
    return best


def _known(cell: Cell) -> bool:
    return cell.value is not None and not isnan(cell.value)


def _notes(table: Table, marks: dict[str, str]) -> list[str]:
    """Warnings first: they change what the figures mean."""
    notes = [f"{mark} {warning}" for warning, mark in marks.items()] + list(table.notes)
    if _best(table):
        notes.append(f"Bold: the best value of a measure{', of those without a warning' * bool(marks)}.")
    missing = not all(_known(cell) for row in table.rows for cell in row.cells)
    return notes + [f"{_MISSING}: not available."] * missing


def _figure(value: float | None) -> str:
    return _MISSING if value is None or isnan(value) else f"{value:.{_DECIMALS}f}"


def _interval(cell: Cell) -> str:
    """Empty where there is none or where there is no value; as `_p_value`."""
    if not _known(cell) or cell.interval is None or cell.interval[0] == cell.interval[1]:
        return ""  # without width it says nothing of how sure the value is
    low, high = map(_figure, cell.interval)
    return f"({low}\N{EN DASH}{high})"


def _p_value(cell: Cell) -> str:
    if not _known(cell) or cell.p_value is None:
        return ""
    return f"p < {_LEAST_P}" if cell.p_value < _LEAST_P else f"p = {_figure(cell.p_value)}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _markdown_text(text: str) -> str:
    return _IN_MARKDOWN.sub(r"\\\g<0>", _one_line(text))


def _markdown_cell(cell: Cell, *, best: bool) -> str:
    value = f"**{_figure(cell.value)}**" if best else _figure(cell.value)
    return ", ".join(filter(None, [f"{value} {_interval(cell)}".rstrip(), _p_value(cell)]))


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
    names = _latex_line(map(_latex_text, ["Detector", *(head[-1] for head in heads)]))
    lines = [
        _latex_cells([_latex_name(row, marks)], [(cell, (i, j) in best) for j, cell in enumerate(row.cells)])
        for i, row in enumerate(table.rows)
    ]
    return _tabular(f"l{'r' * len(heads)}", [*above, names], [line for of_row in lines for line in of_row])


def _latex_turned(table: Table, marks: dict[str, str], best: set[tuple[int, int]]) -> list[str]:
    heads = _heads(table)
    depth = len(heads[0])
    lines: list[str] = []
    for j, head in enumerate(heads):
        new = [not j or head[: level + 1] != heads[j - 1][: level + 1] for level in range(depth)]
        if new[0] and j and depth > 1:
            lines.append(r"\addlinespace")
        shown = [_latex_text(one) if fresh else "" for one, fresh in zip(head, [*new[:-1], True], strict=True)]
        lines += _latex_cells(shown, [(row.cells[j], (i, j) in best) for i, row in enumerate(table.rows)])
    names = _latex_line([*[""] * depth, *(_latex_name(row, marks) for row in table.rows)])
    return _tabular("l" * depth + "r" * len(table.rows), [names], lines)


def _heads(table: Table) -> list[tuple[str, ...]]:
    """Of all columns, as many for each."""
    depth = max(map(len, table.columns))
    return [("",) * (depth - len(heads)) + heads for heads in table.columns]


def _latex_groups(heads: Sequence[tuple[str, ...]], level: int) -> list[str]:
    """The heads above columns that share them, each over a rule."""
    cells, rules, first = [""], [], 2
    for shared, group in groupby(heads, key=lambda head: head[: level + 1]):
        count = len(list(group))
        cells.append(rf"\multicolumn{{{count}}}{{c}}{{{_latex_text(shared[-1])}}}")
        rules += [rf"\cmidrule(lr){{{first}-{first + count - 1}}}"] * bool(shared[-1])
        first += count
    return [_latex_line(cells), "".join(rules)]


def _latex_cells(names: Sequence[str], cells: Sequence[tuple[Cell, bool]]) -> list[str]:
    """A line of values, and below, where there are any, one of their intervals and one of their p-values."""
    values = [
        rf"\textbf{{{_figure(cell.value)}}}" if best else _latex_text(_figure(cell.value)) for cell, best in cells
    ]
    lines = [_latex_line([*names, *values])]
    for below in ([_interval(cell) for cell, _ in cells], [_p_value(cell) for cell, _ in cells]):
        if any(below):
            small = [rf"{{\scriptsize {_latex_text(text)}}}" if text else "" for text in below]
            lines.append(_latex_line([*[""] * len(names), *small]))
    return [*lines[:-1], lines[-1] + "[2pt]" * (len(lines) > 1)]


def _latex_name(row: Row, marks: dict[str, str]) -> str:
    mark = rf"\textsuperscript{{{_latex_text(marks[row.warning])}}}" if row.warning else ""
    return _latex_text(row.name) + mark


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _tabular(columns: str, head: Sequence[str], body: Sequence[str]) -> list[str]:
    begin = rf"\begin{{tabular}}{{{columns}}}"
    return [begin, r"\toprule", *head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
