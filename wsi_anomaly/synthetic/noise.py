"""Randomness that depends on the place alone: fields that repeat without a seam, numbers for sites of a lattice."""

from functools import cache

import numpy as np
from jaxtyping import Float32, Int64
from scipy.ndimage import distance_transform_edt, gaussian_filter, zoom
from scipy.spatial import cKDTree

PERIOD_PX = 1024

Texture = Float32[np.ndarray, "period period"]


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> Float32[np.ndarray, "row column"]:
    """Noise of mean 0, deviation 1 and lumps of about `sigma` pixels; its opposite edges fit."""
    # A field without detail is drawn small and enlarged.
    step = max(1, int(sigma // 4))
    coarse = (-(-shape[0] // step), -(-shape[1] // step))
    noise = gaussian_filter(rng.standard_normal(coarse, dtype=np.float32), sigma / step, mode="wrap")
    if step > 1:
        noise = zoom(noise, step, order=1, mode="grid-wrap", grid_mode=True)[: shape[0], : shape[1]]
    return np.asarray((noise - noise.mean()) / noise.std(), np.float32)


def site_randoms(
    seed: int, column: Int64[np.ndarray, " site"], row: Int64[np.ndarray, " site"], count: int
) -> Float32[np.ndarray, "number site"]:
    """`count` numbers in [0, 1) for each site of a lattice: the same whichever other sites are asked for.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014) over the site's place and the seed.
    """
    place = column.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + row.astype(np.uint64) * np.uint64(
        0xC2B2AE3D27D4EB4F
    )
    bits = _mixed(place ^ _mixed(np.array([seed], np.int64).astype(np.uint64)))
    numbers = np.arange(1, count + 1, dtype=np.uint64)[:, None] * np.uint64(0xD1B54A32D192ED03)
    return (_mixed(bits + numbers) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def laid(texture: Texture, left: int, top: int, shape: tuple[int, int]) -> Float32[np.ndarray, "row column"]:
    """A periodic texture as it lies over the pixels of a region of (rows, columns)."""
    rows, columns = np.arange(top, top + shape[0]), np.arange(left, left + shape[1])
    return texture[np.ix_(rows % PERIOD_PX, columns % PERIOD_PX)]


@cache
def lumps(sigma: float) -> Texture:
    """A field with lumps of `sigma` pixels; 0 is white noise."""
    return smooth_noise(np.random.default_rng(int(sigma * 1000)), (PERIOD_PX, PERIOD_PX), sigma)


@cache
def fat_depth_px() -> Texture:
    """Pixels from the wall of the fat cell around a place; negative in the walls and where three cells meet."""
    coarse, rounding_px = 2, 17
    gap_px = _wall_distance_px(coarse)
    margin = 4 * rounding_px
    core = np.pad(gap_px, margin, mode="wrap") > rounding_px + 1.5
    rounded = rounding_px - coarse * distance_transform_edt(~core)[margin:-margin, margin:-margin]
    depth_px = np.where(gap_px > rounding_px, gap_px, rounded).astype(np.float32)
    return np.asarray(zoom(depth_px, coarse, order=1, mode="grid-wrap", grid_mode=True), np.float32)


def _wall_distance_px(coarse: int) -> Float32[np.ndarray, "row column"]:
    """Pixels from the nearest wall between shaken centres, for one pixel in `coarse` squared."""
    rng = np.random.default_rng(6)
    per_side = 8
    grid = np.stack(np.meshgrid(np.arange(per_side), np.arange(per_side), indexing="ij"), axis=-1).reshape(-1, 2)
    centres = (grid + 0.5 + rng.uniform(-0.3, 0.3, grid.shape)) * (PERIOD_PX / per_side) % PERIOD_PX
    rows, columns = np.mgrid[coarse // 2 : PERIOD_PX : coarse, coarse // 2 : PERIOD_PX : coarse]
    distance, _ = cKDTree(centres, boxsize=np.full(2, PERIOD_PX)).query(np.stack([rows, columns], axis=-1), k=2)
    return np.asarray(np.diff(distance, axis=-1)[..., 0] / 2, np.float32)


def _mixed(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
