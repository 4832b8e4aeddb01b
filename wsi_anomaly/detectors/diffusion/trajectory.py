"""Trajectories: which timesteps a walk from noise visits. Whole numbers only; nothing here touches a tensor."""

from dataclasses import dataclass

import numpy as np

from wsi_anomaly.detectors.diffusion.schedule import NoiseSchedule
from wsi_anomaly.errors import OptionsError


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What a walk will do, known before anything runs."""

    start: int
    """The timestep whose noise is added."""
    timesteps: tuple[int, ...]
    """Where the network is asked, in this order."""
    index: int
    """How many timesteps of the sampler's whole grid lie before the first of these."""
    snr: float
    """Of the latents at `start`, with noise of variance 1."""

    @property
    def calls(self) -> int:
        """How often the network is asked."""
        return len(self.timesteps)


def grid_through(schedule: NoiseSchedule, start: int, steps: int) -> tuple[tuple[int, ...], int]:
    """The start and what lies below it in an even grid, and how much of the grid lies above."""
    _checked(schedule, start, steps)
    stride = len(schedule) // steps
    return tuple(range(start, -1, -stride)), (len(schedule) - 1 - start) // stride


def grid_near(schedule: NoiseSchedule, start: int, steps: int) -> tuple[tuple[int, ...], int]:
    """The same for the even grid that ends at t = 1, from its timestep nearest to the start, the higher of two."""
    _checked(schedule, start, steps)
    stride = len(schedule) // steps
    grid = [t for t in range(1 + (steps - 1) * stride, 0, -stride) if t < len(schedule)]
    index = min(range(len(grid)), key=lambda i: abs(grid[i] - start))
    return tuple(grid[index:]), index


def evenly_in_log_snr(schedule: NoiseSchedule, start: int, steps: int) -> tuple[int, ...]:
    """Different timesteps from the start down to 0, as near to equal steps of log-SNR as whole numbers come."""
    _checked(schedule, start, steps)
    shares = schedule.alphas_cumprod[: start + 1]
    levels = np.log(1 - shares) - np.log(shares)
    count = min(steps, start + 1)
    nearest = np.rint(np.interp(np.linspace(levels[-1], levels[0], count), levels, np.arange(start + 1)))
    below = np.arange(count)[::-1]  # how many timesteps must still find room
    apart = np.maximum.accumulate((nearest - below)[::-1])[::-1] + below
    return tuple(int(t) for t in np.minimum(apart, start - np.arange(count)))


def _checked(schedule: NoiseSchedule, start: int, steps: int) -> None:
    if not 1 <= start < len(schedule):
        raise OptionsError(
            f"start timestep {start} is not within the noise schedule: give one from 1 to {len(schedule) - 1}"
        )
    if steps > len(schedule):
        raise OptionsError(f"{steps} steps are more than the {len(schedule)} timesteps of the noise schedule")
