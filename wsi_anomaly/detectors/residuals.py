"""Image against reconstruction: how far apart, and where. Intensities are in [0, 1]; knows no network and no file."""

import numpy as np
import torch
from jaxtyping import Float, Float32


def squared_error_map(
    images: Float[torch.Tensor, "tile rgb y x"], reconstructions: Float[torch.Tensor, "tile rgb y x"]
) -> Float[torch.Tensor, "tile y x"]:
    """The squared difference of each pixel, averaged over its colours."""
    return (images - reconstructions).square().mean(dim=1)


def tile_means(maps: Float32[np.ndarray, "tile y x"]) -> Float32[np.ndarray, " tile"]:
    """The mean of each map, summed in float64 and one by one, so that it does not depend on how many maps there are."""
    return np.array([one.mean(dtype=np.float64) for one in maps], np.float32)
