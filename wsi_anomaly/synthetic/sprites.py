"""Pictures of single cells as amounts of haematoxylin and eosin, many of each kind. Knows no slide.

Sizes are level-0 pixels of 0.5 µm: a small lymphocyte has a nucleus of 6-7 µm, a carcinoma cell one of 10-20 µm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import numpy as np
from jaxtyping import Bool, Float32
from scipy.ndimage import gaussian_filter

Field = Float32[np.ndarray, "sprite y x"]
Ink = Float32[np.ndarray, "sprite #y #x"] | float

VARIANTS = 96
LARGEST_PX = 72
"""No sprite is wider."""


class Cell(IntEnum):
    """Kinds of cells, and of what is left of dead ones."""

    LYMPHOCYTE = 0
    CENTROBLAST = 1
    MACROPHAGE = 2
    SPINDLE = 3
    RED_CELL = 4
    TUMOUR_BODY = 5
    TUMOUR_NUCLEUS = 6
    GHOST = 7
    DEBRIS = 8


@dataclass(frozen=True, slots=True)
class Sprites:
    """Pictures of one kind: stamping one makes the canvas `canvas * keep + ink`."""

    ink: Float32[np.ndarray, "sprite y x stain"]
    keep: Float32[np.ndarray, "sprite y x 1"]


def angle_of(variant: Float32[np.ndarray, "*any"]) -> Float32[np.ndarray, "*any"]:
    """The direction of a variant's long axis, from x towards y in radians: the variants go once round."""
    return variant * np.float32(np.pi / VARIANTS)


