"""From compartments to colours: the ground between cells, and how stain and light make it all visible."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from scipy.ndimage import gaussian_filter

from wsi_anomaly.synthetic.anatomy import MAP_STEP_PX, Anatomy, Compartment
from wsi_anomaly.synthetic.cells import Canvas, stamp_cells
from wsi_anomaly.synthetic.noise import PERIOD_PX, fat_walls, lumps
from wsi_anomaly.synthetic.pyramid import TILE_PX

MARGIN_PX = 40
"""Canvas beyond each edge of the slide, so that a cell may lie across it."""
BLUR_PX = 4
"""Pixels beyond a tile that its blur sees."""

Field = Float32[np.ndarray, "row column"]


class _Ground(NamedTuple):
    """What lies between the cells of a compartment."""

    fullness: float
    """In deviations of noise: 0 leaves half of the place empty, 3 none."""
    haematoxylin: float
    eosin: float
    fibres: float
    """How much the eosin varies along fibres."""
    fat: float = 0.0
    granules: float = 0.06


_GROUND = {
    Compartment.GLASS: _Ground(-9, 0, 0, 0),
    Compartment.FAT: _Ground(3, 0.03, 0.3, 0, fat=1),
    Compartment.COLLAGEN: _Ground(2.0, 0.05, 0.34, 0.11),
    Compartment.SINUS: _Ground(0.1, 0.08, 0.16, 0),
    Compartment.PARACORTEX: _Ground(1.0, 0.12, 0.19, 0),
    Compartment.MANTLE: _Ground(1.4, 0.18, 0.19, 0),
    Compartment.GERMINAL_CENTRE: _Ground(2.0, 0.15, 0.21, 0),
    Compartment.MEDULLARY_CORD: _Ground(1.0, 0.13, 0.23, 0),
    Compartment.BLOOD: _Ground(0.0, 0.02, 0.2, 0),
    Compartment.TUMOUR_NEST: _Ground(2.5, 0.12, 0.32, 0, granules=0.12),
    Compartment.TUMOUR_STROMA: _Ground(1.8, 0.06, 0.33, 0.12),
    Compartment.CLEFT: _Ground(-2.5, 0, 0.1, 0),
    Compartment.NECROSIS: _Ground(1.3, 0.04, 0.42, 0, granules=0.12),
    Compartment.NUCLEAR_DUST: _Ground(1.6, 0.1, 0.46, 0, granules=0.15),
}


@dataclass(frozen=True, slots=True)
class Stain:
    """How one slide was stained and lit."""

    optical_density: Float32[np.ndarray, "stain rgb"]
    """Of one unit of haematoxylin and of eosin, to base 10."""
    light: Float32[np.ndarray, " rgb"]
    """Grey value of empty glass."""


def mild_stain(rng: np.random.Generator) -> Stain:
    """A stain close to the usual one: vectors as seen in scanned lymph nodes, near those of Ruifrok 2001."""
    vectors = np.array([[0.61, 0.75, 0.26], [0.18, 0.93, 0.30]]) + rng.normal(0, 0.012, (2, 3))
    vectors *= rng.normal(1, 0.04, (2, 1)) / np.linalg.norm(vectors, axis=1, keepdims=True)
    return Stain(vectors.astype(np.float32), (np.array([243, 241, 244]) + rng.normal(0, 1, 3)).astype(np.float32))


def painted_tiles(
    rng: np.random.Generator, anatomy: Anatomy, *, size_px: tuple[int, int], crowding: float
) -> Iterator[UInt8[np.ndarray, "row column rgb"]]:
    """The slide as tiles, row by row. `crowding` near 1 scales how many places cells take.

    In memory: eight bytes for each pixel of the slide.
    """
    cells, light = rng.spawn(2)
    stain = mild_stain(light)
    canvas = _ground(anatomy, size_px)
    stamp_cells(cells, canvas, anatomy, margin_px=MARGIN_PX, crowding=crowding)
    for top, left in _corners(size_px):
        rows, columns = min(TILE_PX, size_px[1] - top), min(TILE_PX, size_px[0] - left)
        first_row, first_column = top + MARGIN_PX - BLUR_PX, left + MARGIN_PX - BLUR_PX
        around = canvas[first_row:, first_column:][: rows + 2 * BLUR_PX, : columns + 2 * BLUR_PX]
        yield _lit(light, around, stain)


def _corners(size_px: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Top and left of each tile, row by row."""
    return product(range(0, size_px[1], TILE_PX), range(0, size_px[0], TILE_PX))


