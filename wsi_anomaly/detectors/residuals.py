"""Image against reconstruction: how far apart, and where. Intensities are in [0, 1]; knows no network and no file."""

from math import exp

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch.nn.functional import avg_pool2d

from wsi_anomaly.errors import OptionsError

SQUARED_ERROR = "Residual: squared error of intensities from 0 to 1, mean of the colours"
"""What `squared_error_map` shows, for who reads it."""
Maps = Float64[torch.Tensor, "tile rgb y x"]
Windows = Float64[torch.Tensor, "tile rgb row column"]
"""One value for each place of the window inside the image."""


def squared_error_map(
    images: Float[torch.Tensor, "tile rgb y x"], reconstructions: Float[torch.Tensor, "tile rgb y x"]
) -> Float[torch.Tensor, "tile y x"]:
    """The squared difference of each pixel, averaged over its colours."""
    return (images - reconstructions).square().mean(dim=1)


def tile_means(maps: Float32[np.ndarray, "tile y x"]) -> Float32[np.ndarray, " tile"]:
    """The mean of each map, summed in float64 and one by one, so that it does not depend on how many maps there are."""
    return np.array([one.mean(dtype=np.float64) for one in maps], np.float32)


def mse(
    images: Float32[torch.Tensor, "tile *axes"], rebuilt: Float32[torch.Tensor, "tile *axes"]
) -> Float32[torch.Tensor, " tile"]:
    """The mean squared difference of each tile, of its intensities or of its latents."""
    return (images - rebuilt).square().flatten(start_dim=1).mean(dim=1)


def ms_ssim(
    images: Float32[torch.Tensor, "tile rgb y x"], rebuilt: Float32[torch.Tensor, "tile rgb y x"]
) -> Float32[torch.Tensor, " tile"]:
    """One minus the multi-scale structural similarity of each tile: 0 for equal images, 1 for unrelated ones.

    Wang, Simoncelli and Bovik, "Multiscale structural similarity for image quality assessment" (2003), equation 7: each
    colour for itself, then their mean. As in pytorch-msssim, only windows inside the image count, and the mean of a
    scale is at least 0. As in the paper's own code, an odd last row or column is halved with itself.

    Five scales need 161 px. Smaller tiles get as many as there is room for, whose weights are raised to the same sum:
    four from 81 px, three from 41 px, two from 21 px, one from 11 px. So compare only scores of tiles of one size.

    Raises:
        OptionsError: the tiles are smaller than the window of 11 px.
    """
    weights = _scale_weights(images.shape[3], images.shape[2])
    # A variance is a small difference of large numbers: in float32 little would be left of it where tissue is smooth.
    first, second = images.double(), rebuilt.double()
    similarities = torch.ones_like(first[:, :, 0, 0])
    for scale, weight in enumerate(weights, start=1):
        luminance, structure = _similarity_maps(first, second)
        compared = luminance * structure if scale == len(weights) else structure
        similarities = similarities * compared.mean(dim=(2, 3)).clamp(min=0) ** weight
        first, second = avg_pool2d(first, 2, ceil_mode=True), avg_pool2d(second, 2, ceil_mode=True)
    return (1 - similarities.mean(dim=1)).float()


def _scale_weights(width_px: int, height_px: int) -> list[float]:
    """The weights of the scales at which a window fits, from fine to coarse."""
    room_px = min(width_px, height_px)
    weights = [weight for scale, weight in enumerate(_WEIGHTS) if room_px > (len(_WINDOW) - 1) * 2**scale]
    if not weights:
        raise OptionsError(
            f"tiles are {width_px} x {height_px} px: the score ms_ssim needs at least {len(_WINDOW)} px. "
            "Choose another score, or a larger tile_px under [tiles] of the pipeline file."
        )
    return [weight * sum(_WEIGHTS) / sum(weights) for weight in weights]


def _similarity_maps(first: Maps, second: Maps) -> tuple[Windows, Windows]:
    """How alike are the mean, and contrast and structure together, of each window."""
    first_mean, second_mean = _window_means(first), _window_means(second)
    first_variance = _window_means(first * first) - first_mean * first_mean
    second_variance = _window_means(second * second) - second_mean * second_mean
    covariance = _window_means(first * second) - first_mean * second_mean
    luminance = (2 * first_mean * second_mean + _C1) / (first_mean * first_mean + second_mean * second_mean + _C1)
    structure = (2 * covariance + _C2) / (first_variance + second_variance + _C2)
    return luminance, structure


def _window_means(maps: Maps) -> Windows:
    """Weighted means, as a sum of shifted copies: on a CPU much faster than a convolution in float64."""
    means = maps
    for axis in (2, 3):
        copies, size = means, means.shape[axis] - len(_WINDOW) + 1
        means = torch.zeros_like(copies.narrow(axis, 0, size))
        for offset, weight in enumerate(_WINDOW):
            means.add_(copies.narrow(axis, offset, size), alpha=weight)
    return means


_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the five scales, from fine to coarse. Their sum is 1.0001 in the paper too."""
_C1, _C2 = 0.01**2, 0.03**2
_BELL = [exp(-((i / 1.5) ** 2) / 2) for i in range(-5, 6)]
_WINDOW = [height / sum(_BELL) for height in _BELL]
