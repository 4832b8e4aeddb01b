"""What lies between the cells: amounts of stain for each structure, with its fibres, gaps and fat. Knows no cells."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32
from PIL import Image

from wsi_anomaly.synthetic.anatomy import Anatomy
from wsi_anomaly.synthetic.noise import fat_depth_px, laid, lumps
from wsi_anomaly.synthetic.structures import MAP_STEP_PX, Structure

Field = Float32[np.ndarray, "row column"]
OfMap = Float32[np.ndarray, "map_row map_column"]
MapIndex = tuple[np.ndarray, ...]
Canvas = Float32[np.ndarray, "row column stain"]


class _Ground(NamedTuple):
    """What lies between the cells of a structure."""

    fullness: float
    """In deviations of noise: 0 leaves half of the place empty, 3 none."""
    haematoxylin: float
    eosin: float
    fibres: float = 0.0
    """How much the eosin varies along fibres, which part where they are thin."""
    reticulin: float = 0.0
    """Eosin of the fine net of fibres between cells."""
    fat: float = 0.0
    granules: float = 0.06


_GROUND = {
    Structure.GLASS: _Ground(-9, 0, 0),
    Structure.FAT: _Ground(3, 0.03, 0.26, fat=1),
    Structure.CAPSULE: _Ground(2.2, 0.05, 0.36, fibres=0.2),
    Structure.TRABECULA: _Ground(2.0, 0.05, 0.36, fibres=0.2),
    Structure.SUBCAPSULAR_SINUS: _Ground(-0.3, 0.05, 0.12, reticulin=0.2),
    Structure.TRABECULAR_SINUS: _Ground(-0.3, 0.05, 0.12, reticulin=0.2),
    Structure.MEDULLARY_SINUS: _Ground(-0.2, 0.05, 0.14, reticulin=0.16),
    Structure.MEDULLARY_CORD: _Ground(1.0, 0.09, 0.16, reticulin=0.26),
    Structure.PARACORTEX: _Ground(1.1, 0.1, 0.16, reticulin=0.3),
    Structure.PRIMARY_FOLLICLE: _Ground(1.1, 0.1, 0.16, reticulin=0.1),
    Structure.MANTLE_ZONE: _Ground(1.1, 0.1, 0.16, reticulin=0.1),
    Structure.GERMINAL_CENTRE: _Ground(1.5, 0.11, 0.14, granules=0.05),
    Structure.VESSEL_WALL: _Ground(2.0, 0.05, 0.34, fibres=0.14),
    Structure.BLOOD: _Ground(-1.5, 0.0, 0.1),
    Structure.HIGH_ENDOTHELIAL_VENULE: _Ground(1.4, 0.08, 0.24, reticulin=0.1),
    Structure.TUMOUR_NEST: _Ground(2.5, 0.12, 0.26, granules=0.12),
    Structure.TUMOUR_GLAND: _Ground(2.5, 0.12, 0.26, granules=0.12),
    Structure.GLAND_LUMEN: _Ground(-1.6, 0.04, 0.14, granules=0.2),
    Structure.TUMOUR_STROMA: _Ground(1.6, 0.06, 0.3, fibres=0.18),
    Structure.CLEFT: _Ground(-2.5, 0, 0.1),
    Structure.LONE_TUMOUR_CELLS: _Ground(1.1, 0.1, 0.16, reticulin=0.3),
    Structure.NECROSIS: _Ground(1.6, 0.04, 0.38, granules=0.14),
    Structure.NUCLEAR_DUST: _Ground(1.8, 0.09, 0.4, granules=0.16),
    Structure.FIBROSIS: _Ground(2.4, 0.03, 0.38, fibres=0.22),
    Structure.MUCIN: _Ground(2.2, 0.1, 0.03, reticulin=0.08, granules=0.01),
}
_TABLE = np.array([_GROUND[structure] for structure in Structure], np.float32)


def ground(anatomy: Anatomy, *, origin_px: tuple[int, int], shape: tuple[int, int]) -> Canvas:
    """The stains without cells in a region: `origin_px` is its top left (x, y), `shape` its (rows, columns)."""
    near = _near_region(anatomy.structures.shape, origin_px, shape)
    table = _TABLE[anatomy.structures[near]]
    if not table[..., 2].any():
        return np.zeros((*shape, 2), np.float32)
    fields = [_enlarged(field, origin_px, shape) for field in (*np.moveaxis(table, -1, 0), anatomy.grain[near])]
    left, top = (start + shift for start, shift in zip(origin_px, anatomy.texture_px, strict=True))
    return _textured(fields, left, top)


def enlarged_region(field: OfMap, *, origin_px: tuple[int, int], shape: tuple[int, int]) -> Field:
    """A field of the map at level 0, interpolated, in a region."""
    return _enlarged(field[_near_region(field.shape, origin_px, shape)], origin_px, shape)


def _near_region(available: tuple[int, ...], origin_px: tuple[int, int], shape: tuple[int, int]) -> MapIndex:
    """The part of the map that a region sees, with one pixel more on each side for interpolation."""
    starts = (origin_px[1], origin_px[0])
    rows, columns = (
        np.clip(np.arange(start // MAP_STEP_PX - 1, (start + length - 1) // MAP_STEP_PX + 2), 0, size - 1)
        for start, length, size in zip(starts, shape, available, strict=True)
    )
    return np.ix_(rows, columns)


def _enlarged(field: OfMap, origin_px: tuple[int, int], shape: tuple[int, int]) -> Field:
    rows, columns = field.shape
    large = Image.fromarray(np.ascontiguousarray(field)).resize(
        (columns * MAP_STEP_PX, rows * MAP_STEP_PX), Image.Resampling.BILINEAR
    )
    left, top = (MAP_STEP_PX + start % MAP_STEP_PX for start in origin_px)
    return np.asarray(large)[top : top + shape[0], left : left + shape[1]]


def _textured(fields: list[Field], left: int, top: int) -> Canvas:
    fullness, haematoxylin, eosin, fibres, reticulin, fat, granules, grain = fields
    shape = (grain.shape[0], grain.shape[1])
    fine, small, middle = (laid(lumps(sigma), left, top, shape) for sigma in (1.3, 3.0, 9.0))
    cover = np.clip((fullness + small) * 1.5 + 0.5, 0, 1)
    thickness = 1 + 0.08 * laid(lumps(40.0), left, top, shape)
    pink = eosin * thickness * (1 + granules / np.maximum(eosin, 0.05) * fine)
    if fibres.any():
        waves = np.sin(6 * grain + 1.8 * middle + 0.6 * small) + 0.8 * np.sin(14 * grain + 4 * middle + small)
        strands = waves * (0.55 + 0.45 * np.sin(2 * middle + 1.5 * small))
        pink += fibres * (0.7 * strands + 0.15 * fine)
        # Bundles come apart in the section.
        cover *= np.clip(1 - 12 * fibres * (-1.0 - strands), 0, 1)
    if reticulin.any():
        thread = np.exp(-((middle + 0.35 * small) ** 2) / 0.018) * (
            0.6 + 0.4 * laid(lumps(9.0), left + 400, top, shape)
        )
        pink += reticulin * thread
        cover = np.maximum(cover, np.clip(thread, 0, 1) * np.minimum(20 * reticulin, 1))
    if fat.any():
        depth_px = laid(fat_depth_px(), left, top, shape) + 0.4 * small
        # Where three cells meet there is little but a few loose fibres.
        loose = np.clip(0.9 + 0.12 * depth_px, 0.3, 1) * (1 + 0.25 * np.sin(3 * middle + 2 * small))
        cover *= 1 - fat * (1 - loose * np.clip(0.5 - depth_px, 0, 1))
    return np.stack([cover * haematoxylin * thickness, cover * np.maximum(pink, 0)], axis=-1)
