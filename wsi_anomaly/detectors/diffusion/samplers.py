"""Samplers: walk latents from a timestep back to clean ones. They know a schedule and a prediction, never a network.

Each sampler is its options. A walk keeps what it remembers of earlier steps to itself, so that it never reaches the
next walk. All walks end with an estimate of latents without any noise (alpha = 1), not with latents at t = 0 as the
pipelines of diffusers do: with the exact noise at every step, what comes out is what went in.

Coefficients are Python floats made in float64 on the host; latents keep their own precision.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64
from pydantic import Field

from wsi_anomaly.detectors.diffusion.schedule import CLEAN, Latents, NoiseSchedule
from wsi_anomaly.detectors.diffusion.trajectory import Trajectory, evenly_in_log_snr, grid_near, grid_through
from wsi_anomaly.options import Options


@dataclass(frozen=True, slots=True)
class Denoiser:
    """What a walk asks while it goes."""

    schedule: NoiseSchedule
    predict: Callable[[Latents, int], Latents]
    """The noise in latents of a timestep, all tiles being at the same. See `NoiseSchedule.noise`."""
    fresh_noise: Callable[[int], Latents]
    """New noise for a step that arrives at a timestep; only `Ancestral` asks for it. It must differ from the noise that
    was added at the start, and depend on each tile's seed alone."""

    def noise(self, latents: Latents, t: int) -> Latents:
        """The prediction, in the precision of the latents."""
        return self.predict(latents, t).to(latents.dtype)


@runtime_checkable
class Sampler(Protocol):
    """A way from noised latents to clean ones."""

    def trajectory(self, schedule: NoiseSchedule, start: int) -> Trajectory:
        """What a walk from `start` will do.

        Raises:
            OptionsError: `start` is not within the schedule, or the schedule has fewer timesteps than steps are wanted.
        """

    def walk(self, latents: Latents, denoiser: Denoiser, start: int) -> Iterator[Latents]:
        """The latents after each call of the network. The last are the clean ones."""


def denoise(sampler: Sampler, latents: Latents, denoiser: Denoiser, *, start: int) -> Latents:
    """The clean latents that the sampler finds for latents which were noised at timestep `start`.

    Raises:
        OptionsError: as `Sampler.trajectory`.
    """
    return deque(sampler.walk(latents, denoiser, start), maxlen=1).pop()


class Plms(Options):
    """Pseudo linear multistep (Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds").

    The grid contains the start, and the first step is done twice: from the prediction where it begins, then from the
    mean of those where it begins and ends. Later steps extrapolate up to four predictions.
    """

    name: Literal["plms"] = "plms"
    steps: int = Field(100, ge=1)
    """Of the whole schedule; a walk that starts lower does fewer."""

    def trajectory(self, schedule: NoiseSchedule, start: int) -> Trajectory:
        """From 674 with 100 steps: 674, 664, 664, 654, ..., 4, which is 69 calls."""
        grid, index = grid_through(schedule, start, self.steps)
        return Trajectory(start, (*grid[:2], *grid[1:]), index, schedule.snr(start))

    def walk(self, latents: Latents, denoiser: Denoiser, start: int) -> Iterator[Latents]:
        """The latents after each call of the network; those of the second are instead of those of the first."""
        schedule = denoiser.schedule
        grid, _ = grid_through(schedule, start, self.steps)
        first, second, *_ = *grid, CLEAN
        known = [denoiser.noise(latents, first)]
        ahead = _move(schedule, latents, known[0], first, second)
        yield ahead
        if second != CLEAN:
            mean = (known[0] + denoiser.noise(ahead, second)) / 2
            latents = _move(schedule, latents, mean, first, second)
            yield latents
        for t, to in pairwise((*grid[1:], CLEAN)):
            known = [denoiser.noise(latents, t), *known[:3]]
            latents = _move(schedule, latents, _weighted_sum(_ADAMS_BASHFORTH[len(known)], known), t, to)
            yield latents


