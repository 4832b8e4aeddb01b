"""What was found on each slide alone, cell by cell of its grid, and what that comes to over all slides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64

from wsi_anomaly.imaging.heatmap import SlideScores, erode
from wsi_anomaly.imaging.intervals import mean_interval
from wsi_anomaly.imaging.metrics import dice, iou, tnr
from wsi_anomaly.imaging.segmentation import OverlapCurve, match_components, overlap_curve, pro_auc, surface_distances
from wsi_anomaly.stages.evaluate.evidence import Evidence
from wsi_anomaly.stages.evaluate.protocol import Protocol

Value = float | int | None

_MEANS = {
    "dice_abnormal_slides": "dice",
    "iou_abnormal_slides": "iou",
    "tnr_normal_slides": "tnr",
    "dice_before_erosion": "dice_before_erosion",
    "iou_before_erosion": "iou_before_erosion",
    "tnr_before_erosion": "tnr_before_erosion",
    "dice_best_threshold": "dice_best_threshold",
    "iou_best_threshold": "iou_best_threshold",
    "dice_area": "dice_area",
    "iou_area": "iou_area",
    "hausdorff_99_um": "hausdorff_99_um",
    "mean_surface_distance_um": "mean_surface_distance_um",
    "component_tpr": "component_tpr",
    "component_ppv": "component_ppv",
}
"""The value of a slide that each measure is the mean of."""
_OF_SUBGROUPS = ("dice_abnormal_slides", "iou_abnormal_slides")
_WITH_INTERVAL = (*_OF_SUBGROUPS, "tnr_normal_slides")
_AT_COMMON_THRESHOLD = ("common_threshold_z", "dice_common_threshold", "iou_common_threshold", "tnr_common_threshold")
_VALUES = (*_MEANS.values(), "best_threshold_z", "components", "components_found")


@dataclass(frozen=True, slots=True)
class Segmented:
    """One slide."""

    evidence: Evidence
    values: Mapping[str, Value]
    """Equal names for every slide; None where it is of the other class, or where nobody drew what is abnormal."""
    curve: OverlapCurve | None
    """Where the annotation touches a tile."""

    @property
    def subgroup(self) -> str:
        """As its label says."""
        return self.evidence.label.subgroup


def segment(one: Evidence, protocol: Protocol) -> Segmented:
    """How well the cells over the threshold agree with the cells that the annotation touches."""
    values: dict[str, Value] = dict.fromkeys(_VALUES)
    tiles = np.isfinite(one.z)
    truth = one.truth & tiles
    if truth.any():
        curve = overlap_curve(one.z_eroded, truth)
        return Segmented(one, values | _overlap(one, truth, curve, protocol), curve)
    if one.label.abnormal or not tiles.any():
        return Segmented(one, values, None)
    return Segmented(one, values | _specificity(one, protocol), None)


def slide_rows(slides: Sequence[Segmented], scores: Mapping[str, SlideScores]) -> tuple[dict[str, Value | str], ...]:
    """One row a slide: what it is, its scores, and its segmentation."""
    return tuple({**_row(slide.evidence, scores.get(slide.evidence.slide_id)), **slide.values} for slide in slides)


def segmentation_measures(slides: Sequence[Segmented]) -> dict[str, Value]:
    """Means over the slides that have a value, each counting the same, and the measures of all slides together.

    What is measured at the best or at the common threshold is an oracle: it is chosen with the truth in hand, so it
    bounds what a threshold can do and estimates nothing.
    """
    groups = sorted({slide.subgroup for slide in slides} - {""})
    drawn = [slide.evidence for slide in slides if slide.evidence.share is not None]
    return {
        **{name: _mean(slides, name) for name in _MEANS},
        **{
            f"{name}_{group}": _mean([slide for slide in slides if slide.subgroup == group], name)
            for group in groups
            for name in _OF_SUBGROUPS
        },
        "pro_auc": pro_auc([one.z_eroded for one in drawn], [one.truth for one in drawn]),
        **_at_common_threshold(slides),
    }


def segmentation_intervals(slides: Sequence[Segmented], protocol: Protocol) -> dict[str, tuple[float, float]]:
    """Of the means of Dice, IoU and TNR, by drawing slides."""
    found = {
        name: mean_interval(
            _column(slides, name), seed=protocol.seed, level=protocol.level, resamples=protocol.resamples
        )
        for name in _WITH_INTERVAL
    }
    return {name: (interval.low, interval.high) for name, interval in found.items() if interval}


def common_threshold(curves: Sequence[OverlapCurve]) -> float | None:
    """The threshold at which the mean Dice of all slides is highest, the highest such one; None without slides.

    Exact: Dice of a slide is a step function of the threshold, so the mean changes only where one of them does.
    """
    if not curves:
        return None
    thresholds = np.concatenate([curve.thresholds_z for curve in curves])
    steps = np.concatenate([np.diff(curve.dice, prepend=curve.dice[0]) for curve in curves])
    order = np.argsort(thresholds, kind="stable")
    thresholds, gains = thresholds[order], np.cumsum(steps[order])
    last_of_equals = np.append(thresholds[1:] > thresholds[:-1], np.True_)
    thresholds, gains = thresholds[last_of_equals], gains[last_of_equals]
    # Sums of the same steps in another order differ in their last digits.
    return float(thresholds[np.flatnonzero(gains >= gains.max() - _ROUNDING)[-1]])


def _at_common_threshold(slides: Sequence[Segmented]) -> dict[str, Value]:
    curves = [slide.curve for slide in slides if slide.curve]
    normal = [slide.evidence.z_eroded for slide in slides if slide.values["tnr"] is not None]
    threshold = common_threshold(curves)
    if threshold is None:
        return dict.fromkeys(_AT_COMMON_THRESHOLD)
    overlaps = [curve.at(threshold) for curve in curves]
    left_out = [float((z[np.isfinite(z)] <= threshold).mean()) for z in normal]
    values = (
        threshold,
        float(np.mean([one.dice for one in overlaps])),
        float(np.mean([one.iou for one in overlaps])),
        float(np.mean(left_out)) if left_out else None,
    )
    return dict(zip(_AT_COMMON_THRESHOLD, values, strict=True))


def _column(slides: Sequence[Segmented], name: str) -> Float64[np.ndarray, " slide"]:
    values = (slide.values[_MEANS[name]] for slide in slides)
    return np.array([value for value in values if value is not None], np.float64)


def _mean(slides: Sequence[Segmented], name: str) -> float | None:
    column = _column(slides, name)
    return float(column.mean()) if column.size else None


def _row(one: Evidence, scores: SlideScores | None) -> dict[str, Value | str]:
    return {
        "slide_id": one.slide_id,
        "label": "abnormal" if one.label.abnormal else "normal",
        "subgroup": one.label.subgroup,
        "tiles": len(one.z_tile),
        "tiles_without_score": int(np.count_nonzero(~np.isfinite(one.z_tile))),
        "annotated_tiles": None if one.share is None else int(np.count_nonzero(one.share > 0)),
        "z_max": scores.z_max if scores else None,
        "z_99": scores.z_99 if scores else None,
    }


def _overlap(
    one: Evidence, truth: Bool[np.ndarray, "row column"], curve: OverlapCurve, protocol: Protocol
) -> dict[str, Value]:
    """Where the annotation touches a tile."""
    tiles = np.isfinite(one.z)
    raw, eroded = (np.nan_to_num(z, nan=-np.inf) > protocol.threshold_z for z in (one.z, one.z_eroded))
    distances = surface_distances(eroded, truth, one.cell_um)
    match = match_components(eroded, truth)
    return {
        "dice": dice(eroded[tiles], truth[tiles]),
        "iou": iou(eroded[tiles], truth[tiles]),
        "dice_before_erosion": dice(raw[tiles], truth[tiles]),
        "iou_before_erosion": iou(raw[tiles], truth[tiles]),
        "best_threshold_z": curve.best.threshold_z,
        "dice_best_threshold": curve.best.dice,
        "iou_best_threshold": curve.best.iou,
        "dice_area": curve.area,
        "iou_area": _area(curve.iou, curve),
        "hausdorff_99_um": distances.truth_to_found_99_um if distances else None,
        "mean_surface_distance_um": distances.truth_to_found_mean_um if distances else None,
        "components": match.true,
        "components_found": match.true_found,
        "component_tpr": match.tpr,
        "component_ppv": match.ppv,
    }


def _area(values: Float[np.ndarray, " point"], curve: OverlapCurve) -> float:
    """As `OverlapCurve.area` of Dice: over the share of tiles found."""
    return float(-np.trapezoid(values, curve.found / curve.found[0]))


def _specificity(one: Evidence, protocol: Protocol) -> dict[str, Value]:
    """Of a normal slide."""
    tiles = np.isfinite(one.z)
    nothing = np.zeros(int(tiles.sum()), np.bool_)
    ranks = one.ranks if protocol.specificity_of == "ranks" else None
    eroded = one.z_eroded if ranks is None else erode(one.grid(ranks))
    return {
        "tnr": tnr(eroded[tiles] > protocol.threshold_z, nothing),
        "tnr_before_erosion": tnr(one.z[tiles] > protocol.threshold_z, nothing),
    }


_ROUNDING = 1e-9
