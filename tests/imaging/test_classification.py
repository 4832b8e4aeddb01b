from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from wsi_anomaly.imaging.classification import Ranking, rank, require_ranked

MEASURES: list[Callable[[Ranking], float | None]] = [
    Ranking.auroc,
    Ranking.aupr,
    Ranking.aupr_in,
    Ranking.detection_error,
    lambda ranking: ranking.fpr_at_tpr(0.95),
    lambda ranking: ranking.sensitivity_at_specificity(0.9),
]
NORMAL, ABNORMAL = [1.0, 2.0, 4.0, 6.0, 8.0], [4.0, 5.0, 7.0, 9.0]


def ranking_of(normal: list[float], abnormal: list[float]) -> Ranking:
    """The ranking of items whose scores are given by class."""
    return rank(np.array(normal + abnormal), np.arange(len(normal) + len(abnormal)) >= len(normal))


def many_items(count: int = 100_000) -> tuple[np.ndarray, np.ndarray]:
    """Scores of float32 and labels, a tenth abnormal, AUROC near 0.76."""
    random = np.random.default_rng(0)
    labels = random.random(count) < 0.1
    return (random.normal(size=count) + labels).astype(np.float32), labels


def test_items_at_or_above_each_threshold_are_counted_by_class() -> None:
    """From infinity down, equal scores in one step."""
    ranking = ranking_of([1.0, 2.0], [2.0, 3.0])
    assert ranking.thresholds.tolist() == [np.inf, 3, 2, 1]
    assert ranking.true_positives.tolist() == [0, 1, 2, 2]
    assert ranking.false_positives.tolist() == [0, 0, 1, 2]
    assert (ranking.abnormal, ranking.normal) == (2, 2)


def test_auroc_is_the_share_of_pairs_in_the_right_order_with_ties_counted_half() -> None:
    """9 is above all 5 normal items, 7 above 4, 5 above 3, 4 above 2 and level with one."""
    assert ranking_of(NORMAL, ABNORMAL).auroc() == (5 + 4 + 3 + 2.5) / 20


def test_aupr_is_the_mean_precision_at_which_each_abnormal_item_is_found() -> None:
    """From the top: 9, (8), 7, (6), 5, then 4 together with a normal 4."""
    assert ranking_of(NORMAL, ABNORMAL).aupr() == pytest.approx((1 / 1 + 2 / 3 + 3 / 5 + 4 / 7) / 4)


def test_aupr_in_takes_normal_items_as_positives_from_the_bottom_up() -> None:
    """From the bottom: 1, 2, then 4 together with an abnormal 4, (5), 6, (7), 8."""
    assert ranking_of(NORMAL, ABNORMAL).aupr_in() == pytest.approx((1 / 1 + 2 / 2 + 3 / 4 + 4 / 6 + 5 / 8) / 5)


def test_fpr_at_tpr_is_the_first_step_that_finds_enough_and_is_never_interpolated() -> None:
    """Of 4 abnormal items, 95 % means all: down to 4, where 8, 6 and 4 of the normal ones are raised."""
    ranking = ranking_of(NORMAL, ABNORMAL)
    assert [ranking.fpr_at_tpr(tpr) for tpr in (0.95, 0.75, 0.74, 0.5, 0.2)] == [3 / 5, 2 / 5, 2 / 5, 1 / 5, 0]


def test_fpr_at_tpr_exists_where_no_threshold_comes_near_the_share() -> None:
    """Two abnormal items have shares of 0, 1/2 and 1 only; a share that is met exactly is enough."""
    assert ranking_of([1.0, 3.0], [2.0, 4.0]).fpr_at_tpr(0.95) == 0.5
    assert ranking_of([1.5, 0.5], list(np.arange(1.0, 21.0))).fpr_at_tpr(0.95) == 0


def test_sensitivity_at_specificity_is_the_last_step_that_leaves_enough_normal_items_out() -> None:
    """Of 5 normal items, 90 % means all: down to 9; 80 % lets 8 pass, 60 % lets 6 pass too."""
    ranking = ranking_of(NORMAL, ABNORMAL)
    found = [ranking.sensitivity_at_specificity(share) for share in (0.95, 0.9, 0.8, 0.79, 0.6, 0.0)]
    assert found == [0.25, 0.25, 0.5, 0.5, 0.75, 1]


def test_sensitivity_is_none_of_them_where_a_normal_item_is_on_top() -> None:
    """Only raising nothing leaves every normal item out."""
    assert ranking_of([9.0], [1.0]).sensitivity_at_specificity(0.95) == 0


def test_detection_error_weighs_both_classes_alike_whatever_their_size() -> None:
    """The best threshold is 4: no abnormal item missed, 3 of 5 normal ones raised."""
    assert ranking_of(NORMAL, ABNORMAL).detection_error() == pytest.approx((0 + 3 / 5) / 2)


