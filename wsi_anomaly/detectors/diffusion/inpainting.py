"""Restore tiles without noising them: hide half of the cells of a checkerboard, rebuild them from the other half.

The baseline "Inpaint" of Mahmood's thesis on score-based anomaly detection (chapter 5). What is known is kept at the
level of the walk as in Lugmayr et al., "RePaint" (CVPR 2022), without its jumps back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8, UInt64

from wsi_anomaly.detectors.diffusion.noise import NoiseMaker
from wsi_anomaly.detectors.diffusion.restoring import Images, Network
from wsi_anomaly.detectors.protocol import Prompt
from wsi_anomaly.errors import OptionsError

Board = Float32[torch.Tensor, "tile channel y x"]
"""Three times the channels: the tile with its dark cells hidden, the tile with its light ones hidden, the tile."""
Half = Float32[torch.Tensor, "tile _ y x"]


class Checkerboard:
    """A network that, told to restore a tile, rebuilds each half of it from the other.

    Two walks go side by side, as channels of one, and the tile goes with them: it is given no noise (see
    `HalfNoise`) and a network that sees none in it, so that it comes to each timestep t as sqrt(a_t) tile. There, what
    a walk z has more than it, over sqrt(1 - a_t), is the noise in a known cell. Told so, every sampler keeps what is
    known exactly at its own level, also one that remembers earlier steps. (`Ancestral` makes it a little noisier near
    the end: its variance is too large for what is certain.) In a hidden cell the network is asked.

    A hidden cell begins as the mean of the known ones, so a walk may start at any timestep; nothing else of the hidden
    half gets into it.
    """

    def __init__(self, network: Network, cell_px: int) -> None:
        self.schedule = network.schedule
        self._network = network
        self._cell_px = cell_px

    @property
    def passes(self) -> int:
        """One for each half, as often as the network itself takes."""
        return 2 * self._network.passes

    def encode(self, pixels: UInt8[torch.Tensor, "tile y x rgb"]) -> Board:
        """The halves, and the whole.

        Raises:
            OptionsError: a cell is as large as the tiles.
        """
        height_px, width_px = pixels.shape[1:3]
        if max(height_px, width_px) <= self._cell_px:
            raise OptionsError(
                f"tiles are {width_px} x {height_px} px: cells of {self._cell_px} px leave nothing to rebuild a tile "
                "from. Lower cell_px under [detector] of the pipeline file."
            )
        tile = self._network.encode(pixels)
        light = self._light(tile)
        return torch.cat([_hidden(tile, known=light), _hidden(tile, known=~light), tile], dim=1)

    def decode(self, latents: Board) -> Images:
        """The hidden cells of both halves, put together."""
        dark_rebuilt, light_rebuilt, _ = latents.chunk(3, dim=1)
        return self._network.decode(torch.where(self._light(latents), light_rebuilt, dark_rebuilt))

    def condition(self, prompts: Sequence[Prompt]) -> Any:  # noqa: ANN401 - as the network's
        """That of the network, for each half."""
        return self._network.condition(prompts)

    def noise(self, latents: Board, t: int, condition: Any) -> Board:  # noqa: ANN401
        """In known cells the noise that is there, in hidden ones what the network sees; none in the tile itself."""
        *halves, tile = latents.chunk(3, dim=1)
        light, spread = self._light(latents), math.sqrt(1 - self.schedule.alpha_cumprod(t))
        seen = [
            torch.where(known, (half - tile) / spread, self._network.noise(half, t, condition))
            for half, known in zip(halves, (light, ~light), strict=True)
        ]
        return torch.cat([*seen, torch.zeros_like(tile)], dim=1)

    def _light(self, latents: torch.Tensor) -> Bool[torch.Tensor, "y x"]:
        """The cells of the colour that the upper left one has."""
        row, column = (torch.arange(size, device=latents.device) // self._cell_px for size in latents.shape[2:])
        return (row[:, None] + column) % 2 == 0


@dataclass(frozen=True, slots=True)
class HalfNoise:
    """Noise of its own for each half, and none for the tile that goes with them."""

    of_halves: NoiseMaker

    @property
    def variance(self) -> float:
        """Of the noise of a half."""
        return self.of_halves.variance

    def __call__(
        self, seeds: UInt64[np.ndarray, " tile"], shape: tuple[int, ...], draw: int
    ) -> Float32[np.ndarray, "tile ..."]:
        """Zeros in the last third of the channels."""
        channels, *size = shape
        noise = np.zeros((len(seeds), *shape), np.float32)
        noised = channels // 3 * 2
        noise[:, :noised] = self.of_halves(seeds, (noised, *size), draw)
        return noise


def _hidden(tile: Half, *, known: Bool[torch.Tensor, "y x"]) -> Half:
    """The tile with the mean of its known pixels everywhere else."""
    mean = torch.where(known, tile, 0).sum(dim=(2, 3), keepdim=True) / known.sum()
    return torch.where(known, tile, mean)