class _Bank:
    """Layers painted over each other, for all variants of one kind at once."""

    def __init__(self, seed: int, side_px: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.side_px = side_px
        self.y, self.x = np.mgrid[:side_px, :side_px].astype(np.float32)[:, None] - (side_px - 1) / 2
        self.ink = np.zeros((VARIANTS, side_px, side_px, 2), np.float32)
        self.keep = np.ones((VARIANTS, side_px, side_px, 1), np.float32)

    def uniform(self, low: float, high: float) -> Float32[np.ndarray, "sprite 1 1"]:
        return self.rng.uniform(low, high, (VARIANTS, 1, 1)).astype(np.float32)

    def some(self, share: float) -> Bool[np.ndarray, "sprite 1 1"]:
        return np.asarray(self.rng.random((VARIANTS, 1, 1)) < share)

    def texture(self, sigma_px: float) -> Field:
        noise = self.rng.standard_normal(self.keep.shape[:3], dtype=np.float32)
        noise = gaussian_filter(noise, (0, sigma_px, sigma_px), mode="wrap")
        return np.asarray(noise / noise.std(), np.float32)

    def blob(
        self,
        radius_px: Float32[np.ndarray, "sprite 1 1"],
        *,
        stretch: Float32[np.ndarray, "sprite 1 1"] | float = 1.0,
        wobble: float = 0.0,
        off_px: float = 0.0,
    ) -> Field:
        """Pixels inside (positive) or outside an uneven ellipse of that mean radius, at about `off_px` from the centre.

        Its long axis lies at `angle_of(variant)`.
        """
        tilt, away = angle_of(np.arange(VARIANTS, dtype=np.float32)[:, None, None]), self.uniform(0.0, 2 * np.pi)
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

    def finished(self) -> Sprites:
        return Sprites(np.ascontiguousarray(self.ink), np.ascontiguousarray(self.keep))


@cache
def sprites_of(cell: Cell) -> Sprites:
    """The pictures of one kind, the same for every slide."""
    return _PAINTERS[cell](cell)


def _lymphocyte(seed: int) -> Sprites:
    """A small round dark nucleus with a little mottled chromatin and hardly any cytoplasm."""
    bank = _Bank(seed, 22)
    nucleus = bank.blob(bank.uniform(5.4, 7.0), stretch=bank.uniform(1.0, 1.35), wobble=0.14)
    bank.paint(nucleus + 2, 0.07, 0.08, opacity=0.6)
    # Some lie deep in the section: paler, and what is behind them shows.
    depth = bank.uniform(0.0, 1.0)
    bank.paint(nucleus, (0.62 + 0.24 * depth) * (1 + 0.13 * bank.texture(1.3)), 0.15, opacity=0.8 + 0.15 * depth)
    return bank.finished()


def _centroblast(seed: int) -> Sprites:
    """A larger, paler nucleus with small nucleoli at its membrane."""
    bank = _Bank(seed, 30)
    nucleus = bank.blob(bank.uniform(6.5, 9.5), stretch=bank.uniform(1.0, 1.5), wobble=0.2)
    bank.paint(nucleus + 3, 0.13, 0.15, opacity=0.5)
    rim = 0.13 * np.exp(-((nucleus - 0.8) ** 2) / 1.5)
    depth = bank.uniform(0.36, 0.56)
    bank.paint(nucleus, depth * (1 + 0.16 * bank.texture(1.5)) + rim, 0.14, opacity=0.85)
    bank.paint(bank.blob(bank.uniform(0.8, 1.5), off_px=4.0), 0.75, 0.2, opacity=0.6)
    return bank.finished()


def _macrophage(seed: int) -> Sprites:
    """A pale bean of a nucleus in much foamy cytoplasm."""
    bank = _Bank(seed, 48)
    body = bank.blob(bank.uniform(11.0, 17.0), stretch=bank.uniform(1.0, 1.5), wobble=0.3)
    bank.paint(body, 0.06, 0.2 + 0.04 * bank.texture(1.8), opacity=np.clip(0.3 * body, 0, 0.8))
    nucleus = bank.blob(bank.uniform(5.5, 7.5), stretch=bank.uniform(1.2, 1.8), wobble=0.2, off_px=4.0)
    rim = 0.12 * np.exp(-((nucleus - 0.8) ** 2) / 1.5)
    bank.paint(nucleus, bank.uniform(0.28, 0.45) * (1 + 0.14 * bank.texture(1.5)) + rim, 0.14)
    return bank.finished()


def _spindle(seed: int) -> Sprites:
    """The long thin nucleus of a fibroblast or endothelial cell."""
    bank = _Bank(seed, 44)
    nucleus = bank.blob(bank.uniform(4.4, 6.0), stretch=bank.uniform(2.5, 5.0), wobble=0.12)
    bank.paint(nucleus, bank.uniform(0.42, 0.7) * (1 + 0.1 * bank.texture(1.5)), 0.2, opacity=0.85)
    return bank.finished()


def _red_cell(seed: int) -> Sprites:
    """A disc of eosin, paler in the middle."""
    bank = _Bank(seed, 20)
    disc = bank.blob(bank.uniform(4.8, 6.5), stretch=bank.uniform(1.0, 1.4), wobble=0.1)
    bank.paint(disc, 0.02, 0.46 - 0.02 * np.minimum(disc, 5), opacity=0.85)
    return bank.finished()


def _tumour_body(seed: int) -> Sprites:
    """The ample cytoplasm of a carcinoma cell, with its border."""
    bank = _Bank(seed, LARGEST_PX)
    body = bank.blob(bank.uniform(16.0, 24.0), stretch=bank.uniform(1.0, 1.5), wobble=0.3)
    border = 0.16 * np.exp(-((body - 1) ** 2) / 2)
    stain = bank.uniform(0.18, 0.32)
    bank.paint(body, bank.uniform(0.1, 0.2), stain + border + 0.05 * bank.texture(1.5), opacity=0.8)
    return bank.finished()


def _tumour_nucleus(seed: int) -> Sprites:
    """A large uneven nucleus with clumped chromatin, a thick membrane and nucleoli; some in mitosis."""
    bank = _Bank(seed, 56)
    dividing = bank.some(0.05)
    nucleus = np.where(dividing, -1, bank.blob(bank.uniform(8.5, 15.0), stretch=bank.uniform(1.0, 1.7), wobble=0.35))
    clumps = np.tanh(2 * bank.texture(1.6))
    rim = 0.45 * np.exp(-((nucleus - 1) ** 2) / 1.6)
    bank.paint(nucleus, bank.uniform(0.4, 0.95) * (1 + 0.5 * clumps) + rim, 0.2, opacity=0.95)
    for _ in range(2):
        nucleolus = bank.blob(bank.uniform(1.2, 3.2), off_px=4.0)
        bank.paint(np.where(dividing, -1, nucleolus), 1.2, 0.6)
    plate = bank.blob(bank.uniform(6.0, 8.0), stretch=bank.uniform(2.0, 4.0), wobble=0.5) + bank.texture(1.2)
    bank.paint(np.where(dividing, plate, -1), 1.5, 0.3)
    return bank.finished()


def _ghost(seed: int) -> Sprites:
    """The outline of a dead cell whose nucleus has faded."""
    bank = _Bank(seed, 56)
    body = bank.blob(bank.uniform(13.0, 20.0), stretch=bank.uniform(1.0, 1.5), wobble=0.3)
    bank.paint(body, 0.03, bank.uniform(0.36, 0.5) + 0.07 * bank.texture(1.3), opacity=0.75)
    bank.paint(-np.abs(body) + 0.6, 0.03, 0.15, opacity=0.6)
    nucleus = bank.blob(bank.uniform(5.0, 8.0), stretch=bank.uniform(1.0, 1.4), wobble=0.2, off_px=3.0)
    bank.paint(nucleus, bank.uniform(0.05, 0.22), 0.45, opacity=0.7)
    return bank.finished()


def _debris(seed: int) -> Sprites:
    """A nucleus shrunk to a dark clot or burst into crumbs."""
    bank = _Bank(seed, 36)
    whole = bank.some(0.3)
    clot = bank.blob(bank.uniform(3.0, 5.5), stretch=bank.uniform(1.0, 1.8), wobble=0.4)
    bank.paint(np.where(whole, clot, -1), bank.uniform(0.9, 1.4), 0.4)
    for _ in range(7):
        crumb = bank.blob(bank.uniform(0.4, 2.4), wobble=0.4, off_px=9.0)
        bank.paint(np.where(whole, -1, crumb), bank.uniform(0.7, 1.3), 0.4)
    return bank.finished()


_PAINTERS: dict[Cell, Callable[[int], Sprites]] = {
    Cell.LYMPHOCYTE: _lymphocyte,
    Cell.CENTROBLAST: _centroblast,
    Cell.MACROPHAGE: _macrophage,
    Cell.SPINDLE: _spindle,
    Cell.RED_CELL: _red_cell,
    Cell.TUMOUR_BODY: _tumour_body,
    Cell.TUMOUR_NUCLEUS: _tumour_nucleus,
    Cell.GHOST: _ghost,
    Cell.DEBRIS: _debris,
}
