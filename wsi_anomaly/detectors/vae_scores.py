"""What a trained VAE says of crops: how unlikely they are, and how much less so after a look. Knows no tile, no file.

Noise is given, never drawn: the number of a crop is the same whatever other crops come with it.
"""

import math
from collections.abc import Callable
from typing import Literal, cast

import imagecodecs
import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64, UInt8
from pydantic import Field, PositiveInt
from torch import nn
from torch.nn import functional

from wsi_anomaly.detectors.vae_network import Crops, PerCrop, Posterior, VaeNetwork, posterior_of
from wsi_anomaly.detectors.vae_readout import Readout
from wsi_anomaly.devices import intensities
from wsi_anomaly.options import Options

COPIES_AT_ONCE_BYTES = {"cpu": 64 * 2**20, "cuda": 4 * 2**30}
"""The weights of encoders that are fitted side by side, but of one at least; gradients and Adam need three times more.

Their number is a power of two, so that a portion is cut into equal groups: another number would round otherwise.
"""

Compression = Literal["png", "jpeg2000"]
Draws = Float32[torch.Tensor, "crop draw latent"]


class RegretOptions(Options):
    """How the encoder is fitted to one crop: as in Xiao et al. (2020)."""

    steps: PositiveInt = 100
    learning_rate: float = Field(2e-4, gt=0)
    weight_decay: float = Field(5e-5, ge=0)


def unlikeliness(network: VaeNetwork, posterior: Posterior, draws: Draws, crops: Crops) -> PerCrop:
    """Negative log-likelihood of each crop in nats, bounded from above by importance-weighted draws.

    Burda et al., "Importance Weighted Autoencoders" (ICLR 2016), eq. 8. One draw of all crops is decoded at a time.
    """
    readout = Readout(network.values)
    weights = [_log_weights(network, readout, posterior, noise, crops) for noise in draws.unbind(1)]
    return math.log(len(weights)) - torch.stack(weights, 1).logsumexp(1)


def adapted(network: VaeNetwork, crops: Crops, draws: Draws, options: RegretOptions) -> Posterior:
    """What encoders believe that were fitted to one crop each, by one draw a step; the network stays as it is.

    Likelihood regret is how much less unlikely a crop is by this posterior than by the network's own: Xiao et al.
    (2020), equation 5. There one crop is fitted after the other. Here the copies of the encoder lie side by side and
    are applied as one; no weight is shared, so the sum of all losses has each copy's own gradient, and Adam, which
    treats every number alone, takes each copy's own step.
    """
    room = COPIES_AT_ONCE_BYTES[crops.device.type] // sum(weight.nbytes for weight in network.encoder.parameters())
    most = 1 << (max(1, room).bit_length() - 1)
    groups = zip(torch.split(crops, most), torch.split(draws, most), strict=True)
    parts = [_adapted(network, *group, options) for group in groups]
    return Posterior(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _adapted(network: VaeNetwork, crops: Crops, draws: Draws, options: RegretOptions) -> Posterior:
    encoder, images = network.encoder, intensities(crops)
    weights = {
        name: weight.detach().contiguous().repeat(len(crops), *[1] * weight.ndim).requires_grad_()
        for name, weight in encoder.named_parameters()  # in channels_last, gradients would be copied at each step
    }
    optimizer = torch.optim.Adam(
        list(weights.values()), options.learning_rate, weight_decay=options.weight_decay, fused=True
    )
    readout = Readout(network.values)
    seen = readout.seen(crops)
    with torch.enable_grad():
        for noise in draws.unbind(1):
            optimizer.zero_grad()
            posterior = posterior_of(_encoded(encoder, weights, images))
            hidden = network.hidden(posterior.at(noise))
            slopes = readout.slopes(hidden.detach()) - seen
            torch.autograd.backward((hidden, posterior.divergence().sum()), (slopes, None))
            optimizer.step()
    with torch.no_grad():
        return posterior_of(_encoded(encoder, weights, images))


def compressed_bits(crops: UInt8[np.ndarray, "crop y x rgb"], compression: Compression) -> Int64[np.ndarray, " crop"]:
    """How many bits a lossless compressor leaves of each crop."""
    return np.array([8 * len(_COMPRESSORS[compression](np.ascontiguousarray(crop))) for crop in crops], np.int64)


def in_bits(nats: Float64[np.ndarray, " crop"]) -> Float64[np.ndarray, " crop"]:
    """Compressed sizes are in bits, and nobody may subtract them from nats."""
    return nats / math.log(2)


def _log_weights(
    network: VaeNetwork, readout: Readout, posterior: Posterior, noise: torch.Tensor, crops: Crops
) -> PerCrop:
    """One draw of each crop: log p(x|z) + log p(z) - log q(z|x), where the constants of normal densities cancel."""
    latents = posterior.at(noise)
    ratio = noise.square() + posterior.log_variance - latents.square()
    return readout.log_likelihoods(network.hidden(latents), crops) + ratio.sum(dim=1, dtype=torch.float64) / 2


def _encoded(
    encoder: nn.Sequential, weights: dict[str, torch.Tensor], images: Float[torch.Tensor, "crop rgb y x"]
) -> Float[torch.Tensor, "crop parameter 1 1"]:
    """Each image by a copy of the encoder with weights of its own.

    As products of matrices: a convolution with a group for each copy takes several times as long on a CPU.
    """
    values = images
    for name, layer in encoder.named_children():
        if isinstance(layer, nn.Conv2d):
            padding = cast("tuple[int, int]", layer.padding)
            columns = functional.unfold(values, layer.kernel_size, padding=padding, stride=layer.stride)
            side = math.isqrt(columns.shape[2])
            products = weights[f"{name}.weight"].flatten(2) @ columns
            values = products.view(len(images), -1, side, side)
            if layer.bias is not None:
                values = values + weights[f"{name}.bias"][..., None, None]
        elif isinstance(layer, nn.BatchNorm2d):
            values = functional.batch_norm(values, layer.running_mean, layer.running_var, eps=layer.eps)
            values = values * weights[f"{name}.weight"][..., None, None] + weights[f"{name}.bias"][..., None, None]
        else:
            values = layer(values)
    return values


def _png(crop: UInt8[np.ndarray, "y x rgb"]) -> bytes:
    return bytes(imagecodecs.png_encode(crop, level=9))


def _jpeg2000(crop: UInt8[np.ndarray, "y x rgb"]) -> bytes:
    # Without the boxes of a file, which have nothing to do with the picture.
    return bytes(imagecodecs.jpeg2k_encode(crop, reversible=True, codecformat="j2k"))


_COMPRESSORS: dict[str, Callable[[UInt8[np.ndarray, "y x rgb"]], bytes]] = {"png": _png, "jpeg2000": _jpeg2000}
