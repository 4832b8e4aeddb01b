"""Facts by hand, against a plain count, and against numbers that MONAI gave."""

import numpy as np
import pytest
from jaxtyping import Float

from wsi_anomaly.imaging.froc import FALSE_POSITIVES, Detections, SlideFindings, detections_of, findings_of, froc
from wsi_anomaly.imaging.segmentation import components

NAN = np.nan
LESIONS = np.array([[1, 1, 0, 0], [0, 0, 0, 2], [3, 0, 0, 2]], np.int32)


def detected(*points: tuple[int, int, float]) -> Detections:
    """Detections given as row, column and confidence."""
    return Detections(
        cells=np.array([point[:2] for point in points], np.int64).reshape(-1, 2),
        confidences=np.array([point[2] for point in points], np.float64),
    )


def findings(lesions: list[float], false_positives: list[float]) -> SlideFindings:
    """What was found on one slide."""
    return SlideFindings(np.array(lesions, np.float64), np.array(false_positives, np.float64))


def test_each_component_over_the_threshold_is_detected_at_its_highest_cell() -> None:
    """Two components: cells that touch at a corner belong together; what is at the threshold is not over it."""
    z = np.array([[2, 3, 1, NAN], [0, 0, 2.5, 0], [0, 0, 0, 0], [4, 0, 0, NAN]], np.float32)
    detections = detections_of(z, 1.0)
    assert detections.cells.tolist() == [[0, 1], [3, 0]]
    assert detections.confidences.tolist() == [3, 4]


def test_of_equally_high_cells_the_first_is_the_detection() -> None:
    """In reading order, whatever sorts them."""
    z = np.zeros((9, 9), np.float32)
    z[2:7, 3:8] = 5
    assert detections_of(z, 0.0).cells.tolist() == [[2, 3]]


@pytest.mark.parametrize("value", [NAN, -1.0])
def test_a_map_with_nothing_over_the_threshold_has_no_detections(value: float) -> None:
    """Without a tile, or without an anomaly; and it makes no findings either."""
    detections = detections_of(np.full((3, 4), value, np.float32), 0.0)
    assert detections.cells.shape == (0, 2)
    found = findings_of(detections, LESIONS)
    assert found.lesions.tolist() == [-np.inf] * 3
    assert found.false_positives.size == 0


def test_a_map_that_is_abnormal_everywhere_is_one_detection() -> None:
    """It can hit one lesion at most: calling everything abnormal does not pay."""
    z = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = findings_of(detections_of(z, -1.0), LESIONS)
    assert found.lesions.tolist() == [-np.inf, 11, -np.inf]


def test_a_lesion_has_the_confidence_of_its_best_detection() -> None:
    """A second hit is no false positive; a point beside every lesion is one; the third lesion is missed."""
    points = detected((0, 0, -2.0), (0, 1, -1.0), (1, 3, 0.5), (1, 1, 7.0))
    found = findings_of(points, LESIONS)
    assert found.lesions.tolist() == [-1, 0.5, -np.inf]
    assert found.false_positives.tolist() == [7]


def test_an_ignored_lesion_is_neither_missed_nor_a_false_positive() -> None:
    """Isolated tumour cells, by the rules of the challenge."""
    found = findings_of(detected((1, 3, 4.0), (2, 1, 3.0)), LESIONS, ignored={2})
    assert found.lesions.tolist() == [-np.inf, -np.inf]
    assert found.false_positives.tolist() == [3]


def test_on_a_slide_without_lesions_every_detection_is_a_false_positive() -> None:
    """Lesions are all 0 there."""
    found = findings_of(detected((0, 0, 1.0), (2, 3, 2.0)), np.zeros_like(LESIONS))
    assert found.lesions.size == 0
    assert found.false_positives.tolist() == [1, 2]


def test_a_confidence_that_is_no_number_is_refused() -> None:
    """It could stand nowhere on the curve."""
    with pytest.raises(ValueError, match="1 confidences are NaN or infinite"):
        findings_of(detected((0, 0, NAN)), LESIONS)


