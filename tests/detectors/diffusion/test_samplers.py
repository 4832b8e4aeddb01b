"""Facts about samplers: they are diffusers' own, step by step; they undo noise; they remember nothing."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_anomaly.detectors.diffusion.noise import tile_noise
from wsi_anomaly.detectors.diffusion.samplers import (
    Ancestral,
    Ddim,
    Denoiser,
    DpmSolverPlusPlus,
    Plms,
    Sampler,
    SamplerOptions,
    UniPc,
    denoise,
)
from wsi_anomaly.detectors.diffusion.schedule import CLEAN, NoiseSchedule
from wsi_anomaly.errors import OptionsError
from wsi_anomaly.options import Options, parse_options

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT = NoiseSchedule.from_config(BETAS)
LINEAR = NoiseSchedule.from_betas("linear", 1e-4, 0.02, steps=1000)
SHAPE = (4, 8, 8)
SEEDS = np.arange(3, dtype=np.uint64)
SAMPLERS = [Plms(), Ddim(), Ddim(snap=False), UniPc(), DpmSolverPlusPlus(), Ancestral()]
DETERMINISTIC = SAMPLERS[:-1]
MIXING = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

Latents = torch.Tensor


def name_of(sampler: Any) -> str:
    """Its options, as the name of a test."""
    return repr(sampler).replace(" ", "")


every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=name_of)
every_deterministic_sampler = pytest.mark.parametrize("sampler", DETERMINISTIC, ids=name_of)


def drawn(draw: int = 0, seeds: np.ndarray = SEEDS) -> Latents:
    """Noise of some tiles."""
    return torch.from_numpy(tile_noise(seeds, SHAPE, draw=draw))


def network(latents: Latents, t: int) -> Latents:
    """A small network with random weights."""
    return torch.tanh(torch.einsum("oi,niyx->noyx", MIXING, latents) + math.sin(t / 50))


def random_denoiser(seeds: np.ndarray = SEEDS, schedule: NoiseSchedule = LATENT) -> Denoiser:
    """A walk with that network and noise from the tiles' seeds."""
    return Denoiser(schedule, network, lambda t: drawn(t, seeds))


def perfect_denoiser(schedule: NoiseSchedule, clean: Latents) -> Denoiser:
    """Tells exactly the noise that is in latents which are known to be those of `clean`."""

    def predict(latents: Latents, t: int) -> Latents:
        signal = schedule.alpha_cumprod(t)
        return (latents - math.sqrt(signal) * clean) / math.sqrt(1 - signal)

    return Denoiser(schedule, predict, lambda t: drawn(t).to(clean))


def relative_error(ours: Latents, theirs: Latents) -> float:
    """The largest difference, as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_same_walk(sampler: Sampler, scheduler: Any, start: int, *, steps: int | None = None) -> None:
    """Each of the first `steps` latents of our walk is what diffusers' scheduler makes of the same network."""
    latents = LATENT.noised(drawn(100), drawn(), start)
    timesteps = sampler.trajectory(LATENT, start).timesteps
    walked = list(sampler.walk(latents, random_denoiser(), start))
    assert len(walked) == len(timesteps)
    for t, ours in list(zip(timesteps, walked, strict=True))[:steps]:
        latents = scheduler.step(network(latents, t), t, latents).prev_sample
        assert relative_error(ours, latents) < 1e-5


@pytest.mark.parametrize(("start", "steps"), [(674, 100), (671, 100), (991, 100), (250, 50), (999, 20), (11, 100)])
def test_plms_is_that_of_diffusers_at_every_step(start: int, steps: int) -> None:
    """Its scheduler with its grid put through the start and the second timestep repeated; the last alpha is 1."""
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=True, steps_offset=start % (1000 // steps))
    scheduler.set_timesteps(steps)
    assert set(Plms(steps=steps).trajectory(LATENT, start).timesteps) <= set(scheduler.timesteps.tolist())
    assert_same_walk(Plms(steps=steps), scheduler, start)


def test_plms_over_the_whole_grid_visits_the_timesteps_of_diffusers() -> None:
    """In the same order, with the same repetition."""
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    scheduler.set_timesteps(100)
    assert Plms().trajectory(LATENT, 991).timesteps == tuple(scheduler.timesteps.tolist())


def test_plms_leaves_stable_diffusions_own_scheduler_only_at_the_last_step() -> None:
    """That one stops at the noise of t = 0, where ours goes on to clean latents."""
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=4)
    scheduler.set_timesteps(100)
    assert_same_walk(Plms(), scheduler, 674, steps=68)


