"""Facts about the noise of tiles: it depends on the seed alone, and has the statistics it claims."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_anomaly.detectors.diffusion.noise import SIMPLEX_DEVIATION, simplex_noise, tile_noise

SHAPE = (4, 32, 32)


def seeds(*numbers: int) -> np.ndarray:
    """Seeds of tiles."""
    return np.array(numbers, np.uint64)


@settings(deadline=None)
@given(batch=st.lists(st.integers(0, 2**64 - 1), max_size=6), draw=st.integers(0, 5))
def test_noise_does_not_depend_on_the_batch(batch: list[int], draw: int) -> None:
    """Bit for bit, in any company and order."""
    together = tile_noise(seeds(*batch), (2, 3), draw=draw)
    assert together.shape == (len(batch), 2, 3)
    for seed, tile in zip(batch, together, strict=True):
        assert np.array_equal(tile, tile_noise(seeds(seed), (2, 3), draw=draw)[0])


def test_noise_is_standard_normal() -> None:
    """Mean, deviation and tails over many tiles, and no tie between neighbouring seeds or draws."""
    noise = tile_noise(np.arange(200, dtype=np.uint64), SHAPE)
    assert abs(noise.mean()) < 0.004
    assert noise.std() == pytest.approx(1, abs=0.004)
    assert (np.abs(noise) > 1.959964).mean() == pytest.approx(0.05, abs=0.001)
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.005
    assert abs((noise * tile_noise(np.arange(200, dtype=np.uint64), SHAPE, draw=1)).mean()) < 0.005


def test_another_seed_or_draw_is_other_noise() -> None:
    """Also where seed and draw change places."""
    drawn = [tile_noise(seeds(seed), (8,), draw=draw)[0] for seed in (0, 1, 2, 2**64 - 1) for draw in (0, 1, 2)]
    assert len({tuple(noise.tolist()) for noise in drawn}) == len(drawn)


def test_noise_leaves_the_global_state_alone() -> None:
    """It neither decides the noise nor is used up."""
    np.random.seed(3)  # noqa: NPY002 - this state is what must not matter
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = tile_noise(seeds(7), SHAPE), simplex_noise(seeds(7), (1, 8, 8), t=5)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    np.random.seed(4)  # noqa: NPY002
    assert np.array_equal(first[0], tile_noise(seeds(7), SHAPE))
    assert np.array_equal(first[1], simplex_noise(seeds(7), (1, 8, 8), t=5))


def test_noise_is_the_same_on_every_machine() -> None:
    """Written down once, so that another platform or another numpy shows."""
    known = {(0, 0): FIRST_OF_0, (1, 0): FIRST_OF_1, (2**64 - 1, 0): FIRST_OF_LAST, (1, 1): SECOND_DRAW_OF_1}
    for (seed, draw), values in known.items():
        assert tile_noise(seeds(seed), (3,), draw=draw)[0] == pytest.approx(values, rel=1e-6)
    assert simplex_noise(seeds(1), (2, 64, 64), t=250)[0, :, 50, 10:12].ravel() == pytest.approx(SIMPLEX_OF_1, abs=1e-5)


FIRST_OF_0 = (0.05991104, 0.01555963, -1.1644385)
FIRST_OF_1 = (1.0916891, 0.4558267, 0.70178974)
FIRST_OF_LAST = (-1.7444787, -0.48715827, 1.5449836)
SECOND_DRAW_OF_1 = (0.18661235, -0.05541545, -0.37375617)
SIMPLEX_OF_1 = (0.432781, 0.467983, -0.26277, -0.095586)


def test_simplex_noise_does_not_depend_on_the_batch() -> None:
    """Bit for bit, in any company and order."""
    together = simplex_noise(seeds(5, 2**63, 9), (2, 16, 24), t=100)
    assert together.shape == (3, 2, 16, 24)
    assert np.array_equal(together[::-1], simplex_noise(seeds(9, 2**63, 5), (2, 16, 24), t=100))
    assert np.array_equal(together[[1]], simplex_noise(seeds(2**63), (2, 16, 24), t=100))


def test_simplex_noise_of_tiles_and_channels_differs() -> None:
    """Every field has lattice gradients of its own."""
    fields = simplex_noise(seeds(1, 2), (3, 64, 64), t=100).reshape(6, -1)
    assert np.abs(np.corrcoef(fields) - np.eye(6)).max() < 0.3


def test_simplex_noise_has_the_deviation_that_is_told() -> None:
    """Over many seeds and timesteps; about zero."""
    fields = [simplex_noise(np.arange(4, dtype=np.uint64) + 4 * t, (3, 64, 64), t=t) for t in range(1, 1000, 25)]
    values = np.stack(fields).astype(np.float64)
    assert np.sqrt((values**2).mean()) == pytest.approx(SIMPLEX_DEVIATION, rel=0.03)
    assert abs(values.mean()) < 0.03


def test_an_octave_is_smooth_at_its_wavelength() -> None:
    """No step between neighbouring pixels, but different values a wavelength apart, along each axis."""
    field = simplex_noise(seeds(3), (1, 256, 256), t=40, octaves=1)[0, 0]
    for axis in (0, 1):
        assert np.abs(np.diff(field, axis=axis)).max() < 0.1
        apart = np.corrcoef(field.take(range(192), axis).ravel(), field.take(range(64, 256), axis).ravel())
        assert abs(apart[0, 1]) < 0.4


def test_octaves_add_up() -> None:
    """Each of half the wavelength and `persistence` times as strong."""
    long, short = (simplex_noise(seeds(3), (1, 32, 32), t=40, octaves=1, wavelength_px=w) for w in (16.0, 8.0))
    both = simplex_noise(seeds(3), (1, 32, 32), t=40, octaves=2, wavelength_px=16.0, persistence=0.25)
    assert both == pytest.approx(long + 0.25 * short, abs=1e-6)


def test_simplex_noise_changes_slowly_with_the_timestep() -> None:
    """Neighbouring slices of the field are alike, far ones are not."""
    here, near, far = (simplex_noise(seeds(3), (1, 128, 128), t=t)[0, 0].ravel() for t in (400, 401, 700))
    assert np.corrcoef(here, near)[0, 1] > 0.85
    assert abs(np.corrcoef(here, far)[0, 1]) < 0.3


def test_simplex_noise_is_that_of_the_definition() -> None:
    """Against the sum over corners written out pixel by pixel."""
    philox = np.random.Philox(key=np.array([8, 1], np.uint64), counter=np.array([0, 0, 0, 1], np.uint64))
    table = np.random.Generator(philox).permutation(256)
    field = simplex_noise(seeds(8), (2, 9, 11), t=37, octaves=1, wavelength_px=5.3)[0, 1]
    for row, column in ((0, 0), (3, 7), (8, 10), (5, 5)):
        place = np.array([column, row, 37]) / 5.3
        assert field[row, column] == pytest.approx(simplex_at(place, table), abs=1e-5)


def simplex_at(place: np.ndarray, table: np.ndarray) -> float:
    """Simplex noise at one place, by walking from corner to corner, each time along the longest way left."""
    gradients = [g for g in itertools.product((-1, 0, 1), repeat=3) if sum(map(abs, g)) == 2]
    corner = np.floor(place + place.sum() / 3).astype(int)
    total, longest = 0.0, np.argsort(-(place - corner))
    for axis in (*longest, None):
        way = place - (corner - corner.sum() / 6)
        hashed = 0
        for number in corner[::-1]:
            hashed = table[(number + hashed) % 256]
        total += max(0.6 - way @ way, 0) ** 4 * np.dot(gradients[hashed % 12], way)
        if axis is not None:
            corner[axis] += 1
    return 23.4 * total
