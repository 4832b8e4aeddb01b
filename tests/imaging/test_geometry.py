import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_anomaly.imaging.geometry import Grid, area_fraction


def grid_over(bounds: tuple[int, int, int, int], *, mpp: float = 0.25, stride_px: int = 256) -> Grid:
    """A grid of 256 px tiles at 0.5 µm/px."""
    return Grid.over(bounds, downsample=(0.5 / mpp, 0.5 / mpp), tile_px=256, stride_px=stride_px)


def test_the_grid_begins_at_the_bounds_and_covers_them() -> None:
    """A tile of 256 px at 0.5 µm/px is 512 level-0 pixels of a 0.25 µm/px slide."""
    grid = grid_over((1000, 2000, 1500, 600))
    assert grid.shape == (2, 3)
    assert grid.footprint_level0_px == (512, 512)
    assert grid.origins(grid.cells()).tolist() == [
        [1000, 2000],
        [1512, 2000],
        [2024, 2000],
        [1000, 2512],
        [1512, 2512],
        [2024, 2512],
    ]


def test_origins_do_not_drift_on_slides_of_odd_mpp() -> None:
    """Rounding happens once for each cell, not step by step."""
    grid = grid_over((0, 0, 100_000, 300), mpp=0.2431)
    origins = grid.origins(grid.cells())
    column = origins[grid.cells()[:, 0] == 0, 0]
    assert np.abs(column - np.arange(len(column)) * 256 * 0.5 / 0.2431).max() <= 0.5


def test_neighbouring_boxes_share_their_edges() -> None:
    """Regions have no slits."""
    grid = grid_over((0, 0, 5000, 600), mpp=0.2431)
    boxes = grid.boxes(grid.cells()[: grid.shape[1]])
    assert (boxes[1:, 0] == boxes[:-1, 2]).all()


def test_area_fractions_by_hand() -> None:
    """Whole, half, quarter pixels and what lies outside."""
    mask = np.array([[True, False], [False, False]])
    boxes = np.array([[0, 0, 1, 1], [0, 0, 2, 2], [0.5, 0.5, 1.5, 1.5], [-1, 0, 1, 1], [1, 1, 2, 2]], float)
    assert area_fraction(mask, boxes) == pytest.approx([1.0, 0.25, 0.25, 0.5, 0.0])


@given(
    seed=st.integers(0, 100),
    x=st.floats(-3, 8),
    y=st.floats(-3, 8),
    width=st.floats(0.1, 9),
    height=st.floats(0.1, 9),
)
def test_area_fraction_equals_the_sum_over_pixels(seed: int, x: float, y: float, width: float, height: float) -> None:
    """Held against the overlap of each pixel with the box."""
    mask = np.random.default_rng(seed).random((5, 7)) > 0.5
    rows, columns = np.indices(mask.shape)
    overlap_y = np.clip(np.minimum(rows + 1, y + height) - np.maximum(rows, y), 0, None)
    overlap_x = np.clip(np.minimum(columns + 1, x + width) - np.maximum(columns, x), 0, None)
    expected = (mask * overlap_x * overlap_y).sum() / (width * height)
    found = area_fraction(mask, np.array([[x, y, x + width, y + height]]))
    assert found == pytest.approx([expected], abs=1e-6)
