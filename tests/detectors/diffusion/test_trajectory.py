"""Facts about trajectories: which timesteps each sampler visits, and which starts and steps are refused."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_anomaly.detectors.diffusion.samplers import Ancestral, Ddim, DpmSolverPlusPlus, Plms, Sampler, UniPc
from wsi_anomaly.detectors.diffusion.schedule import NoiseSchedule
from wsi_anomaly.errors import OptionsError

LATENT = NoiseSchedule.from_betas("scaled_linear", 0.00085, 0.012, steps=1000)
LINEAR = NoiseSchedule.from_betas("linear", 1e-4, 0.02, steps=1000)
COSINE = NoiseSchedule.from_betas("squaredcos_cap_v2", 1e-4, 0.02, steps=1000)


@pytest.mark.parametrize(
    ("sampler", "start", "first", "ends"),
    [
        (Plms(), 674, (674, 664, 664, 654), (4, 69, 32)),
        (Ddim(), 674, (671, 661), (1, 68, 32)),
        (Ddim(), 236, (241,), (1, 25, 75)),
        (Ddim(), 390, (391,), (1, 40, 60)),
        (Ddim(), 500, (501,), (1, 51, 49)),
        (Ddim(snap=False), 674, (674, 664), (4, 68, 32)),
        (Ddim(steps=1000), 999, (999, 998), (1, 999, 0)),
        (UniPc(), 674, (674,), (0, 20, 0)),
        (DpmSolverPlusPlus(), 674, (674,), (0, 20, 0)),
        (Ancestral(), 249, (249, 248), (0, 250, 750)),
        (Plms(), 7, (7,), (7, 1, 99)),
        (UniPc(), 3, (3, 2, 1, 0), (0, 4, 0)),
        (UniPc(steps=1), 674, (674,), (674, 1, 0)),
    ],
)
def test_a_trajectory_tells_what_a_walk_will_do(
    sampler: Sampler, start: int, first: tuple[int, ...], ends: tuple[int, int, int]
) -> None:
    """Timesteps, how many, their place in the grid, and the signal-to-noise ratio of the start."""
    trajectory = sampler.trajectory(LATENT, start)
    assert trajectory.timesteps[: len(first)] == first
    assert (trajectory.timesteps[-1], trajectory.calls, trajectory.index) == ends
    assert (trajectory.start, trajectory.snr) == (start, LATENT.snr(start))


@settings(max_examples=60, deadline=None)
@given(start=st.integers(1, 999), steps=st.integers(1, 1000), schedule=st.sampled_from([LATENT, LINEAR, COSINE]))
def test_timesteps_even_in_log_snr_are_different_and_reach_the_end(
    start: int, steps: int, schedule: NoiseSchedule
) -> None:
    """They fall from the start to 0, as many as were asked for or as there are."""
    trajectory = UniPc(steps=steps).trajectory(schedule, start)
    assert trajectory.timesteps[0] == start
    assert trajectory.calls == min(steps, start + 1)
    assert all(later < earlier for earlier, later in zip(trajectory.timesteps, trajectory.timesteps[1:], strict=False))
    if steps > 1:
        assert trajectory.timesteps[-1] == 0


def test_fast_timesteps_are_evenly_spaced_in_log_snr() -> None:
    """Within a timestep, where timesteps are dense; at the end whole numbers lie further apart."""
    levels = [math.log(LATENT.snr(t)) for t in UniPc().trajectory(LATENT, 674).timesteps]
    even = (math.log(LATENT.snr(0)) - levels[0]) / 19
    assert np.diff(levels)[:12] == pytest.approx(even, rel=0.1)


@pytest.mark.parametrize("sampler_class", [Plms, Ddim, UniPc, DpmSolverPlusPlus, Ancestral])
@pytest.mark.parametrize("start", [-1, 0, 1000, 5000])
def test_a_start_outside_the_schedule_is_refused(sampler_class: Callable[..., Sampler], start: int) -> None:
    """The message says which there are."""
    with pytest.raises(OptionsError, match=rf"start timestep {start} .* from 1 to 999"):
        sampler_class().trajectory(LATENT, start)


@pytest.mark.parametrize("sampler_class", [Plms, Ddim, UniPc, DpmSolverPlusPlus, Ancestral])
def test_more_steps_than_timesteps_are_refused(sampler_class: Callable[..., Sampler]) -> None:
    """The message has both numbers."""
    with pytest.raises(OptionsError, match="1001 steps are more than the 1000 timesteps"):
        sampler_class(steps=1001).trajectory(LATENT, 674)