@pytest.mark.parametrize("start", [674, 671, 236, 1, 999])
def test_released_ddim_is_that_of_diffusers_at_every_step(start: int) -> None:
    """On its own grid, whatever the start."""
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True, steps_offset=1)
    scheduler.set_timesteps(100)
    assert set(Ddim().trajectory(LATENT, start).timesteps) <= set(scheduler.timesteps.tolist())
    assert_same_walk(Ddim(), scheduler, start)


def test_ddim_through_the_start_is_that_of_diffusers_at_every_step() -> None:
    """The same steps on the shifted grid."""
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True, steps_offset=4)
    scheduler.set_timesteps(100)
    assert_same_walk(Ddim(snap=False), scheduler, 674)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in their set_timesteps
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
@pytest.mark.parametrize(
    ("sampler_class", "scheduler"),
    [
        (UniPc, UniPCMultistepScheduler(**BETAS, solver_order=3, solver_type="bh2")),
        (DpmSolverPlusPlus, DPMSolverMultistepScheduler(**BETAS, solver_order=2)),
    ],
    ids=["unipc", "dpm++"],
)
def test_fast_solvers_are_those_of_diffusers_at_every_step(
    sampler_class: type[UniPc | DpmSolverPlusPlus], scheduler: Any, steps: int
) -> None:
    """Their schedulers, told to use our timesteps."""
    sampler = sampler_class(steps=steps)
    timesteps = sampler.trajectory(LATENT, 674).timesteps
    scheduler.set_timesteps(steps)
    sigmas = [LATENT.snr(t) ** -0.5 for t in timesteps]
    scheduler.timesteps, scheduler.sigmas = torch.tensor(timesteps), torch.tensor([*sigmas, 0.0])
    scheduler.set_begin_index(0)
    assert_same_walk(sampler, scheduler, 674)


@pytest.mark.parametrize("steps", [1000, 100])
def test_ancestral_steps_are_those_of_diffusers_at_every_step(steps: int) -> None:
    """With the variance and the clipping of AnoDDPM, given the same fresh noise."""
    scheduler = DDPMScheduler(**BETAS, variance_type="fixed_large", clip_sample=True, steps_offset=0)
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = torch.from_numpy(LATENT.alphas_cumprod)  # theirs round 1 - a_t / a_(t-1) to five digits
    fresh, again = (torch.Generator().manual_seed(3) for _ in range(2))
    denoiser = Denoiser(LATENT, network, lambda _: torch.randn(latents.shape, generator=fresh))
    start = 300
    theirs = latents = LATENT.noised(drawn(100).clamp(-1, 1), drawn(), start)
    timesteps = Ancestral(steps=steps).trajectory(LATENT, start).timesteps
    for t, ours in zip(timesteps, Ancestral(steps=steps).walk(latents, denoiser, start), strict=True):
        theirs = scheduler.step(network(theirs, t), t, theirs, generator=again).prev_sample
        assert relative_error(ours, theirs) < 1e-5


def test_fresh_noise_is_asked_for_each_timestep_but_the_start_and_the_end() -> None:
    """Once, when a step arrives there: noise that was added at the start under its own number is not used again."""
    asked: list[int] = []

    def fresh_noise(t: int) -> Latents:
        asked.append(t)
        return drawn(t)

    denoise(Ancestral(), drawn(50), Denoiser(LATENT, network, fresh_noise), start=50)
    assert asked == list(range(49, -1, -1))


