"""Tables that commands print when they are done."""

from collections.abc import Iterable, Iterator, Sequence
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
