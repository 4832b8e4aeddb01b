"""What a detector brings to the training loop, and what the loop hands it at each step. Learns nothing itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8, UInt64
from pydantic import Field, PositiveInt

from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.options import Options

Positions = Int64[np.ndarray, " tile"]
Precision = Literal["fp32", "fp16", "bf16"]


class DiffusionTrainingOptions(Options):
    """How long, how fast and how exactly to learn."""

    steps: int = Field(400_000, ge=1)
    batch_size: int = Field(64, ge=1)
    """Tiles of a step. Where so many do not fit into memory at once, they go through in parts: nothing else changes."""
    learning_rate: float = Field(1e-5, gt=0)
    learning_rate_decay: Literal["none", "cosine"] = "none"
    """How it falls from the first step to the last: to nothing, along half a cosine."""
    weight_decay: float = Field(1e-2, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are shortened to it."""
    precision: Precision = "fp16"
    """What the network computes in on a GPU; what is learnt stays in float32. On the CPU it is always "fp32"."""
    gradient_checkpointing: bool = False
    """Compute half of a step twice instead of remembering it: less memory, a third more time."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep the moving average of what is learnt, with this decay, instead of what the last step left."""
    save_every: PositiveInt = 500
    """Steps between two savings of the unfinished fit: so much is lost, at most, when it is killed."""
    picture_every: PositiveInt = 5000
    """Steps between two pictures of the loss and of rebuilt tiles."""
    seed: int = Field(0, ge=0)
    """Decides the order of the tiles, and the noise and timestep of each tile in each step. In a pipeline file, the
    pipeline's own where it is not given."""

    def deciding(self) -> dict[str, Any]:
        """Those that change what is learnt, as JSON values."""
        return self.model_dump(mode="json", exclude={"gradient_checkpointing", "save_every", "picture_every"})


@dataclass(frozen=True, slots=True)
class Draws:
    """Everything random about some tiles in one step."""

    seeds: UInt64[np.ndarray, " tile"]
    """For `noise.tile_noise` and whatever else is drawn for a tile."""
    timesteps: Int64[np.ndarray, " tile"]

    def part(self, tiles: slice) -> "Draws":
        """Those of some of the tiles."""
        return Draws(self.seeds[tiles], self.timesteps[tiles])


@dataclass(frozen=True, slots=True)
class DiffusionLearner:
    """What a detector brings to the loop.

    Of the network only parameters that require gradients are learnt, saved and resumed; they are in float32. It should
    draw nothing itself and keep no batch statistics: then the parts of a batch are worth as much as the whole.
    """

    network: torch.nn.Module
    timesteps: int
    """How many the noise schedule has: those drawn are from 0 to one less."""
    loss: Callable[[TileBatch, Positions, Draws], Float[torch.Tensor, " tile"]]
    """The loss of each tile, by calling the network. Gets where the tiles stand in the source, too."""
    rebuild: Callable[[TileBatch], UInt8[np.ndarray, "tile y x rgb"]]
    """For the pictures."""
    save: Callable[[Path], object]
    """Writes the finished weights into a folder."""
    weights: str
    """The name of the file that `save` writes."""
    recipe: Mapping[str, Any]
    """All that decides the weights besides the tiles and the training options, as JSON values."""
    read: Callable[[Positions], TileBatch] | None = None
    """The tiles of a step as `loss` wants them, while the step before goes on in another thread; else all of them."""
    label: str = "as the model rebuilds them"
    """Over what `rebuild` makes, in the pictures."""
    table: str = "[detector.training]"
    """Where its training options stand in a pipeline file, for messages."""


class TileOrder:
    """An endless row of tiles: every tile once, in an order of the epoch's own, then again in another."""

    def __init__(self, count: int, *, seed: int) -> None:
        self._count = count
        self._epoch = lru_cache(2)(lambda epoch: _generator(seed, _ORDER, epoch).permutation(count))

    def positions(self, step: int, batch_size: int) -> Positions:
        """Where the tiles of a step stand in the source; a batch may reach from one epoch into the next."""
        places = range(step * batch_size, (step + 1) * batch_size)
        return np.array([self._epoch(place // self._count)[place % self._count] for place in places], np.int64)


def draws(step: int, batch_size: int, *, timesteps: int, seed: int) -> Draws:
    """Those of a whole batch: a function of the seed, the step, and the place in the batch."""
    generator = _generator(seed, _DRAWS, step)
    seeds = generator.integers(0, 2**64, batch_size, np.uint64)
    return Draws(seeds, generator.integers(0, timesteps, batch_size, np.int64))


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, number))))


_ORDER, _DRAWS = 1, 2
