"""The measures of one detector: of tiles, of slides, of segmentations, of lesions. Reads no file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from wsi_anomaly.imaging.classification import Ranking, rank
from wsi_anomaly.imaging.froc import FrocCurve, SlideFindings, detections_of, findings_of, froc
from wsi_anomaly.imaging.intervals import Comparison, Interval, bootstrap_interval, delong_interval, delong_test
from wsi_anomaly.imaging.metrics import dice, iou, tnr
from wsi_anomaly.imaging.segmentation import (
    components,
    match_components,
    overlap_curve,
    pro_auc,
    surface_distances,
)
from wsi_anomaly.stages.evaluate.evidence import Evidence
from wsi_anomaly.stages.evaluate.protocol import Protocol

SLIDE_SCORES = ("z_max", "z_99")
Measure = float | int | None
Measures = dict[str, Measure]


@dataclass(frozen=True, slots=True)
class Findings:
    """What one detector is worth."""

    measures: Mapping[str, Measure]
    intervals: Mapping[str, tuple[float, float]]
    tiles: Ranking | None
    slides: Mapping[str, Ranking]
    """By slide score."""
    froc: FrocCurve | None
    warnings: tuple[str, ...]


def measure(evidence: Sequence[Evidence], protocol: Protocol) -> Findings:
    """Everything that the truth allows; a measure that needs two classes is None where one is missing."""
    tiles, tile_measures = _tile_level(evidence, protocol)
    slides, slide_measures, intervals = _slide_level(evidence, protocol)
    curve, lesion_measures = _lesion_level(evidence, protocol)
    return Findings(
        tile_measures | slide_measures | _segmentation(evidence, protocol) | lesion_measures,
        intervals,
        tiles,
        slides,
        curve,
        _warnings(evidence, tiles, protocol),
    )


def compare(first: Sequence[Evidence], second: Sequence[Evidence], protocol: Protocol) -> dict[str, Comparison]:
    """DeLong's test between two detectors over the slides that both have seen."""
    scores = [{one.slide_id: one.scores(protocol) for one in slides} for slides in (first, second)]
    shared = [one for one in first if one.slide_id in scores[1]]
    abnormal = np.array([one.label.abnormal for one in shared])
    found = {}
    for place, name in enumerate(SLIDE_SCORES):
        columns = [np.array([table[one.slide_id][place] for one in shared], np.float64) for table in scores]
        if test := delong_test(columns[0], columns[1], abnormal):
            found[name] = test
    return found


def _tile_level(evidence: Sequence[Evidence], protocol: Protocol) -> tuple[Ranking | None, Measures]:
    scores, labels = zip(*(_certain(one, protocol) for one in evidence), strict=True)
    ranking = rank(np.concatenate(scores).astype(np.float32), np.concatenate(labels))
    return ranking, {
        "tiles": ranking.abnormal + ranking.normal,
        "abnormal_tiles": ranking.abnormal,
        "tile_auroc": ranking.auroc(),
        "tile_aupr": ranking.aupr(),
        "tile_aupr_in": ranking.aupr_in(),
        "tile_fpr_at_95_tpr": ranking.fpr_at_tpr(0.95),
        "tile_detection_error": ranking.detection_error(),
    }


def _certain(one: Evidence, protocol: Protocol) -> tuple[Float64[np.ndarray, " _"], Bool[np.ndarray, " _"]]:
    """Scores and labels of the tiles that are surely normal or surely abnormal."""
    if one.share is None:
        return np.empty(0), np.empty(0, bool)
    abnormal = one.share >= protocol.abnormal_from - _ROUNDING
    normal = one.share <= protocol.normal_up_to
    if one.label.abnormal and not protocol.normal_tissue_of_abnormal_slides:
        normal = np.zeros_like(normal)
    chosen = np.isfinite(one.z_tile) & (abnormal | normal)
    return one.z_tile[chosen], abnormal[chosen]


def _slide_level(
    evidence: Sequence[Evidence], protocol: Protocol
) -> tuple[dict[str, Ranking], Measures, dict[str, tuple[float, float]]]:
    measures: Measures = {
        "slides": len(evidence),
        "abnormal_slides": sum(one.label.abnormal for one in evidence),
    }
    rankings, intervals = {}, {}
    for subgroup in ("", *sorted({one.label.subgroup for one in evidence} - {""})):
        chosen = [one for one in evidence if not one.label.abnormal or subgroup in {"", one.label.subgroup}]
        labels = np.array([one.label.abnormal for one in chosen])
        for place, score in enumerate(SLIDE_SCORES):
            values = np.array([one.scores(protocol)[place] for one in chosen], np.float64)
            ranking = rank(values, labels)
            suffix = f"{score}_{subgroup}" if subgroup else score
            measures |= _slide_measures(ranking, suffix)
            for name, interval in _intervals(values, labels, protocol):
                if interval:
                    intervals[f"slide_{name}_{suffix}"] = (interval.low, interval.high)
            if not subgroup:
                rankings[score] = ranking
    return rankings, measures, intervals


def _slide_measures(ranking: Ranking, suffix: str) -> Measures:
    return {
        f"slide_auroc_{suffix}": ranking.auroc(),
        f"slide_aupr_{suffix}": ranking.aupr(),
        f"slide_sensitivity_at_90_specificity_{suffix}": ranking.sensitivity_at_specificity(0.9),
        f"slide_sensitivity_at_95_specificity_{suffix}": ranking.sensitivity_at_specificity(0.95),
    }


