"""The network of the VAE detector: from crops to latents and back to how likely each value is. Knows no score, no tile.

A DCGAN whose output is one of 256 values for each colour of each pixel, as in Xiao et al., "Likelihood Regret: An
Out-of-Distribution Detection Score For Variational Auto-encoder" (NeurIPS 2020).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, UInt8
from torch import nn
from torch.utils.checkpoint import checkpoint

from wsi_anomaly.devices import intensities

LOGITS_AT_ONCE_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""The most that is computed at once, but one crop at least; on a CPU what its caches hold, elsewhere a part of memory.

A crop of 64 px has 12.6 MB, and a gradient needs about four times as much.
"""
SMALLEST_CROP_PX = 8

Crops = UInt8[torch.Tensor, "crop y x rgb"]
Latents = Float[torch.Tensor, "crop latent"]
Hidden = Float[torch.Tensor, "crop width half_y half_x"]
PerCrop = Float64[torch.Tensor, " crop"]


class Posterior(NamedTuple):
    """What the encoder believes of the latents of each crop: independent normal values."""

    mean: Latents
    log_variance: Latents

    def at(self, noise: Latents) -> Latents:
        """The latents that standard normal `noise` stands for."""
        return self.mean + (self.log_variance / 2).exp() * noise

    def divergence(self) -> PerCrop:
        """From the prior, a standard normal distribution: Kullback and Leibler's, in nats."""
        parts = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return parts.sum(dim=1, dtype=torch.float64) / 2


class VaeNetwork(nn.Module):
    """An encoder, and a decoder in two parts: all but its last layer, and that one, which makes 768 channels."""

    def __init__(self, crop_px: int, width: int, latents: int, *, generator: torch.Generator) -> None:
        super().__init__()
        halvings = (crop_px // 4).bit_length() - 1
        widths = [width * 2**layer for layer in range(halvings)]
        with torch.random.fork_rng(devices=[]):  # layers draw from the caller's random state, for nothing
            self.encoder = nn.Sequential(*_encoding(widths, latents))
            self.decoder = nn.Sequential(*_decoding(widths, latents))
            self.values = nn.ConvTranspose2d(width, RGB * VALUES, kernel_size=4, stride=2, padding=1)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(layer.weight, 0, 0.02, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def posterior(self, crops: Crops) -> Posterior:
        """What the encoder believes of each crop."""
        return posterior_of(self.encoder(intensities(crops)))

    def log_likelihoods(self, latents: Latents, crops: Crops) -> PerCrop:
        """Log-probability of each whole crop under its latents, in nats.

        In pieces of `LOGITS_AT_ONCE_BYTES`; where there are several, they are computed again for their gradients.
        """
        hidden = self.hidden(latents)
        most = max(1, LOGITS_AT_ONCE_BYTES[crops.device.type] // (4 * VALUES * crops[0].numel()))
        pieces = list(zip(torch.split(hidden, most), torch.split(crops, most), strict=True))
        if len(pieces) == 1:
            return torch.cat([self._log_likelihoods(*piece) for piece in pieces])
        return torch.cat(
            [
                checkpoint(self._log_likelihoods, *piece, use_reentrant=False, preserve_rng_state=False)
                for piece in pieces
            ]
        )

    def hidden(self, latents: Latents) -> Hidden:
        """What the decoder has before its last layer."""
        return self.decoder(latents[:, :, None, None])

    def _log_likelihoods(self, hidden: Hidden, crops: Crops) -> PerCrop:
        """In nats, summed as float64: of forty thousand nats, float32 leaves two decimals."""
        # Values last, as they lie in memory: a softmax across memory takes three times as long.
        logits = self.values(hidden).permute(0, 2, 3, 1).unflatten(3, (RGB, VALUES))
        return logits.log_softmax(4).gather(4, crops.long()[..., None]).sum(dim=(1, 2, 3, 4), dtype=torch.float64)


def posterior_of(encoded: Float[torch.Tensor, "crop parameter y x"]) -> Posterior:
    """The output of an encoder as a distribution; bounded, so that the strangest crop gives finite numbers."""
    mean, log_variance = encoded.flatten(1).chunk(2, dim=1)
    return Posterior(mean, log_variance.clamp(*_LOG_VARIANCES))


def evidence(network: VaeNetwork, posterior: Posterior, noise: Latents, crops: Crops) -> PerCrop:
    """The evidence lower bound of each crop by one draw, in nats."""
    return network.log_likelihoods(posterior.at(noise), crops) - posterior.divergence()


def negative_evidence(network: VaeNetwork, crops: Crops, generator: torch.Generator) -> Float64[torch.Tensor, ""]:
    """What training makes small: the mean over the crops, in nats. The generator is on the CPU."""
    posterior = network.posterior(crops)
    noise = torch.randn(posterior.mean.shape, generator=generator).to(crops.device)
    return -evidence(network, posterior, noise, crops).mean()


def with_replaced_values(crops: Crops, fraction: float, generator: torch.Generator) -> Crops:
    """The crops (on the CPU) with about this fraction of their values drawn anew, evenly from 0 to 255.

    What the background model of a likelihood ratio learns from: Ren et al., "Likelihood Ratios for Out-of-Distribution
    Detection" (NeurIPS 2019).
    """
    replaced = torch.rand(crops.shape, generator=generator) < fraction
    return torch.where(replaced, torch.randint(VALUES, crops.shape, generator=generator, dtype=torch.uint8), crops)


def _encoding(widths: list[int], latents: int) -> Iterator[nn.Module]:
    for before, after in pairwise((RGB, *widths)):
        yield nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1, bias=False)
        yield nn.BatchNorm2d(after)
        yield nn.ReLU()
    yield nn.Conv2d(widths[-1], 2 * latents, kernel_size=4)


def _decoding(widths: list[int], latents: int) -> Iterator[nn.Module]:
    yield nn.ConvTranspose2d(latents, widths[-1], kernel_size=4, bias=False)
    for before, after in pairwise(reversed(widths)):
        yield nn.BatchNorm2d(before)
        yield nn.ReLU()
        yield nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1, bias=False)
    yield nn.BatchNorm2d(widths[0])
    yield nn.ReLU()


RGB, VALUES = 3, 256
_LOG_VARIANCES = -30.0, 20.0
