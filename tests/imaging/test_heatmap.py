import numpy as np
import pytest

from wsi_anomaly.imaging.geometry import Grid
from wsi_anomaly.imaging.heatmap import erode, on_grid, slide_scores
from wsi_anomaly.imaging.regions import regions_over
from wsi_anomaly.imaging.zscore import describe, z_scores

NAN = np.nan


def test_erosion_takes_the_least_of_a_cell_and_its_neighbours_above_and_left() -> None:
    """By hand: a single high cell vanishes, a 2x2 block keeps its lower right."""
    z = np.array([[0, 0, 0, 0], [0, 5, 6, 0], [0, 7, 8, 0], [0, 0, 0, 9]], np.float32)
    expected = np.zeros((4, 4), np.float32)
    expected[2, 2] = 5
    assert (erode(z) == expected).all()


def test_background_never_wins_the_erosion() -> None:
    """A lone tile keeps its z, and background stays background."""
    z = np.array([[NAN, NAN, NAN], [NAN, 4, NAN], [NAN, NAN, NAN]], np.float32)
    eroded = erode(z)
    assert eroded[1, 1] == 4
    assert np.isnan(eroded).sum() == 8


def test_z_99_is_the_mean_of_the_top_percent() -> None:
    """Of 200 cells the two highest; of few cells the highest."""
    assert slide_scores(np.arange(200, dtype=np.float32).reshape(10, 20)) == (199.0, 198.5)
    assert slide_scores(np.array([[1, NAN, 3]], np.float32)) == (3.0, 3.0)


def test_a_slide_without_z_has_no_score() -> None:
    """Rather an error than a number."""
    with pytest.raises(ValueError, match="no cell"):
        slide_scores(np.full((2, 2), NAN, np.float32))


def test_values_stand_at_their_cells() -> None:
    """Everything else is background."""
    grid = on_grid(np.array([1.5, -2.0]), np.array([[0, 1], [2, 0]], np.int32), (3, 2))
    assert grid[0, 1] == 1.5
    assert grid[2, 0] == -2
    assert np.isnan(grid).sum() == 4


def test_z_scores_by_hand() -> None:
    """Population deviation; NaN is left out of the reference and stays NaN."""
    reference = describe(np.array([1, 3, NAN], np.float32))
    assert (reference.mean, reference.deviation, reference.count) == (2.0, 1.0, 2)
    z = z_scores(np.array([[4.0], [NAN]], np.float32), [reference])
    assert z[0, 0] == 2
    assert np.isnan(z[1, 0])


@pytest.mark.parametrize("scores", [[], [1.0], [2.0, 2.0, 2.0], [97179.0, 97179.02]])
def test_nothing_is_measured_against_scores_that_do_not_differ(scores: list[float]) -> None:
    """A deviation of zero would make every z infinite, and one of rounding would make it absurd."""
    with pytest.raises(ValueError, match="scores"):
        describe(np.array(scores, np.float32))


def test_regions_are_polygons_with_holes_in_level_0_pixels() -> None:
    """A ring of cells over the threshold, and a cell apart that touches it by a corner only."""
    z = np.zeros((5, 5), np.float32)
    z[:3, :3] = 2
    z[1, 1] = 0
    z[3, 3] = 4
    z[4, 4] = NAN
    grid = Grid((100, 200), (10.0, 10.0), (10.0, 10.0), (5, 5))
    corner, ring = regions_over(z, 1.0, grid)
    assert (corner.cells, corner.z_max, corner.polygon.bounds) == (1, 4.0, (130, 230, 140, 240))
    assert (ring.cells, ring.polygon.area, len(ring.polygon.interiors)) == (8, 800, 1)
    assert ring.polygon.bounds == (100, 200, 130, 230)


def test_nothing_over_the_threshold_is_no_region() -> None:
    """Also where all is background."""
    grid = Grid((0, 0), (1.0, 1.0), (1.0, 1.0), (2, 2))
    assert regions_over(np.full((2, 2), NAN, np.float32), 0.0, grid) == ()