@pytest.mark.parametrize("share", [-0.1, 95.0, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(share: float) -> None:
    """95 for 95 % would otherwise be answered."""
    ranking = ranking_of(NORMAL, ABNORMAL)
    with pytest.raises(ValueError, match="is no share"):
        ranking.fpr_at_tpr(share)
    with pytest.raises(ValueError, match="is no share"):
        ranking.sensitivity_at_specificity(share)


def test_perfect_and_reversed_scores_reach_the_ends_of_every_measure() -> None:
    """In the order of MEASURES; reversed, the two precisions are those of finding everything last."""
    perfect, reversed_ = ranking_of([1.0, 2.0], [3.0, 4.0]), ranking_of([3.0, 4.0], [1.0, 2.0])
    assert [measure(perfect) for measure in MEASURES] == [1, 1, 1, 0, 0, 1]
    late = (1 / 3 + 2 / 4) / 2
    assert [measure(reversed_) for measure in MEASURES] == pytest.approx([0, late, late, 0.5, 1, 0])
    assert not perfect.all_equal


def test_equal_scores_are_worth_a_coin_and_are_said_to_be_equal() -> None:
    """The precisions are the shares of the classes: one of four is abnormal."""
    ranking = ranking_of([0.0, -0.0, 0.0], [0.0])
    assert [measure(ranking) for measure in MEASURES] == [0.5, 0.25, 0.75, 0.5, 1, 0]
    assert ranking.all_equal


@pytest.mark.parametrize(("normal", "abnormal"), [([1.0, 2.0], []), ([], [1.0, 2.0]), ([], [])])
def test_one_class_has_counts_but_no_measures(normal: list[float], abnormal: list[float]) -> None:
    """No number is made up."""
    ranking = ranking_of(normal, abnormal)
    assert [measure(ranking) for measure in MEASURES] == [None] * len(MEASURES)
    assert ranking.curve() is None
    assert (ranking.normal, ranking.abnormal) == (len(normal), len(abnormal))
    assert not ranking.all_equal


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused_and_counted(bad: float) -> None:
    """Even where there is one class only."""
    with pytest.raises(ValueError, match="2 of 3 scores are NaN or infinite"):
        rank(np.array([0.1, bad, bad]), np.array([False, False, False]))


def test_scores_without_labels_are_refused() -> None:
    """The message holds both numbers."""
    with pytest.raises(ValueError, match=r"\(3,\) scores for \(2,\) labels"):
        require_ranked(np.zeros(3), np.zeros(2, np.bool_))


def test_edges_of_bins_are_all_scores_where_they_are_few() -> None:
    """Rising, without the infinite one."""
    assert ranking_of([1.0, 2.0], [2.0, 3.0]).bin_edges().tolist() == [1, 2, 3]


def test_edges_of_bins_cut_either_class_into_equal_parts() -> None:
    """However rare one of them is, and wherever it lies."""
    random = np.random.default_rng(0)
    normal, abnormal = random.normal(0, 1, 100_000), random.normal(6, 0.1, 500)
    edges = rank(np.append(normal, abnormal), np.arange(100_500) >= 100_000).bin_edges(100)
    assert (np.diff(edges) > 0).all()
    assert np.histogram(normal, [-np.inf, *edges, np.inf])[0].max() <= 100_000 / 50 + 1
    assert np.histogram(abnormal, [-np.inf, *edges, np.inf])[0].max() <= 500 / 50 + 1


def test_the_curve_holds_every_step_where_they_are_few() -> None:
    """Raising nothing comes first, with a precision of 1; raising everything last."""
    curve = ranking_of([1.0, 2.0], [2.0, 3.0]).curve()
    assert curve is not None
    assert curve.thresholds.tolist() == [np.inf, 3, 2, 1]
    assert curve.fpr.tolist() == [0, 0, 0.5, 1]
    assert curve.tpr.tolist() == [0, 0.5, 1, 1]
    assert curve.precision.tolist() == [1, 1, 2 / 3, 2 / 4]


def test_a_thinned_curve_keeps_its_ends_its_points_and_its_area() -> None:
    """Of more than 10,000 steps 2000 stay, each a point of the whole curve."""
    ranking = rank(*many_items())
    whole, thin = ranking.curve(1_000_000), ranking.curve()
    assert whole is not None
    assert thin is not None
    assert len(whole.fpr) == len(ranking.thresholds) > 10_000
    assert 1000 < len(thin.fpr) <= 2000
    assert (thin.fpr[0], thin.tpr[0], thin.fpr[-1], thin.tpr[-1]) == (0, 0, 1, 1)
    assert np.isin(thin.thresholds, whole.thresholds).all()
    assert (np.diff(thin.thresholds) < 0).all()
    assert np.trapezoid(thin.tpr, thin.fpr) == pytest.approx(ranking.auroc(), abs=1e-4)


def test_a_thinned_curve_keeps_every_rare_abnormal_item() -> None:
    """Ten among a hundred thousand: each is a step of a tenth, found at the threshold that is its score."""
    scores, labels = many_items()
    labels = np.arange(scores.size) % 10_000 == 0
    curve = rank(scores, labels).curve()
    assert curve is not None
    assert np.isin(scores[labels], curve.thresholds).all()


ties = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40).filter(
    lambda items: len({abnormal for _, abnormal in items}) == 2
)


@settings(deadline=None)
@given(ties)
def test_areas_and_curves_are_those_of_scikit_learn(items: list[tuple[int, bool]]) -> None:
    """Also with many ties."""
    scores, labels = np.array([float(score) for score, _ in items]), np.array([label for _, label in items])
    ranking = rank(scores, labels)
    assert ranking.auroc() == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores))
    assert ranking.aupr() == pytest.approx(sklearn_metrics.average_precision_score(labels, scores))
    assert ranking.aupr_in() == pytest.approx(sklearn_metrics.average_precision_score(~labels, -scores))
    curve = ranking.curve()
    assert curve is not None
    fpr, tpr, thresholds = sklearn_metrics.roc_curve(labels, scores, drop_intermediate=False)
    precision, recall, _ = sklearn_metrics.precision_recall_curve(labels, scores)
    assert curve.thresholds.tolist() == thresholds.tolist()
    assert np.column_stack([curve.fpr, curve.tpr]) == pytest.approx(np.column_stack([fpr, tpr]))
    # scikit-learn lists the thresholds the other way round.
    assert curve.precision[::-1] == pytest.approx(precision)
    assert curve.tpr[::-1] == pytest.approx(recall)


