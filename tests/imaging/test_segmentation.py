"""Facts by hand, against libraries that are always here, and against numbers that other packages gave for `WAVES`."""

import numpy as np
import pytest
from jaxtyping import Bool, Float
from scipy.spatial import KDTree
from skimage.measure import label
from sklearn.metrics import auc, average_precision_score, f1_score, jaccard_score

from wsi_anomaly.imaging.metrics import dice, iou
from wsi_anomaly.imaging.segmentation import (
    ComponentMatch,
    components,
    match_components,
    overlap_curve,
    pro_auc,
    surface_distances,
)

NAN = np.nan
Z = np.array([[3, 2, NAN], [1, 2, 0]], np.float32)
TRUTH = np.array([[True, True, False], [False, False, False]])
ROW, COLUMN = np.mgrid[:40, :56]
WAVES = np.sin(ROW / 3) + np.cos(COLUMN / 4) + np.sin(ROW * COLUMN / 50) / 2
CRESTS = np.sin((ROW + 2) / 3.2) + np.cos((COLUMN + 1) / 4.3) > 1.2


def mask(*rows: str) -> Bool[np.ndarray, "row column"]:
    """A mask drawn with # and dots."""
    return np.array([[cell == "#" for cell in row] for row in rows])


def noisy(seed: int) -> tuple[Float[np.ndarray, "row column"], Bool[np.ndarray, "row column"]]:
    """A z map with ties and holes, and a truth that it follows a little."""
    rng = np.random.default_rng(seed)
    truth = rng.random((15, 20)) < 0.15
    z = np.round(rng.normal(size=truth.shape) + truth, 1).astype(np.float32)
    z[rng.random(truth.shape) < 0.1] = NAN
    return z, truth & np.isfinite(z)


def test_the_overlap_curve_by_hand() -> None:
    """Five tiles with four distinct z, two of them true: one point for all tiles and one over each z."""
    curve = overlap_curve(Z, TRUTH)
    assert curve.thresholds_z[1:].tolist() == [0, 1, 2, 3]
    assert -1e-3 < curve.thresholds_z[0] < 0
    assert curve.found.tolist() == [5, 4, 3, 1, 0]
    assert curve.hits.tolist() == [2, 2, 2, 1, 0]
    assert curve.dice == pytest.approx([4 / 7, 4 / 6, 4 / 5, 2 / 3, 0])
    assert curve.iou == pytest.approx([2 / 5, 2 / 4, 2 / 3, 1 / 2, 0])
    assert curve.best == pytest.approx((1.0, 4 / 5, 2 / 3))


def test_the_area_averages_dice_over_the_share_of_tiles_found() -> None:
    """Trapezoids between shares of 0, 1/5, 3/5, 4/5 and 1."""
    steps = [0.2 * (0 + 2 / 3), 0.4 * (2 / 3 + 4 / 5), 0.2 * (4 / 5 + 4 / 6), 0.2 * (4 / 6 + 4 / 7)]
    assert overlap_curve(Z, TRUTH).area == pytest.approx(sum(steps) / 2)


def test_average_precision_by_hand() -> None:
    """Half the truth at a precision of 1, the other half, tied with a wrong tile, at 2/3."""
    assert overlap_curve(Z, TRUTH).average_precision == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


@pytest.mark.parametrize("seed", range(3))
def test_the_overlap_at_any_threshold_is_that_of_the_mask_over_it(seed: int) -> None:
    """Exactly, also at a threshold that 32 bits round; and no other threshold than the best gives more."""
    z, truth = noisy(seed)
    curve = overlap_curve(z, truth)
    for threshold_z in (-np.inf, -99.0, -1.0, 0.0, 0.1, 0.3, 1.05, 99.0):
        found = z > threshold_z
        assert curve.at(threshold_z) == (threshold_z, dice(found, truth), iou(found, truth))
    assert curve.best.dice == max(dice(z > value, truth) for value in (-99, *np.unique(z[np.isfinite(z)])))
    assert dice(z > curve.best.threshold_z, truth) == curve.best.dice


@pytest.mark.parametrize("seed", range(3))
def test_the_curve_agrees_with_scikit_learn(seed: int) -> None:
    """Dice is F1, IoU is Jaccard, and the average precision goes by that name."""
    z, truth = noisy(seed)
    curve, tiles = overlap_curve(z, truth), np.isfinite(z)
    for threshold_z in (-0.5, 0.0, 0.7):
        found = z[tiles] > threshold_z
        expected = (f1_score(truth[tiles], found), jaccard_score(truth[tiles], found))
        assert curve.at(threshold_z)[1:] == pytest.approx(expected)
    assert curve.average_precision == pytest.approx(average_precision_score(truth[tiles], z[tiles]))


def test_the_curve_depends_on_the_order_of_the_tiles_alone() -> None:
    """Two detectors are compared whatever the scale of their scores."""
    z, truth = noisy(5)
    one, other = overlap_curve(z, truth), overlap_curve(np.exp(z), truth)
    assert (one.best.dice, one.area, one.average_precision) == (other.best.dice, other.area, other.average_precision)


