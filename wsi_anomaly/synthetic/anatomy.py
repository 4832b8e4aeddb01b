"""What lies where on a slide: a coarse map of the structures of a normal lymph node. Knows no disease, no cells."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from scipy.ndimage import distance_transform_edt, gaussian_filter

from wsi_anomaly.synthetic.noise import PERIOD_PX, smooth_noise
from wsi_anomaly.synthetic.structures import MAP_STEP_PX, Structure

Mask = Bool[np.ndarray, "row column"]
StructureMap = UInt8[np.ndarray, "row column"]
MapField = Float32[np.ndarray, "row column"]


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The structures of one slide, a map pixel for each `MAP_STEP_PX` squared."""

    structures: StructureMap
    grain: MapField
    """Fibres run along the contours of this field, about one for each unit."""
    depth_px: MapField
    """Level-0 pixels from the edge of the node, negative outside."""
    scale: float
    """A small slide gets a small node with smaller follicles, not the corner of a large one; cells keep their size."""
    texture_px: tuple[int, int]
    """Where (x, y) in the textures that all slides share this one begins."""


def draw_node(rng: np.random.Generator, size_px: tuple[int, int]) -> Anatomy:
    """A lymph node on glass."""
    shape = (-(-size_px[1] // MAP_STEP_PX), -(-size_px[0] // MAP_STEP_PX))
    scale = float(np.clip(min(size_px) / 4096, 0.3, 1))
    node = _node(rng, shape)
    depth_px = _depth_px(node)
    strands = smooth_noise(rng, shape, 9 * max(scale, 0.5))
    capsule_px = depth_px + 6 * smooth_noise(rng, shape, 4.0)
    grain = np.where(depth_px < 90 * scale, depth_px / 12, 3 * strands).astype(np.float32)
    structures = _outside(rng, node, depth_px, scale)
    _add_interior(rng, structures, depth_px, strands, scale)
    _add_follicles(rng, structures, depth_px, scale)
    _add_vessels(rng, structures, grain, depth_px)
    _add_capsule(structures, capsule_px, scale)
    x, y = rng.integers(PERIOD_PX, size=2).tolist()
    return Anatomy(structures, grain, depth_px, scale, (x, y))


def distance_px(shape: tuple[int, ...], row: int, column: int) -> MapField:
    """Level-0 pixels from a place of the map."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    return np.asarray(np.hypot(y - row, x - column) * MAP_STEP_PX, np.float32)


def along_contour(field: MapField, width: float) -> Mask:
    """A winding band where noise is near zero."""
    return np.asarray(np.abs(field) < width)


def _node(rng: np.random.Generator, shape: tuple[int, int]) -> Mask:
    """A bean: an ellipse with an uneven edge and a dent, the hilum."""
    rows, columns = shape
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    tilt = rng.uniform(0, np.pi)
    along, across = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
    long_axis, short_axis = rng.uniform(0.74, 0.8), rng.uniform(0.64, 0.7)
    roundness = 1 - np.hypot(along / long_axis, across / short_axis)
    dent = 0.3 * np.exp(-((along - 0.1) ** 2 + (across - short_axis) ** 2) / 0.05)
    return np.asarray(roundness + 0.035 * smooth_noise(rng, shape, rows / 14) - dent > 0)


def _depth_px(node: Mask) -> MapField:
    inside = distance_transform_edt(node)
    outside = distance_transform_edt(~node)
    # Pixels of the map have corners, the capsule has none.
    return np.asarray(gaussian_filter((inside - outside).astype(np.float32), 1.5) * MAP_STEP_PX, np.float32)


def _outside(rng: np.random.Generator, node: Mask, depth_px: MapField, scale: float) -> StructureMap:
    """Glass, with fat along part of the node."""
    width_px = scale * (130 + 150 * smooth_noise(rng, node.shape, 60 * scale))
    fat = ~node & (-depth_px < width_px)
    return np.where(fat, np.uint8(Structure.FAT), np.uint8(Structure.GLASS))


def _add_interior(
    rng: np.random.Generator, structures: StructureMap, depth_px: MapField, strands: MapField, scale: float
) -> None:
    """Paracortex, with medullary cords and sinuses deep inside and trabeculae with sinuses along them."""
    shape = structures.shape
    structures[depth_px > 0] = Structure.PARACORTEX
    medulla = depth_px + 150 * scale * smooth_noise(rng, shape, 40 * scale) > 0.62 * float(depth_px.max())
    sinuses = smooth_noise(rng, shape, 10.0)
    structures[medulla] = Structure.MEDULLARY_CORD
    structures[medulla & along_contour(sinuses, 0.3)] = Structure.MEDULLARY_SINUS
    reach = (depth_px > 0) & (sinuses > 0)
    structures[reach & along_contour(strands, 0.14)] = Structure.TRABECULAR_SINUS
    structures[reach & along_contour(strands, 0.06)] = Structure.TRABECULA


def _add_follicles(rng: np.random.Generator, structures: StructureMap, depth_px: MapField, scale: float) -> None:
    """Germinal centres in their mantles and some follicles without one, side by side under the capsule."""
    ripple = smooth_noise(rng, structures.shape, 6.0)
    taken: list[tuple[int, int, float]] = []
    cortex = np.argwhere((depth_px > 200 * scale) & (depth_px < 520 * scale))
    for row, column in rng.permutation(cortex)[:400].tolist():
        radius_px = scale * rng.uniform(120, 210)
        mantle_px = radius_px + 60 * scale
        crowded = any(
            np.hypot(row - r, column - c) * MAP_STEP_PX < mantle_px + other + 40 * scale for r, c, other in taken
        )
        if crowded or depth_px[row, column] < mantle_px + 70 * scale:
            continue
        taken.append((row, column, mantle_px))
        away_px = distance_px(structures.shape, row, column) + 10 * ripple
        if len(taken) % 4 == 0:
            structures[away_px < radius_px] = Structure.PRIMARY_FOLLICLE
            continue
        structures[away_px < mantle_px] = Structure.MANTLE_ZONE
        structures[away_px < radius_px] = Structure.GERMINAL_CENTRE


def _add_vessels(rng: np.random.Generator, structures: StructureMap, grain: MapField, depth_px: MapField) -> None:
    """Small arteries and veins, blood in a wall, and venules whose wall is plump endothelium."""
    loose = np.isin(structures, [Structure.PARACORTEX, Structure.MEDULLARY_CORD])
    places = np.argwhere(loose & (depth_px > 16 * MAP_STEP_PX))
    for number, (row, column) in enumerate(rng.permutation(places)[: len(places) // 900].tolist()):
        lumen_px, stretch, tilt = 8 + rng.gamma(2, 7), rng.uniform(1, 2.6), rng.uniform(0, np.pi)
        near = np.s_[max(row - 24, 0) : row + 25, max(column - 24, 0) : column + 25]
        y, x = np.mgrid[near]
        along = ((x - column) * np.cos(tilt) + (y - row) * np.sin(tilt)) / stretch
        across = (y - row) * np.cos(tilt) - (x - column) * np.sin(tilt)
        away_px = (np.hypot(along, across) * MAP_STEP_PX).astype(np.float32)
        if number % 2:
            structures[near][away_px < 0.5 * lumen_px + 18] = Structure.HIGH_ENDOTHELIAL_VENULE
            structures[near][away_px < 0.5 * lumen_px] = Structure.BLOOD
            continue
        wall = away_px < (1 + rng.uniform(0.1, 0.5)) * lumen_px + 8
        structures[near][wall] = Structure.VESSEL_WALL
        structures[near][away_px < lumen_px] = Structure.BLOOD
        grain[near][wall] = away_px[wall] / 9


def _add_capsule(structures: StructureMap, depth_px: MapField, scale: float) -> None:
    """The capsule and the sinus under it."""
    thickness_px = 24 + 26 * scale
    structures[(depth_px > 0) & (depth_px < thickness_px + 34)] = Structure.SUBCAPSULAR_SINUS
    structures[(depth_px > 0) & (depth_px < thickness_px)] = Structure.CAPSULE