class Ddim(Options):
    """First-order deterministic steps (Song et al., "Denoising Diffusion Implicit Models", eq. 12 with sigma = 0)."""

    name: Literal["ddim"] = "ddim"
    steps: int = Field(100, ge=1)
    """Of the whole schedule; a walk that starts lower does fewer."""
    snap: bool = True
    """As AnoPILaD's released code: its grid ends at t = 1, and latents noised at the start are taken for those of the
    nearest timestep of that grid. Otherwise the grid contains the start."""

    def trajectory(self, schedule: NoiseSchedule, start: int) -> Trajectory:
        """From 674 with 100 steps: 671, 661, ..., 1 if it snaps, else 674, 664, ..., 4; either is 68 calls."""
        grid, index = (grid_near if self.snap else grid_through)(schedule, start, self.steps)
        return Trajectory(start, grid, index, schedule.snr(start))

    def walk(self, latents: Latents, denoiser: Denoiser, start: int) -> Iterator[Latents]:
        """The latents after each call of the network."""
        timesteps = self.trajectory(denoiser.schedule, start).timesteps
        for t, to in pairwise((*timesteps, CLEAN)):
            latents = _move(denoiser.schedule, latents, denoiser.noise(latents, t), t, to)
            yield latents


class UniPc(Options):
    """UniPC of order three (Zhao et al., "UniPC: A Unified Predictor-Corrector Framework ...", B(h) = exp(h) - 1)."""

    name: Literal["unipc"] = "unipc"
    steps: int = Field(20, ge=1)
    """Calls of the network, evenly spaced in log-SNR from the start to t = 0."""

    def trajectory(self, schedule: NoiseSchedule, start: int) -> Trajectory:
        """Fewer calls than steps where there are not as many timesteps."""
        return Trajectory(start, evenly_in_log_snr(schedule, start, self.steps), 0, schedule.snr(start))

    def walk(self, latents: Latents, denoiser: Denoiser, start: int) -> Iterator[Latents]:
        """The latents after each call of the network."""
        timesteps = self.trajectory(denoiser.schedule, start).timesteps
        return _multistep(latents, denoiser, timesteps, order=3, corrected=True)


class DpmSolverPlusPlus(Options):
    """DPM-Solver++(2M) (Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling ...", algorithm 2)."""

    name: Literal["dpm++"] = "dpm++"
    steps: int = Field(20, ge=1)
    """Calls of the network, evenly spaced in log-SNR from the start to t = 0."""

    def trajectory(self, schedule: NoiseSchedule, start: int) -> Trajectory:
        """Fewer calls than steps where there are not as many timesteps."""
        return Trajectory(start, evenly_in_log_snr(schedule, start, self.steps), 0, schedule.snr(start))

    def walk(self, latents: Latents, denoiser: Denoiser, start: int) -> Iterator[Latents]:
        """The latents after each call of the network."""
        timesteps = self.trajectory(denoiser.schedule, start).timesteps
        return _multistep(latents, denoiser, timesteps, order=2, corrected=False)


class Ancestral(Options):
    """Steps with fresh noise of variance beta (Ho et al., "Denoising Diffusion Probabilistic Models", algorithm 2).

    As in AnoDDPM (Wyatt et al. 2022) the clean estimate is clipped to [-1, 1] at every step: for pixels, not latents.
    AnoDDPM counts timesteps from 1: its 250 is 249 here.
    """

    name: Literal["ancestral"] = "ancestral"
    steps: int = Field(1000, ge=1)
    """Of the whole schedule; a walk that starts lower does fewer."""

    def trajectory(self, schedule: NoiseSchedule, start: int) -> Trajectory:
        """From 249 with 1000 steps: 249, 248, ..., 0, which is 250 calls."""
        grid, index = grid_through(schedule, start, self.steps)
        return Trajectory(start, grid, index, schedule.snr(start))

    def walk(self, latents: Latents, denoiser: Denoiser, start: int) -> Iterator[Latents]:
        """The latents after each call of the network."""
        schedule = denoiser.schedule
        for t, to in pairwise((*self.trajectory(schedule, start).timesteps, CLEAN)):
            clean = schedule.clean(latents, denoiser.noise(latents, t), t).clamp(-1, 1)
            if to == CLEAN:
                yield clean
                return
            before, after = schedule.alpha_cumprod(t), schedule.alpha_cumprod(to)
            kept = before / after
            of_clean = math.sqrt(after) * (1 - kept) / (1 - before)
            of_latents = math.sqrt(kept) * (1 - after) / (1 - before)
            latents = of_clean * clean + of_latents * latents + math.sqrt(1 - kept) * denoiser.fresh_noise(to)
            yield latents