def test_cells_without_a_tile_are_left_out_of_the_curve() -> None:
    """An unreadable tile in a lesion is no miss."""
    holed = np.array([[3, NAN], [np.inf, 0]], np.float32)
    assert overlap_curve(holed, np.ones((2, 2), np.bool_)).truth_cells == 2


def test_without_truth_only_finding_nothing_is_right() -> None:
    """The best threshold is the highest z, and there is nothing to average."""
    curve = overlap_curve(Z, np.zeros_like(TRUTH))
    assert curve.best == (3.0, 1.0, 1.0)
    assert curve.at(2.9).dice == 0
    assert curve.area is None
    assert curve.average_precision is None


def test_where_everything_is_abnormal_the_best_threshold_lies_below_every_tile() -> None:
    """It is a number that finds all tiles, not minus infinity."""
    curve = overlap_curve(Z, np.isfinite(Z))
    assert curve.best.dice == curve.best.iou == curve.average_precision == 1
    assert -np.inf < curve.best.threshold_z < np.nanmin(Z)


def test_a_map_without_tiles_has_no_curve() -> None:
    """Rather an error than a number."""
    with pytest.raises(ValueError, match="no cell"):
        overlap_curve(np.full((2, 2), NAN, np.float32), np.zeros((2, 2), np.bool_))


def test_surface_distances_in_a_row_of_cells_by_hand() -> None:
    """From the truth 3 cells; back 3 and 4 cells, whose 99th percentile lies 99 % of the way; of all three the mean."""
    distances = surface_distances(mask("...##"), mask("#...."), 100.0)
    assert distances == pytest.approx((300, 399, 300, (300 + 300 + 400) / 3))


def test_surface_distances_of_nested_squares_by_hand() -> None:
    """Outlines are one cell apart, at the four outer corners diagonally; what is inside the outlines does not count."""
    inner = np.pad(np.ones((3, 3), np.bool_), 2)
    outer = np.pad(np.ones((5, 5), np.bool_), 1)
    distances = surface_distances(outer, inner, 2.0)
    outer_sum = 2 * (12 + 4 * np.sqrt(2))
    assert distances == pytest.approx((2, 2 * np.sqrt(2), 2, (outer_sum + 8 * 2) / 24))


def test_a_mask_lies_no_distance_from_itself() -> None:
    """Also where it fills the grid, whose edge is outline."""
    everything = np.ones((4, 4), np.bool_)
    assert surface_distances(CRESTS, CRESTS, 112.0) == (0, 0, 0, 0)
    assert surface_distances(everything, everything, 112.0) == (0, 0, 0, 0)


def test_there_is_no_distance_to_an_empty_mask() -> None:
    """No number is made up for it."""
    nothing = np.zeros_like(TRUTH)
    assert surface_distances(nothing, TRUTH, 1.0) is None
    assert surface_distances(TRUTH, nothing, 1.0) is None
    assert surface_distances(nothing, nothing, 1.0) is None


def test_surface_distances_agree_with_a_search_for_nearest_outline_cells() -> None:
    """An outline cell is one that a shift by one cell uncovers."""
    found = WAVES > 1
    distances = surface_distances(found, CRESTS, 112.0)

    def outline(cells: Bool[np.ndarray, "row column"]) -> Float[np.ndarray, "cell rowcol"]:
        padded = np.pad(cells, 1)
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        return np.argwhere(cells & ~inner) * 112.0

    to_found = KDTree(outline(found)).query(outline(CRESTS))[0]
    to_truth = KDTree(outline(CRESTS)).query(outline(found))[0]
    symmetric = np.concatenate([to_found, to_truth]).mean()
    expected = (np.percentile(to_found, 99), np.percentile(to_truth, 99), to_found.mean(), symmetric)
    assert distances == pytest.approx(expected)


def test_surface_distances_are_those_of_other_packages() -> None:
    """MONAI 1.6.1, directed and symmetric, in 32 bits; MedPy 0.5.2 gives 95.64902747771748 for the third."""
    monai = (327.352783203125, 497.28076171875, 95.6490249633789, 136.36221313476562)
    distances = surface_distances(WAVES > 1, CRESTS, 112.0)
    assert distances == pytest.approx(monai, rel=1e-6)
    assert distances.truth_to_found_mean_um == pytest.approx(95.64902747771748, rel=1e-12)


def test_corners_connect_components() -> None:
    """As in the challenge's script."""
    labels = components(mask("#...", ".#.#", "...."))
    assert labels[0, 0] == labels[1, 1] != labels[1, 3] > 0
    assert labels.max() == 2


def test_components_match_where_they_share_a_cell() -> None:
    """One of two lesions is found, in two pieces, with one false alarm beside it that misses the other by a cell."""
    truth = mask("###..#", "......", "......")
    found = mask("#.#...", ".....#", "......")
    match = match_components(found, truth)
    assert match == ComponentMatch(true=2, true_found=1, found=3, found_right=2)
    assert (match.tpr, match.ppv, match.thesis_ppv) == pytest.approx((1 / 2, 2 / 3, 1 / 2))


