"""How much noise a diffusion network sees in clean tiles, noise level by noise level. Fits nothing, knows no density.

Mahmood, Oliva and Styner, "Multiscale Score Matching for Out-of-Distribution Detection" (ICLR 2021): a network that
tells the noise in normal tiles at many levels sees as much of it in every normal tile. Of a network that tells the
noise, sigma * ||score|| is the norm of what it tells.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Shaped

from wsi_anomaly.detectors.diffusion.restoring import Network
from wsi_anomaly.detectors.diffusion.schedule import NoiseSchedule
from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.devices import CHUNK_TILES, reproducible
from wsi_anomaly.errors import OptionsError

Maps = Float32[torch.Tensor, "tile level channel y_latent x_latent"]


@dataclass(frozen=True, slots=True)
class ScoreNorms:
    """A network, the timesteps at which it is asked, and where it computes."""

    network: Network
    timesteps: tuple[int, ...]
    device: torch.device

    def vectors(self, batch: TileBatch) -> Float32[np.ndarray, "tile level"]:
        """The norm sigma * ||score|| of each tile at each level; no noise is added."""
        return self.of_maps(norms_of, batch)

    def of_maps(self, function: Callable[[Maps], torch.Tensor], batch: TileBatch) -> Shaped[np.ndarray, "tile ..."]:
        """A function of what the network sees in each tile at each level, always of as many tiles at once."""
        parts = []
        with torch.inference_mode(), reproducible():
            for start in range(0, max(len(batch), 1), CHUNK_TILES):  # no tiles: one chunk still tells the shape
                part = slice(start, start + CHUNK_TILES)
                count = len(batch.pixels[part])
                pixels = np.zeros((CHUNK_TILES, *batch.pixels.shape[1:]), np.uint8)
                pixels[:count] = batch.pixels[part]
                prompts = (*batch.prompts[part], *((),) * CHUNK_TILES)[:CHUNK_TILES]
                clean = self.network.encode(torch.from_numpy(pixels).to(self.device))
                condition = self.network.condition(prompts)
                seen = [self.network.noise(faded(self.network, clean, t), t, condition) for t in self.timesteps]
                parts.append(function(torch.stack(seen, dim=1))[:count].cpu().numpy())
        return np.concatenate(parts)


def norms_of(maps: Maps) -> Float32[torch.Tensor, "tile level"]:
    """Of what the network sees in each tile at each level; rounded last, so that the order of the sum does not show."""
    return maps.double().square().sum(dim=(2, 3, 4)).sqrt().float()


def faded(network: Network, clean: torch.Tensor, t: int) -> torch.Tensor:
    """Clean tiles as strong as they are at timestep `t`, without the noise."""
    return clean * math.sqrt(network.schedule.alpha_cumprod(t))


def levels_of(schedule: NoiseSchedule, levels: int, *, most_sigma: float, least_sigma: float) -> tuple[int, ...]:
    """Timesteps whose noise is nearest to these deviations (on intensities in [0, 1]), from the strongest down.

    Between the two, each level is weaker than the one before by the same factor. The timesteps are all different: where
    two levels have the same nearest one, as below the weakest noise of the schedule, they get neighbouring ones.

    Raises:
        OptionsError: there are more levels than timesteps.
    """
    if levels > len(schedule):
        raise OptionsError(
            f"{levels} noise levels are more than the {len(schedule)} timesteps of the base. Lower levels under "
            "[detector.ncsn] of the pipeline file."
        )
    # Networks see intensities in [-1, 1], where the same noise deviates twice as much.
    wanted = [1 / (1 + (2 * sigma) ** 2) for sigma in np.geomspace(least_sigma, most_sigma, levels)]
    nearest = np.array([np.abs(schedule.alphas_cumprod - signal).argmin() for signal in wanted])
    order = np.arange(levels)
    apart = np.maximum.accumulate(nearest - order) + order
    return tuple(int(t) for t in np.minimum(apart, len(schedule) - levels + order)[::-1])