def test_ancestral_clips_its_estimate_of_pixels() -> None:
    """A network that sees no noise in anything drives pixels far out; what comes back is within [-1, 1]."""
    denoiser = Denoiser(LINEAR, lambda latents, _: 0 * latents, drawn)
    assert float(denoise(Ancestral(), 100 * drawn(), denoiser, start=20).abs().max()) == 1.0


@every_sampler
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_walk_asks_the_network_as_its_trajectory_says(sampler: Any, data: st.DataObject) -> None:
    """At these timesteps, in this order, for any start and number of steps; latents come once for each call."""
    start, steps = data.draw(st.integers(1, 999)), data.draw(st.integers(1, 60))
    sampler = sampler.model_copy(update={"steps": steps})
    asked: list[int] = []

    def predict(latents: Latents, t: int) -> Latents:
        asked.append(t)
        return latents

    walked = list(sampler.walk(drawn(), Denoiser(LATENT, predict, drawn), start))
    assert tuple(asked) == sampler.trajectory(LATENT, start).timesteps
    assert len(walked) == len(asked)
    assert CLEAN not in asked


@every_sampler
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_network_that_knows_the_noise_gives_back_the_input(sampler: Any, data: st.DataObject) -> None:
    """To 1e-4 in float32, for any start and number of steps of Stable Diffusion's schedule."""
    start, steps = data.draw(st.integers(1, 999)), data.draw(st.integers(1, 120))
    sampler = sampler.model_copy(update={"steps": steps})
    clean = drawn(50).clamp(-1, 1)
    latents = LATENT.noised(clean, drawn(), start)
    found = denoise(sampler, latents, perfect_denoiser(LATENT, clean), start=start)
    assert float((found - clean).abs().max()) < 1e-4


@pytest.mark.parametrize("start", [1, 10, 250, 500, 674, 999])
@every_deterministic_sampler
def test_a_network_that_always_tells_the_added_noise_gives_back_the_input(sampler: Any, start: int) -> None:
    """Exactly that tensor, at every step; float64, so that the schedule of pixels can be walked from its end."""
    clean, noise = drawn(50).double(), drawn().double()
    for schedule in (LATENT, LINEAR):
        latents = schedule.noised(clean, noise, sampler.trajectory(schedule, start).timesteps[0])
        denoiser = Denoiser(schedule, lambda *_: noise, drawn)
        assert torch.allclose(denoise(sampler, latents, denoiser, start=start), clean, atol=1e-10)


@every_sampler
def test_nothing_of_a_walk_reaches_the_next(sampler: Any) -> None:
    """Equal bits the second time, after a walk from another start, and beside one that is not finished."""
    latents = LATENT.noised(drawn(50), drawn(), 674)
    first = denoise(sampler, latents, random_denoiser(), start=674)
    denoise(sampler, latents, random_denoiser(), start=500)
    halted = sampler.walk(latents, random_denoiser(), 300)
    next(halted)
    assert torch.equal(denoise(sampler, latents, random_denoiser(), start=674), first)
    assert torch.equal(latents, LATENT.noised(drawn(50), drawn(), 674))


@every_sampler
def test_a_tile_does_not_depend_on_its_batch(sampler: Any) -> None:
    """Alone or among others, in any order, fresh noise included."""
    backwards = SEEDS[::-1].copy()
    together = denoise(sampler, drawn(999, backwards), random_denoiser(backwards), start=300)
    for place, seed in enumerate(backwards):
        alone = np.array([seed])
        assert torch.allclose(
            denoise(sampler, drawn(999, alone), random_denoiser(alone), start=300)[0], together[place], atol=1e-5
        )


@every_sampler
def test_latents_stay_in_full_precision(sampler: Any) -> None:
    """Also where the network computes in half of it."""
    denoiser = Denoiser(LATENT, lambda latents, t: network(latents, t).bfloat16(), drawn)
    assert {latents.dtype for latents in sampler.walk(drawn(), denoiser, 40)} == {torch.float32}


