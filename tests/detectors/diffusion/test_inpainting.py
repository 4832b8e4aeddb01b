"""Facts about in-painting: what is known stays known, what is hidden is never seen, and both halves make a tile."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from wsi_anomaly.detectors.diffusion.inpainting import Checkerboard, HalfNoise
from wsi_anomaly.detectors.diffusion.noise import GaussianNoise, tile_noise
from wsi_anomaly.detectors.diffusion.pixel import NetworkSizes, PixelDiffusion, ScheduleOptions, model_from_scratch
from wsi_anomaly.detectors.diffusion.restoring import Network, Restorer
from wsi_anomaly.detectors.diffusion.samplers import Ancestral, Ddim, DpmSolverPlusPlus, Plms, UniPc
from wsi_anomaly.detectors.diffusion.schedule import NoiseSchedule
from wsi_anomaly.detectors.protocol import Prompt, TileBatch
from wsi_anomaly.devices import intensities
from wsi_anomaly.errors import OptionsError
from wsi_anomaly.testing import batch_of, odd_tiles, smooth_tiles

SAMPLERS = [Plms(steps=20), Ddim(steps=20, snap=False), UniPc(), DpmSolverPlusPlus(), Ancestral(steps=20)]
CPU = torch.device("cpu")
PX, CELL_PX = 16, 4


class Ideal:
    """A network that knows the tiles and so tells exactly the noise that is in their pixels."""

    passes = 1

    def __init__(self, pixels: np.ndarray) -> None:
        self.schedule = NoiseSchedule.from_betas("linear", 1e-4, 0.02, steps=1000)
        self.clean = self.encode(torch.from_numpy(pixels))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """In [-1, 1]."""
        return intensities(pixels) * 2 - 1

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """In [0, 1]."""
        return (latents + 1) / 2

    def condition(self, prompts: Sequence[Prompt]) -> None:
        """None."""

    def noise(self, latents: torch.Tensor, t: int, condition: Any) -> torch.Tensor:  # noqa: ARG002
        """What there is more than the tile."""
        share = self.schedule.alpha_cumprod(t)
        return (latents - math.sqrt(share) * self.clean) / math.sqrt(1 - share)


def tiny_network() -> PixelDiffusion:
    """With random weights: it looks at the whole tile, so that any leak shows."""
    sizes = NetworkSizes(channels=(8, 16), layers_per_level=1, attention_levels=(1,), head_channels=8, norm_groups=4)
    return PixelDiffusion(model_from_scratch(sizes, ScheduleOptions(), seed=0), CPU, precision="fp32")


def restored(network: Network, sampler: Any, batch: TileBatch, start: int = 674) -> torch.Tensor:
    """The tiles as they come back, in [0, 1]."""
    board = Checkerboard(network, CELL_PX)
    restorer = Restorer(board, sampler, [start], make_noise=HalfNoise(GaussianNoise()), device=CPU, portion=len(batch))
    return board.decode(restorer.restore(batch).after[0])


def light_cells() -> np.ndarray:
    """True where the cells of a tile are light, the upper left one being so."""
    row, column = np.indices((PX, PX)) // CELL_PX
    return (row + column) % 2 == 0


@pytest.fixture
def batch() -> TileBatch:
    """Normal and abnormal tiles."""
    return batch_of(np.concatenate([smooth_tiles(2, PX, seed=1), odd_tiles(2, PX, seed=1)]))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
@pytest.mark.parametrize("start", [1, 250, 999])
def test_a_network_that_knows_the_tile_gives_it_back(sampler: Any, start: int, batch: TileBatch) -> None:
    """With every sampler and from every height: what is told of known cells does not disturb the hidden ones."""
    tiles = intensities(torch.from_numpy(batch.pixels))
    torch.testing.assert_close(restored(Ideal(batch.pixels), sampler, batch, start), tiles, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_the_known_half_is_at_each_step_what_the_noise_made_of_it(sampler: Any, batch: TileBatch) -> None:
    """Whatever the network says. Ancestral steps change the noise, and hardly its variance until the last ones."""
    board, start = Checkerboard(tiny_network(), CELL_PX), 674
    seen: list[tuple[int, torch.Tensor]] = []

    class Watched:
        schedule, passes = board.schedule, board.passes
        encode, decode, condition = board.encode, board.decode, board.condition

        def noise(self, latents: torch.Tensor, t: int, condition: Any) -> torch.Tensor:
            seen.append((t, latents))
            return board.noise(latents, t, condition)

    restorer = Restorer(
        Watched(), sampler, [start], make_noise=HalfNoise(GaussianNoise()), device=CPU, portion=len(batch)
    )
    restorer.restore(batch)
    clean = intensities(torch.from_numpy(batch.pixels)) * 2 - 1
    added = torch.from_numpy(tile_noise(batch.seeds, (6, PX, PX), draw=start)).chunk(2, dim=1)
    assert len(seen) == restorer.trajectories[0].calls
    for t, latents in seen:
        share = board.schedule.alpha_cumprod(t)
        for half, noise, known in zip(latents.chunk(3, dim=1), added, (light_cells(), ~light_cells()), strict=False):
            there = ((half - math.sqrt(share) * clean) / math.sqrt(1 - share))[:, :, known]
            if sampler.name == "ancestral":
                assert t < 300 or there.std() == pytest.approx(1, abs=0.1)
            else:
                torch.testing.assert_close(there, noise[:, :, known], atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
@pytest.mark.parametrize("start", [100, 674])
def test_a_hidden_cell_is_never_seen(sampler: Any, start: int, batch: TileBatch) -> None:
    """Other pixels in the light cells change nothing there, to the bit; the dark cells, rebuilt from them, change."""
    light = light_cells()
    other = batch.pixels.copy()
    other[:, light] = 255 - other[:, light]
    network = tiny_network()
    before = restored(network, sampler, batch, start).numpy()
    after = restored(network, sampler, batch_of(other), start).numpy()
    assert np.array_equal(after[:, :, light], before[:, :, light])
    assert not np.isclose(after[:, :, ~light], before[:, :, ~light]).all()


def test_a_hidden_cell_begins_as_the_mean_of_the_known_ones(batch: TileBatch) -> None:
    """Of its tile and colour."""
    first, second, whole = Checkerboard(tiny_network(), CELL_PX).encode(torch.from_numpy(batch.pixels)).chunk(3, dim=1)
    light = torch.from_numpy(light_cells())
    assert torch.equal(torch.where(light, first, second), whole)
    for half, known in ((first, light), (second, ~light)):
        means = half[:, :, known].mean(dim=2, keepdim=True)
        torch.testing.assert_close(half[:, :, ~known], means.expand(-1, -1, int((~known).sum())))


def test_noise_goes_to_the_halves_only_and_to_each_its_own() -> None:
    """The tile that is compared with stays as it is."""
    seeds = np.arange(2, dtype=np.uint64)
    noise = HalfNoise(GaussianNoise())(seeds, (9, PX, PX), 674)
    assert not noise[:, 6:].any()
    assert abs(np.corrcoef(noise[:, :3].ravel(), noise[:, 3:6].ravel())[0, 1]) < 0.1
    assert np.array_equal(HalfNoise(GaussianNoise())(seeds[1:], (9, PX, PX), 674), noise[1:])


def test_cells_as_large_as_the_tile_are_refused() -> None:
    """Nothing would be known."""
    with pytest.raises(OptionsError, match=r"16 x 16 px: cells of 16 px leave nothing.*cell_px"):
        Checkerboard(tiny_network(), PX).encode(torch.zeros(1, PX, PX, 3, dtype=torch.uint8))


def test_cells_need_not_divide_the_tile(batch: TileBatch) -> None:
    """Those at the right and lower edges are cut."""
    board = Checkerboard(Ideal(batch.pixels), 5)
    encoded = board.encode(torch.from_numpy(batch.pixels))
    assert torch.isfinite(encoded).all()
    assert board.decode(encoded).shape == (4, 3, PX, PX)