def _intervals(
    values: Float64[np.ndarray, " slide"], labels: Bool[np.ndarray, " slide"], protocol: Protocol
) -> list[tuple[str, Interval | None]]:
    def bootstrapped(measured: Callable[[Ranking], float | None]) -> Interval | None:
        return bootstrap_interval(
            measured, values, labels, seed=protocol.seed, level=protocol.level, resamples=protocol.resamples
        )

    return [
        ("auroc", delong_interval(values, labels, level=protocol.level)),
        ("auroc_bootstrap", bootstrapped(Ranking.auroc)),
        ("aupr", bootstrapped(Ranking.aupr)),
        ("sensitivity_at_90_specificity", bootstrapped(lambda ranking: ranking.sensitivity_at_specificity(0.9))),
        ("sensitivity_at_95_specificity", bootstrapped(lambda ranking: ranking.sensitivity_at_specificity(0.95))),
    ]


def _segmentation(evidence: Sequence[Evidence], protocol: Protocol) -> Measures:
    """Means over slides, as AnoPILaD reports them."""
    columns: dict[str, list[float]] = {name: [] for name in _SEGMENTATION}
    for one in evidence:
        if one.share is None or not np.isfinite(one.z_tile).any():
            continue
        found = _segmented(one, protocol) if one.truth.any() else _specificity(one, protocol)
        for name, value in found.items():
            if value is not None:
                columns[name].append(value)
    measures: Measures = {name: float(np.mean(values)) if values else None for name, values in columns.items()}
    drawn = [one for one in evidence if one.share is not None]
    measures["pro_auc"] = pro_auc([one.z_eroded for one in drawn], [one.truth for one in drawn]) if drawn else None
    return measures


def _segmented(one: Evidence, protocol: Protocol) -> dict[str, float | None]:
    """Of an abnormal slide."""
    truth, tiles = one.truth, np.isfinite(one.z)
    found = {name: np.nan_to_num(z, nan=-np.inf) > protocol.threshold_z for name, z in _before_and_after(one)}
    curve, eroded = overlap_curve(one.z_eroded, truth & tiles), found["eroded"]
    distances = surface_distances(eroded, truth & tiles, one.cell_um)
    match = match_components(eroded, truth & tiles)
    return {
        "dice_abnormal_slides": dice(eroded[tiles], truth[tiles]),
        "iou_abnormal_slides": iou(eroded[tiles], truth[tiles]),
        "dice_before_erosion": dice(found["raw"][tiles], truth[tiles]),
        "iou_before_erosion": iou(found["raw"][tiles], truth[tiles]),
        "dice_best_threshold": curve.best.dice,
        "dice_area": curve.area,
        "hausdorff_99_um": distances.truth_to_found_99_um if distances else None,
        "mean_surface_distance_um": distances.truth_to_found_mean_um if distances else None,
        "component_tpr": match.tpr,
        "component_ppv": match.ppv,
    }


def _specificity(one: Evidence, protocol: Protocol) -> dict[str, float | None]:
    """Of a normal slide."""
    tiles = np.isfinite(one.z)
    nothing = np.zeros(int(tiles.sum()), bool)
    ranked = protocol.specificity_of == "ranks" and one.ranks is not None
    maps = (
        [("eroded", one.grid(one.ranks)), ("raw", one.z)]
        if ranked and one.ranks is not None
        else _before_and_after(one)
    )
    names = {"eroded": "tnr_normal_slides", "raw": "tnr_before_erosion"}
    return {names[name]: tnr(z[tiles] > protocol.threshold_z, nothing) for name, z in maps}


def _before_and_after(one: Evidence) -> list[tuple[str, Float64[np.ndarray, "row column"]]]:
    return [("eroded", one.z_eroded.astype(np.float64)), ("raw", one.z.astype(np.float64))]


def _lesion_level(evidence: Sequence[Evidence], protocol: Protocol) -> tuple[FrocCurve | None, Measures]:
    """Lesions are the components of the annotated cells; detections the components of eroded z over the threshold."""
    slides: list[SlideFindings] = [
        findings_of(detections_of(one.z_eroded, protocol.threshold_z), components(one.truth))
        for one in evidence
        if one.share is not None
    ]
    curve = froc(slides)
    return curve, {"froc_score": curve.score if curve else None}


def _warnings(evidence: Sequence[Evidence], tiles: Ranking | None, protocol: Protocol) -> tuple[str, ...]:
    """What a table must not hide."""
    z = np.concatenate([one.z_tile for one in evidence])
    normal = np.concatenate([_certain(one, protocol)[0][~_certain(one, protocol)[1]] for one in evidence])
    found = []
    if tiles is not None and tiles.all_equal:
        found.append("all tiles have the same score")
    if (missing := float(np.isnan(z).mean())) > _MANY_MISSING:
        found.append(f"{missing:.0%} of the tiles have no score")
    if len(normal) and (share := float((normal > protocol.threshold_z).mean())) > _MANY_ABNORMAL:
        found.append(f"{share:.0%} of the normal tiles lie above z = {protocol.threshold_z:g}")
    if len(normal) and abs(drift := float(np.median(normal))) > _MUCH_DRIFT:
        found.append(f"the normal tissue under test has a median z of {drift:.1f}: it differs from the reference")
    return tuple(found)


_SEGMENTATION = (
    "dice_abnormal_slides",
    "iou_abnormal_slides",
    "tnr_normal_slides",
    "dice_before_erosion",
    "iou_before_erosion",
    "tnr_before_erosion",
    "dice_best_threshold",
    "dice_area",
    "hausdorff_99_um",
    "mean_surface_distance_um",
    "component_tpr",
    "component_ppv",
)
_ROUNDING = 1e-6
"""Areas are sums of floats: a tile fully inside may miss 1 by so much."""
_MANY_MISSING, _MANY_ABNORMAL, _MUCH_DRIFT = 0.05, 0.75, 1.0
