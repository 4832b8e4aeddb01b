"""What autoencoders share: layers that halve and double a tile, and the scorer. Knows no training, no checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import nn

from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.detectors.residuals import SQUARED_ERROR, squared_error_map, tile_means
from wsi_anomaly.devices import apply_in_chunks, to_pixels
from wsi_anomaly.errors import OptionsError

Images = Float[torch.Tensor, "tile rgb y x"]


@dataclass(frozen=True, slots=True)
class AutoencoderScorer:
    """A fitted autoencoder. The scores of a tile do not depend on the other tiles of its batch."""

    network: nn.Module
    device: torch.device
    map_meaning: ClassVar[str] = SQUARED_ERROR

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


def halving_layers(channels: tuple[int, ...]) -> Iterator[nn.Module]:
    """From colours to the last of `channels`: each step halves width and height."""
    for before, after in pairwise((_RGB, *channels)):
        yield nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1, bias=False)
        yield from _activation(after)


def doubling_layers(channels: tuple[int, ...]) -> Iterator[nn.Module]:
    """The way back, with `channels` as on the way in; what comes out is not bounded."""
    for before, after in pairwise(reversed(channels)):
        yield nn.ConvTranspose2d(before, after, kernel_size=3, stride=2, padding=1, output_padding=1, bias=False)
        yield from _activation(after)
    yield nn.ConvTranspose2d(channels[0], _RGB, kernel_size=3, stride=2, padding=1, output_padding=1)


def draw_weights(layers: nn.Module, generator: torch.Generator) -> None:
    """Fill convolutions with N(0, 0.02), and their biases with zeros."""
    for layer in layers.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, 0, 0.02, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def require_halves(images: Images, halvings: int) -> None:
    """Refuse images that so many layers cannot halve and double back to their own size.

    Raises:
        OptionsError: width or height is no multiple of two for each layer, or too small.
    """
    height_px, width_px = images.shape[2:]
    step_px = 2**halvings
    if height_px % step_px or width_px % step_px or min(height_px, width_px) < 2 * step_px:
        raise OptionsError(
            f"tiles are {width_px} x {height_px} px: an autoencoder of {halvings} layers needs a multiple of "
            f"{step_px} px, at least {2 * step_px}. Change tile_px under [tiles] of the pipeline file."
        )


def _activation(width: int) -> Iterator[nn.Module]:
    yield nn.BatchNorm2d(width)
    yield nn.LeakyReLU(0.2)


_RGB = 3
