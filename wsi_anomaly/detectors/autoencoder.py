"""The autoencoder detector: what a network that has only seen normal tissue cannot rebuild is abnormal.

The two-dimensional, coloured counterpart of the plain autoencoder of Gong et al., "Memorizing Normality to Detect
Anomaly" (ICCV 2019). A baseline: a network this wide rebuilds much abnormal tissue too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from pydantic import Field, PositiveInt
from torch import nn

from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.residuals import squared_error_map, tile_means
from wsi_anomaly.detectors.training import Learner, TrainingOptions, train
from wsi_anomaly.detectors.weights import load_weights
from wsi_anomaly.devices import apply_in_chunks, resolve_device, to_pixels, to_tensor
from wsi_anomaly.errors import OptionsError
from wsi_anomaly.options import Options

Images = Float[torch.Tensor, "tile rgb y x"]


class Autoencoder(Options):
    """Learns to rebuild normal tiles through a narrow middle."""

    score_names: ClassVar[tuple[str, ...]] = ("mse",)

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


@dataclass(frozen=True, slots=True)
class AutoencoderScorer:
    """A fitted autoencoder. The scores of a tile do not depend on the other tiles of its batch."""

    network: nn.Module
    device: torch.device

    def score(self, batch: TileBatch) -> Float32[np.ndarray, "tile 1"]:
        """Mean squared error of the rebuilt tile, on intensities in [0, 1]. Never normalised by slide."""
        return tile_means(self.score_map(batch))[:, None]

    def score_map(self, batch: TileBatch) -> Float32[np.ndarray, "tile y x"]:
        """Squared error of each pixel, averaged over its colours; the score is its mean."""
        return apply_in_chunks(
            lambda images: squared_error_map(images, self.network(images)), batch.pixels, self.device
        )

    def reconstruct(self, batch: TileBatch) -> UInt8[np.ndarray, "tile y x rgb"]:
        """Each tile as the network rebuilds it, clipped to what pixels can hold."""
        return apply_in_chunks(lambda images: to_pixels(self.network(images)), batch.pixels, self.device)


class AutoencoderNetwork(nn.Module):
    """From images to images, with intensities in [0, 1] outside and [-1, 1] inside; the output is not bounded."""

    def __init__(self, channels: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.halvings = len(channels)
        with torch.random.fork_rng(devices=[]):  # layers draw from the caller's random state, for nothing
            self.layers = nn.Sequential(*_layers(channels))
        for layer in self.layers:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(layer.weight, 0, 0.02, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images: Images) -> Images:
        """The images as the network rebuilds them.

        Raises:
            OptionsError: the layers cannot halve and double images of this size back to their own size.
        """
        height_px, width_px = images.shape[2:]
        step_px = 2**self.halvings
        if height_px % step_px or width_px % step_px or min(height_px, width_px) < 2 * step_px:
            raise OptionsError(
                f"tiles are {width_px} x {height_px} px: an autoencoder of {self.halvings} layers needs a multiple of "
                f"{step_px} px, at least {2 * step_px}. Change tile_px under [tiles] of the pipeline file."
            )
        rebuilt: torch.Tensor = self.layers(images * 2 - 1)
        return (rebuilt + 1) / 2


def _layers(channels: tuple[int, ...]) -> Iterator[nn.Module]:
    for before, after in pairwise((_RGB, *channels)):
        yield nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1, bias=False)
        yield from _activation(after)
    for before, after in pairwise(reversed(channels)):
        yield nn.ConvTranspose2d(before, after, kernel_size=3, stride=2, padding=1, output_padding=1, bias=False)
        yield from _activation(after)
    yield nn.ConvTranspose2d(channels[0], _RGB, kernel_size=3, stride=2, padding=1, output_padding=1)


def _activation(width: int) -> Iterator[nn.Module]:
    yield nn.BatchNorm2d(width)
    yield nn.LeakyReLU(0.2)


_RGB = 3
