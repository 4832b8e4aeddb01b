"""The heat map of a slide: z-scores on the tile grid, eroded, and the slide scores that follow from it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int32
from scipy import ndimage


class SlideScores(NamedTuple):
    """How far a slide deviates as a whole (AnoPILaD, section on slide-level detection)."""

    z_max: float
    z_99: float


def on_grid(
    values: Float64[np.ndarray, " tile"], cells: Int32[np.ndarray, "tile rowcol"], shape: tuple[int, int]
) -> Float32[np.ndarray, "row column"]:
    """Tile values at their cells; NaN where there is no tile."""
    grid = np.full(shape, np.nan, np.float32)
    grid[cells[:, 0], cells[:, 1]] = values
    return grid


def erode(z: Float32[np.ndarray, "row column"]) -> Float32[np.ndarray, "row column"]:
    """One grey erosion with a 2x2 window: a cell stays high only together with its neighbours.

    Each cell takes the least of itself and of its neighbours above, to the left and above left, so the eroded map
    lies half a cell towards the lower right of the tissue it speaks of. Cells without a tile (NaN) are +inf for the
    erosion: they never win, and a lone tile keeps its z.
    """
    tissue = np.isfinite(z)
    eroded = ndimage.grey_erosion(np.where(tissue, z, np.inf), size=(2, 2))
    return np.where(tissue, eroded, np.nan).astype(np.float32)


def slide_scores(z: Float32[np.ndarray, "row column"]) -> SlideScores:
    """Z_MAX, the highest z, and Z_99, the mean of the highest 1 % (at least one cell).

    Raises:
        ValueError: no cell has a z.
    """
    ordered = np.sort(z[np.isfinite(z)].astype(np.float64))
    if not len(ordered):
        raise ValueError("no cell has a z-score")
    return SlideScores(z_max=float(ordered[-1]), z_99=float(ordered[int(0.99 * len(ordered)) :].mean()))
