"""How sure a measure of scores against labels is, and whether two detectors differ: arrays in, numbers out.

Knows no slide and no file. Items are taken as independent of each other: slides are; tiles of one slide are not, they
belong to `clusters`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from wsi_anomaly.imaging.classification import Ranking, rank, require_ranked

Measure = Callable[[Ranking], float | None]
"""What to measure, such as `Ranking.auroc`."""
FEWEST = 2
"""Items or clusters: one alone says nothing of its variance."""
BATCH = 64
"""Resamples at once, which bounds memory. Another number draws other items."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A measure and the range that it may lie in. Where the range has no width, the method can say nothing."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two detectors on the same items."""

    difference: float
    """The measure of the first less that of the second."""
    p_value: float
    """The chance, two-sided, of a difference at least this large between detectors that are equally good."""
    method: Literal["DeLong", "paired bootstrap"]


def delong_interval(
    scores: Float[np.ndarray, " item"], labels: Bool[np.ndarray, " item"], *, level: float = 0.95
) -> Interval | None:
    """The AUROC and its interval after DeLong et al. (Biometrics 1988): normal, clipped to [0, 1], as pROC makes it.

    None where a class has fewer than two items. All scores equal, or perfectly separated classes, have no variance: the
    range shrinks to the value, which is no proof of certainty.

    Raises:
        ValueError: a score is NaN or infinite, or there are not as many scores as labels.
    """
    require_ranked(scores, labels)
    if not _two_of_each(labels):
        return None
    from scipy.special import ndtri

    placements = _placements(scores, labels)
    auroc = float(placements[labels].mean())
    margin = float(ndtri((1 + level) / 2)) * _variance(placements, labels) ** 0.5
    return Interval(auroc, max(0.0, auroc - margin), min(1.0, auroc + margin))


def delong_test(
    scores_a: Float[np.ndarray, " item"], scores_b: Float[np.ndarray, " item"], labels: Bool[np.ndarray, " item"]
) -> Comparison | None:
    """How far the AUROCs of two detectors differ on the same items, and whether by chance.

    DeLong et al. (Biometrics 1988), as pROC has it for paired curves. None where a class has fewer than two items. The
    p-value is 1 where both rank alike, and 0 where they differ without variance, as perfect and all-equal scores do:
    `auroc_test` mends that.

    Raises:
        ValueError: a score is NaN or infinite, or there are not as many scores as labels.
    """
    require_ranked(scores_a, labels)
    require_ranked(scores_b, labels)
    if not _two_of_each(labels):
        return None
    from scipy.special import ndtr

    gains = _placements(scores_a, labels) - _placements(scores_b, labels)
    difference, deviation = float(gains[labels].mean()), _variance(gains, labels) ** 0.5
    if difference == 0:
        return Comparison(0.0, 1.0, "DeLong")
    return Comparison(difference, 2 * float(ndtr(-abs(difference) / deviation)) if deviation else 0.0, "DeLong")


def auroc_test(
    scores_a: Float[np.ndarray, " item"],
    scores_b: Float[np.ndarray, " item"],
    labels: Bool[np.ndarray, " item"],
    *,
    seed: int,
    resamples: int = 2000,
) -> Comparison | None:
    """`delong_test`, and `bootstrap_test` where there is no variance for it to go by.

    Raises:
        ValueError: a score is NaN or infinite, or there are not as many scores as labels.
    """
    found = delong_test(scores_a, scores_b, labels)
    if found is None or found.p_value > 0:
        return found
    return bootstrap_test(Ranking.auroc, scores_a, scores_b, labels, seed=seed, resamples=resamples)


def bootstrap_interval(
    measure: Measure,
    scores: Float[np.ndarray, " item"],
    labels: Bool[np.ndarray, " item"],
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval | None:
    """Any measure and the percentiles of what it is on items drawn again, as many of each class as there are.

    None where a class has fewer than two items. Equal seeds give equal ranges.

    Raises:
        ValueError: a score is NaN or infinite, there are not as many scores as labels, or `measure` gives None although
            both classes are there.
    """
    require_ranked(scores, labels)
    if not _two_of_each(labels):
        return None
    drawn = _bootstrap(lambda chosen: _measured(measure, scores[chosen], labels[chosen]), labels, resamples, seed)
    return percentiles(_measured(measure, scores, labels), drawn, level)


def bootstrap_test(
    measure: Measure,
    scores_a: Float[np.ndarray, " item"],
    scores_b: Float[np.ndarray, " item"],
    labels: Bool[np.ndarray, " item"],
    *,
    seed: int,
    resamples: int = 2000,
) -> Comparison | None:
    """How far two detectors differ in any measure on the same items, and whether by chance.

    Items are drawn again by class, the same ones for both detectors. The p-value is twice the smaller share of drawn
    differences on either side of 0, which agrees with their percentile interval; one more is counted on that side, so
    that it is never 0 (Davison & Hinkley, "Bootstrap Methods and their Application", 1997, section 4.2). Nor is it
    below 2 / 2^items. None where a class has fewer than two items.

    Raises:
        ValueError: a score is NaN or infinite, or there are not as many scores as labels.
    """
    require_ranked(scores_a, labels)
    require_ranked(scores_b, labels)
    if not _two_of_each(labels):
        return None

    def difference(chosen: Int64[np.ndarray, " drawn"]) -> float:
        first = _measured(measure, scores_a[chosen], labels[chosen])
        return first - _measured(measure, scores_b[chosen], labels[chosen])

    drawn = _bootstrap(difference, labels, resamples, seed)
    beyond = 1 + min(int(np.count_nonzero(drawn <= 0)), int(np.count_nonzero(drawn >= 0)))
    # Without variance every draw differs alike, however few items there are. Were the detectors equally good, each item
    # might as well have its scores swapped: of so many cases no test can call fewer than the two extreme ones rare.
    least = 2.0 ** (1 - labels.size)
    p_value = min(1.0, max(least, 2 * beyond / (resamples + 1)))
    return Comparison(difference(np.arange(labels.size)), p_value, "paired bootstrap")


def mean_interval(
    values: Float64[np.ndarray, " item"], *, seed: int, level: float = 0.95, resamples: int = 2000
) -> Interval | None:
    """The mean and the percentiles of what it is on items drawn again; None where there are fewer than two."""
    if values.size < FEWEST:
        return None
    drawn = np.random.default_rng(seed).choice(values, (resamples, values.size)).mean(axis=1)
    return percentiles(float(values.mean()), drawn, level)


def measured_of(measure: Measure, ranking: Ranking) -> float:
    """The measure of a ranking that has both classes.

    Raises:
        ValueError: it has no value nevertheless.
    """
    value = measure(ranking)
    if value is None:
        raise ValueError("the measure has no value although both classes are there")
    return value


def percentiles(value: float, drawn: Float64[np.ndarray, " resample"], level: float) -> Interval:
    """Around `value`, where the share `level` of what was drawn lies in the middle."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _measured(measure: Measure, scores: Float[np.ndarray, " item"], labels: Bool[np.ndarray, " item"]) -> float:
    return measured_of(measure, rank(scores, labels))


