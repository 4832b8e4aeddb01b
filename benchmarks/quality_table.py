"""From the scores of tiles to Markdown tables of how well they rank. Knows no detector, no picture and no process."""

from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wsi_anomaly.imaging.classification import Ranking, rank
from wsi_anomaly.imaging.intervals import Interval, bootstrap_interval, delong_interval
from wsi_anomaly.imaging.zscore import describe, z_scores

TPR = 0.95
MEASURES = ("AUROC", "AUPR", f"FPR at {TPR:.0%} TPR", "mean z of normal")
COSTS = {"steps": "steps", "minutes": "minutes", "cpu_minutes": "CPU minutes", "peak_gib": "GiB"}
MISSING = "\N{EN DASH}"


def quality_table(
    results: Mapping[str, Mapping[str, Any]], places: Sequence[str], *, seed: int, costs: Sequence[str] = ()
) -> str:
    """A line for each score of each row; below, the reasons why some have none.

    `results` are what `quality.py` keeps, `places` the folders of reference, normal and abnormal tiles.
    """
    table = Table("row", "score", box=box.MARKDOWN)
    for head in (*MEASURES, *(COSTS[cost] for cost in costs)):
        table.add_column(head, justify="right")
    notes = []
    for name, result in results.items():
        paid = [_figure(result.get(cost)) for cost in costs]
        if reason := why_missing(result, places):
            table.add_row(escape(name), MISSING, *[MISSING] * len(MEASURES), *paid)
            notes.append(f"- {name}: {reason}")
            continue
        for score, by_place in result["scores"].items():
            reference, normal, tumour = (np.array(by_place[place], np.float32) for place in places)
            table.add_row(escape(name), escape(score), *measures(reference, normal, tumour, seed=seed), *paid)
            notes += [f"- {name}, {score}: {fault}" for fault in _faults(normal, tumour)]
    # Wide enough for any row: a line that is broken is no Markdown.
    console = Console(file=StringIO(), width=1000)
    console.print(table)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]
    return "\n".join([*lines, *([""] * bool(notes)), *notes]) + "\n"


def why_missing(result: Mapping[str, Any], places: Sequence[str]) -> str:
    """The reason why a row has no scores of these tiles, or nothing."""
    refusals = (result.get("refused", {}).get(place, "") for place in places)
    return result.get("reason", "") or next(filter(None, refusals), "")


def measures(reference: np.ndarray, normal: np.ndarray, tumour: np.ndarray, *, seed: int) -> tuple[str, ...]:
    """One figure for each of `MEASURES`; tiles without a score are left out."""
    normal, tumour = (part[np.isfinite(part)] for part in (normal, tumour))
    scores, labels = np.concatenate([normal, tumour]), np.repeat([False, True], [len(normal), len(tumour)])
    return (
        _range(delong_interval(scores, labels)),
        _range(bootstrap_interval(Ranking.aupr, scores, labels, seed=seed)),
        _figure(rank(scores, labels).fpr_at_tpr(TPR)),
        _figure(_mean_z(reference, normal)),
    )


def _faults(normal: np.ndarray, tumour: np.ndarray) -> Iterator[str]:
    missing = sum(int((~np.isfinite(part)).sum()) for part in (normal, tumour))
    if missing:
        yield f"{missing} of {len(normal) + len(tumour)} tiles have no score and are left out"


def _mean_z(reference: np.ndarray, normal: np.ndarray) -> float | None:
    """None where the scores of the reference are all equal."""
    try:
        return float(z_scores(normal[:, None], [describe(reference)]).mean()) if normal.size else None
    except ValueError:
        return None


def _range(interval: Interval | None) -> str:
    return MISSING if interval is None else f"{interval.value:.3f} ({interval.low:.3f}-{interval.high:.3f})"


def _figure(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
