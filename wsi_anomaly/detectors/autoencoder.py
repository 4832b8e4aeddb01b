"""The autoencoder detector: what a network that has only seen normal tissue cannot rebuild is abnormal.

The two-dimensional, coloured counterpart of the plain autoencoder of Gong et al., "Memorizing Normality to Detect
Anomaly" (ICCV 2019). A baseline: a network this wide rebuilds much abnormal tissue too.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import nn

from wsi_anomaly.detectors.autoencoding import (
    AutoencoderScorer,
    Images,
    doubling_layers,
    draw_weights,
    halving_layers,
    require_halves,
)
from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.residuals import squared_error_map
from wsi_anomaly.detectors.training import Learner, TrainingOptions, train
from wsi_anomaly.detectors.weights import load_weights
from wsi_anomaly.devices import resolve_device, to_tensor
from wsi_anomaly.options import Options


class Autoencoder(Options):
    """Learns to rebuild normal tiles through a narrow middle."""

    score_names: ClassVar[tuple[str, ...]] = ("mse",)
    paper: ClassVar[str] = "Gong et al., ICCV 2019"
    needs: ClassVar[tuple[str, ...]] = ()
    caution: ClassVar[str] = "can rank tumour below normal tissue"

    channels: tuple[PositiveInt, ...] = Field((96, 128, 256, 256), min_length=1)
    """Width of each layer on the way in, mirrored on the way out. Each halves width and height of the tile."""
    training: TrainingOptions = TrainingOptions()

    def fit(self, tiles: TileSource, checkpoint: Path, *, device: str) -> None:
        """Learn normal tissue from `tiles` and leave the weights in the folder `checkpoint`.

        Goes on from an unfinished fit with the same options. On one machine with one number of threads, equal options
        and tiles give equal bytes.

        Raises:
            CohortError: there are fewer than two tiles.
            OptionsError: the device does not exist, or the tiles do not divide by two once for each layer.
            ModelError: training diverged.
        """
        place = resolve_device(device)
        network = self._network().to(place)

        def loss(batch: TileBatch, _: torch.Generator) -> Float[torch.Tensor, ""]:
            images = to_tensor(batch.pixels, place)
            return squared_error_map(images, network(images)).mean()

        optimizer = torch.optim.Adam(network.parameters(), self.training.learning_rate)
        learner = Learner(network, optimizer, loss, self._architecture())
        train(learner, tiles, self.training, folder=checkpoint, recipe=self.model_dump(mode="json"))

    def load(self, checkpoint: Path, *, device: str) -> "AutoencoderScorer":
        """The scorer whose weights `fit` left in `checkpoint`.

        Raises:
            ModelError: the weights are missing, damaged, of another format or of another architecture.
            OptionsError: the device does not exist.
        """
        place = resolve_device(device)
        network = self._network()
        load_weights(network, checkpoint, self._architecture())
        return AutoencoderScorer(network.to(place).eval(), place)

    def _network(self) -> "AutoencoderNetwork":
        return AutoencoderNetwork(self.channels, torch.Generator().manual_seed(self.training.seed))

    def _architecture(self) -> dict[str, Any]:
        return {"detector": "autoencoder", "channels": list(self.channels)}


class AutoencoderNetwork(nn.Module):
    """From images to images, with intensities in [0, 1] outside and [-1, 1] inside; the output is not bounded."""

    def __init__(self, channels: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.halvings = len(channels)
        with torch.random.fork_rng(devices=[]):  # layers draw from the caller's random state, for nothing
            self.layers = nn.Sequential(*halving_layers(channels), *doubling_layers(channels))
        draw_weights(self.layers, generator)

    def forward(self, images: Images) -> Images:
        """The images as the network rebuilds them.

        Raises:
            OptionsError: the layers cannot halve and double images of this size back to their own size.
        """
        require_halves(images, self.halvings)
        rebuilt: torch.Tensor = self.layers(images * 2 - 1)
        return (rebuilt + 1) / 2
