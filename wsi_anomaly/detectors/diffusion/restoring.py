"""Restore tiles: add noise, and let a network that knows normal tissue take it away. Knows no files and no training.

After AnoDDPM (Wyatt et al. 2022) and Graham et al., "Denoising diffusion models for out-of-distribution detection"
(2023): what does not come back as it was is abnormal. Each tile has noise of its own, made of its seed.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Shaped, UInt8, UInt64

from wsi_anomaly.detectors.diffusion.noise import NoiseMaker
from wsi_anomaly.detectors.diffusion.samplers import Denoiser, Sampler, denoise
from wsi_anomaly.detectors.diffusion.schedule import NoiseSchedule
from wsi_anomaly.detectors.diffusion.trajectory import Trajectory
from wsi_anomaly.detectors.protocol import Prompt, TileBatch
from wsi_anomaly.devices import reproducible
from wsi_anomaly.errors import OptionsError

Images = Float32[torch.Tensor, "tile rgb y x"]
Latents = Float32[torch.Tensor, "tile channel y_latent x_latent"]
Norms = Float32[torch.Tensor, "tile _"]

Result = TypeVar("Result")

log = logging.getLogger(__name__)


@runtime_checkable
class Network(Protocol):
    """A diffusion network in the space that it works in: latents, or the pixels themselves."""

    schedule: NoiseSchedule

    @property
    def passes(self) -> int:
        """How often a tile goes through the network itself when `noise` is asked once."""

    def encode(self, pixels: UInt8[torch.Tensor, "tile y x rgb"]) -> Latents:
        """Clean latents of tiles, without anything random."""

    def decode(self, latents: Latents) -> Images:
        """Tiles as intensities in [0, 1]."""

    def condition(self, prompts: Sequence[Prompt]) -> Any:  # noqa: ANN401 - known to `noise` alone
        """What `noise` needs to know of the tiles."""

    def noise(self, latents: Latents, t: int, condition: Any) -> Latents:  # noqa: ANN401
        """The noise that it sees in latents of timestep `t`."""


@dataclass(frozen=True, slots=True)
class Restored:
    """Some tiles before and after, in the network's space; `after` and `norms` have one entry a starting timestep."""

    before: Latents
    after: tuple[Latents, ...]
    norms: tuple[Norms, ...]
    """Of the noise that the network saw, in the order of the calls."""


class Restorer:
    """Restores tiles in portions of a fixed size, so that a tile comes out the same in whatever batch it comes.

    The last batch is remembered: its scores, maps and pictures cost one walk. Where a portion does not fit into the
    device's memory it is halved, and stays so.
    """

    def __init__(
        self,
        network: Network,
        sampler: Sampler,
        starts: Sequence[int],
        *,
        make_noise: NoiseMaker,
        device: torch.device,
        portion: int,
        check: Callable[[TileBatch], None] = lambda _: None,
    ) -> None:
        """`check` raises an error for a batch that lacks what the network needs."""
        self.network = network
        self.trajectories = tuple(sampler.trajectory(network.schedule, start) for start in starts)
        self.device = device
        self.portion = portion
        self.noise_variance = make_noise.variance
        self._sampler = sampler
        self._check = check
        self._make_noise = make_noise
        self._last: tuple[TileBatch, Restored] | None = None

    def restore(self, batch: TileBatch) -> Restored:
        """Latents that hold no number (NaN) where the network failed."""
        if self._last is None or self._last[0] is not batch:
            self._check(batch)
            self._last = batch, self._restored(batch)
        return self._last[1]

    def in_portions(
        self, function: Callable[..., torch.Tensor], *values: Shaped[torch.Tensor, "tile ..."]
    ) -> Float32[np.ndarray, "tile ..."]:
        """A function of some tensors with one row a tile, each portion by itself, on the device."""

        def work() -> torch.Tensor:
            parts = []
            for part in self._portions(len(values[0])):
                rows = [value[part].to(self.device) for value in values]
                result = function(*(_filled(row, self.portion) for row in rows))
                parts.append(result[: len(rows[0])].float().cpu())
            return torch.cat(parts)

        return self._with_room(work).numpy()

    def _with_room(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, once the portions are small enough for the device."""
        while True:
            try:
                with torch.inference_mode(), reproducible():
                    return work()
            except torch.OutOfMemoryError as error:
                self._halve(error)

    def _restored(self, batch: TileBatch) -> Restored:
        parts = self._with_room(lambda: [self._restored_portion(batch, part) for part in self._portions(len(batch))])
        before, *walked = (torch.cat(column) for column in zip(*parts, strict=True))
        return Restored(before, tuple(walked[::2]), tuple(walked[1::2]))

    def _restored_portion(self, batch: TileBatch, part: slice) -> tuple[torch.Tensor, ...]:
        """Before, then after and norms of each walk, for one portion that is filled up with black tiles."""
        count = len(batch.seeds[part])
        missing = self.portion - count
        seeds = np.concatenate([batch.seeds[part], np.zeros(missing, np.uint64)])
        condition = self.network.condition((*batch.prompts[part], *((),) * missing))
        before = self.network.encode(_filled(torch.from_numpy(batch.pixels[part]).to(self.device), self.portion))
        walks = (self._walked(before, condition, seeds, trajectory) for trajectory in self.trajectories)
        return tuple(values[:count].cpu() for values in (before, *chain.from_iterable(walks)))

    def _walked(
        self,
        before: Latents,
        condition: Any,  # noqa: ANN401 - see Network
        seeds: UInt64[np.ndarray, " tile"],
        trajectory: Trajectory,
    ) -> tuple[Latents, Norms]:
        schedule, start = self.network.schedule, trajectory.start
        norms = []

        def noise(draw: int) -> Latents:
            return torch.from_numpy(self._make_noise(seeds, tuple(before.shape[1:]), draw)).to(self.device)

        def predict(latents: Latents, t: int) -> Latents:
            seen = self.network.noise(latents, t, condition)
            norms.append(_norm(seen))
            return seen

        denoiser = Denoiser(
            schedule,
            predict=predict,
            fresh_noise=lambda t: noise(len(schedule) * (start + 1) + t),
        )
        after = denoise(self._sampler, schedule.noised(before, noise(start), start), denoiser, start=start)
        return after, torch.stack(norms, dim=1)

    def _portions(self, count: int) -> Iterator[slice]:
        """At least one, so that no tiles still have a shape."""
        return (slice(start, start + self.portion) for start in range(0, max(count, 1), self.portion))

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        if self.portion == 1:
            raise OptionsError(
                "the device has too little memory for a single tile. Free its memory, use a smaller tile_px, or run on "
                "the CPU: --device cpu"
            ) from error
        self.portion //= 2
        torch.cuda.empty_cache()
        log.warning("the device has too little memory: going on with %d tiles at once", self.portion)


def _norm(noise: torch.Tensor) -> Float32[torch.Tensor, " tile"]:
    """Over all of a tile's values; rounded last, so that the order of the sum does not show."""
    return noise.double().square().sum(dim=(1, 2, 3)).sqrt().float()


def _filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Zeros behind, where there are fewer rows."""
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
