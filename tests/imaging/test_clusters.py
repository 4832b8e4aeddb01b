import numpy as np
import pytest

from wsi_anomaly.imaging.classification import Ranking, rank
from wsi_anomaly.imaging.clusters import BinnedClusters, bin_clusters, cluster_intervals
from wsi_anomaly.imaging.intervals import Interval, bootstrap_interval

MEASURES = (Ranking.auroc, Ranking.aupr, Ranking.aupr_in, Ranking.detection_error)


def slides(count: int, tiles: int, *, share: float, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores and labels; the second half has abnormal tiles, 2 higher, and each slide an offset of its own."""
    random, found = np.random.default_rng(seed), []
    for number in range(count):
        abnormal = (random.random(tiles) < share) & (number >= count // 2)
        found.append((random.normal(random.normal(0, 0.5), 1, tiles) + 2 * abnormal, abnormal))
    return found


def together(clusters: list[tuple[np.ndarray, np.ndarray]]) -> Ranking:
    """As items without clusters."""
    scores, labels = zip(*clusters, strict=True)
    return rank(np.concatenate(scores), np.concatenate(labels))


def halves(count: int) -> np.ndarray:
    """The strata of `slides`."""
    return np.arange(count) >= count // 2


@pytest.mark.parametrize("share", [0.3, 0.002])
def test_measures_of_the_bins_are_nearly_those_of_all_scores(share: float) -> None:
    """AUROC of 200,000 tiles in 4,096 bins within 1e-4, AUPR within 1e-3; also where abnormal tiles are rare."""
    clusters = slides(20, 10_000, share=share)
    ranking = together(clusters)
    edges = ranking.bin_edges()
    assert len(edges) <= 4096
    found = cluster_intervals(MEASURES, bin_clusters(clusters, edges), halves(20), seed=0, resamples=10)
    for measure, interval, error in zip(MEASURES, found, (1e-4, 1e-3, 1e-3, 1e-3), strict=True):
        assert interval is not None
        assert interval.value == pytest.approx(measure(ranking), abs=error)


def test_few_scores_have_bins_of_their_own() -> None:
    """Then nothing is lost."""
    clusters = slides(6, 50, share=0.3)
    ranking = together(clusters)
    found = cluster_intervals(MEASURES, bin_clusters(clusters, ranking.bin_edges()), halves(6), seed=0, resamples=10)
    assert [one.value for one in found if one] == pytest.approx([measure(ranking) for measure in MEASURES])


def test_a_bin_holds_the_scores_from_its_edge_on() -> None:
    """What is below the first edge has a bin too."""
    counts = bin_clusters([(np.array([0.5, 1, 1.5, 2]), np.array([True, True, False, False]))], np.array([1.0, 2]))
    assert counts.abnormal.tolist() == [[1, 1, 0]]
    assert counts.normal.tolist() == [[0, 1, 1]]


def test_clusters_of_one_item_give_the_interval_of_independent_items() -> None:
    """Up to what chance leaves of 1000 draws."""
    random = np.random.default_rng(0)
    labels = np.arange(100) < 40
    scores = random.normal(size=100) + labels
    clusters = bin_clusters(zip(scores[:, None], labels[:, None], strict=True), np.unique(scores))
    found = cluster_intervals([Ranking.auroc], clusters, labels, seed=0, resamples=1000)[0]
    known = bootstrap_interval(Ranking.auroc, scores, labels, seed=1, resamples=1000)
    assert found is not None
    assert known is not None
    assert [found.value, found.low, found.high] == pytest.approx([known.value, known.low, known.high], abs=0.015)


def test_draws_depend_on_the_seed_alone() -> None:
    """As many clusters of each stratum are drawn as there are."""
    clusters = bin_clusters(slides(10, 50, share=0.5), np.linspace(-3, 5, 40))
    one = cluster_intervals(MEASURES, clusters, halves(10), seed=1, resamples=100)
    assert one == cluster_intervals(MEASURES, clusters, halves(10), seed=1, resamples=100)
    assert one != cluster_intervals(MEASURES, clusters, halves(10), seed=2, resamples=100)
    equal = BinnedClusters(np.full((10, 1), 3), np.full((10, 1), 4))
    counted = cluster_intervals([lambda ranking: float(ranking.normal)], equal, halves(10), seed=0, resamples=99)
    assert counted == [Interval(40.0, 40.0, 40.0)]


def test_what_says_nothing_of_its_variance_has_no_interval() -> None:
    """One class, one cluster of a kind; but one kind of clusters with both classes is enough."""
    both = slides(8, 50, share=0.5)
    clusters = bin_clusters(both, np.linspace(-3, 5, 40))
    only_normal = bin_clusters(both[:4], np.linspace(-3, 5, 40))
    assert cluster_intervals([Ranking.auroc], only_normal, halves(4), seed=0) == [None]
    assert cluster_intervals([Ranking.auroc], clusters, np.arange(8) == 7, seed=0) == [None]
    of_abnormal = bin_clusters(both[4:], np.linspace(-3, 5, 40))
    assert cluster_intervals([Ranking.auroc], of_abnormal, np.ones(4, np.bool_), seed=0, resamples=50)[0] is not None


def test_draws_without_a_class_are_not_counted() -> None:
    """All abnormal tiles are in one of two slides; a quarter of the draws leave it out."""
    clusters = BinnedClusters(np.array([[0, 0], [0, 5], [0, 0], [0, 0]]), np.array([[5, 0], [5, 0], [5, 0], [5, 0]]))
    found = cluster_intervals([Ranking.auroc], clusters, np.array([True, True, False, False]), seed=0, resamples=50)
    assert found == [Interval(1.0, 1.0, 1.0)]