def test_one_found_component_may_cover_several_lesions() -> None:
    """Both are found, and it is right once."""
    match = match_components(mask("#######"), mask("##...##"))
    assert match == (2, 2, 1, 1)
    assert match.thesis_ppv == 1


def test_small_components_are_taken_out_of_both_masks() -> None:
    """The single cells go; a lesion hit by nothing but a single cell is missed."""
    truth = mask("##.#.", ".....", "####.")
    found = mask("#..##", ".....", ".##.#")
    assert match_components(found, truth) == (3, 3, 4, 3)
    assert match_components(found, truth, min_cells=2) == (2, 1, 2, 1)


def test_rates_of_no_components_are_none() -> None:
    """Nothing to find, nothing found, or neither."""
    nothing = np.zeros_like(TRUTH)
    missed, wrong, idle = (
        match_components(*masks) for masks in ((nothing, TRUTH), (TRUTH, nothing), (nothing, nothing))
    )
    assert (missed.tpr, missed.ppv, missed.thesis_ppv) == (0, None, None)
    assert (wrong.tpr, wrong.ppv, wrong.thesis_ppv) == (None, 0, 0)
    assert (idle.tpr, idle.ppv, idle.thesis_ppv) == (None, None, None)


def test_per_region_overlap_by_hand() -> None:
    """Lesions of 1 and 3 tiles and 4 normal tiles, on two slides of different shapes and one without lesions.

    Falling z finds the small lesion, a third of the large one, a normal tile, the rest of the large one: the overlap
    is 2/3 up to a false positive rate of 1/4 and 1 from there.
    """
    z_maps = [np.array([[5.0, 3.0, NAN]]), np.array([[4.0, 2.0, 2.0], [1.0, NAN, NAN]]), np.array([[1.0], [0.0]])]
    truths = [mask("#.."), mask("###", "..."), mask(".", ".")]
    assert pro_auc(z_maps, truths, max_fpr=0.125) == pytest.approx(2 / 3)
    assert pro_auc(z_maps, truths, max_fpr=0.25) == pytest.approx(2 / 3)
    assert pro_auc(z_maps, truths) == pytest.approx((0.25 * 2 / 3 + 0.05) / 0.3)
    assert pro_auc(z_maps, truths, max_fpr=1.0) == pytest.approx(0.25 * 2 / 3 + 0.75)


def test_per_region_overlap_is_that_of_the_benchmark() -> None:
    """MVTec's own code, as ADEval 1.1.0 ships it; it reads the curve at normal tiles only, so it cuts corners."""
    assert pro_auc([WAVES], [CRESTS]) == pytest.approx(0.8467273506398715, abs=1e-3)
    assert pro_auc([WAVES], [CRESTS], max_fpr=0.05) == pytest.approx(0.47981126269592705, abs=4e-3)


@pytest.mark.parametrize("max_fpr", [0.05, 0.3, 1.0])
def test_per_region_overlap_agrees_with_a_table_of_all_thresholds(max_fpr: float) -> None:
    """Overlap of each region and share of normal tiles, threshold by threshold."""
    slides = [noisy(seed) for seed in (1, 2)]
    regions = [z[label(truth, connectivity=2) == 1 + n] for z, truth in slides for n in range(label(truth).max())]
    regions = [region[np.isfinite(region)] for region in regions if np.isfinite(region).any()]
    normal = np.concatenate([z[np.isfinite(z) & ~truth] for z, truth in slides])
    thresholds = np.unique(np.concatenate([normal, *regions]))[::-1]
    fpr = np.array([0, *((normal >= t).mean() for t in thresholds)])
    overlap = np.array([0, *(np.mean([(region >= t).mean() for region in regions]) for t in thresholds)])
    fine = np.union1d(np.linspace(0, max_fpr, 100_001), fpr[fpr <= max_fpr])
    expected = auc(fine, np.interp(fine, fpr, overlap)) / max_fpr
    assert pro_auc([z for z, _ in slides], [t for _, t in slides], max_fpr=max_fpr) == pytest.approx(expected, abs=2e-5)


def test_an_unreadable_tile_neither_splits_a_region_nor_counts_in_it() -> None:
    """The row is one lesion of two tiles, one of which is over the only normal tile."""
    assert pro_auc([np.array([[2.0, NAN, 0.0, 1.0]])], [mask("###.")]) == pytest.approx(1 / 2)
    assert pro_auc([np.array([[2.0, NAN, 0.0, 1.0, 9.0]])], [mask("###.#")], max_fpr=1.0) == pytest.approx(3 / 4)


def test_per_region_overlap_needs_regions_and_normal_tiles() -> None:
    """No slide, no lesion, no tile, and nothing but lesion: no number is made up."""
    nowhere = np.full(Z.shape, NAN, np.float32)
    assert pro_auc([], []) is None
    assert pro_auc([Z], [np.zeros_like(TRUTH)]) is None
    assert pro_auc([nowhere], [TRUTH]) is None
    assert pro_auc([Z], [np.isfinite(Z)]) is None
    assert pro_auc([Z, nowhere], [TRUTH, TRUTH]) == pro_auc([Z], [TRUTH])
