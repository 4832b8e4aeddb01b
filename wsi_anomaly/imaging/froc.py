"""FROC, the lesion-level measure of Camelyon16: how many lesions are found at how many false alarms a slide.

Arrays in, numbers out. Knows no slide, no file and no outline: lesions come as numbers, with what hits them.

Follows the challenge's evaluation script (Ehteshami Bejnordi et al., JAMA 2017) with two differences. The script takes
0 for the confidence of a missed lesion, which z-scores may fall below; here it is -inf. And it leaves out its lowest
threshold, which is that 0 unless every lesion is hit; here no confidence is left out. What the script does to outlines
before is up to the caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

FALSE_POSITIVES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Per slide: where Camelyon16 reads the curve."""


@dataclass(frozen=True, slots=True)
class SlideFindings:
    """What the detections of one slide amount to."""

    lesions: Float[np.ndarray, " lesion"]
    """The highest confidence among the detections that hit each lesion; -inf where the lesion was missed."""
    false_positives: Float[np.ndarray, " detection"]
    """The confidence of each detection that hits no lesion."""


@dataclass(frozen=True, slots=True)
class FrocCurve:
    """Lesions found against false positives, from a threshold over everything down to the lowest confidence."""

    thresholds: Float[np.ndarray, " point"]
    """Falling, the first +inf: a detection counts where its confidence is at least this."""
    false_positives: Float[np.ndarray, " point"]
    """A slide, averaged over all slides, with and without lesions."""
    sensitivity: Float[np.ndarray, " point"]
    """The share found of the lesions of all slides."""

    def at(self, false_positives: float) -> float:
        """The sensitivity at so many false positives a slide, between points on a line and beyond the last as there."""
        return float(np.interp(false_positives, self.false_positives, self.sensitivity))

    @property
    def score(self) -> float:
        """The mean sensitivity at 1/4, 1/2, 1, 2, 4 and 8 false positives a slide: the challenge's score, 0 to 1."""
        return float(np.mean([self.at(rate) for rate in FALSE_POSITIVES]))


def peaks_of(z: Float[np.ndarray, "row column"], radius_cells: float) -> Int64[np.ndarray, "peak rowcol"]:
    """The cells that no higher one suppresses, highest z first; of equal ones the first in reading order.

    Again and again the highest cell that is left is taken, and the cells whose centres lie up to `radius_cells` from
    its own are left out: the non-maximum suppression of Liu et al., "Detecting Cancer Metastases on Gigapixel Pathology
    Images" (arXiv 1703.02442). It has no lowest z, so the curve reaches every rate at which it is read. Cells without a
    finite z are none.
    """
    reach = int(radius_cells)
    tissue = np.pad(np.isfinite(z), reach)
    row, column = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    steps = (row * tissue.shape[1] + column)[np.hypot(row, column) <= radius_cells].tolist()
    cells = np.argwhere(np.isfinite(z))
    cells = cells[np.argsort(-z[cells[:, 0], cells[:, 1]], kind="stable")]
    places = (cells + reach) @ np.array([tissue.shape[1], 1])
    left, peaks = bytearray(tissue), []  # plain bytes: single elements of an array take ten times as long
    for position, place in enumerate(places.tolist()):
        if left[place]:
            peaks.append(position)
            for step in steps:
                left[place + step] = 0
    return cells[peaks]


def slide_findings(
    confidences: Float[np.ndarray, " detection"],
    hits: tuple[Int64[np.ndarray, " hit"], Int64[np.ndarray, " hit"]],
    ignored: Bool[np.ndarray, " lesion"],
) -> SlideFindings:
    """Which lesions of a slide were detected, and which detections hit none.

    `hits` are the detections and, beside each, the lesion that it hits. A lesion that is `ignored` need not be found,
    and what hits it is no false positive either: the challenge ignores isolated tumour cells.

    Raises:
        ValueError: a confidence is NaN or infinite.
    """
    if not np.isfinite(confidences).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(confidences))} confidences are NaN or infinite")
    detection, lesion = hits
    highest = np.full(len(ignored), -np.inf)
    np.maximum.at(highest, lesion, confidences[detection])
    beside = np.ones(len(confidences), np.bool_)
    beside[detection] = False
    return SlideFindings(lesions=highest[~ignored], false_positives=confidences[beside])


def froc(slides: Sequence[SlideFindings]) -> FrocCurve | None:
    """The curve of a cohort, slides without lesions included; None where no slide has a lesion to find."""
    lesions = np.sort(np.concatenate([np.empty(0), *(slide.lesions for slide in slides)]))
    if not len(lesions):
        return None
    false_positives = np.sort(np.concatenate([np.empty(0), *(slide.false_positives for slide in slides)]))
    confidences = np.unique(np.concatenate([lesions[np.isfinite(lesions)], false_positives]))
    thresholds = np.append(confidences, np.inf)[::-1]
    return FrocCurve(
        thresholds=thresholds,
        false_positives=_at_least(thresholds, false_positives) / len(slides),
        sensitivity=_at_least(thresholds, lesions) / len(lesions),
    )


def _at_least(
    thresholds: Float[np.ndarray, " point"], ordered: Float[np.ndarray, " value"]
) -> Int[np.ndarray, " point"]:
    """How many of the `ordered` values reach each threshold."""
    return np.asarray(len(ordered) - np.searchsorted(ordered, thresholds, side="left"))
