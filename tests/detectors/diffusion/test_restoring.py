import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from wsi_anomaly.detectors.diffusion.noise import GaussianNoise
from wsi_anomaly.detectors.diffusion.restoring import Restorer
from wsi_anomaly.detectors.diffusion.samplers import Ancestral, Ddim, DpmSolverPlusPlus, Plms, Sampler, UniPc
from wsi_anomaly.detectors.diffusion.schedule import NoiseSchedule
from wsi_anomaly.detectors.diffusion.scoring import DiffusionScorer, names_of
from wsi_anomaly.detectors.protocol import Prompt, TileBatch
from wsi_anomaly.errors import OptionsError
from wsi_anomaly.testing import batch_of, odd_tiles, smooth_tiles

SCHEDULE = NoiseSchedule.from_betas("scaled_linear", 0.00085, 0.012, steps=1000)
CPU = torch.device("cpu")
SAMPLERS = [Plms(), Ddim(snap=False), UniPc(steps=13), DpmSolverPlusPlus(steps=20)]


class Oracle:
    """A network on pixels that knows the clean images, and so the exact noise; `room` tiles fit into its memory."""

    passes = 1

    def __init__(self, *, room: int = 99, fails: tuple[int, ...] = ()) -> None:
        self.schedule = SCHEDULE
        self.asked: list[int] = []
        self._room = room
        self._fails = fails
        self._clean = torch.empty(0)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Intensities from -1 to 1."""
        self._clean = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return self._clean

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Intensities from 0 to 1."""
        return (latents + 1) / 2

    def condition(self, prompts: Sequence[Prompt]) -> Any:
        """How many tiles there are."""
        return len(prompts)

    def noise(self, latents: torch.Tensor, t: int, condition: int) -> torch.Tensor:
        """What makes these latents of the clean ones."""
        assert condition == len(latents)
        self.asked.append(len(latents))
        if len(latents) > self._room:
            raise torch.OutOfMemoryError
        share = self.schedule.alpha_cumprod(t)
        noise = (latents - share**0.5 * self._clean) / (1 - share) ** 0.5
        noise[list(self._fails)] = float("nan")
        return noise


class Shrinking(Oracle):
    """A network that takes a tenth too little noise away, each tile by itself."""

    def noise(self, latents: torch.Tensor, t: int, condition: int) -> torch.Tensor:
        """Depends on nothing but the tile."""
        return 0.9 * super().noise(latents, t, condition)


def restorer(network: Any, sampler: Sampler, *starts: int, portion: int = 8) -> Restorer:
    """On the CPU."""
    return Restorer(network, sampler, starts or (674,), make_noise=GaussianNoise(), device=CPU, portion=portion)


def some_tiles(count: int = 11) -> TileBatch:
    """Normal and abnormal ones, with seeds of their own."""
    return batch_of(np.concatenate([smooth_tiles(count - 4, 16, seed=0), odd_tiles(4, 16, seed=0)]))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_exact_noise_brings_every_tile_back(sampler: Sampler) -> None:
    """To 1e-4 of the latents, and to the pixel."""
    batch = some_tiles()
    scorer = DiffusionScorer(restorer(Oracle(), sampler), ("mse_latent", "mse_pixel"))
    restored = scorer.restorer.restore(batch)
    assert (restored.before - restored.after[0]).abs().max() < 1e-4
    np.testing.assert_array_equal(scorer.reconstruct(batch), batch.pixels)
    assert scorer.score(batch).max() < 1e-7


@pytest.mark.parametrize("sampler", [Plms(steps=20), UniPc(steps=6), Ancestral(steps=20)], ids=lambda s: s.name)
def test_a_tile_is_restored_alike_in_any_company(sampler: Sampler) -> None:
    """Bit by bit: alone, in any order, with any number of others."""
    batch, order = some_tiles(), np.random.default_rng(0).permutation(11)
    whole = restorer(Shrinking(), sampler).restore(batch).after[0]
    shuffled = restorer(Shrinking(), sampler).restore(batch_of(batch.pixels[order], seeds=batch.seeds[order])).after[0]
    assert torch.equal(shuffled, whole[order])
    alone = restorer(Shrinking(), sampler).restore(batch_of(batch.pixels[3:4], seeds=batch.seeds[3:4])).after[0]
    assert torch.equal(alone[0], whole[3])


def test_another_size_of_portions_changes_next_to_nothing() -> None:
    """1e-4, relatively."""
    batch = some_tiles()
    scores = [
        DiffusionScorer(restorer(Shrinking(), Plms(steps=20), portion=portion), ("mse_latent",)).score(batch)
        for portion in (1, 3, 8)
    ]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-4)
    np.testing.assert_allclose(scores[2], scores[0], rtol=1e-4)


