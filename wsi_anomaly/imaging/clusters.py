"""How sure a measure of tiles is, given that those of one slide are alike: arrays in, numbers out.

Knows no slide and no file. Whole clusters of items are drawn again. Millions of items stay cheap, since each cluster is
counted into bins of score once: a resample is then a weighted sum of counts.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64

from wsi_anomaly.imaging.classification import Ranking
from wsi_anomaly.imaging.intervals import BATCH, FEWEST, Interval, Measure, measured_of, percentiles


@dataclass(frozen=True, slots=True)
class BinnedClusters:
    """How many items of each cluster, such as tiles of a slide, lie between which scores; bins rise."""

    abnormal: Int64[np.ndarray, "cluster bin"]
    normal: Int64[np.ndarray, "cluster bin"]


def bin_clusters(
    clusters: Iterable[tuple[Float[np.ndarray, " _"], Bool[np.ndarray, " _"]]], edges: Float[np.ndarray, " edge"]
) -> BinnedClusters:
    """Count the scores and labels of each cluster between rising `edges`, such as `Ranking.bin_edges`."""
    counts = [_bin_counts(scores, labels, edges) for scores, labels in clusters]
    return BinnedClusters(*(np.stack(part) for part in zip(*counts, strict=True)))


def cluster_intervals(
    measures: Sequence[Measure],
    clusters: BinnedClusters,
    strata: Bool[np.ndarray, " cluster"],
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 2000,
) -> list[Interval | None]:
    """Each measure and the percentiles of what it is on clusters drawn again, as many of each stratum as there are.

    Measures are those of the bins; all of them see the same draws. None where a class is missing, or where a stratum
    has one cluster alone, which says nothing of its variance. Draws that happen to leave out a class are not counted.
    """
    of_all = _ranking_of(clusters.abnormal.sum(axis=0), clusters.normal.sum(axis=0))
    sizes = np.bincount(strata)
    if not of_all.has_both_classes or sizes[sizes > 0].min() < FEWEST:
        return [None] * len(measures)
    drawn = [
        [measured_of(measure, ranking) for measure in measures]
        for ranking in _draws(clusters, strata, np.random.default_rng(seed), resamples)
        if ranking.has_both_classes
    ]
    values = np.array(drawn, np.float64).reshape(-1, len(measures)).T
    return [
        percentiles(measured_of(measure, of_all), column, level) if column.size else None
        for measure, column in zip(measures, values, strict=True)
    ]


def _bin_counts(
    scores: Float[np.ndarray, " item"], labels: Bool[np.ndarray, " item"], edges: Float[np.ndarray, " edge"]
) -> tuple[Int64[np.ndarray, " bin"], Int64[np.ndarray, " bin"]]:
    """Of abnormal and of normal items."""
    bins = np.searchsorted(edges, scores, side="right")
    abnormal, everything = (np.bincount(chosen, minlength=len(edges) + 1) for chosen in (bins[labels], bins))
    return abnormal, everything - abnormal


def _draws(
    clusters: BinnedClusters, strata: Bool[np.ndarray, " cluster"], random: np.random.Generator, resamples: int
) -> Iterator[Ranking]:
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    # Floats are multiplied by BLAS, 20 times as fast as whole numbers, and hold these sums exactly.
    counts = [part.astype(np.float64) for part in (clusters.abnormal, clusters.normal)]
    for start in range(0, resamples, BATCH):
        times = np.zeros((min(BATCH, resamples - start), len(strata)))
        for chosen in members:
            times[:, chosen] = random.multinomial(len(chosen), np.full(len(chosen), 1 / len(chosen)), len(times))
        abnormal, normal = ((times @ part).astype(np.int64) for part in counts)
        yield from map(_ranking_of, abnormal, normal)


def _ranking_of(abnormal: Int64[np.ndarray, " bin"], normal: Int64[np.ndarray, " bin"]) -> Ranking:
    """As if every item had the number of its bin for a score."""
    bins = np.flatnonzero(abnormal + normal)[::-1]
    found, raised = (np.concatenate([[0], np.cumsum(part[bins])]) for part in (abnormal, normal))
    return Ranking(np.concatenate([[np.inf], bins]), found, raised)