def gaussian_errors(sampler: Sampler, deviations: tuple[float, float], start: int) -> tuple[float, float]:
    """Root mean square distances from the exact way down, for normal data where everything is known.

    Before the last step, where latents still have noise, and at its end.
    """
    generator = torch.Generator().manual_seed(1)
    noise, mean = (torch.randn(shape, generator=generator).double() for shape in ((8, *SHAPE), (1, *SHAPE)))
    deviation = torch.empty(1, *SHAPE, dtype=torch.float64).uniform_(*deviations, generator=generator)

    def spread(t: int) -> Latents:
        signal = LATENT.alpha_cumprod(t)
        return (signal * deviation**2 + 1 - signal).sqrt()

    def exact(t: int) -> Latents:
        return math.sqrt(LATENT.alpha_cumprod(t)) * mean + spread(t) * noise

    def expected_noise(latents: Latents, t: int) -> Latents:
        signal = LATENT.alpha_cumprod(t)
        return math.sqrt(1 - signal) * (latents - math.sqrt(signal) * mean) / spread(t) ** 2

    *_, before, end = sampler.walk(exact(start), Denoiser(LATENT, expected_noise, drawn), start)
    last = sampler.trajectory(LATENT, start).timesteps[-1]
    return float((before - exact(last)).square().mean().sqrt()), float((end - exact(CLEAN)).square().mean().sqrt())


@pytest.mark.parametrize("deviations", [(0.5, 1.5), (0.9, 0.901)])
def test_better_samplers_come_nearer_to_the_exact_way(deviations: tuple[float, float]) -> None:
    """69 calls of PLMS and 20 of the fast solvers against 68 of DDIM, on two kinds of normal data."""
    for sampler, limit in {Plms(): 5e-4, UniPc(): 1.1e-3, DpmSolverPlusPlus(): 2e-3}.items():
        assert gaussian_errors(sampler, deviations, 674)[1] < limit
    for snap in (True, False):
        assert gaussian_errors(Ddim(snap=snap), deviations, 674)[1] > 1e-2


@pytest.mark.parametrize(
    ("coarse", "fine", "factor"),
    [
        (Ddim(steps=50, snap=False), Ddim(steps=100, snap=False), 1.8),
        (Plms(steps=50), Plms(steps=100), 2.2),
        (DpmSolverPlusPlus(steps=20), DpmSolverPlusPlus(steps=40), 3.0),
        (UniPc(steps=20), UniPc(steps=40), 8.0),
    ],
)
def test_twice_the_steps_pay(coarse: Sampler, fine: Sampler, factor: float) -> None:
    """First, second and third order show; the last step, to clean latents, is of first order for all."""
    assert gaussian_errors(coarse, (0.5, 1.5), 640)[0] > factor * gaussian_errors(fine, (0.5, 1.5), 640)[0]


@every_sampler
def test_a_start_outside_the_schedule_stops_a_walk_at_once(sampler: Any) -> None:
    """Before the network is asked for anything."""
    with pytest.raises(OptionsError, match="start timestep 1000"):
        denoise(sampler, drawn(), Denoiser(LATENT, lambda *_: pytest.fail("was asked"), drawn), start=1000)


class Detector(Options):
    """Something that has a sampler."""

    sampler: SamplerOptions = Plms()


@every_sampler
def test_a_pipeline_file_names_its_sampler(sampler: Any) -> None:
    """And gets the same one back from what it writes out."""
    table = Detector(sampler=sampler).model_dump(mode="json")
    assert parse_options(Detector, table, where="pipeline").sampler == sampler


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "plms", "steps": 0}, "greater than or equal to 1"),
        ({"name": "unipc", "steps": -3}, "greater than or equal to 1"),
        ({"name": "euler"}, "'plms', 'ddim', 'unipc', 'dpm\\+\\+', 'ancestral'"),
        ({"steps": 5}, "unable to extract tag using discriminator 'name'"),
        ({"name": "plms", "snap": True}, "unknown key 'sampler.plms.snap'"),
    ],
)
def test_wrong_samplers_are_refused_by_name(table: dict[str, Any], message: str) -> None:
    """No steps, no such sampler, no name, an option of another sampler."""
    with pytest.raises(OptionsError, match=f"^pipeline: .*{message}"):
        parse_options(Detector, {"sampler": table}, where="pipeline")
