"""From raw scores to z-scores: how many deviations a tile lies above normal tissue."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64
from pydantic import Field

from wsi_anomaly.options import Options

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class ScoreReference(Options):
    """The distribution of one score over normal tiles that the detector did not learn from."""

    mean: float
    deviation: float = Field(gt=0)
    """Population standard deviation."""
    count: int = Field(ge=2)
    quantiles: dict[str, float]


def describe(scores: Float32[np.ndarray, " tile"]) -> ScoreReference:
    """The reference that some scores make; NaN (unreadable tiles) is left out.

    Raises:
        ValueError: fewer than two scores, or all equal but for rounding: nothing can be measured against them.
    """
    finite = scores[np.isfinite(scores)].astype(np.float64)
    if len(finite) < 2:  # noqa: PLR2004 - a deviation needs two
        raise ValueError(f"there are {len(finite)} scores")
    if finite.std() <= _ROUNDING * abs(finite.mean()):
        raise ValueError(f"its {len(finite)} scores are all equal")
    quantiles = {str(q): float(value) for q, value in zip(QUANTILES, np.quantile(finite, QUANTILES), strict=True)}
    return ScoreReference(
        mean=float(finite.mean()), deviation=float(finite.std()), count=len(finite), quantiles=quantiles
    )


def z_scores(
    scores: Float32[np.ndarray, "tile score"], references: Sequence[ScoreReference]
) -> Float64[np.ndarray, "tile score"]:
    """(score - mean) / deviation, column by column; NaN stays NaN."""
    mean = np.array([reference.mean for reference in references])
    deviation = np.array([reference.deviation for reference in references])
    return np.asarray((scores.astype(np.float64) - mean) / deviation)


_ROUNDING = 1e-6
"""Of their mean. Scores are kept as float32, whose steps are a tenth of this."""