def _ground(anatomy: Anatomy, size_px: tuple[int, int]) -> Canvas:
    """The stains without cells, with a margin."""
    width, height = size_px
    canvas = np.zeros((height + 2 * MARGIN_PX, width + 2 * MARGIN_PX, 2), np.float32)
    table = np.array([_GROUND[kind] for kind in Compartment], np.float32)
    # Interpolation looks one map pixel beyond a tile, and so does the edge of the slide.
    compartments, grain = (np.pad(field, 1, mode="edge") for field in (anatomy.compartments, anatomy.grain))
    for top, left in _corners(size_px):
        place = canvas[MARGIN_PX + top : MARGIN_PX + height, MARGIN_PX + left : MARGIN_PX + width][:TILE_PX, :TILE_PX]
        near = np.s_[top // MAP_STEP_PX :, left // MAP_STEP_PX :]
        side = TILE_PX // MAP_STEP_PX + 2
        kinds = compartments[near][:side, :side]
        if kinds.any():
            fields = [*np.moveaxis(table[kinds], -1, 0), grain[near][:side, :side]]
            place[:] = _tile_ground([_enlarged(field, place.shape[:2]) for field in fields], top, left)
    return canvas


def _tile_ground(fields: list[Field], top: int, left: int) -> Canvas:
    fullness, haematoxylin, eosin, fibres, fat, granules, grain = fields

    def laid(texture: Float32[np.ndarray, "period period"]) -> Field:
        return _laid(texture, top, left, (grain.shape[0], grain.shape[1]))

    cover = np.clip((fullness + laid(lumps(3.0))) * 1.5 + 0.5, 0, 1)
    cover *= 1 - fat * (1 - np.clip(2.2 - laid(fat_walls(92)), 0, 1))
    strands = np.sin(6 * grain + 1.5 * laid(lumps(9.0)))
    speckle = 1 + granules / np.maximum(eosin, 0.05) * laid(lumps(1.3))
    return np.stack([cover * haematoxylin, cover * np.maximum(eosin * speckle + fibres * strands, 0)], axis=-1)


def _enlarged(field: Float32[np.ndarray, "map_row map_column"], shape: tuple[int, ...]) -> Field:
    """A field of the map at level 0, interpolated, without the map pixel around it."""
    rows, columns = field.shape
    large = Image.fromarray(field).resize((columns * MAP_STEP_PX, rows * MAP_STEP_PX), Image.Resampling.BILINEAR)
    return np.asarray(large)[MAP_STEP_PX : MAP_STEP_PX + shape[0], MAP_STEP_PX : MAP_STEP_PX + shape[1]]


def _laid(texture: Float32[np.ndarray, "period period"], top: int, left: int, shape: tuple[int, int]) -> Field:
    """A periodic texture as it lies over a tile."""
    # Tiles divide the period, so none lies across its end.
    return texture[top % PERIOD_PX :, left % PERIOD_PX :][: shape[0], : shape[1]]


def _lit(
    rng: np.random.Generator, ink: Float32[np.ndarray, "wider_row wider_column stain"], stain: Stain
) -> UInt8[np.ndarray, "row column rgb"]:
    """What the camera sees of a tile, given with `BLUR_PX` more on each side."""
    blurred = gaussian_filter(ink, (0.75, 0.75, 0))[BLUR_PX:-BLUR_PX, BLUR_PX:-BLUR_PX]
    seen = np.power(np.float32(10), -(blurred @ stain.optical_density)) * stain.light
    seen += np.float32(1.5) * rng.standard_normal((*seen.shape[:2], 1), dtype=np.float32)
    return np.asarray(np.clip(seen + 0.5, 0, 255), np.uint8)
