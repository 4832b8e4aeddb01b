"""Textures for the tests of detectors: quick to draw and easy to tell apart. No tissue: see `stream` for that."""

import numpy as np
from jaxtyping import UInt8


def smooth_tiles(count: int, tile_px: int, *, seed: int) -> UInt8[np.ndarray, "tile y x rgb"]:
    """Normal texture: slow waves of pink and violet."""
    random = np.random.default_rng(seed)
    place = np.linspace(0, 1, tile_px)
    waves, turns, phases = random.uniform(0.2, 1, (3, count, 2, 1, 1))
    down = np.sin(2 * np.pi * (waves[:, 0] * place[:, None] + turns[:, 0] * place[None, :] + phases[:, 0]))
    across = np.sin(2 * np.pi * (waves[:, 1] * place[:, None] - turns[:, 1] * place[None, :] + phases[:, 1]))
    shade = ((down + across) / 4 + 0.5)[..., None]
    colours = np.array([225, 170, 205]) * shade + np.array([130, 80, 165]) * (1 - shade)
    return np.asarray(colours.round(), np.uint8)


def odd_tiles(count: int, tile_px: int, *, seed: int) -> UInt8[np.ndarray, "tile y x rgb"]:
    """The same texture with something abnormal planted in its middle: strong noise and hard edges."""
    random = np.random.default_rng(seed)
    tiles = smooth_tiles(count, tile_px, seed=seed)
    middle = slice(tile_px // 4, tile_px - tile_px // 4)
    side = middle.stop - middle.start
    tiles[:, middle, middle] = random.choice(np.array([0, 255], np.uint8), (count, side, side, 3))
    return tiles
