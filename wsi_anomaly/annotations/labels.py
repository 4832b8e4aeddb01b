"""CSV tables of what slides are -> labels and the files of annotations. Opens no annotation and knows no run."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsi_anomaly.errors import AnnotationError
from wsi_anomaly.options import nearest

_COLUMNS = ("slide_id", "annotation", "label")
_NOT_READ = ("path", "mpp", "split", "mask")
"""Columns of a table of slides, which may be the same file."""


@dataclass(frozen=True, slots=True)
class SlideLabel:
    """What a slide is as a whole."""

    abnormal: bool
    subgroup: str = ""
    """Of abnormal slides: "macro", "micro" or "itc" (isolated tumour cells); "" where nobody said."""


LABELS: Mapping[str, SlideLabel] = {
    **dict.fromkeys(("normal", "0"), SlideLabel(abnormal=False)),
    **dict.fromkeys(("abnormal", "tumor", "tumour", "1"), SlideLabel(abnormal=True)),
    "negative": SlideLabel(abnormal=False),
    "positive": SlideLabel(abnormal=True),
    **{subgroup: SlideLabel(abnormal=True, subgroup=subgroup) for subgroup in ("macro", "micro", "itc")},
}


@dataclass(frozen=True, slots=True)
class TruthRow:
    """What a table says of one slide."""

    annotation: Path | None
    label: SlideLabel | None


def read_truth(table: Path, *, not_read: Sequence[str] = ()) -> dict[str, TruthRow]:
    """The rows of a CSV with the columns `slide_id` and `annotation`, `label` or both, by slide_id.

    It is UTF-8, separated by comma, semicolon or tab. An annotation is a path relative to the table; a label one of
    `LABELS` in letters of any case. Both may be left empty where the table has both columns. The other columns of a
    table of slides may stand there too, and those of `not_read`.

    Raises:
        AnnotationError: the table cannot be read, or rows are faulty (all are listed).
    """
    numbered = _rows(table)
    columns = _columns(table, numbered[0][1] if numbered else [], not_read)
    rows: dict[str, TruthRow] = {}
    faults: list[str] = []
    for number, cells in numbered[1:]:
        row = dict.fromkeys(_COLUMNS, "") | dict(zip(columns, cells, strict=False))
        if fault := _fault(row, columns, cells, table.parent):
            faults.append(f"row {number}: {fault}")
        elif row["slide_id"] in rows:
            faults.append(f"row {number}: '{row['slide_id']}' is there already")
        annotation = table.parent / row["annotation"] if row["annotation"] else None
        rows[row["slide_id"]] = TruthRow(annotation, LABELS.get(row["label"].lower()))
    if faults:
        raise AnnotationError("\n  ".join([f"{table.name} has faults; mend them and run again:", *faults]))
    return rows


def read_slide_labels(table: Path, *, not_read: Sequence[str] = ()) -> dict[str, SlideLabel]:
    """The label of each slide that has one, from a table as `read_truth` reads it.

    Raises:
        AnnotationError: the table cannot be read, has no column `label`, or rows are faulty (all are listed).
    """
    rows = read_truth(table, not_read=not_read)
    labels = {slide_id: row.label for slide_id, row in rows.items() if row.label is not None}
    if not labels:
        raise AnnotationError(f"{table.name}: has no labels; add the column label ({', '.join(LABELS)})")
    return labels


def read_slide_groups(table: Path) -> dict[str, str]:
    """Any text that a table has for slides in its column `label`, by slide_id; slides without are left out.

    Texts that differ in case alone are one, spelt as the first of them. Other columns are not read.

    Raises:
        AnnotationError: the table cannot be read, lacks one of both columns, or rows are faulty (all are listed).
    """
    numbered = _rows(table)
    columns = [name.lower() for name in numbered[0][1]] if numbered else []
    for name in ("slide_id", "label"):
        if columns.count(name) != 1:
            raise AnnotationError(f"{table.name}: columns are '{', '.join(columns)}'; '{name}' must be there, once")
    texts: dict[str, str] = {}
    spellings: dict[str, str] = {}
    faults: list[str] = []
    for number, cells in numbered[1:]:
        row = {"slide_id": "", "label": ""} | dict(zip(columns, cells, strict=False))
        slide_id, text = row["slide_id"], " ".join(row["label"].split())
        if any(cells[len(columns) :]):
            faults.append(
                f"row {number}: {len(cells)} cells in {len(columns)} columns; put a text with commas in quotes"
            )
        elif not slide_id or slide_id in texts:
            faults.append(f"row {number}: " + (f"'{slide_id}' is there already" if slide_id else "slide_id is empty"))
        texts[slide_id] = spellings.setdefault(text.casefold(), text)
    if faults:
        raise AnnotationError("\n  ".join([f"{table.name} has faults; mend them and run again:", *faults]))
    return {slide_id: text for slide_id, text in texts.items() if text}


def _columns(table: Path, header: Sequence[str], not_read: Sequence[str]) -> list[str]:
    columns = [name.lower() for name in header]
    known = {*_COLUMNS, *_NOT_READ, *(name.lower() for name in not_read)}
    for name in columns:
        if name not in known:
            raise AnnotationError(f"{table.name}: unknown column '{name}' ({nearest(name, _COLUMNS)})")
    if "slide_id" not in columns or not {"annotation", "label"} & set(columns) or len({*columns}) < len(columns):
        raise AnnotationError(
            f"{table.name}: columns are '{', '.join(columns)}'; they must be slide_id and label, annotation or both, "
            "each once"
        )
    return columns


def _fault(row: Mapping[str, str], columns: Sequence[str], cells: Sequence[str], folder: Path) -> str:
    label = row["label"].lower()
    if any(cells[len(columns) :]):
        return f"{len(cells)} cells in {len(columns)} columns"
    if not row["slide_id"]:
        return "slide_id is empty"
    if label not in LABELS and (label or "annotation" not in columns):
        return f"label '{label}' is none of {', '.join(LABELS)}"
    if row["annotation"] and not (folder / row["annotation"]).is_file():
        name = Path(row["annotation"])
        return f"annotation '{name.name if name.is_absolute() else name}' is no file"
    return ""


def _rows(table: Path) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, numbered as in a spreadsheet; blanks around cells are cut off."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        header = text.lstrip().partition("\n")[0]
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
        rows = [(number, [cell.strip() for cell in row]) for number, row in enumerate(reader, start=1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AnnotationError(f"{table.name}: no table that can be read; save it as 'CSV UTF-8'") from error
    return [(number, cells) for number, cells in rows if any(cells)]