def test_the_curve_by_hand() -> None:
    """Two lesions and a false positive on one slide, two false positives on another, negative confidences included."""
    curve = froc([findings([5, -2], [4]), findings([], [6, -3])])
    assert curve.thresholds.tolist() == [np.inf, 6, 5, 4, -2, -3]
    assert curve.false_positives.tolist() == [0, 0.5, 0.5, 1, 1, 1.5]
    assert curve.sensitivity.tolist() == [0, 0, 0.5, 0.5, 1, 1]


def test_the_score_reads_the_curve_at_six_rates() -> None:
    """By hand, of the curve above: 0 on the way to the first hit, 1/2 at 0.5, and 1 from 1 on, also past its end."""
    curve = froc([findings([5, -2], [4]), findings([], [6, -3])])
    assert [curve.at(rate) for rate in FALSE_POSITIVES] == [0, 0.5, 1, 1, 1, 1]
    assert curve.at(0.75) == 0.5
    assert curve.score == pytest.approx(4.5 / 6)


def test_slides_without_lesions_dilute_false_positives() -> None:
    """They are averaged over all slides, as the challenge does, not over normal or abnormal ones."""
    slides = [findings([1], [2, 3])]
    assert froc(slides).false_positives[-1] == 2
    assert froc([*slides, findings([], []), findings([], []), findings([], [])]).false_positives[-1] == 0.5


def test_finding_all_lesions_and_nothing_else_scores_one() -> None:
    """And finding nothing, or only false positives, scores zero."""
    assert froc([findings([2, 3], []), findings([], [])]).score == 1
    assert froc([findings([-np.inf], [])]).score == 0
    assert froc([findings([-np.inf], [1, 2, 3])]).score == 0


def test_without_lesions_there_is_no_curve() -> None:
    """Sensitivity means nothing there."""
    assert froc([]) is None
    assert froc([findings([], [1, 2])]) is None


def test_the_lowest_threshold_counts_where_no_lesion_is_missed() -> None:
    """The challenge's script would drop it, and with it the second lesion."""
    assert froc([findings([3, 1], [2])]).sensitivity.tolist() == [0, 0.5, 0.5, 1]


def waves() -> Float[np.ndarray, "row column"]:
    """A z map with many hills."""
    row, column = np.mgrid[:40, :56]
    return np.sin(row / 3) + np.cos(column / 4) + np.sin(row * column / 50) / 2


def findings_of_waves() -> list[SlideFindings]:
    """Three slides: two with nine lesions, one of them ignored, and a normal one."""
    row, column = np.mgrid[:40, :56]
    lesions = components(np.sin((row + 2) / 3.2) + np.cos((column + 1) / 4.3) > 1.2)
    z = waves()
    return [
        findings_of(detections_of(z, 1.2), lesions, ignored={2}),
        findings_of(detections_of(z[::-1], 1.2), lesions, ignored={1}),
        findings_of(detections_of(z[:, ::-1], 1.2), np.zeros_like(lesions)),
    ]


def test_curve_and_score_are_those_of_the_challenge() -> None:
    """MONAI 1.6.1's rendering of the challenge's script, on the same points and lesions; it starts at the far end."""
    false_positives = np.array([17, 15, 14, 12, 10, 8, 6, 4, 2, 0]) / 3
    sensitivity = [0.5, 0.5, 0.375, 0.3125, 0.25, 0.1875, 0.125, 0.0625, 0, 0]
    curve = froc(findings_of_waves())
    assert curve.false_positives[::-1] == pytest.approx(false_positives)
    assert curve.sensitivity[::-1] == pytest.approx(sensitivity)
    assert curve.score == pytest.approx(0.16145833333333334)


def test_the_curve_agrees_with_a_plain_count() -> None:
    """At every threshold, with ties between and within slides."""
    rng = np.random.default_rng(3)
    slides = [findings(list(rng.integers(0, 9, 4)), list(rng.integers(0, 9, 6))) for _ in range(5)]
    curve = froc(slides)
    for threshold, rate, share in zip(curve.thresholds, curve.false_positives, curve.sensitivity, strict=True):
        assert rate == sum((slide.false_positives >= threshold).sum() for slide in slides) / 5
        assert share == sum((slide.lesions >= threshold).sum() for slide in slides) / 20
