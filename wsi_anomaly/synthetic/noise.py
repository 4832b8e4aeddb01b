"""Random fields that repeat without a seam, so that one small field textures a slide of any size."""

from functools import cache

import numpy as np
from jaxtyping import Float32
from scipy.ndimage import gaussian_filter, zoom
from scipy.spatial import cKDTree

PERIOD_PX = 1024


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> Float32[np.ndarray, "row column"]:
    """Noise of mean 0, deviation 1 and lumps of about `sigma` pixels; its opposite edges fit."""
    noise = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    return np.asarray((noise - noise.mean()) / noise.std(), np.float32)


@cache
def lumps(sigma: float) -> Float32[np.ndarray, "row column"]:
    """A field of `PERIOD_PX` squared with lumps of `sigma` pixels."""
    return smooth_noise(np.random.default_rng(int(sigma * 1000)), (PERIOD_PX, PERIOD_PX), sigma)


@cache
def fat_walls(cell_px: int) -> Float32[np.ndarray, "row column"]:
    """A field of `PERIOD_PX` squared: pixels from the nearest wall between fat cells of about `cell_px`."""
    rng = np.random.default_rng(cell_px)
    per_side = PERIOD_PX // cell_px
    grid = np.stack(np.meshgrid(np.arange(per_side), np.arange(per_side), indexing="ij"), axis=-1).reshape(-1, 2)
    centres = (grid + 0.5 + rng.uniform(-0.38, 0.38, grid.shape)) * (PERIOD_PX / per_side) % PERIOD_PX
    coarse = 4
    rows, columns = np.mgrid[coarse // 2 : PERIOD_PX : coarse, coarse // 2 : PERIOD_PX : coarse]
    distance, _ = cKDTree(centres, boxsize=np.full(2, PERIOD_PX)).query(np.stack([rows, columns], axis=-1), k=2)
    gap = np.diff(distance, axis=-1)[..., 0].astype(np.float32) / 2
    return np.asarray(zoom(gap, coarse, order=1, mode="grid-wrap", grid_mode=True), np.float32)