SamplerOptions = Annotated[Plms | Ddim | UniPc | DpmSolverPlusPlus | Ancestral, Field(discriminator="name")]
"""A sampler of a pipeline file, told by its `name`."""

_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
_Known = tuple[int, Latents]
"""A timestep and the clean latents that were estimated there."""


def _move(schedule: NoiseSchedule, latents: Latents, noise: Latents, t: int, to: int) -> Latents:
    """The latents of timestep `to` that have the same clean latents and the same noise."""
    before, after = schedule.alpha_cumprod(t), schedule.alpha_cumprod(to)
    kept = math.sqrt(after / before)
    return kept * latents + (math.sqrt(1 - after) - kept * math.sqrt(1 - before)) * noise


def _multistep(
    latents: Latents, denoiser: Denoiser, timesteps: Sequence[int], *, order: int, corrected: bool
) -> Iterator[Latents]:
    """Extrapolate the clean latents in log-SNR; once they are estimated at the end of a step, redo it with them."""
    schedule = denoiser.schedule
    origin = latents
    known: list[_Known] = []
    for left, t in zip(reversed(range(len(timesteps))), timesteps, strict=True):
        estimate = t, schedule.clean(latents, denoiser.noise(latents, t), t)
        if not left:
            yield estimate[1]
            return
        if corrected and known:
            latents = _exponential_step(schedule, origin, [*known, estimate], t)
        known = [estimate, *known][: min(order, left + 1)]
        origin = latents
        latents = _exponential_step(schedule, origin, known, timesteps[-left])
        yield latents


def _exponential_step(schedule: NoiseSchedule, latents: Latents, known: list[_Known], to: int) -> Latents:
    """From the timestep of the first known estimate to `to`, where the other estimates bend the way."""
    times = [t for t, _ in known]
    at = {t: math.log(schedule.snr(t)) / 2 for t in (*times, to)}
    step = at[to] - at[times[0]]
    nodes = np.array([(at[t] - at[times[0]]) / step for t in times[1:]], np.float64)
    before, after = schedule.alpha_cumprod(times[0]), schedule.alpha_cumprod(to)
    weights = [math.sqrt(after) * weight for weight in _estimate_weights(step, nodes)]
    return math.sqrt((1 - after) / (1 - before)) * latents + _weighted_sum(weights, [clean for _, clean in known])


def _estimate_weights(step: float, nodes: Float64[np.ndarray, " node"]) -> list[float]:
    """UniPC's weights of the estimate where a step begins and of those at the nodes, places in units of the step."""
    gain = -math.expm1(-step)
    slopes = gain * _node_weights(step, nodes) / nodes
    return [gain - float(slopes.sum()), *slopes.tolist()]


def _node_weights(step: float, nodes: Float64[np.ndarray, " node"]) -> Float64[np.ndarray, " node"]:
    """What makes a step exact for polynomials in log-SNR; for one node UniPC takes the limit of small steps."""
    if len(nodes) < 2:  # noqa: PLR2004
        return np.full(len(nodes), 0.5)
    moments, phi = [], math.expm1(-step)
    for k in range(1, len(nodes) + 1):
        phi = phi / -step - 1 / math.factorial(k)
        moments.append(phi * math.factorial(k) / math.expm1(-step))
    return np.linalg.solve(np.vander(nodes, increasing=True).T, moments)


def _weighted_sum(weights: Sequence[float], tensors: Sequence[Latents]) -> Latents:
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total
