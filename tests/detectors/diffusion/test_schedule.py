"""Facts about noise schedules: the closed forms, and what is read from a model's configuration."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_anomaly.detectors.diffusion.schedule import CLEAN, NoiseSchedule
from wsi_anomaly.errors import ModelError, OptionsError

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
LATENT = NoiseSchedule.from_config(STABLE_DIFFUSION)
LINEAR = NoiseSchedule.from_betas("linear", 1e-4, 0.02, steps=1000)
COSINE = NoiseSchedule.from_betas("squaredcos_cap_v2", 1e-4, 0.02, steps=1000)
VELOCITY = NoiseSchedule.from_config(STABLE_DIFFUSION | {"prediction_type": "v_prediction"})


def latents(seed: int, tiles: int = 3) -> torch.Tensor:
    """Random latents in float64."""
    return torch.randn(tiles, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("schedule", "t", "snr"),
    [(LATENT, 674, 0.1104), (LATENT, 390, 0.7876), (LATENT, 236, 2.296), (LINEAR, 674, 0.00995), (LINEAR, 236, 1.267)],
)
def test_one_timestep_is_another_snr_on_another_schedule(schedule: NoiseSchedule, t: int, snr: float) -> None:
    """The figures known of Stable Diffusion's schedule and of DDPM's."""
    assert schedule.snr(t) == pytest.approx(snr, rel=1e-3)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_curves_are_those_of_diffusers(kind: Any) -> None:
    """To the float32 in which diffusers keeps them."""
    ours = NoiseSchedule.from_betas(kind, 0.00085, 0.012, steps=500)
    theirs = DDPMScheduler(500, beta_start=0.00085, beta_end=0.012, beta_schedule=kind)
    assert ours.alphas_cumprod == pytest.approx(theirs.alphas_cumprod.double().numpy(), rel=1e-3, abs=1e-7)
    assert ours.alphas_cumprod[:400] == pytest.approx(theirs.alphas_cumprod[:400].double().numpy(), rel=2e-5)


def test_noising_in_one_go_is_noising_step_by_step() -> None:
    """The closed form against the chain that it sums up, with the same noise at each step."""
    betas = 1 - LATENT.alphas_cumprod / np.concatenate([[1.0], LATENT.alphas_cumprod[:-1]])
    clean, mean, variance = latents(1), latents(1), 0.0
    for t in range(200):
        mean, variance = mean * math.sqrt(1 - betas[t]), variance * (1 - betas[t]) + betas[t]
    noise = latents(2)
    assert torch.allclose(LATENT.noised(clean, noise, 199), mean + math.sqrt(variance) * noise, rtol=1e-12)


def test_tiles_of_one_batch_may_be_at_timesteps_of_their_own() -> None:
    """As in training; each tile is noised as if it were alone."""
    clean, noise, t = latents(1), latents(2), torch.tensor([0, 674, 999])
    together = LATENT.noised(clean, noise, t)
    alone = [LATENT.noised(clean[[i]], noise[[i]], int(t[i]))[0] for i in range(3)]
    assert torch.allclose(together, torch.stack(alone), rtol=1e-14)
    assert LATENT.noised(clean.float(), noise.float(), t).dtype == torch.float32


@settings(deadline=None)
@given(t=st.integers(-1, 999), schedule=st.sampled_from([LATENT, LINEAR, VELOCITY]))
def test_what_was_noised_is_found_again(t: int, schedule: NoiseSchedule) -> None:
    """From the noise, and from the output of a perfect network, whatever it was trained to tell."""
    clean, noise = latents(1), latents(2)
    noised, output = schedule.noised(clean, noise, t), schedule.target(clean, noise, t)
    assert torch.allclose(schedule.clean(noised, noise, t), clean, atol=1e-10)
    assert torch.allclose(schedule.noise(output, noised, t), noise, atol=1e-10)


def test_velocity_is_that_of_diffusers() -> None:
    """For tiles at timesteps of their own."""
    theirs = DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    clean, noise, t = latents(1).float(), latents(2).float(), torch.tensor([3, 500, 998])
    assert torch.allclose(VELOCITY.target(clean, noise, t), theirs.get_velocity(clean, noise, t), atol=1e-5)


def test_half_precision_of_a_network_does_not_reach_the_latents() -> None:
    """Its output is taken to the precision of the latents before anything is computed."""
    for schedule in (LATENT, VELOCITY):
        assert schedule.noise(latents(1).bfloat16(), latents(2).float(), 500).dtype == torch.float32


def test_clean_latents_have_no_noise() -> None:
    """The timestep before the first."""
    assert (LATENT.alpha_cumprod(CLEAN), LATENT.snr(CLEAN), len(LATENT)) == (1.0, math.inf, 1000)
    assert torch.equal(LATENT.noised(latents(1), latents(2), CLEAN), latents(1))


def test_betas_of_a_configuration_come_before_its_curve() -> None:
    """A model may bring its betas one by one."""
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION | {"trained_betas": [0.5, 0.5]})
    assert schedule.alphas_cumprod.tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule: input should be 'scaled_linear', 'linear'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type: input should be 'epsilon' or 'v_prediction'"),
        ({"prediction_type": "sample"}, "prediction_type"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: input should be false"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"beta_start": 0.0}, "each beta above 0"),
        ({"beta_end": 1.5}, "below 1"),
        ({"trained_betas": []}, "at least one beta"),
    ],
)
def test_a_configuration_that_is_not_known_is_refused(change: dict[str, Any], message: str) -> None:
    """The message names the file and the key."""
    with pytest.raises(ModelError, match=f"^model/scheduler_config.json: .*{message}"):
        NoiseSchedule.from_config(STABLE_DIFFUSION | change, where="model/scheduler_config.json")


def test_a_flow_model_is_refused() -> None:
    """It has no betas at all; the message says which models can be used."""
    with pytest.raises(ModelError, match=r"beta_schedule: field required.* such as Stable Diffusion 1.x"):
        NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000})


@pytest.mark.parametrize(("start", "end", "steps"), [(0.0, 0.02, 10), (0.1, 1.0, 10), (0.1, 0.2, 0)])
def test_betas_that_are_no_shares_are_refused(start: float, end: float, steps: int) -> None:
    """Nothing that would give all signal, no signal or no schedule."""
    with pytest.raises(OptionsError, match="beta"):
        NoiseSchedule.from_betas("linear", start, end, steps=steps)
