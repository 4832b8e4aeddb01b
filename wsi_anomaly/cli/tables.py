"""Tables that commands print when they are done."""

from collections.abc import Iterable, Mapping
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
            stdout.print(f"{row.status}: {row.reason}", markup=False, highlight=False, soft_wrap=True)
    line = f"Everything is in {out}: slides.csv, and slides/<slide_id>/ with heatmap.png and GeoJSON for QuPath."
    stdout.print(line, markup=False, highlight=False, soft_wrap=True)


def print_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """One row a measure, one column a detector."""
    table = Table(box=None, header_style="bold")
    table.add_column("measure")
    for detector in metrics:
        table.add_column(escape(detector), justify="right")
    for name in dict.fromkeys(name for measures in metrics.values() for name in measures):
        values = (measures.get(name) for measures in metrics.values())
        table.add_row(
            escape(name.replace("_", " ")),
            *(_number(value) if isinstance(value, float) else "-" if value is None else str(value) for value in values),
        )
    stdout.print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
