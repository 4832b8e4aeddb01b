"""Noise of tiles: a function of each tile's seed alone, never of its batch or of a global state. Knows no schedule."""

from dataclasses import dataclass
from itertools import product
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8, UInt64

Seeds = UInt64[np.ndarray, " tile"]

SIMPLEX_DEVIATION = 0.5
"""Of `simplex_noise` with its defaults, over many seeds. The signal-to-noise ratio of a schedule is that of noise of
deviation 1: divide it by the square of this."""


@runtime_checkable
class NoiseMaker(Protocol):
    """What is added to tiles at the start of a walk."""

    @property
    def variance(self) -> float:
        """Of what is added; schedules count on 1."""

    def __call__(self, seeds: Seeds, shape: tuple[int, ...], draw: int) -> Float32[np.ndarray, "tile ..."]:
        """Noise of a shape for some seeds; `draw` tells independent draws of a tile apart."""


@dataclass(frozen=True, slots=True)
class GaussianNoise:
    """Standard normal values, independent of each other."""

    @property
    def variance(self) -> float:
        """As schedules have it."""
        return 1.0

    def __call__(self, seeds: Seeds, shape: tuple[int, ...], draw: int) -> Float32[np.ndarray, "tile ..."]:
        """See `tile_noise`."""
        return tile_noise(seeds, shape, draw=draw)


@dataclass(frozen=True, slots=True)
class SimplexNoise:
    """The noise of a start is simplex noise; fresh noise on the way back, drawn beyond the schedule, is normal."""

    timesteps: int
    """How many the schedule has."""

    @property
    def variance(self) -> float:
        """Of the noise of a start."""
        return SIMPLEX_DEVIATION**2

    def __call__(self, seeds: Seeds, shape: tuple[int, ...], draw: int) -> Float32[np.ndarray, "tile ..."]:
        """See `simplex_noise`: a draw within the schedule is a timestep."""
        if draw >= self.timesteps:
            return tile_noise(seeds, shape, draw=draw)
        channels, height, width = shape
        return simplex_noise(seeds, (channels, height, width), t=draw)


def tile_noise(seeds: Seeds, shape: tuple[int, ...], *, draw: int = 0) -> Float32[np.ndarray, "tile ..."]:
    """Independent standard normal values; another `draw` (0 or more) of a tile is other noise.

    The generator counts (Philox: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3") under the key
    (seed, draw), so that a tile has the same noise on every machine.
    """
    noise = np.empty((len(seeds), *shape), np.float32)
    for tile, seed in zip(noise, seeds, strict=True):
        tile[...] = _generator(seed, draw, _VALUES).standard_normal(shape, np.float32)
    return noise


def simplex_noise(
    seeds: Seeds,
    shape: tuple[int, int, int],
    *,
    t: int,
    octaves: int = 6,
    persistence: float = 0.8,
    wavelength_px: float = 64.0,
) -> Float32[np.ndarray, "tile channel y x"]:
    """Lumpy noise: octaves of simplex noise, each of half the wavelength of the one before and `persistence` times it.

    That of AnoDDPM (Wyatt et al. 2022), where the first wavelength is called frequency: a slice at `t` through a field
    of three dimensions, so that the noise of one seed changes slowly with t. `shape` is (channels, height, width).

    An octave is as strong as there, and the sum not scaled to deviation 1: see `SIMPLEX_DEVIATION`. Unlike there, tiles
    and channels have noise of their own, and octaves are plain simplex noise (Gustavson, "Simplex noise demystified",
    2005), not the slightly smoother OpenSimplex.
    """
    channels, *size = shape
    tables = [_generator(seed, channel, _TABLES).permutation(256) for seed in seeds for channel in range(channels)]
    noise = np.zeros((len(seeds) * channels, *size), np.float32)
    for octave in range(octaves):
        corners = _corners((size[0], size[1]), t, wavelength_px / 2**octave)
        for index, table in enumerate(tables):
            noise[index] += persistence**octave * _simplex(*corners, table.astype(np.uint8))
    return noise.reshape(len(seeds), *shape)


def _corners(
    size: tuple[int, int], t: int, wavelength_px: float
) -> tuple[UInt8[np.ndarray, "corner axis y x"], Float32[np.ndarray, "corner axis y x"]]:
    """The four lattice corners around each pixel, modulo 256, and the ways from there times their falloff.

    No seed changes them: tiles and channels share them.
    """
    y, x = np.indices(size)
    place = np.stack([x, y, np.full(size, t)]) / wavelength_px
    cell = np.floor(place + place.sum(axis=0) / 3)
    first = (place - cell + cell.sum(axis=0) / 6).astype(np.float32)
    ahead = first[0] >= first[1], first[1] >= first[2], first[0] >= first[2]
    pairs = (ahead[0], ahead[2]), (ahead[1], ~ahead[0]), (~ahead[2], ~ahead[1])
    rank = np.stack([np.add(*pair, dtype=np.uint8) for pair in pairs])  # the longest way is gone first
    cells = np.empty((4, *first.shape), np.uint8)
    ways = np.empty((4, *first.shape), np.float32)
    for corner in range(4):
        gone = rank >= 3 - corner
        way = first - gone + np.float32(corner / 6)
        falloff = np.maximum(np.float32(0.6) - np.square(way).sum(axis=0), 0) ** 4
        cells[corner] = cell.astype(np.int64) + gone & 255
        ways[corner] = falloff * way
    return cells, ways


def _simplex(
    cells: UInt8[np.ndarray, "corner axis y x"],
    ways: Float32[np.ndarray, "corner axis y x"],
    table: UInt8[np.ndarray, "256"],
) -> Float32[np.ndarray, "y x"]:
    """One octave. Numbers of corners wrap at 256, as they should."""
    hashed = cells[:, 0] + table[cells[:, 1] + table[cells[:, 2]]]
    gradients = _GRADIENTS.T[:, table % len(_GRADIENTS)]
    along = [np.einsum("cyx,cyx->yx", gradients[axis].take(hashed), ways[:, axis]) for axis in range(3)]
    return _STRENGTH * (along[0] + along[1] + along[2])


def _generator(seed: np.uint64, draw: int, stream: int) -> np.random.Generator:
    """A generator that no other seed, draw or stream shares numbers with."""
    key = np.array([seed, draw], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], np.uint64)))


_VALUES, _TABLES = 0, 1
_GRADIENTS = np.array([g for g in product((-1, 0, 1), repeat=3) if np.abs(g).sum() == 2], np.float32)  # noqa: PLR2004
"""From the middle of a cube to its edges."""
_STRENGTH = np.float32(23.4)
"""Gives an octave the deviation of one of OpenSimplex, 0.31, which AnoDDPM's is."""
