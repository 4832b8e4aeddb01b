"""A CSV or TSV table -> the slides that it lists. Opens no slide."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from wsi_anomaly.cohort.naming import folder_name, key_of
from wsi_anomaly.cohort.slide import PIXEL_SIZES, CohortSlide, Split, is_pixel_size
from wsi_anomaly.errors import CohortError
from wsi_anomaly.options import nearest

COLUMNS = ("slide_id", "path", "mpp", "split", "annotation", "mask")
_NOT_READ = ("label",)
"""Of a table of labels, which may be the same file."""


def read_table(table: Path, wanted: Sequence[str] = ()) -> list[CohortSlide]:
    """The slides of a CSV; `slide_id` is "" where the table gives none. `wanted` are columns beside the usual ones.

    Raises:
        CohortError: the table or some of its rows have faults, or it lacks a column.
    """
    rows = _rows(table)
    columns = _columns(table, next(rows, (1, [])), wanted)
    slides: list[CohortSlide] = []
    faults: list[str] = []
    first_row: dict[str, int] = {}
    for number, cells in rows:
        row = dict.fromkeys([*COLUMNS, *columns], "") | dict(zip(columns, cells, strict=False))
        in_row = _row_faults(row, table.parent)
        if len(cells) > len(columns):
            in_row = [f"{len(cells)} cells in {len(columns)} columns"]
        elif row["slide_id"] and (first := first_row.setdefault(key_of(row["slide_id"]), number)) != number:
            in_row.append(f"slide_id '{row['slide_id']}' is the one of row {first}")
        faults += [f"row {number}: {fault}" for fault in in_row]
        if not faults:
            slides.append(_slide(row, table.parent, wanted))
    if faults:
        raise CohortError("\n  ".join([f"{table.name} has faults; mend them and run again:", *faults]))
    if not slides:
        raise CohortError(f"{table.name}: no slides in this table")
    return slides


def _columns(table: Path, header: tuple[int, list[str]], wanted: Sequence[str]) -> list[str]:
    number, names = header
    columns = [name.lower() for name in names]
    known = (*COLUMNS, *_NOT_READ, *(name.lower() for name in wanted))
    faults = [f"unknown column '{name}' ({nearest(name, known)})" for name in columns if name not in known]
    faults += [f"column '{name}' is there twice" for name, count in Counter(columns).items() if count > 1]
    if "path" not in columns:
        faults.append("the column path is missing")
    faults += [
        f"the column {name} is missing, which the detector looks at" for name in wanted if name.lower() not in columns
    ]
    if faults:
        raise CohortError(f"{table.name}, row {number}: {'; '.join(faults)}")
    return columns


def _rows(table: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, numbered as in a spreadsheet; blanks and empty cells at the end are cut off."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        header = text.lstrip().partition("\n")[0]
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
        for number, row in enumerate(reader, start=1):
            cells = [cell.strip() for cell in row]
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                yield number, cells
    except UnicodeDecodeError as error:
        raise CohortError(f"{table.name}: not UTF-8; save it as 'CSV UTF-8'") from error
    except OSError as error:
        raise CohortError(f"{table.name}: cannot be read ({error.strerror})") from error
    except csv.Error as error:
        raise CohortError(f"{table.name}: not a CSV table ({error})") from error


def _row_faults(row: dict[str, str], folder: Path) -> list[str]:
    faults = []
    for column in ("path", "annotation", "mask"):
        if row[column] and not (folder / row[column]).is_file():
            name = Path(row[column])
            faults.append(f"{column} '{name.name if name.is_absolute() else name}' is no file")
    if not row["path"]:
        faults.append("path is empty")
    if row["slide_id"] and row["slide_id"] != folder_name(row["slide_id"]):
        faults.append(f"slide_id '{row['slide_id']}' is no name for a folder; use '{folder_name(row['slide_id'])}'")
    if row["mpp"] and not is_pixel_size(_number(row["mpp"])):
        faults.append(f"mpp '{row['mpp']}' is no size of a pixel; give {PIXEL_SIZES}")
    if row["split"] and row["split"] not in get_args(Split):
        faults.append(f"split '{row['split']}' is none of {', '.join(get_args(Split))}")
    return faults


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _slide(row: dict[str, str], folder: Path, wanted: Sequence[str]) -> CohortSlide:
    return CohortSlide(
        slide_id=row["slide_id"],
        path=folder / row["path"],
        mpp=float(row["mpp"]) if row["mpp"] else None,
        split=next((split for split in get_args(Split) if split == row["split"]), None),
        annotation=folder / row["annotation"] if row["annotation"] else None,
        mask=folder / row["mask"] if row["mask"] else None,
        values={name: row[name.lower()] for name in wanted},
    )
