"""What an evaluation leaves for people: tables, curves, how z is spread, and the maps of detectors side by side."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64

from wsi_anomaly.imaging.classification import Ranking
from wsi_anomaly.reporting.evaluation_figures import Curve, CurveKind, write_curves
from wsi_anomaly.reporting.z_figures import count_z, slide_z, write_calibration, write_histograms
from wsi_anomaly.stages.evaluate.evidence import Evidence
from wsi_anomaly.stages.evaluate.measures import Findings
from wsi_anomaly.stages.evaluate.protocol import Protocol
from wsi_anomaly.stages.evaluate.side_by_side import write_pictures
from wsi_anomaly.stages.evaluate.tables_of import Comparisons, write_tables
from wsi_anomaly.storage.record import remove, writable

_RANKED: Mapping[str, tuple[str, str, Callable[[Findings], Ranking]]] = {
    "tiles": ("Tiles", "tile_{}", lambda found: found.tiles),
    "slides_z_max": ("Slides by Z_MAX", "slide_{}_z_max", lambda found: found.slides["z_max"]),
    "slides_z_99": ("Slides by Z_99", "slide_{}_z_99", lambda found: found.slides["z_99"]),
}
"""Of each pair of pictures: what is ranked, how its measures are named, and its ranking."""
_ABNORMAL_TILES = "Tiles that an annotation touches are abnormal, all others normal."
_NOTHING = np.empty(0)
_MOST_POINTS = 20_000
"""Of a curve: where few are abnormal, precision changes within a small part of all thresholds."""


def write_outputs(
    folder: Path,
    evidence: Mapping[str, Sequence[Evidence]],
    findings: Mapping[str, Findings],
    comparisons: Comparisons,
    protocol: Protocol,
) -> None:
    """Tables, curves, histograms, calibration, and in the folder `slides` a picture of each annotated slide.

    Pictures that an earlier evaluation left and this one cannot draw are removed.

    Raises:
        OutputError: the folder cannot be written.
    """
    with writable(folder):
        remove(folder / "slides")
        (folder / "slides").mkdir(parents=True)
        write_tables(folder, findings, comparisons, protocol)
        for name in _RANKED:
            _write_ranked(folder, name, findings, protocol)
        _write_froc(folder / "froc.png", findings)
        _write_spread(folder, evidence)
        write_pictures(folder / "slides", evidence, findings)


def _write_ranked(folder: Path, name: str, findings: Mapping[str, Findings], protocol: Protocol) -> None:
    """ROC, precision and recall; every detector has its place in the legend, so that it looks the same everywhere."""
    title, measure, ranking_of = _RANKED[name]
    rankings = {detector: ranking_of(found) for detector, found in findings.items()}
    known = {detector: ranking for detector, ranking in rankings.items() if ranking.has_both_classes}
    sizes = {(ranking.abnormal, ranking.normal) for ranking in known.values()}
    abnormal, normal = sizes.pop() if len(sizes) == 1 else (0, 0)
    pictures: tuple[tuple[CurveKind, str, str], ...] = (("roc", "ROC", "auroc"), ("pr", "precision and recall", "aupr"))
    for kind, head, area in pictures:
        path = folder / f"{kind}_{name}.png"
        if not known:
            remove(path)
            continue
        curves = {
            detector: _curve(known.get(detector), kind, found.intervals.get(measure.format(area)))
            for detector, found in findings.items()
        }
        write_curves(
            path,
            curves,
            kind,
            title=f"{title}: {head}",
            subtitle=f"{abnormal:,} abnormal, {normal:,} normal." * bool(abnormal),
            prevalence=abnormal / (abnormal + normal) if abnormal else None,
            level=protocol.level,
        )


def _write_froc(path: Path, findings: Mapping[str, Findings]) -> None:
    curves = {
        detector: Curve(_doubles(found.froc.false_positives), _doubles(found.froc.sensitivity), found.froc.score)
        if found.froc
        else Curve(_NOTHING, _NOTHING, None)
        for detector, found in findings.items()
    }
    lesions = {found.measures["lesions"] for found in findings.values()}
    if any(len(curve.x) for curve in curves.values()):
        subtitle = f"{lesions.pop():,} lesions to find." if len(lesions) == 1 else ""
        write_curves(path, curves, "froc", title="Lesions: FROC", subtitle=subtitle)
    else:
        remove(path)


def _curve(ranking: Ranking | None, kind: CurveKind, interval: tuple[float, float] | None) -> Curve:
    points = ranking.curve(_MOST_POINTS) if ranking else None
    if ranking is None or points is None:
        return Curve(_NOTHING, _NOTHING, None)
    if kind == "roc":
        return Curve(points.fpr, points.tpr, ranking.auroc(), interval)
    return Curve(points.tpr, points.precision, ranking.aupr(), interval)


def _doubles(values: Float[np.ndarray, " point"]) -> Float64[np.ndarray, " point"]:
    return np.asarray(values, np.float64)


def _write_spread(folder: Path, evidence: Mapping[str, Sequence[Evidence]]) -> None:
    counts, slides = {}, {}
    for detector, found in evidence.items():
        known = [(one.z_tile, one.share) for one in found if one.share is not None]
        z, share = (np.concatenate([_NOTHING, *arrays]) for arrays in (zip(*known, strict=True) if known else ((), ())))
        counts[detector] = (count_z(z[share == 0]), count_z(z[share > 0]))
        slides[detector] = [slide_z(one.slide_id, one.z_tile, abnormal=one.label.abnormal) for one in found]
    write_histograms(
        folder / "z_histogram.png", counts, title="z of normal and of abnormal tiles", subtitle=_ABNORMAL_TILES
    )
    write_calibration(folder / "calibration.png", slides, title="z of the tiles of each slide")
