"""Slides as a detector ranks them by their scores, all and by subgroup: measures, intervals, and tests between two."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from jaxtyping import Bool, Float64

from wsi_anomaly.imaging.classification import Ranking, rank
from wsi_anomaly.imaging.clusters import bin_clusters, cluster_intervals
from wsi_anomaly.imaging.heatmap import SlideScores
from wsi_anomaly.imaging.intervals import (
    Comparison,
    Interval,
    Measure,
    auroc_test,
    bootstrap_test,
    delong_interval,
)
from wsi_anomaly.stages.evaluate.evidence import Evidence
from wsi_anomaly.stages.evaluate.protocol import Protocol

SLIDE_SCORES = ("z_max", "z_99")
SLIDE_MEASURES: Mapping[str, Measure] = {
    "auroc": Ranking.auroc,
    "aupr": Ranking.aupr,
    "sensitivity_at_90_specificity": lambda ranking: ranking.sensitivity_at_specificity(0.9),
    "sensitivity_at_95_specificity": lambda ranking: ranking.sensitivity_at_specificity(0.95),
}


def scores_of(evidence: Sequence[Evidence], protocol: Protocol) -> dict[str, SlideScores]:
    """Z_MAX and Z_99 by slide_id, of the slides that have a tile with a score."""
    return {one.slide_id: one.scores(protocol) for one in evidence if np.isfinite(one.z_tile).any()}


def subgroups(evidence: Sequence[Evidence]) -> dict[str, list[Evidence]]:
    """Abnormal slides by what the names of their measures end in: "" has all, "_macro" those of that subgroup."""
    abnormal = [one for one in evidence if one.label.abnormal]
    names = sorted({one.label.subgroup for one in abnormal} - {""})
    return {"": abnormal} | {f"_{name}": [one for one in abnormal if one.label.subgroup == name] for name in names}


def rank_slides(evidence: Sequence[Evidence], scores: Mapping[str, SlideScores]) -> dict[str, Ranking]:
    """By slide score: "z_max", "z_99", and of each subgroup against all normal slides, "z_max_macro"."""
    return {name: rank(column, labels) for name, (column,), labels in _columns(evidence, [scores])}


def slide_measures(evidence: Sequence[Evidence], scores: Mapping[str, SlideScores]) -> dict[str, float | int | None]:
    """Each measure, None where a class is missing, and what it is counted from."""
    return {
        "slides": len(evidence),
        "abnormal_slides": sum(one.label.abnormal for one in evidence),
        "slides_without_score": len(evidence) - len(scores),
        **{
            f"slide_{name}_{suffix}": measured(ranking)
            for suffix, ranking in rank_slides(evidence, scores).items()
            for name, measured in SLIDE_MEASURES.items()
        },
    }


def slide_intervals(
    evidence: Sequence[Evidence], scores: Mapping[str, SlideScores], protocol: Protocol
) -> dict[str, tuple[float, float]]:
    """By DeLong for AUROC, and by drawing slides for all; `slide_auroc_bootstrap_...` is the second of AUROC."""
    found: dict[str, Interval | None] = {}
    for suffix, (column,), labels in _columns(evidence, [scores]):
        drawn = cluster_intervals(
            tuple(SLIDE_MEASURES.values()),
            bin_clusters(zip(column[:, None], labels[:, None], strict=True), np.unique(column)),
            labels,
            seed=protocol.seed,
            level=protocol.level,
            resamples=protocol.resamples,
        )
        found |= {f"slide_{name}_{suffix}": one for name, one in zip(SLIDE_MEASURES, drawn, strict=True)}
        found[f"slide_auroc_bootstrap_{suffix}"] = found[f"slide_auroc_{suffix}"]
        found[f"slide_auroc_{suffix}"] = delong_interval(column, labels, level=protocol.level)
    return {name: (interval.low, interval.high) for name, interval in found.items() if interval}


def compare(first: Sequence[Evidence], second: Sequence[Evidence], protocol: Protocol) -> dict[str, Comparison]:
    """How the slide measures of two detectors differ, over the slides that both have scored; by measure.

    A measure is absent where a class has fewer than two slides.
    """
    scores = [scores_of(slides, protocol) for slides in (first, second)]
    found: dict[str, Comparison | None] = {}
    for suffix, (one, other), labels in _columns(first, scores):
        for name, measured in SLIDE_MEASURES.items():
            test = auroc_test if name == "auroc" else partial(bootstrap_test, measured)
            found[f"slide_{name}_{suffix}"] = test(one, other, labels, seed=protocol.seed, resamples=protocol.resamples)
    return {name: test for name, test in found.items() if test}


def _columns(
    evidence: Sequence[Evidence], tables: Sequence[Mapping[str, SlideScores]]
) -> Iterator[tuple[str, list[Float64[np.ndarray, " slide"]], Bool[np.ndarray, " slide"]]]:
    """Each slide score of the slides that are in every table, as one column a table, and which slides are abnormal.

    A subgroup stands against all normal slides.
    """
    scored = [one for one in evidence if all(one.slide_id in table for table in tables)]
    normal = [one for one in scored if not one.label.abnormal]
    for suffix, abnormal in subgroups(scored).items():
        labels = np.arange(len(normal) + len(abnormal)) >= len(normal)
        for place, score in enumerate(SLIDE_SCORES):
            columns = [
                np.array([table[one.slide_id][place] for one in (*normal, *abnormal)], np.float64) for table in tables
            ]
            yield f"{score}{suffix}", columns, labels
