"""The MemAE detector: normal tissue is rebuilt from a memory of it; what that memory does not hold is abnormal.

Gong et al., "Memorizing Normality to Detect Anomaly: Memory-augmented Deep Autoencoder for Unsupervised Anomaly
Detection" (ICCV 2019), with two-dimensional, coloured layers instead of those for video.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import nn
from torch.nn.functional import normalize

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

Features = Float[torch.Tensor, "tile channel row column"]
Addresses = Float[torch.Tensor, "tile row column item"]
"""How much of each item of the memory every place is made of: none below zero, with a sum of one (or zero)."""


class MemAe(Options):
    """Rebuilds tiles from a memory of what normal tissue looks like.

    What has less detail than normal tissue is rebuilt better than it: of made-up tissue, a small network ranks necrosis
    above what is normal, and sheets of equal tumour cells below it. So does the plain autoencoder.
    """

    score_names: ClassVar[tuple[str, ...]] = ("mse",)
    paper: ClassVar[str] = "Gong et al., ICCV 2019"
    needs: ClassVar[tuple[str, ...]] = ()
    caution: ClassVar[str] = "can rank tumour below normal tissue"

    channels: tuple[PositiveInt, ...] = Field((96, 128, 256, 256), min_length=1)
    """Width of each layer on the way in, mirrored on the way out. Each halves width and height of the tile."""
    items: PositiveInt = 2000
    """How many vectors the memory holds."""
    shrinkage: float = Field(1.0, ge=0, le=3)
    """Items that are asked for less than this many times the even share (one by `items`) are left out. The paper: 1 to
    3. At 0 all take part, and much abnormal tissue can be mixed from them. At 3 nothing is left at a quarter of the
    places before the first step of learning."""
    entropy_weight: float = Field(0.0002, ge=0)
    """How much the loss prefers few items at each place."""
    training: TrainingOptions = TrainingOptions()

    def fit(self, tiles: TileSource, checkpoint: Path, *, device: str) -> None:
        """Learn normal tissue from `tiles` and leave the weights, memory included, in the folder `checkpoint`.

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
            rebuilt, addresses = network.recall(images)
            # The paper's weight of the entropy belongs to errors of intensities in [-1, 1], which are four times these.
            return 4 * squared_error_map(images, rebuilt).mean() + self.entropy_weight * entropy(addresses)

        optimizer = torch.optim.Adam(network.parameters(), self.training.learning_rate)
        learner = Learner(network, optimizer, loss, self._architecture())
        train(learner, tiles, self.training, folder=checkpoint, recipe=self.model_dump(mode="json"))

    def load(self, checkpoint: Path, *, device: str) -> AutoencoderScorer:
        """The scorer whose weights `fit` left in `checkpoint`.

        Raises:
            ModelError: the weights are missing, damaged, of another format or of another architecture.
            OptionsError: the device does not exist.
        """
        place = resolve_device(device)
        network = self._network()
        load_weights(network, checkpoint, self._architecture())
        return AutoencoderScorer(network.to(place).eval(), place)

    def _network(self) -> "MemAeNetwork":
        generator = torch.Generator().manual_seed(self.training.seed)
        return MemAeNetwork(self.channels, self.items, self.shrinkage, generator=generator)

    def _architecture(self) -> dict[str, Any]:
        return {
            "detector": "memae",
            "channels": list(self.channels),
            "items": self.items,
            "shrinkage": self.shrinkage,  # changes no shape, but what the weights mean
        }


class MemAeNetwork(nn.Module):
    """From images to images, with intensities in [0, 1] outside and [-1, 1] inside; the output is not bounded."""

    def __init__(self, channels: tuple[int, ...], items: int, shrinkage: float, *, generator: torch.Generator) -> None:
        super().__init__()
        self.halvings = len(channels)
        with torch.random.fork_rng(devices=[]):  # layers draw from the caller's random state, for nothing
            self.encoder = nn.Sequential(*halving_layers(channels))
            self.decoder = nn.Sequential(*doubling_layers(channels))
        self.memory = Memory(items, channels[-1], shrinkage, generator=generator)
        draw_weights(self, generator)

    def forward(self, images: Images) -> Images:
        """The images as the network rebuilds them.

        Raises:
            OptionsError: the layers cannot halve and double images of this size back to their own size.
        """
        return self.recall(images)[0]

    def recall(self, images: Images) -> tuple[Images, Addresses]:
        """The images as the network rebuilds them, and of which items of the memory."""
        require_halves(images, self.halvings)
        features, addresses = self.memory(self.encoder(images * 2 - 1))
        rebuilt: torch.Tensor = self.decoder(features)
        return (rebuilt + 1) / 2, addresses


class Memory(nn.Module):
    """Puts a mixture of remembered vectors in the place of each feature vector (Gong et al. 2019, section 3.3)."""

    def __init__(self, items: int, width: int, shrinkage: float, *, generator: torch.Generator) -> None:
        super().__init__()
        self.items = nn.Parameter(torch.empty(items, width))
        nn.init.uniform_(self.items, -(width**-0.5), width**-0.5, generator=generator)
        self.threshold = shrinkage / items

    def forward(self, features: Features) -> tuple[Features, Addresses]:
        """The mixtures, and what they are made of. How alike two vectors are is their plain product."""
        likeness = features.permute(0, 2, 3, 1) @ self.items.T
        addresses = shrunken(likeness.softmax(dim=3), self.threshold)
        return (addresses @ self.items).permute(0, 3, 1, 2), addresses


def shrunken(shares: Addresses, threshold: float) -> Addresses:
    """The shares above the threshold as they are, the others as 0, then all with a sum of 1 (section 3.3).

    Where all are below it, nothing is left, and the sum stays 0.
    """
    above = shares - threshold
    # The paper's way to write a step that gradients go through.
    kept = above.relu() * shares / (above.abs() + _TINY)
    return normalize(kept, p=1, dim=3, eps=_TINY)


def entropy(addresses: Addresses) -> Float[torch.Tensor, ""]:
    """In nats, averaged over all places (section 3.4): 0 where each is made of one item."""
    return -(addresses * (addresses + _TINY).log()).sum(dim=3).mean()


_TINY = 1e-12
