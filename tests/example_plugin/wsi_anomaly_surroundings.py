"""A detector of forty lines: a pixel that cannot be guessed from those around it is abnormal."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.residuals import squared_error_map, tile_means
from wsi_anomaly.detectors.training import Learner, TrainingOptions, train
from wsi_anomaly.detectors.weights import load_weights
from wsi_anomaly.devices import apply_in_chunks, resolve_device, to_tensor
from wsi_anomaly.options import Options

ARCHITECTURE = {"detector": "surroundings"}


class Surroundings(Options):
    """Guesses each pixel from its four neighbours: what it cannot guess is abnormal."""

    score_names: ClassVar[tuple[str, ...]] = ("guess_error",)
    needs: ClassVar[tuple[str, ...]] = ()

    training: TrainingOptions = TrainingOptions(learning_rate=0.02, max_epochs=10)

    def fit(self, tiles: TileSource, checkpoint: Path, *, device: str) -> None:
        """Learn normal tissue from `tiles` and leave the weights in the folder `checkpoint`."""
        place = resolve_device(device)
        network = Guess().to(place)

        def loss(batch: TileBatch, _: torch.Generator) -> torch.Tensor:
            images = to_tensor(batch.pixels, place)
            return squared_error_map(images, network(images)).mean()

        optimizer = torch.optim.Adam(network.parameters(), self.training.learning_rate)
        learner = Learner(network, optimizer, loss, ARCHITECTURE)
        train(learner, tiles, self.training, folder=checkpoint, recipe=self.model_dump(mode="json"))

    def load(self, checkpoint: Path, *, device: str) -> "SurroundingsScorer":
        """The scorer whose weights `fit` left in `checkpoint`."""
        network = Guess()
        load_weights(network, checkpoint, ARCHITECTURE)
        return SurroundingsScorer(network.to(resolve_device(device)), resolve_device(device))


@dataclass(frozen=True)
class SurroundingsScorer:
    """A fitted detector."""

    network: nn.Module
    device: torch.device

    def score(self, batch: TileBatch) -> np.ndarray:
        """One row a tile, one column a score; higher is more abnormal."""
        return tile_means(self.score_map(batch))[:, None]

    def score_map(self, batch: TileBatch) -> np.ndarray:
        """The anomaly of each pixel. Leave this method out where there is none."""
        return apply_in_chunks(
            lambda images: squared_error_map(images, self.network(images)), batch.pixels, self.device
        )


class Guess(nn.Module):
    """From images to what the neighbours of each pixel say of it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4 * 3, 3, kernel_size=1)
        nn.init.constant_(self.mix.weight, 1 / 12)
        nn.init.zeros_(self.mix.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The guess of each pixel, never having seen it."""
        wide = nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
        above, below = wide[..., :-2, 1:-1], wide[..., 2:, 1:-1]
        left, right = wide[..., 1:-1, :-2], wide[..., 1:-1, 2:]
        return self.mix(torch.cat((above, below, left, right), dim=1))
