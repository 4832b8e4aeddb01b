"""How well the cells found on a slide's tile grid agree with those a pathologist drew, at one threshold or at all.

Arrays in, numbers out. Knows no slide, no file and no cohort table; agreement of two plain masks is in `metrics`.

Where z is given, a cell without a finite z has no tile and is left out, whatever `truth` says of it; a cell is found
where z > threshold. Cells that touch, be it at a corner, belong to one component.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int32
from scipy import ndimage


class Overlap(NamedTuple):
    """How well the cells over one threshold cover the truth."""

    threshold_z: float
    dice: float
    iou: float


@dataclass(frozen=True, slots=True)
class OverlapCurve:
    """Overlap with the truth at every threshold that changes it: just below the lowest z, then each distinct z."""

    thresholds_z: Float[np.ndarray, " point"]
    hits: Int[np.ndarray, " point"]
    """Cells over the threshold that are in the truth."""
    found: Int[np.ndarray, " point"]
    """Cells over the threshold: every tile at the first point, none at the last."""
    truth_cells: int

    @property
    def dice(self) -> Float[np.ndarray, " point"]:
        """Dice at each threshold; two empty masks agree."""
        return _shares(2 * self.hits, self.found + self.truth_cells)

    @property
    def iou(self) -> Float[np.ndarray, " point"]:
        """Intersection over union at each threshold; two empty masks agree."""
        return _shares(self.hits, self.found + self.truth_cells - self.hits)

    def at(self, threshold_z: float) -> Overlap:
        """The overlap at any threshold, as `metrics.dice` and `metrics.iou` of z > `threshold_z` give it."""
        exact = self.thresholds_z.dtype.type(threshold_z)  # z > threshold compares in the precision of z
        return self._point(max(int(np.searchsorted(self.thresholds_z, exact, side="right")) - 1, 0), threshold_z)

    @property
    def best(self) -> Overlap:
        """The highest Dice that any threshold reaches, at the highest such threshold; IoU is highest there too.

        An oracle: it is chosen with the truth in hand, so it bounds what a threshold can do and estimates nothing.
        """
        last = len(self.thresholds_z) - 1 - int(np.argmax(self.dice[::-1]))
        return self._point(last, float(self.thresholds_z[last]))

    @property
    def area(self) -> float | None:
        """Dice averaged over thresholds at evenly spaced quantiles of the slide's z; None where the truth is empty.

        It is the area under Dice against the share of tiles found, by trapezoids, and so depends on the order of the
        tiles alone. It compares detectors on one slide: what a perfect one reaches depends on the size of the truth.
        """
        if not self.truth_cells:
            return None
        return float(-np.trapezoid(self.dice, self.found / self.found[0]))

    @property
    def average_precision(self) -> float | None:
        """The area under precision against recall, by steps; None where the truth is empty. A perfect order gives 1."""
        if not self.truth_cells:
            return None
        precision = _shares(self.hits[:-1], self.found[:-1])
        return float(np.sum(precision * -np.diff(self.hits)) / self.truth_cells)

    def _point(self, index: int, threshold_z: float) -> Overlap:
        return Overlap(threshold_z, dice=float(self.dice[index]), iou=float(self.iou[index]))


def overlap_curve(z: Float[np.ndarray, "row column"], truth: Bool[np.ndarray, "row column"]) -> OverlapCurve:
    """How the overlap of one slide depends on the threshold; z is sorted once.

    Raises:
        ValueError: no cell has a z.
    """
    tiles = np.isfinite(z)
    if not tiles.any():
        raise ValueError("no cell has a z-score")
    values, groups = np.unique(z[tiles], return_inverse=True)
    true_cells = np.bincount(groups[truth[tiles]], minlength=len(values))
    return OverlapCurve(
        thresholds_z=np.concatenate([np.nextafter(values[:1], values.dtype.type(-np.inf)), values]),
        hits=_left_over(true_cells),
        found=_left_over(np.bincount(groups)),
        truth_cells=int(true_cells.sum()),
    )


class SurfaceDistances(NamedTuple):
    """How far the outlines of truth and found lie apart.

    "Directed Hausdorff 99" and "mean surface distance" in table 5.1 of the MSMA thesis are the two from
    truth to found, going by its released code: they punish what is missed and forgive what is found besides.
    """

    truth_to_found_99_um: float
    """Of the distances from each outline cell of the truth to the nearest of found, the 99th percentile."""
    found_to_truth_99_um: float
    truth_to_found_mean_um: float
    symmetric_mean_um: float
    """Over the outline cells of both, so the longer outline counts more."""


def surface_distances(
    found: Bool[np.ndarray, "row column"], truth: Bool[np.ndarray, "row column"], cell_um: float
) -> SurfaceDistances | None:
    """Distances between the outlines, from centre to centre of cells `cell_um` wide; None where either mask is empty.

    Outline cells are those with one of their four neighbours outside the mask or the grid.
    """
    if not (found.any() and truth.any()):
        return None
    outline_found, outline_truth = _outline(found), _outline(truth)
    to_found_um = ndimage.distance_transform_edt(~outline_found)[outline_truth] * cell_um
    to_truth_um = ndimage.distance_transform_edt(~outline_truth)[outline_found] * cell_um
    return SurfaceDistances(
        truth_to_found_99_um=float(np.percentile(to_found_um, 99)),
        found_to_truth_99_um=float(np.percentile(to_truth_um, 99)),
        truth_to_found_mean_um=float(to_found_um.mean()),
        symmetric_mean_um=float(np.concatenate([to_found_um, to_truth_um]).mean()),
    )


class ComponentMatch(NamedTuple):
    """How many components of truth and of found touch each other; counts of slides may be added up."""

    true: int
    true_found: int
    found: int
    found_right: int

    @property
    def tpr(self) -> float | None:
        """The share of the true components that are found; None where there is none."""
        return self.true_found / self.true if self.true else None

    @property
    def ppv(self) -> float | None:
        """The share of the found components that are right; None where there is none."""
        return self.found_right / self.found if self.found else None

    @property
    def thesis_ppv(self) -> float | None:
        """True components found, over these and the found components that are wrong; None where there is neither.

        The released code of the MSMA thesis (table 5.1) counts so: a lesion found in pieces counts once.
        """
        both = self.true_found + self.found - self.found_right
        return self.true_found / both if both else None


def match_components(
    found: Bool[np.ndarray, "row column"], truth: Bool[np.ndarray, "row column"], *, min_cells: int = 1
) -> ComponentMatch:
    """Which components of `truth` were found, and which of `found` are right: those sharing a cell with the other.

    Components of fewer than `min_cells` cells are taken out of both masks first.
    """
    found_labels, truth_labels = (_large_components(mask, min_cells) for mask in (found, truth))
    shared = (found_labels > 0) & (truth_labels > 0)
    return ComponentMatch(
        true=_different(truth_labels),
        true_found=_different(truth_labels[shared]),
        found=_different(found_labels),
        found_right=_different(found_labels[shared]),
    )


def pro_auc(
    z_maps: Sequence[Float[np.ndarray, "_ _"]], truths: Sequence[Bool[np.ndarray, "_ _"]], *, max_fpr: float = 0.3
) -> float | None:
    """The area under per-region overlap against false positive rate up to `max_fpr`, divided by `max_fpr`: 0 to 1.

    Bergmann et al., "The MVTec Anomaly Detection Dataset" (IJCV 2021), exact at every threshold: overlap is averaged
    over the components of truth of all slides, each counting the same; the rate is over all other tiles of all slides.
    None where no component has a tile, or no tile is outside of them: there is nothing to compare.
    """
    slides = [_weighted_tiles(z, truth) for z, truth in zip(z_maps, truths, strict=True)]
    if not slides:
        return None
    values, weights, truth = (np.concatenate(parts) for parts in zip(*slides, strict=True))
    if truth.all() or not truth.any():
        return None
    from sklearn.metrics import roc_curve  # takes a second to import

    fpr, overlap, _ = roc_curve(truth, values, sample_weight=weights)
    inside = fpr <= max_fpr
    overlap = np.append(overlap[inside], np.interp(max_fpr, fpr, overlap))
    return float(np.trapezoid(overlap, np.append(fpr[inside], max_fpr)) / max_fpr)


def components(mask: Bool[np.ndarray, "row column"]) -> Int32[np.ndarray, "row column"]:
    """The connected components of `mask`, numbered from 1; 0 outside. Corners connect."""
    return np.asarray(ndimage.label(mask, structure=np.ones((3, 3)))[0], np.int32)


def _shares(part: Int[np.ndarray, " point"], whole: Int[np.ndarray, " point"]) -> Float[np.ndarray, " point"]:
    """The part of the whole, and 1 where there is nothing to share."""
    return np.divide(part, whole, out=np.ones(len(part)), where=whole > 0)


def _left_over(counts: Int[np.ndarray, " value"]) -> Int[np.ndarray, " point"]:
    """How many are left when nothing, the first, the first two, ... are taken away."""
    return np.asarray(counts.sum() - np.concatenate([[0], np.cumsum(counts)]))


def _outline(mask: Bool[np.ndarray, "row column"]) -> Bool[np.ndarray, "row column"]:
    return np.asarray(mask & ~ndimage.binary_erosion(mask))


def _large_components(mask: Bool[np.ndarray, "row column"], min_cells: int) -> Int32[np.ndarray, "row column"]:
    labels = components(mask)
    return np.where(np.bincount(labels.ravel())[labels] < min_cells, np.int32(0), labels)


def _different(labels: Int32[np.ndarray, "*shape"]) -> int:
    """How many components the labels name."""
    return int(np.count_nonzero(np.bincount(labels.ravel())[1:]))


def _weighted_tiles(
    z: Float[np.ndarray, "row column"], truth: Bool[np.ndarray, "row column"]
) -> tuple[Float[np.ndarray, " tile"], Float[np.ndarray, " tile"], Bool[np.ndarray, " tile"]]:
    """z, weight and truth of each tile: a component's tiles share a weight of 1, other tiles have 1 each."""
    tiles = np.isfinite(z)
    labels = components(truth)[tiles]
    sizes = np.bincount(labels)
    return z[tiles], np.where(labels > 0, 1 / sizes[labels], 1.0), labels > 0
