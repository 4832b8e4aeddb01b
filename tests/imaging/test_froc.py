"""Facts by hand, against a plain count, and against numbers that MONAI gave."""

import numpy as np
import pytest
from jaxtyping import Float, Int64
from scipy import ndimage

from wsi_anomaly.imaging.froc import FALSE_POSITIVES, SlideFindings, froc, peaks_of, slide_findings

NAN = np.nan


def findings(lesions: list[float], false_positives: list[float]) -> SlideFindings:
    """What was found on one slide."""
    return SlideFindings(np.array(lesions, np.float64), np.array(false_positives, np.float64))


def found_by(confidences: list[float], hits: list[tuple[int, int]], ignored: list[bool]) -> SlideFindings:
    """Of detections, and the pairs of detection and lesion that touch."""
    pairs = np.array(hits, np.int64).reshape(-1, 2).T
    return slide_findings(np.array(confidences), (pairs[0], pairs[1]), np.array(ignored, np.bool_))


def suppressed_one_by_one(z: Float[np.ndarray, "row column"], radius: float) -> list[list[int]]:
    """The definition: take the highest cell that is left and put out the disc around it, until none is left."""
    left = np.where(np.isfinite(z), z, -np.inf)
    row, column = np.mgrid[: z.shape[0], : z.shape[1]]
    peaks = []
    while left.max() > -np.inf:
        peak = np.unravel_index(np.argmax(left), z.shape)
        peaks.append([int(place) for place in peak])
        left[(row - peak[0]) ** 2 + (column - peak[1]) ** 2 <= radius**2] = -np.inf
    return peaks


def test_a_cell_is_a_peak_where_no_higher_one_lies_near() -> None:
    """Highest first; the 8 falls to the 9 beside it, and the 7 beside that stands, as the 8 is out already."""
    z = np.array([[1, 9, 8, 7, 1], [1, 1, 1, 1, 1], [NAN, 1, 1, 1, 5]], np.float32)
    assert peaks_of(z, 1.5).tolist() == [[0, 1], [0, 3], [2, 4], [2, 1]]


def test_the_radius_reaches_from_centre_to_centre_and_includes_its_end() -> None:
    """Cells in one row, each lower than the one before."""
    z = np.arange(9.0, 0.0, -1.0)[None]
    assert peaks_of(z, 0.9)[:, 1].tolist() == list(range(9))
    assert peaks_of(z, 1.0)[:, 1].tolist() == [0, 2, 4, 6, 8]
    assert peaks_of(z, 2.0)[:, 1].tolist() == [0, 3, 6]
    assert peaks_of(np.diag(z[0]) + np.where(np.eye(9) > 0, 0, NAN), 1.4).shape == (9, 2)


def test_of_equally_high_cells_the_first_is_the_peak() -> None:
    """In reading order, whatever sorts them."""
    assert peaks_of(np.zeros((4, 4), np.float32), 1.5).tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]


def test_half_a_slide_over_zero_is_many_peaks() -> None:
    """Noise, of which a component over 0 would make a few detections: the lesion in it is one of its own."""
    z = np.random.default_rng(0).normal(0, 1, (60, 60))
    z[30, 40] = 9
    peaks = peaks_of(z, 1.46)
    assert peaks[0].tolist() == [30, 40]
    assert 500 < len(peaks) < 900


def test_a_map_without_tiles_has_no_peaks() -> None:
    """And a single tile is one."""
    assert peaks_of(np.full((3, 4), NAN, np.float32), 1.5).shape == (0, 2)
    assert peaks_of(np.array([[NAN, -3.0]]), 1.5).tolist() == [[0, 1]]


@pytest.mark.parametrize("radius", [0.5, 1.46, 3.0, 5.8, 40.0])
def test_peaks_are_those_of_the_definition(radius: float) -> None:
    """Cell by cell, with ties, tissue that is torn and edges."""
    random = np.random.default_rng(7)
    z = np.round(ndimage.gaussian_filter(random.normal(0, 3, (23, 31)), 1), 1)
    z[random.random(z.shape) < 0.3] = NAN
    assert peaks_of(z, radius).tolist() == suppressed_one_by_one(z, radius)


def test_a_lesion_has_the_confidence_of_its_best_detection() -> None:
    """A second hit is no false positive; a detection beside every lesion is one; the third lesion is missed."""
    found = found_by([-2.0, -1.0, 0.5, 7.0], [(0, 0), (1, 0), (2, 1)], [False] * 3)
    assert found.lesions.tolist() == [-1, 0.5, -np.inf]
    assert found.false_positives.tolist() == [7]


def test_a_detection_may_hit_several_lesions() -> None:
    """It counts for each of them."""
    found = found_by([4.0, 1.0], [(0, 0), (0, 1), (1, 1)], [False, False])
    assert found.lesions.tolist() == [4, 4]
    assert found.false_positives.size == 0


def test_an_ignored_lesion_is_neither_missed_nor_a_false_positive() -> None:
    """Isolated tumour cells, by the rules of the challenge; what also hits another lesion counts for that one."""
    found = found_by([4.0, 3.0, 2.0], [(0, 1), (1, 2), (2, 1), (2, 0)], [False, True, False])
    assert found.lesions.tolist() == [2, 3]
    assert found.false_positives.size == 0


def test_on_a_slide_without_lesions_every_detection_is_a_false_positive() -> None:
    """There is nothing to hit."""
    found = found_by([1.0, 2.0], [], [])
    assert found.lesions.size == 0
    assert found.false_positives.tolist() == [1, 2]


def test_a_confidence_that_is_no_number_is_refused() -> None:
    """It could stand nowhere on the curve."""
    with pytest.raises(ValueError, match="1 confidences are NaN or infinite"):
        found_by([NAN], [], [])


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


def labelled_components(mask: np.ndarray) -> np.ndarray:
    """Numbered from 1; corners connect."""
    return ndimage.label(mask, np.ones((3, 3)))[0]


def highest_cells(z: Float[np.ndarray, "row column"], threshold: float) -> Int64[np.ndarray, "peak rowcol"]:
    """Of each component over the threshold."""
    labels = labelled_components(z > threshold)
    return np.array(ndimage.maximum_position(z, labels, range(1, labels.max() + 1)), np.int64)


def findings_of_waves() -> list[SlideFindings]:
    """Three slides: two with nine lesions, one of them ignored, and a normal one; a detection is one cell."""
    row, column = np.mgrid[:40, :56]
    lesions = labelled_components(np.sin((row + 2) / 3.2) + np.cos((column + 1) / 4.3) > 1.2)
    slides = []
    for z, labels, ignored in (
        (waves(), lesions, 2),
        (waves()[::-1], lesions, 1),
        (waves()[:, ::-1], np.zeros_like(lesions), 0),
    ):
        cells = tuple(highest_cells(z, 1.2).T)
        detection = np.flatnonzero(labels[cells])
        slides.append(
            slide_findings(
                z[cells],
                (detection, labels[cells][detection].astype(np.int64) - 1),
                np.arange(1, labels.max() + 1) == ignored,
            )
        )
    return slides


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
