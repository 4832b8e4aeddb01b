"""What an evaluation leaves for people: tables, curves, histograms, and the maps of detectors side by side."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import shapely
from jaxtyping import Float64

from wsi_anomaly.annotations import Annotation, Outline
from wsi_anomaly.imaging.metrics import dice
from wsi_anomaly.reporting.comparison_figure import ComparedMap, write_comparison
from wsi_anomaly.reporting.evaluation_figures import Curve, write_curves
from wsi_anomaly.reporting.tables import Cell, Column, Row, Table, to_latex, to_markdown
from wsi_anomaly.reporting.z_figures import count_z, slide_z, write_calibration, write_histograms
from wsi_anomaly.stages.evaluate.evidence import Evidence
from wsi_anomaly.stages.evaluate.measures import Findings
from wsi_anomaly.stages.evaluate.protocol import Protocol
from wsi_anomaly.storage.arrays import read_array, read_attributes
from wsi_anomaly.storage.record import writable, write_text
from wsi_anomaly.storage.tiles import TileStore

_CLASSIFICATION = {
    ("Tiles", "AUROC"): "tile_auroc",
    ("Tiles", "AUPR"): "tile_aupr",
    ("Slides, Z_MAX", "AUROC"): "slide_auroc_z_max",
    ("Slides, Z_MAX", "AUPR"): "slide_aupr_z_max",
    ("Slides, Z_99", "AUROC"): "slide_auroc_z_99",
    ("Slides, Z_99", "AUPR"): "slide_aupr_z_99",
}
_SEGMENTATION = {
    ("Normal slides", "TNR"): "tnr_normal_slides",
    ("Abnormal slides", "Dice"): "dice_abnormal_slides",
    ("Abnormal slides", "IoU"): "iou_abnormal_slides",
    ("Lesions", "FROC score"): "froc_score",
    ("Lesions", "PRO-AUC"): "pro_auc",
}
_MOST_COMPARISONS = 20


def write_outputs(
    folder: Path, evidence: Mapping[str, Sequence[Evidence]], findings: Mapping[str, Findings], protocol: Protocol
) -> None:
    """Tables as Markdown and LaTeX, curves, histograms, calibration, and a picture of each annotated slide."""
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_tables(folder, findings, protocol)
        _write_curves(folder, findings)
        _write_spread(folder, evidence)
        _write_comparisons(folder, evidence, protocol)


def _write_tables(folder: Path, findings: Mapping[str, Findings], protocol: Protocol) -> None:
    tables = {
        "classification": _table("Tiles and slides", _CLASSIFICATION, findings, protocol),
        "segmentation": _table("Segmentation and lesions", _SEGMENTATION, findings, protocol),
    }
    write_text(folder / "tables.md", "\n\n".join(to_markdown(table) for table in tables.values()) + "\n")
    write_text(
        folder / "tables.tex",
        "\n\n".join(to_latex(table, label=f"tab:{name}") for name, table in tables.items()) + "\n",
    )


def _table(
    caption: str, names: Mapping[tuple[str, str], str], findings: Mapping[str, Findings], protocol: Protocol
) -> Table:
    return Table(
        columns=tuple(Column(heads) for heads in names),
        rows=tuple(
            Row(
                detector,
                tuple(Cell(found.measures.get(name), found.intervals.get(name)) for name in names.values()),
                warning="; ".join(found.warnings),
            )
            for detector, found in findings.items()
        ),
        caption=caption,
        notes=protocol.choices(),
    )


def _write_curves(folder: Path, findings: Mapping[str, Findings]) -> None:
    rocs, prs, frocs = {}, {}, {}
    for detector, found in findings.items():
        curve = found.tiles.curve() if found.tiles else None
        if curve and found.tiles:
            rocs[detector] = Curve(_doubles(curve.fpr), _doubles(curve.tpr), found.tiles.auroc())
            prs[detector] = Curve(_doubles(curve.tpr), _doubles(curve.precision), found.tiles.aupr())
        if found.froc:
            points = found.froc
            frocs[detector] = Curve(_doubles(points.false_positives), _doubles(points.sensitivity), points.score)
    if rocs:
        write_curves(folder / "roc.png", rocs, "roc", title="Tiles: ROC")
        write_curves(folder / "pr.png", prs, "pr", title="Tiles: precision and recall")
    if frocs:
        write_curves(folder / "froc.png", frocs, "froc", title="Lesions: FROC")


def _doubles(values: np.ndarray) -> Float64[np.ndarray, " point"]:
    return np.asarray(values, np.float64)


def _write_spread(folder: Path, evidence: Mapping[str, Sequence[Evidence]]) -> None:
    counts, slides = {}, {}
    for detector, found in evidence.items():
        drawn = [one for one in found if one.share is not None]
        share = np.concatenate([one.share for one in drawn if one.share is not None] or [np.empty(0)])
        z = np.concatenate([one.z_tile for one in drawn] or [np.empty(0)])
        counts[detector] = (count_z(z[share == 0]), count_z(z[share > 0]))
        slides[detector] = [slide_z(one.slide_id, one.z_tile, abnormal=one.label.abnormal) for one in found]
    write_histograms(folder / "z_histogram.png", counts, title="z of normal and of abnormal tiles")
    write_calibration(folder / "calibration.png", slides, title="z of the tiles of each slide")


def _write_comparisons(folder: Path, evidence: Mapping[str, Sequence[Evidence]], protocol: Protocol) -> None:
    """Of annotated slides that all detectors have seen, at most so many."""
    tables = {detector: {one.slide_id: one for one in found} for detector, found in evidence.items()}
    first = next(iter(tables.values()))
    shared = [name for name, one in first.items() if one.annotation and all(name in table for table in tables.values())]
    for slide_id in shared[:_MOST_COMPARISONS]:
        _write_comparison(
            folder / f"{slide_id}.png", {name: table[slide_id] for name, table in tables.items()}, protocol
        )


def _write_comparison(path: Path, seen: Mapping[str, Evidence], protocol: Protocol) -> None:
    one = next(iter(seen.values()))
    attributes = read_attributes(one.folder.tissue)
    grid = TileStore(one.folder.tiles).grid
    downsample = np.array(attributes["overview_downsample"], np.float64)
    start = np.array(grid.origin_level0_px, np.float64)
    size = np.array([one.shape[1] * grid.stride_level0_px[0], one.shape[0] * grid.stride_level0_px[1]]) / downsample

    def rings(outlines: Sequence[Outline]) -> list[Float64[np.ndarray, "corner xy"]]:
        return [ring for outline in outlines for ring in _rings(outline.polygon, lambda xy: (xy - start) / downsample)]

    annotation = one.annotation if isinstance(one.annotation, Annotation) else Annotation((), (), ())
    write_comparison(
        path,
        read_array(one.folder.tissue, "overview"),
        [_compared(name, found, (0.0, 0.0, float(size[0]), float(size[1])), protocol) for name, found in seen.items()],
        abnormal=rings(annotation.abnormal),
        other=rings(annotation.excluded),
        slide_id=one.slide_id,
        overview_mpp=float(downsample[0] * attributes["mpp"][0]),
    )


def _compared(
    name: str, one: Evidence, extent_px: tuple[float, float, float, float], protocol: Protocol
) -> ComparedMap:
    tiles = np.isfinite(one.z)
    found = np.nan_to_num(one.z_eroded, nan=-np.inf) > protocol.threshold_z
    agreement = dice(found[tiles], one.truth[tiles]) if one.truth.any() else None
    return ComparedMap(name, one.z_eroded, extent_px, z_99=one.scores(protocol).z_99, dice=agreement)


def _rings(
    polygon: shapely.Polygon | shapely.MultiPolygon, moved: Callable[[np.ndarray], np.ndarray]
) -> list[Float64[np.ndarray, "corner xy"]]:
    parts = polygon.geoms if isinstance(polygon, shapely.MultiPolygon) else [polygon]
    return [moved(np.asarray(ring.coords)[:, :2]) for part in parts for ring in (part.exterior, *part.interiors)]
