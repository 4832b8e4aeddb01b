from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from wsi_anomaly.imaging.classification import Ranking, rank
from wsi_anomaly.imaging.intervals import (
    Comparison,
    Interval,
    auroc_test,
    bootstrap_interval,
    bootstrap_test,
    delong_interval,
    delong_test,
    mean_interval,
)

# Twelve normal and eight abnormal slides, seen by two detectors, with ties within and across the classes.
FIRST = np.array([1, 2, 3, 3, 4, 5, 5, 6, 7, 8, 2, 4, 4, 6, 7, 9, 8, 5, 9.5, 3]) / 10
SECOND = np.array([3, 1, 6, 2, 7, 4, 8, 5, 9, 6, 1, 5, 5, 4, 9, 8, 6, 3, 7, 2]) / 10
ARE_ABNORMAL = np.arange(20) >= 12

PERFECT, REVERSED, EQUAL = np.array([0.0, 1, 2, 3]), np.array([3.0, 2, 1, 0]), np.ones(4)
HALF = np.array([False, False, True, True])


def two_detectors(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of two equally good detectors that agree in part, and labels, 40 % abnormal."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) < 0.4 * count
    common = random.normal(size=count) + labels
    return common + random.normal(size=count), common + random.normal(size=count), labels


def test_the_delong_interval_of_four_items_is_the_one_made_by_hand() -> None:
    """Each class has placements 1/2 and 1, whose variance is 1/8; 1/8 / 2 twice is 1/8; the top is clipped."""
    interval = delong_interval(np.array([1.0, 3, 2, 4]), HALF)
    assert interval is not None
    assert interval.value == 0.75
    assert interval.low == pytest.approx(0.75 - 1.959963984540054 * (1 / 8) ** 0.5)
    assert interval.high == 1


def test_the_delong_interval_is_the_one_that_other_packages_found() -> None:
    """MLstatkit 0.1.91, and confidenceinterval 1.0.5, which counts in float32."""
    first, second = delong_interval(FIRST, ARE_ABNORMAL), delong_interval(SECOND, ARE_ABNORMAL)
    assert first is not None
    assert second is not None
    assert [first.value, first.low, first.high] == pytest.approx([0.765625, 0.5497786137777876, 0.9814713862222124])
    assert [second.value, second.low, second.high] == pytest.approx(
        [0.5833333333333334, 0.32004098130696734, 0.8466256853596994]
    )
    assert [first.low, first.high] == pytest.approx([0.5497786168198121, 0.9814713831801879], rel=1e-7)


def test_the_delong_test_is_the_one_that_another_package_found() -> None:
    """MLstatkit 0.1.91."""
    found = delong_test(FIRST, SECOND, ARE_ABNORMAL)
    assert found is not None
    assert found.difference == pytest.approx(0.765625 - 0.5833333333333334)
    assert found.p_value == pytest.approx(0.04702923634241989)


@pytest.mark.parametrize("seed", range(3))
def test_delong_is_that_of_mlstatkit(seed: int) -> None:
    """Where it is installed; at another level too."""
    there: Any = pytest.importorskip("MLstatkit.delong")
    first, second, labels = two_detectors(60, seed)
    first = first.round(1)
    _, p_value, (low, high), _ = there.Delong_test(labels.astype(int), first, second, alpha=0.9, return_auc=False)[:4]
    interval, found = delong_interval(first, labels, level=0.9), delong_test(first, second, labels)
    assert interval is not None
    assert found is not None
    assert [interval.low, interval.high, found.p_value] == pytest.approx([low, high, p_value])


@pytest.mark.parametrize("seed", range(3))
def test_delong_is_what_all_pairs_of_items_give(seed: int) -> None:
    """The definition of 1988, without ranks: covariances of the placements of each item."""
    first, second, labels = two_detectors(50, seed)
    pairs = [
        np.heaviside(scores[labels][:, None] - scores[~labels], 0.5) for scores in (first.round(1), second.round(1))
    ]
    over_abnormal = np.cov([one.mean(axis=1) for one in pairs]) / np.count_nonzero(labels)
    over_normal = np.cov([one.mean(axis=0) for one in pairs]) / np.count_nonzero(~labels)
    covariance = over_abnormal + over_normal
    difference = pairs[0].mean() - pairs[1].mean()
    deviation = (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) ** 0.5

    interval, found = delong_interval(first.round(1), labels), delong_test(first.round(1), second.round(1), labels)
    assert interval is not None
    assert found is not None
    assert interval.value == pytest.approx(pairs[0].mean())
    assert interval.value - interval.low == pytest.approx(norm.ppf(0.975) * covariance[0, 0] ** 0.5)
    assert found.difference == pytest.approx(difference)
    assert found.p_value == pytest.approx(2 * norm.sf(abs(difference) / deviation))


def test_the_delong_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Of 300 cohorts of 80 slides whose true AUROC is known, 95 %, give or take."""
    truth, held = norm.cdf(1 / 2), 0  # classes one apart, deviation of both: the root of 2
    for seed in range(300):
        scores, _, labels = two_detectors(80, seed)
        interval = delong_interval(scores, labels)
        assert interval is not None
        held += interval.low <= truth <= interval.high
    assert 0.91 < held / 300 < 0.98


def test_equally_good_detectors_seldom_differ() -> None:
    """In 300 cohorts the p-value is under 0.05 about 15 times."""
    found = [delong_test(*two_detectors(80, seed)) for seed in range(300)]
    assert 0.02 < np.mean([one.p_value < 0.05 for one in found if one is not None]) < 0.09


def test_swapped_detectors_have_the_opposite_difference_and_the_same_p_value() -> None:
    """By either test."""
    one, other = delong_test(FIRST, SECOND, ARE_ABNORMAL), delong_test(SECOND, FIRST, ARE_ABNORMAL)
    assert one is not None
    assert other == Comparison(-one.difference, one.p_value, "DeLong")
    drawn = bootstrap_test(Ranking.auroc, FIRST, SECOND, ARE_ABNORMAL, seed=1, resamples=200)
    assert drawn is not None
    swapped = bootstrap_test(Ranking.auroc, SECOND, FIRST, ARE_ABNORMAL, seed=1, resamples=200)
    assert swapped == Comparison(-drawn.difference, drawn.p_value, "paired bootstrap")


@pytest.mark.parametrize("measure", [Ranking.auroc, Ranking.aupr, lambda ranking: ranking.fpr_at_tpr(0.95)])
def test_the_bootstrap_interval_is_around_the_measure_and_depends_on_the_seed_alone(measure: Any) -> None:
    """The value itself is the measure of all items, whatever is drawn."""
    scores, _, labels = two_detectors(100, 0)
    one = bootstrap_interval(measure, scores, labels, seed=1, resamples=200)
    assert one is not None
    assert one.value == measure(rank(scores, labels))
    assert one.low < one.value < one.high
    assert bootstrap_interval(measure, scores, labels, seed=1, resamples=200) == one
    assert bootstrap_interval(measure, scores, labels, seed=2, resamples=200) != one


def test_as_many_items_of_each_class_are_drawn_as_there_are() -> None:
    """The number of abnormal items is the same in every resample."""
    interval = bootstrap_interval(lambda ranking: float(ranking.abnormal), FIRST, ARE_ABNORMAL, seed=0, resamples=99)
    assert interval == Interval(8.0, 8.0, 8.0)


def test_the_bootstrap_interval_is_the_one_of_a_plain_loop_over_scikit_learn() -> None:
    """Up to what chance leaves of 1000 resamples, at a level of 90 %."""
    scores, _, labels = two_detectors(100, 0)
    random, drawn = np.random.default_rng(5), []
    for _ in range(1000):
        chosen = np.concatenate([random.choice(np.flatnonzero(one), one.sum()) for one in (labels, ~labels)])
        drawn.append(roc_auc_score(labels[chosen], scores[chosen]))
    interval = bootstrap_interval(Ranking.auroc, scores, labels, seed=0, level=0.9, resamples=1000)
    assert interval is not None
    assert [interval.low, interval.high] == pytest.approx(np.percentile(drawn, [5, 95]), abs=0.01)


def test_bootstrap_and_delong_agree_on_many_slides() -> None:
    """On the AUROC of 400 slides, within a hundredth; on the difference of two detectors likewise."""
    first, second, labels = two_detectors(400, 3)
    drawn, computed = bootstrap_interval(Ranking.auroc, first, labels, seed=0), delong_interval(first, labels)
    assert drawn is not None
    assert computed is not None
    assert [drawn.low, drawn.high] == pytest.approx([computed.low, computed.high], abs=0.01)
    by_draws, by_ranks = (
        bootstrap_test(Ranking.auroc, first, second, labels, seed=0),
        delong_test(first, second, labels),
    )
    assert by_draws is not None
    assert by_ranks is not None
    assert by_draws.difference == pytest.approx(by_ranks.difference)
    assert by_draws.p_value == pytest.approx(by_ranks.p_value, abs=0.05)


def test_a_clear_difference_is_found_by_both_tests() -> None:
    """A detector against noise."""
    scores, _, labels = two_detectors(400, 3)
    noise = np.random.default_rng(0).normal(size=400)
    drawn = bootstrap_test(Ranking.aupr, scores, noise, labels, seed=0, resamples=500)
    computed = delong_test(scores, noise, labels)
    assert drawn is not None
    assert computed is not None
    assert drawn.difference > 0.1
    assert drawn.p_value <= 4 / 501
    assert computed.p_value < 1e-4


@pytest.mark.parametrize(("scores", "auroc"), [(PERFECT, 1.0), (REVERSED, 0.0), (EQUAL, 0.5)])
def test_scores_without_variance_have_an_interval_without_width(scores: np.ndarray, auroc: float) -> None:
    """A caller can tell by it that the method had nothing to go by."""
    assert delong_interval(scores, HALF) == Interval(auroc, auroc, auroc)
    assert bootstrap_interval(Ranking.auroc, scores, HALF, seed=0, resamples=50) == Interval(auroc, auroc, auroc)


@pytest.mark.parametrize("scores", [PERFECT, EQUAL, FIRST[8:]])
def test_a_detector_does_not_differ_from_one_that_ranks_alike(scores: np.ndarray) -> None:
    """Whatever its scale."""
    labels = np.arange(scores.size) >= scores.size // 2
    assert delong_test(scores, 10 * scores - 3, labels) == Comparison(0.0, 1.0, "DeLong")
    drawn = bootstrap_test(Ranking.auroc, scores, 10 * scores - 3, labels, seed=0, resamples=50)
    assert drawn == Comparison(0.0, 1.0, "paired bootstrap")


def test_all_right_against_all_wrong_is_the_clearest_difference() -> None:
    """There is no variance, so DeLong's p-value is 0; the bootstrap says no more than its resamples allow."""
    right, half = np.arange(20.0), np.arange(20) >= 10
    assert delong_test(right, -right, half) == Comparison(1.0, 0.0, "DeLong")
    assert delong_test(PERFECT, EQUAL, HALF) == Comparison(0.5, 0.0, "DeLong")
    drawn = bootstrap_test(Ranking.auroc, right, -right, half, seed=0, resamples=199)
    assert drawn == Comparison(1.0, 2 / 200, "paired bootstrap")


def test_no_bootstrap_is_surer_than_the_number_of_items_allows() -> None:
    """Scores of four slides can be swapped between two detectors in 16 ways, two of them as extreme."""
    drawn = bootstrap_test(Ranking.auroc, PERFECT, REVERSED, HALF, seed=0, resamples=199)
    assert drawn == Comparison(1.0, 2 / 16, "paired bootstrap")


def test_aurocs_are_compared_by_delong_unless_there_is_no_variance() -> None:
    """Then by bootstrap."""
    assert auroc_test(FIRST, SECOND, ARE_ABNORMAL, seed=0) == delong_test(FIRST, SECOND, ARE_ABNORMAL)
    drawn = bootstrap_test(Ranking.auroc, PERFECT, EQUAL, HALF, seed=3, resamples=99)
    assert auroc_test(PERFECT, EQUAL, HALF, seed=3, resamples=99) == drawn
    assert auroc_test(PERFECT, EQUAL, np.zeros(4, np.bool_), seed=0) is None


def test_the_interval_of_a_mean_is_that_of_its_standard_error_on_many_items() -> None:
    """And there is none of a single one."""
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = mean_interval(values, seed=0, level=0.9)
    assert found is not None
    assert found.value == values.mean()
    margin = norm.ppf(0.95) * values.std() / 20
    assert [found.low, found.high] == pytest.approx([values.mean() - margin, values.mean() + margin], abs=0.015)
    assert mean_interval(values[:1], seed=0) is None


@pytest.mark.parametrize("abnormal", [0, 1, 3, 4])
def test_a_class_of_fewer_than_two_items_has_no_interval_and_no_test(abnormal: int) -> None:
    """One item says nothing of its variance."""
    labels = np.arange(4) < abnormal
    assert delong_interval(PERFECT, labels) is None
    assert delong_test(PERFECT, REVERSED, labels) is None
    assert bootstrap_interval(Ranking.auroc, PERFECT, labels, seed=0) is None
    assert bootstrap_test(Ranking.auroc, PERFECT, REVERSED, labels, seed=0) is None


def test_scores_that_are_no_numbers_are_refused_and_counted() -> None:
    """Of either detector, even where there is one class only."""
    bad, labels = np.array([0.0, np.nan, 2, np.inf]), np.zeros(4, np.bool_)
    refused = pytest.raises(ValueError, match="2 of 4 scores are NaN or infinite")
    with refused:
        delong_interval(bad, labels)
    with refused:
        delong_test(PERFECT, bad, labels)
    with refused:
        bootstrap_interval(Ranking.auroc, bad, labels, seed=0)
    with refused:
        bootstrap_test(Ranking.auroc, PERFECT, bad, labels, seed=0)


def test_a_measure_without_a_value_is_refused() -> None:
    """Both classes are there, so this is a mistake in the measure."""
    with pytest.raises(ValueError, match="no value although both classes"):
        bootstrap_interval(lambda _: None, PERFECT, HALF, seed=0)
