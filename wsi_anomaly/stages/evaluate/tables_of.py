"""The tables of an evaluation: for a paper as Markdown and LaTeX, and everything as CSV. Measures and draws nothing."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from wsi_anomaly.imaging.intervals import Comparison
from wsi_anomaly.reporting.tables import Cell, Row, Table, to_latex, to_markdown
from wsi_anomaly.stages.evaluate.measures import Findings
from wsi_anomaly.stages.evaluate.protocol import Protocol
from wsi_anomaly.storage.record import write_text

Comparisons = Mapping[str, Mapping[str, Comparison]]
"""Of the first detector with each other one, by measure."""
_Columns = Mapping[tuple[str, ...], str]
"""The measure below each column's heads."""

_LAYOUTS = {"tables": False, "tables_turned": True}
_ANY_SUBGROUP = "slide_auroc_z_max_"
_TESTS = "DeLong's test for AUROC where that has a variance, else a paired bootstrap (measures.csv says which)"


def write_tables(folder: Path, findings: Mapping[str, Findings], comparisons: Comparisons, protocol: Protocol) -> None:
    """Tables 2 and 3 of the AnoPILaD paper in both directions, all measures, and what was found on each slide."""
    notes = (*_counts(findings), *protocol.choices())
    tables = {
        name: _table(columns, findings, comparisons, caption=caption, notes=notes)
        for name, caption, columns in (
            ("classification", "Classification of tiles and slides", _classification(findings)),
            ("segmentation", "Segmentation and lesions", _segmentation(findings)),
        )
    }
    for stem, turned in _LAYOUTS.items():
        markdown = [to_markdown(table, turned=turned) for table in tables.values()]
        latex = [to_latex(table, label=f"tab:{name}", turned=turned) for name, table in tables.items()]
        write_text(folder / f"{stem}.md", "\n".join(markdown))
        write_text(folder / f"{stem}.tex", "\n".join([r"% Needs \usepackage{booktabs}.", *latex]))
    write_text(folder / "measures.csv", _csv(_measure_rows(findings, comparisons)))
    slides = [{"detector": detector, **row} for detector, found in findings.items() for row in found.per_slide]
    write_text(folder / "slides.csv", _csv(slides))


def _classification(findings: Mapping[str, Findings]) -> _Columns:
    columns: dict[tuple[str, ...], str] = {("Tiles", "AUROC"): "tile_auroc", ("Tiles", "AUPR"): "tile_aupr"}
    for group in ("", *_subgroups(findings)):
        for score in ("z_max", "z_99"):
            for measure in ("auroc", "aupr"):
                heads = (_of_group("Slides", group), score.upper(), measure.upper())
                columns[heads] = _of_subgroup(f"slide_{measure}_{score}", group)
    return columns


def _segmentation(findings: Mapping[str, Findings]) -> _Columns:
    columns: dict[tuple[str, ...], str] = {("Normal slides", "TNR"): "tnr_normal_slides"}
    for group in ("", *_subgroups(findings)):
        for head, measure in (("Dice", "dice_abnormal_slides"), ("IoU", "iou_abnormal_slides")):
            name = _of_subgroup(measure, group)
            if any(name in found.measures for found in findings.values()):
                columns[_of_group("Abnormal slides", group), head] = name
    return columns | {("Lesions", "FROC score"): "froc_score", ("Lesions", "PRO-AUC"): "pro_auc"}


def _subgroups(findings: Mapping[str, Findings]) -> list[str]:
    """Of abnormal slides, such as "macro"; as measures are named after them."""
    names = dict.fromkeys(name for found in findings.values() for name in found.measures)
    return [name.removeprefix(_ANY_SUBGROUP) for name in names if name.startswith(_ANY_SUBGROUP)]


def _of_group(head: str, group: str) -> str:
    return f"{head}, {group}" if group else head


def _of_subgroup(measure: str, group: str) -> str:
    return f"{measure}_{group}" if group else measure


def _table(
    columns: _Columns,
    findings: Mapping[str, Findings],
    comparisons: Comparisons,
    *,
    caption: str,
    notes: tuple[str, ...],
) -> Table:
    rows = []
    for detector, found in findings.items():
        tests = comparisons.get(detector, {})
        cells = tuple(_cell(found, name, tests.get(name)) for name in columns.values())
        rows.append(Row(detector, cells, warning="; ".join(found.warnings)))
    if any(cell.p_value is not None for row in rows for cell in row.cells):
        notes += (f"p: two-sided, of the difference from {rows[0].name} on the slides that both have seen; {_TESTS}.",)
    return Table(tuple(columns), tuple(rows), caption, notes)


def _cell(found: Findings, name: str, comparison: Comparison | None) -> Cell:
    value = found.measures.get(name)
    return Cell(
        None if value is None else float(value),
        found.intervals.get(name),
        comparison.p_value if comparison else None,
    )


def _counts(findings: Mapping[str, Findings]) -> list[str]:
    """What was evaluated; of each detector where they have seen different slides."""
    texts = {detector: _counted(found.measures) for detector, found in findings.items()}
    if len(set(texts.values())) == 1:
        return [next(iter(texts.values()))]
    return [f"{detector}: {text}" for detector, text in texts.items()]


def _counted(measures: Mapping[str, float | int | None]) -> str:
    slides, abnormal_slides, tiles, abnormal_tiles = (
        f"{measures.get(name) or 0:,}" for name in ("slides", "abnormal_slides", "tiles", "abnormal_tiles")
    )
    return f"{slides} slides, {abnormal_slides} of them abnormal; {tiles} tiles, {abnormal_tiles} of them abnormal."


def _measure_rows(findings: Mapping[str, Findings], comparisons: Comparisons) -> list[dict[str, object]]:
    """One for each measure of each detector, also for those that have an interval or a test alone."""
    rows: list[dict[str, object]] = []
    for detector, found in findings.items():
        tests = comparisons.get(detector, {})
        for name in dict.fromkeys([*found.measures, *found.intervals, *tests]):
            low, high = found.intervals.get(name, (None, None))
            test = tests.get(name)
            rows.append(
                {
                    "detector": detector,
                    "measure": name,
                    "value": found.measures.get(name),
                    "low": low,
                    "high": high,
                    "first_minus_this": test.difference if test else None,
                    "p_value": test.p_value if test else None,
                    "test": test.method if test else None,
                }
            )
    return rows


def _csv(rows: Sequence[Mapping[str, object]]) -> str:
    """With the columns of all rows; what a row has not, and None, is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