def test_score_map_and_picture_of_a_batch_cost_one_walk() -> None:
    """The second and third question are answered from memory."""
    network, batch = Oracle(), some_tiles(8)
    scorer = DiffusionScorer(restorer(network, Plms()), ("mse_pixel",))
    scorer.score(batch)
    assert len(network.asked) == 69
    scorer.score_map(batch)
    scorer.reconstruct(batch)
    assert len(network.asked) == 69
    scorer.score(some_tiles(8))
    assert len(network.asked) == 2 * 69


def test_too_little_memory_halves_the_portion_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """With one line for each halving."""
    small, ample = restorer(Shrinking(room=2), Plms(steps=20)), restorer(Shrinking(), Plms(steps=20), portion=2)
    batch = some_tiles()
    with caplog.at_level(logging.WARNING):
        after = small.restore(batch).after[0]
    assert torch.equal(after, ample.restore(batch).after[0])
    assert [record.getMessage().rsplit("going on ", 1)[1] for record in caplog.records] == [
        "with 4 tiles at once",
        "with 2 tiles at once",
    ]
    assert small.portion == 2


def test_a_device_without_room_for_one_tile_is_given_up() -> None:
    """With what to do."""
    with pytest.raises(OptionsError, match=r"too little memory for a single tile.*--device cpu"):
        restorer(Shrinking(room=0), Plms(steps=20)).restore(some_tiles())


def test_a_failed_tile_has_no_score_and_spoils_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """NaN for it, the same numbers for the others, and a count in the log."""
    batch = some_tiles(8)
    well = DiffusionScorer(restorer(Shrinking(), Ddim(steps=20)), ("mse_latent", "ms_ssim")).score(batch)
    found = DiffusionScorer(restorer(Shrinking(fails=(2,)), Ddim(steps=20)), ("mse_latent", "ms_ssim")).score(batch)
    assert np.isnan(found[2]).all()
    np.testing.assert_array_equal(np.delete(found, 2, axis=0), np.delete(well, 2, axis=0))
    assert "1 tiles could not be restored" in caplog.text


def test_several_starts_give_a_column_each_and_are_told() -> None:
    """So that their z-scores can be averaged; each with noise of its own."""
    scorer = DiffusionScorer(restorer(Shrinking(), Ddim(steps=100), 236, 674), ("mse_latent", "mse_pixel"))
    assert names_of(scorer.scores, (236, 674)) == (
        "mse_latent t236",
        "mse_pixel t236",
        "mse_latent t674",
        "mse_pixel t674",
    )
    table = scorer.score(some_tiles())
    assert table.shape == (11, 4)
    assert (table[:, 0] < table[:, 2]).all()
    alone = DiffusionScorer(restorer(Shrinking(), Ddim(steps=100), 674), ("mse_latent",)).score(some_tiles())
    np.testing.assert_array_equal(alone[:, 0], table[:, 2])
    assert scorer.facts["timesteps"] == [236, 674]
    assert scorer.facts["network_calls"] == [25, 68]
    assert scorer.facts["snr"][1] == pytest.approx(0.110, abs=5e-4)


@pytest.mark.parametrize("start", [0, 1000, -5])
def test_a_start_outside_the_schedule_is_refused(start: int) -> None:
    """Before anything is computed."""
    with pytest.raises(OptionsError, match="not within the noise schedule: give one from 1 to 999"):
        restorer(Oracle(), Plms(), start)


class Believer(Oracle):
    """The exact network of tissue whose every pixel is normal around one colour: it pulls all tiles there."""

    def noise(self, latents: torch.Tensor, t: int, condition: int) -> torch.Tensor:
        """The expected noise under a normal prior (Tweedie's formula)."""
        assert condition == len(latents)
        self.asked.append(len(latents))
        share, mean, deviation = self.schedule.alpha_cumprod(t), 0.2, 0.5
        return (1 - share) ** 0.5 * (latents - share**0.5 * mean) / (share * deviation**2 + 1 - share)


def test_the_fast_profile_ranks_tiles_as_the_paper_does() -> None:
    """Rank correlation 0.99 at no more than a fifth of the calls, with the samplers of the two pipeline files."""
    from scipy.stats import spearmanr

    from wsi_anomaly.pipeline import load_pipeline
    from wsi_anomaly.pipeline.preset import build_detector

    batch, scores, calls = some_tiles(40), [], []
    for name in ("anopilad", "anopilad-fast"):
        detector: Any = build_detector(load_pipeline(name))
        network = Believer()
        scorer = DiffusionScorer(restorer(network, detector.sampler, *detector.timesteps, portion=40), ("mse_latent",))
        scores.append(scorer.score(batch)[:, 0])
        calls.append(len(network.asked))
    assert calls[1] <= calls[0] / 5
    assert spearmanr(*scores).statistic >= 0.99
