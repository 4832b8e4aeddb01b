"""FROC, the lesion-level measure of Camelyon16: how many lesions are found at how many false alarms a slide.

Arrays in, numbers out. Knows no slide, no file and no outline: lesions come as labelled cells.

Follows the challenge's evaluation script (Ehteshami Bejnordi et al., JAMA 2017) with two differences. The script takes
0 for the confidence of a missed lesion, which z-scores may fall below; here it is -inf. And it leaves out its lowest
threshold, which is that 0 unless every lesion is hit; here no confidence is left out. What the script does to outlines
before (widen them by 37.5 µm, fill holes, join what then touches) is finer than a tile and up to the caller.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Int64

from wsi_anomaly.imaging.segmentation import components

FALSE_POSITIVES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Per slide: where Camelyon16 reads the curve."""


@dataclass(frozen=True, slots=True)
class Detections:
    """Points of one slide where a lesion is believed to be."""

    cells: Int64[np.ndarray, "detection rowcol"]
    confidences: Float[np.ndarray, " detection"]


@dataclass(frozen=True, slots=True)
class SlideFindings:
    """What the detections of one slide amount to."""

    lesions: Float[np.ndarray, " lesion"]
    """The highest confidence among the detections in each lesion; -inf where the lesion was missed."""
    false_positives: Float[np.ndarray, " detection"]
    """The confidence of each detection outside every lesion."""


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


def detections_of(z: Float[np.ndarray, "row column"], threshold_z: float) -> Detections:
    """One detection for each component of `z` > `threshold_z`: its highest z, at the (first) cell that has it.

    Cells that touch, be it at a corner, are one component. The challenge asks for points and leaves open how they are
    found; a component that covers several lesions can hit only one of them.
    """
    labels = components(np.where(np.isfinite(z), z, -np.inf) > threshold_z)
    cells, values, owners = np.argwhere(labels), z[labels > 0], labels[labels > 0]
    order = np.lexsort((-values, owners))  # stable, so of equal cells the first in reading order wins
    peaks = order[np.unique(owners[order], return_index=True)[1]]
    return Detections(cells=cells[peaks], confidences=values[peaks])


def findings_of(
    detections: Detections, lesions: Int[np.ndarray, "row column"], *, ignored: AbstractSet[int] = frozenset()
) -> SlideFindings:
    """Which lesions of a slide were detected, and which detections hit none.

    `lesions` numbers the cells of each lesion, 0 outside (`segmentation.components` does for a plain mask); a slide
    without lesions is all 0. A lesion too small for any cell cannot be hit: count it by a -inf more in the result.
    Lesions whose number is in `ignored` need not be found and are no false positives either: the challenge ignores
    isolated tumour cells, which are lesions under 200 µm across.

    Raises:
        ValueError: a confidence is NaN or infinite.
    """
    confidences = detections.confidences
    if not np.isfinite(confidences).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(confidences))} confidences are NaN or infinite")
    hit = lesions[detections.cells[:, 0], detections.cells[:, 1]]
    wanted = np.setdiff1d(lesions, [0, *ignored])
    highest = np.full(len(wanted), -np.inf)
    counts = np.isin(hit, wanted)
    np.maximum.at(highest, np.searchsorted(wanted, hit[counts]), confidences[counts])
    return SlideFindings(lesions=highest, false_positives=confidences[hit == 0])


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
