"""How well scores and masks agree with the truth: arrays in, numbers out. Knows no slide, no file and no threshold."""

import numpy as np
from jaxtyping import Bool, Float


def auroc(scores: Float[np.ndarray, " item"], labels: Bool[np.ndarray, " item"]) -> float | None:
    """The chance that an abnormal item scores higher than a normal one, ties counted half; items are slides or tiles.

    `labels` is True where abnormal. None where `labels` holds one class only (or nothing): there is no pair to compare.

    Raises:
        ValueError: a score is NaN or infinite, or there are not as many scores as labels.
    """
    if scores.shape != labels.shape:
        raise ValueError(f"{scores.shape} scores for {labels.shape} labels")
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(scores))} of {scores.size} scores are NaN or infinite")
    if labels.all() or not labels.any():
        return None
    from sklearn.metrics import roc_auc_score  # takes a second to import

    return float(roc_auc_score(labels, scores))


def dice(predicted: Bool[np.ndarray, "*shape"], truth: Bool[np.ndarray, "*shape"]) -> float:
    """Twice the overlap over the sum of both areas, 0 to 1. Two empty masks agree: 1."""
    both, either = _overlap(predicted, truth)
    return 2 * both / (both + either) if either else 1.0


def iou(predicted: Bool[np.ndarray, "*shape"], truth: Bool[np.ndarray, "*shape"]) -> float:
    """The overlap over the joint area, 0 to 1. Two empty masks agree: 1."""
    both, either = _overlap(predicted, truth)
    return both / either if either else 1.0


def tnr(predicted: Bool[np.ndarray, "*shape"], truth: Bool[np.ndarray, "*shape"]) -> float | None:
    """The true negative rate (specificity): the share of what is not in `truth` that `predicted` leaves out too.

    None where `truth` covers everything: there is nothing to leave out.
    """
    _, either = _overlap(predicted, truth)
    negatives = truth.size - int(np.count_nonzero(truth))
    return (truth.size - either) / negatives if negatives else None


def _overlap(predicted: Bool[np.ndarray, "*shape"], truth: Bool[np.ndarray, "*shape"]) -> tuple[int, int]:
    """How many elements are in both masks, and how many in at least one."""
    if predicted.shape != truth.shape:
        raise ValueError(f"masks of different shapes: {predicted.shape} and {truth.shape}")
    return int(np.count_nonzero(predicted & truth)), int(np.count_nonzero(predicted | truth))