def _placements(scores: Float[np.ndarray, " item"], labels: Bool[np.ndarray, " item"]) -> Float64[np.ndarray, " item"]:
    """The share of the other class that each item is on the right side of, ties counted half.

    From ranks, in n log n (Sun & Xu, IEEE Signal Processing Letters 2014).
    """
    from scipy.stats import rankdata

    below = rankdata(scores)
    below[labels] -= rankdata(scores[labels])
    below[~labels] -= rankdata(scores[~labels])
    abnormal = np.count_nonzero(labels)
    return np.where(labels, below / (labels.size - abnormal), 1 - below / abnormal)


def _variance(placements: Float64[np.ndarray, " item"], labels: Bool[np.ndarray, " item"]) -> float:
    """The variance of the mean of `placements` (or of a difference of such) that the choice of items brings."""
    return sum(float(one.var(ddof=1)) / one.size for one in (placements[labels], placements[~labels]))


def _bootstrap(
    statistic: Callable[[Int64[np.ndarray, " drawn"]], float],
    labels: Bool[np.ndarray, " item"],
    resamples: int,
    seed: int,
) -> Float64[np.ndarray, " resample"]:
    """What `statistic` makes of the numbers of items drawn with replacement from each class."""
    from scipy.stats import bootstrap

    result = bootstrap(
        (np.flatnonzero(labels), np.flatnonzero(~labels)),
        lambda abnormal, normal: statistic(np.concatenate([abnormal, normal])),
        vectorized=False,
        n_resamples=resamples,
        batch=BATCH,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return np.asarray(result.bootstrap_distribution, np.float64)


def _two_of_each(labels: Bool[np.ndarray, " item"]) -> bool:
    """Whether there are two items of each class."""
    abnormal = int(np.count_nonzero(labels))
    return min(abnormal, labels.size - abnormal) >= FEWEST
