"""The three networks of f-AnoGAN: images are in [-1, 1], square, of a power of two. Know no loss and no tiles."""

from itertools import pairwise
from math import log2

import torch
from jaxtyping import Float
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate

Images = Float[torch.Tensor, "crop rgb crop_y crop_x"]
Latents = Float[torch.Tensor, "crop latent"]
Features = Float[torch.Tensor, "crop feature row column"]
Larger = Float[torch.Tensor, "crop changed 2*row 2*column"]
Smaller = Float[torch.Tensor, "crop changed row//2 column//2"]

SMALLEST_PX = 4


def levels_of(crop_px: int) -> int:
    """How often the smallest image is doubled."""
    return round(log2(crop_px / SMALLEST_PX))


class Generator(nn.Module):
    """From latents to images: the residual network of Gulrajani et al. (2017), with batch statistics as there."""

    def __init__(self, crop_px: int, width: int, latent: int) -> None:
        super().__init__()
        widths = _widths(width, levels_of(crop_px))[::-1]
        self.width = widths[0]
        self.first = nn.Linear(latent, self.width * SMALLEST_PX**2)
        self.blocks = nn.Sequential(*(Up(before, after) for before, after in pairwise(widths)))
        self.last = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())

    def forward(self, latents: Latents) -> Images:
        """The images that the latents stand for."""
        smallest = self.first(latents).unflatten(1, (self.width, SMALLEST_PX, SMALLEST_PX))
        images: torch.Tensor = self.last(self.blocks(smallest))
        return images


class Trunk(nn.Module):
    """From images to features: layers are normalised one image at a time, as the gradient penalty demands."""

    def __init__(self, crop_px: int, width: int) -> None:
        super().__init__()
        widths = _widths(width, levels_of(crop_px))
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            *(Down(before, after) for before, after in pairwise(widths)),
        )
        self.size = widths[-1] * SMALLEST_PX**2

    def forward(self, images: Images) -> Features:
        """What is seen in the images."""
        features: torch.Tensor = self.layers(images)
        return features


class Critic(nn.Module):
    """From images to how real they look, without bounds."""

    def __init__(self, crop_px: int, width: int) -> None:
        super().__init__()
        self.features = Trunk(crop_px, width)
        self.last = nn.Linear(self.features.size, 1)

    def forward(self, images: Images) -> Float[torch.Tensor, " crop"]:
        """Higher is more real."""
        realness: torch.Tensor = self.last(self.features(images).flatten(start_dim=1))
        return realness[:, 0]


class Encoder(nn.Module):
    """From images to latents: the critic's layers with another end.

    Not bounded: the latents that the generator learns with are not either, and a hyperbolic tangent, as in the paper's
    code, could not reach a third of them.
    """

    def __init__(self, crop_px: int, width: int, latent: int) -> None:
        super().__init__()
        self.trunk = Trunk(crop_px, width)
        self.last = nn.Linear(self.trunk.size, latent)

    def forward(self, images: Images) -> Latents:
        """Where the images lie among the latents."""
        latents: torch.Tensor = self.last(self.trunk(images).flatten(start_dim=1))
        return latents


class Up(nn.Module):
    """A residual block that doubles height and width."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(before, after, 1)
        self.start = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.convolve = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1),
        )

    def forward(self, features: Features) -> Larger:
        """The same, twice as large."""
        changed: torch.Tensor = self.convolve(interpolate(self.start(features), scale_factor=2.0))
        return interpolate(self.shortcut(features), scale_factor=2.0) + changed


class Down(nn.Module):
    """A residual block that halves height and width."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(before, after, 1)
        self.convolve = nn.Sequential(
            nn.GroupNorm(1, before),
            nn.ReLU(),
            nn.Conv2d(before, before, 3, padding=1, bias=False),
            nn.GroupNorm(1, before),
            nn.ReLU(),
            nn.Conv2d(before, after, 3, padding=1),
        )

    def forward(self, features: Features) -> Smaller:
        """The same, half as large."""
        return self.shortcut(avg_pool2d(features, 2)) + avg_pool2d(self.convolve(features), 2)


def _widths(width: int, levels: int) -> list[int]:
    """From the largest image to the smallest: doubled with each halving, up to eightfold."""
    return [width * min(_WIDEST, 2**level) for level in range(levels + 1)]


_WIDEST = 8
