"""`slides.csv`: one row a slide with its status and measures, rewritten whole after each slide."""

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from wsi_anomaly.errors import OutputError
from wsi_anomaly.storage.record import write_text


@dataclass(frozen=True, slots=True)
class SlideRow:
    """What became of one slide. Measures are None for a slide that failed."""

    slide_id: str
    status: Literal["done", "skipped", "failed"]
    """`skipped`: the run ended before it came to this slide."""
    reason: str = ""
    tiles: int | None = None
    corrupt_tiles: int | None = None
    failed_tiles: int | None = None
    z_max: float | None = None
    z_99: float | None = None
    area_over_0_um2: float | None = None
    area_over_threshold_um2: float | None = None
    seconds: float | None = None


def write_slide_table(path: Path, rows: Iterable[SlideRow]) -> None:
    """Write the table, sorted by slide_id."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(SlideRow)], lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda row: row.slide_id):
        writer.writerow({name: _cell(value) for name, value in asdict(row).items()})
    write_text(path, text.getvalue())


def read_slide_table(path: Path) -> dict[str, SlideRow]:
    """The rows by slide_id; empty where there is no table yet.

    Raises:
        OutputError: the file is something else.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]
        return {row.slide_id: row for row in map(_ROW.validate_python, rows)}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise OutputError(f"{path}: is not a slide table of this tool. Move it away and run again.") from error


_ROW = TypeAdapter(SlideRow)


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
