import numpy as np
import pytest

from wsi_anomaly.imaging.metrics import auroc, dice, iou, tnr

NOTHING = np.zeros((2, 3), np.bool_)
EVERYTHING = np.ones((2, 3), np.bool_)
TRUTH = np.array([[True, True, False], [False, False, False]])
PREDICTED = np.array([[True, False, True], [True, False, False]])


def test_auroc_is_the_share_of_pairs_in_the_right_order_with_ties_counted_half() -> None:
    """Of the 6 pairs, 4 are right (0.9 over all three, 0.4 over 0.1) and one is a tie (0.4 and 0.4)."""
    scores = np.array([0.1, 0.4, 0.8, 0.4, 0.9])
    labels = np.array([False, False, False, True, True])
    assert auroc(scores, labels) == pytest.approx(4.5 / 6)


def test_auroc_of_perfect_and_reversed_scores_is_one_and_zero() -> None:
    """Higher scores mean abnormal."""
    labels = np.array([False, True])
    assert auroc(np.array([-1.0, 3.0], np.float32), labels) == 1
    assert auroc(np.array([3.0, -1.0], np.float32), labels) == 0


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_auroc_of_one_class_is_none(labels: list[bool]) -> None:
    """Without a pair of both classes nothing is measured, and no number is made up."""
    assert auroc(np.array([0.1, 0.2]), np.array(labels)) is None
    assert auroc(np.empty(0), np.empty(0, np.bool_)) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_auroc_refuses_scores_that_are_no_numbers(bad: float) -> None:
    """Even where the answer would be None."""
    with pytest.raises(ValueError, match="1 of 2 scores are NaN or infinite"):
        auroc(np.array([0.1, bad]), np.array([False, False]))


def test_dice_iou_and_tnr_of_masks_that_overlap_in_one_of_four_pixels() -> None:
    """Truth has 2 pixels, the prediction 3, both share 1, together they have 4; of 4 true negatives 2 are kept."""
    assert dice(PREDICTED, TRUTH) == pytest.approx(2 * 1 / (3 + 2))
    assert iou(PREDICTED, TRUTH) == pytest.approx(1 / 4)
    assert tnr(PREDICTED, TRUTH) == pytest.approx(2 / 4)


def test_two_empty_masks_agree_and_one_empty_mask_misses() -> None:
    """The empty cases are defined, so that a slide without tumour counts."""
    assert dice(NOTHING, NOTHING) == iou(NOTHING, NOTHING) == 1
    assert dice(NOTHING, TRUTH) == iou(NOTHING, TRUTH) == 0
    assert dice(EVERYTHING, EVERYTHING) == iou(EVERYTHING, EVERYTHING) == 1


def test_tnr_is_none_where_the_truth_covers_everything() -> None:
    """There is no negative to find."""
    assert tnr(NOTHING, EVERYTHING) is None
    assert tnr(NOTHING, NOTHING) == 1
    assert tnr(EVERYTHING, NOTHING) == 0
