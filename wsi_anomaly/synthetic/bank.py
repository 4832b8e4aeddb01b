"""Draw many variants of a small picture at once, as amounts of haematoxylin and eosin. Knows no cells and no slide."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32
from scipy.ndimage import gaussian_filter

Field = Float32[np.ndarray, "sprite y x"]
Each = Float32[np.ndarray, "sprite 1 1"]
Ink = Float32[np.ndarray, "sprite #y #x"] | float

VARIANTS = 96


@dataclass(frozen=True, slots=True)
class Sprites:
    """Pictures of one kind: stamping one makes the canvas `canvas * keep + ink`."""

    ink: Float32[np.ndarray, "sprite y x stain"]
    keep: Float32[np.ndarray, "sprite y x stain"]


def angle_of(variant: Float32[np.ndarray, "*any"]) -> Float32[np.ndarray, "*any"]:
    """The direction of a variant's long axis, from x towards y in radians: the variants go once round."""
    return variant * np.float32(np.pi / VARIANTS)


class Bank:
    """Layers painted over each other, for all variants of one kind at once."""

    def __init__(self, seed: int, side_px: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.side_px = side_px
        self.y, self.x = np.mgrid[:side_px, :side_px].astype(np.float32)[:, None] - (side_px - 1) / 2
        self.ink = np.zeros((VARIANTS, side_px, side_px, 2), np.float32)
        self.keep = np.ones((VARIANTS, side_px, side_px, 1), np.float32)

    def uniform(self, low: float, high: float) -> Each:
        """A number for each variant."""
        return self.rng.uniform(low, high, (VARIANTS, 1, 1)).astype(np.float32)

    def some(self, share: float) -> Bool[np.ndarray, "sprite 1 1"]:
        """Some of the variants."""
        return np.asarray(self.rng.random((VARIANTS, 1, 1)) < share)

    def texture(self, sigma_px: float) -> Field:
        """Noise of deviation 1 with lumps of that size."""
        noise = self.rng.standard_normal(self.keep.shape[:3], dtype=np.float32)
        noise = gaussian_filter(noise, (0, sigma_px, sigma_px), mode="wrap")
        return np.asarray(noise / noise.std(), np.float32)

    def blob(
        self,
        radius_px: Each,
        *,
        stretch: Each | float = 1.0,
        wobble: float = 0.0,
        off_px: float = 0.0,
        away: Each | None = None,
    ) -> Field:
        """Pixels inside (positive) or outside an uneven ellipse of that mean radius, at about `off_px` from the centre.

        Its long axis lies at `angle_of(variant)`. `away` is the direction of the shift in radians, any if not given.
        """
        tilt = angle_of(np.arange(VARIANTS, dtype=np.float32)[:, None, None])
        away = self.uniform(0.0, 2 * np.pi) if away is None else away
        shift = off_px * self.uniform(0.6, 1.0) + 0.5 * self.uniform(-1.0, 1.0)
        x, y = self.x - shift * np.cos(away), self.y - shift * np.sin(away)
        along, across = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
        along, across = along / np.sqrt(stretch), across * np.sqrt(stretch)
        angle = np.arctan2(across, along)
        edge = 1 + sum(
            wobble / order * self.uniform(-1.0, 1.0) * np.cos(order * angle + self.uniform(0.0, 2 * np.pi))
            for order in (2, 3, 4, 5)
        )
        return np.asarray(radius_px * edge - np.hypot(along, across), np.float32)

    def paint(self, inside_px: Field, haematoxylin: Ink, eosin: Ink, opacity: Ink = 1.0) -> None:
        """Cover what lies under the positive part of `inside_px`; the edge is a pixel wide."""
        cover = (opacity * np.clip(inside_px + 0.5, 0, 1))[..., None].astype(np.float32)
        stain = np.stack(np.broadcast_arrays(haematoxylin, eosin, inside_px)[:2], axis=-1)
        self.ink = self.ink * (1 - cover) + np.maximum(stain, 0).astype(np.float32) * cover
        self.keep = self.keep * (1 - cover)

    def nucleus(
        self, inside_px: Field, haematoxylin: Ink, *, clumps: float, clump_px: float, rim: float, opacity: Ink = 0.9
    ) -> None:
        """Paint a nucleus: chromatin that varies by the share `clumps` in lumps of `clump_px`, and a membrane."""
        chromatin = np.tanh(1.4 * self.texture(clump_px))
        membrane = rim * np.exp(-((inside_px - 0.8) ** 2) / 1.4)
        self.paint(inside_px, haematoxylin * (1 + clumps * chromatin) + membrane, 0.12, opacity)

    def finished(self) -> Sprites:
        """The pictures as they are now."""
        return Sprites(np.ascontiguousarray(self.ink), np.ascontiguousarray(np.broadcast_to(self.keep, self.ink.shape)))
