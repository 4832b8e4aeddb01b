"""How well scores tell abnormal items from normal ones: arrays in, numbers out. Knows no slide, file or interval.

Items are tiles or slides; higher scores are more abnormal. `rank` sorts them once and every measure follows from the
counts that this leaves: the functions of scikit-learn, whose definitions these are, would sort millions of tiles anew
for each measure.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64


@dataclass(frozen=True, slots=True)
class Curve:
    """The trade-off between finding abnormal items and raising normal ones, from the highest threshold to the lowest.

    An item is raised where its score is at least the threshold. The first threshold is infinite: nothing is raised, and
    the precision is 1 by convention.
    """

    thresholds: Float64[np.ndarray, " point"]
    fpr: Float64[np.ndarray, " point"]
    """The share of normal items that are raised: 1 - specificity."""
    tpr: Float64[np.ndarray, " point"]
    """The share of abnormal items that are raised: sensitivity, and the recall that goes with `precision`."""
    precision: Float64[np.ndarray, " point"]
    """The share of abnormal ones among those raised."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """How many items of each class each threshold raises: infinity, then every score that occurs, falling.

    Every measure is None where one class is absent: there is nothing to tell apart.
    """

    thresholds: Float[np.ndarray, " step"]
    true_positives: Int64[np.ndarray, " step"]
    """Abnormal items whose score is at least the threshold."""
    false_positives: Int64[np.ndarray, " step"]
    """Normal items whose score is at least the threshold."""

    @property
    def abnormal(self) -> int:
        """The number of abnormal items."""
        return int(self.true_positives[-1])

    @property
    def normal(self) -> int:
        """The number of normal items."""
        return int(self.false_positives[-1])

    @property
    def has_both_classes(self) -> bool:
        """Whether there is anything to tell apart."""
        return self.abnormal > 0 and self.normal > 0

    @property
    def all_equal(self) -> bool:
        """Whether all items have one and the same score, so that no measure says anything of the detector."""
        return len(self.thresholds) == 2  # noqa: PLR2004 - infinity and that score

    def auroc(self) -> float | None:
        """The chance that an abnormal item scores higher than a normal one, ties counted half."""
        if not self.has_both_classes:
            return None
        found, raised = self.true_positives, self.false_positives
        doubled_area = int(np.sum(np.diff(raised) * (found[1:] + found[:-1])))
        return doubled_area / (2 * self.abnormal * self.normal)

    def aupr(self) -> float | None:
        """The area under precision and recall with abnormal items as positives, as average precision.

        Known as AUPR-out where normal data are "in distribution" (Hendrycks & Gimpel, ICLR 2017). The code released
        with MSMA (Mahmood et al., ICLR 2021) calls it "in", and joins the points by lines, which is too kind.
        """
        return _average_precision(self.true_positives, self.false_positives) if self.has_both_classes else None

    def aupr_in(self) -> float | None:
        """The same with normal items as positives and the lowest score first, known as AUPR-in."""
        if not self.has_both_classes:
            return None
        return _average_precision(self.normal - self.false_positives[::-1], self.abnormal - self.true_positives[::-1])

    def fpr_at_tpr(self, tpr: float) -> float | None:
        """The smallest share of normal items raised by any threshold that finds at least `tpr` of the abnormal ones.

        Nothing is interpolated. The code released with MSMA looks for a share close to `tpr` instead, and answers 0
        where there is none.

        Raises:
            ValueError: `tpr` is not between 0 and 1.
        """
        _require_share(tpr)
        if not self.has_both_classes:
            return None
        step = np.searchsorted(self.true_positives / self.abnormal, tpr)
        return float(self.false_positives[step] / self.normal)

    def sensitivity_at_specificity(self, specificity: float) -> float | None:
        """The largest share of abnormal items found by any threshold that raises no more normal ones than allowed.

        At least the share `specificity` of normal items is left out. Nothing is interpolated.

        Raises:
            ValueError: `specificity` is not between 0 and 1.
        """
        _require_share(specificity)
        if not self.has_both_classes:
            return None
        kept = np.count_nonzero((self.normal - self.false_positives) / self.normal >= specificity)
        return float(self.true_positives[kept - 1] / self.abnormal)

    def detection_error(self) -> float | None:
        """The least share of errors of any threshold, were both classes equally common: 0 at best, 0.5 at worst.

        min over thresholds of (1 - TPR) / 2 + FPR / 2 (Liang et al., "ODIN", ICLR 2018).
        """
        if not self.has_both_classes:
            return None
        gain = self.true_positives / self.abnormal - self.false_positives / self.normal
        return float((1 - gain.max()) / 2)

    def curve(self, max_points: int = 2000) -> Curve | None:
        """The curve to draw, thinned to `max_points` of its points, evenly along the way; both ends stay."""
        if not self.has_both_classes:
            return None
        fpr, tpr = self.false_positives / self.normal, self.true_positives / self.abnormal
        chosen: slice | Int64[np.ndarray, " point"] = slice(None)
        if len(self.thresholds) > max_points:
            chosen = np.unique(np.searchsorted(fpr + tpr, np.linspace(0, 2, max_points)))
        raised = (self.true_positives + self.false_positives)[chosen]
        return Curve(
            thresholds=self.thresholds[chosen].astype(np.float64),
            fpr=fpr[chosen],
            tpr=tpr[chosen],
            precision=np.where(raised, self.true_positives[chosen] / np.maximum(raised, 1), 1.0),
        )

    def bin_edges(self, bins: int = 4096) -> Float[np.ndarray, " edge"]:
        """Thresholds, rising, that cut either class into `bins` / 2 equal parts; all of them where they are few.

        Besides items of one score, no bin between them holds more than 2 / `bins` of a class: an AUROC of the bins is
        off by less than 2 / `bins`.
        """
        if len(self.thresholds) <= bins:
            return self.thresholds[:0:-1]
        cuts = [_evenly(counts, bins // 2) for counts in (self.true_positives, self.false_positives)]
        return self.thresholds[np.setdiff1d(np.concatenate(cuts), [0])[::-1]]


def rank(scores: Float[np.ndarray, " item"], labels: Bool[np.ndarray, " item"]) -> Ranking:
    """Sort items by their score and count; `labels` is True where abnormal.

    A ranking holds 20 to 24 bytes for each different score; to measure it takes up to 60 for a while.

    Raises:
        ValueError: a score is NaN or infinite, or there are not as many scores as labels.
    """
    require_ranked(scores, labels)
    abnormal, normal = np.sort(scores[labels]), np.sort(scores[~labels])
    thresholds = np.append(np.unique(scores), scores.dtype.type(np.inf))[::-1]
    return Ranking(
        thresholds=thresholds,
        true_positives=abnormal.size - np.searchsorted(abnormal, thresholds),
        false_positives=normal.size - np.searchsorted(normal, thresholds),
    )


def require_ranked(scores: Float[np.ndarray, " item"], labels: Bool[np.ndarray, " label"]) -> None:
    """Make sure that items can be ranked.

    Raises:
        ValueError: a score is NaN or infinite, or there are not as many scores as labels.
    """
    if scores.shape != labels.shape:
        raise ValueError(f"{scores.shape} scores for {labels.shape} labels")
    bad = scores.size - int(np.count_nonzero(np.isfinite(scores)))
    if bad:
        raise ValueError(f"{bad} of {scores.size} scores are NaN or infinite")


def _average_precision(hits: Int64[np.ndarray, " step"], alarms: Int64[np.ndarray, " step"]) -> float:
    """Precision at each step, weighted by the recall that the step adds; both count upwards from 0."""
    precision = hits[1:] / (hits[1:] + alarms[1:])
    return float(np.sum(np.diff(hits) * precision) / hits[-1])


def _evenly(counts: Int64[np.ndarray, " step"], parts: int) -> Int64[np.ndarray, " cut"]:
    """The steps at which counts that rise pass equal parts of the last."""
    return np.searchsorted(counts, np.linspace(0, int(counts[-1]), parts + 1).astype(np.int64))


def _require_share(value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{value} is no share: it must lie between 0 and 1")