def test_areas_of_many_items_are_those_of_scikit_learn() -> None:
    """Scores of float32, as detectors leave them."""
    scores, labels = many_items()
    ranking = rank(scores, labels)
    assert ranking.auroc() == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), rel=1e-12)
    assert ranking.aupr() == pytest.approx(sklearn_metrics.average_precision_score(labels, scores), rel=1e-12)
    assert ranking.aupr_in() == pytest.approx(sklearn_metrics.average_precision_score(~labels, -scores), rel=1e-12)


# Twelve normal and eight abnormal items, with ties within and across the classes.
GRADES = np.array([1, 2, 3, 3, 4, 5, 5, 6, 7, 8, 2, 4, 4, 6, 7, 9, 8, 5, 9.5, 3]) / 10
ARE_ABNORMAL = np.arange(20) >= 12
MEASURED_ELSEWHERE = {
    "auroc": 0.765625,  # torchmetrics 1.9.0
    "aupr": 0.6947136809269162,  # torchmetrics 1.9.0
    "aupr_in": 0.8158895502645502,  # torchmetrics 1.9.0, of 1 - score for the other class
    "sensitivity_at_90": 0.375,  # torchmetrics 1.9.0
    "sensitivity_at_95": 0.25,  # torchmetrics 1.9.0
    "fpr_at_95": 0.75,  # pytorch-ood 0.4.0
    "fpr_at_80": 0.5833333333333334,  # pytorch-ood 0.4.0
}


def measured() -> dict[str, float | None]:
    """The measures of the items above."""
    ranking = rank(GRADES, ARE_ABNORMAL)
    return {
        "auroc": ranking.auroc(),
        "aupr": ranking.aupr(),
        "aupr_in": ranking.aupr_in(),
        "sensitivity_at_90": ranking.sensitivity_at_specificity(0.9),
        "sensitivity_at_95": ranking.sensitivity_at_specificity(0.95),
        "fpr_at_95": ranking.fpr_at_tpr(0.95),
        "fpr_at_80": ranking.fpr_at_tpr(0.8),
    }


def test_measures_are_those_that_other_packages_found() -> None:
    """To the precision of float32, in which some of them count."""
    assert measured() == pytest.approx(MEASURED_ELSEWHERE, rel=1e-6)


def test_measures_are_those_of_torchmetrics() -> None:
    """Where it is installed."""
    from wsi_anomaly.torchvision_shim import make_importable

    make_importable()  # torchmetrics imports torchvision where it finds it
    there: Any = pytest.importorskip("torchmetrics.functional.classification")
    import torch

    scores, labels = torch.tensor(GRADES), torch.tensor(ARE_ABNORMAL.astype(np.int64))
    found = {
        "auroc": there.binary_auroc(scores, labels),
        "aupr": there.binary_average_precision(scores, labels),
        "aupr_in": there.binary_average_precision(1 - scores, 1 - labels),
        "sensitivity_at_90": there.binary_sensitivity_at_specificity(scores, labels, 0.9)[0],
        "sensitivity_at_95": there.binary_sensitivity_at_specificity(scores, labels, 0.95)[0],
    }
    ours = {name: value for name, value in measured().items() if name in found}
    assert ours == pytest.approx({name: float(value) for name, value in found.items()}, rel=1e-6)


def test_fpr_at_tpr_is_that_of_pytorch_ood() -> None:
    """Where it is installed; it marks abnormal items by negative labels."""
    from wsi_anomaly.torchvision_shim import make_importable

    make_importable()
    there: Any = pytest.importorskip("pytorch_ood.metrics.functional")
    import torch

    scores, labels = torch.tensor(GRADES), torch.tensor(np.where(ARE_ABNORMAL, -1, 0))
    ranking = rank(GRADES, ARE_ABNORMAL)
    for tpr in (0.2, 0.5, 0.8, 0.95, 1.0):
        assert ranking.fpr_at_tpr(tpr) == pytest.approx(float(there.fpr_at_tpr(scores, labels, tpr)))
