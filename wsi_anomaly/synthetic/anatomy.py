"""What lies where on a slide: a coarse map of compartments of a lymph node. Knows no cells and no colours."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import shapely
from jaxtyping import Bool, Float32, UInt8
from scipy.ndimage import distance_transform_edt

from wsi_anomaly.synthetic.anomalies import Anomaly, AnomalyKind, outline
from wsi_anomaly.synthetic.noise import smooth_noise

MAP_STEP_PX = 8
"""Level-0 pixels for each pixel of the map."""

Mask = Bool[np.ndarray, "row column"]


class Compartment(IntEnum):
    """Kinds of places on a slide."""

    GLASS = 0
    FAT = 1
    COLLAGEN = 2
    SINUS = 3
    PARACORTEX = 4
    MANTLE = 5
    GERMINAL_CENTRE = 6
    MEDULLARY_CORD = 7
    BLOOD = 8
    TUMOUR_NEST = 9
    TUMOUR_STROMA = 10
    CLEFT = 11
    NECROSIS = 12
    NUCLEAR_DUST = 13


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The compartments of one slide, a map pixel for each `MAP_STEP_PX` squared."""

    compartments: UInt8[np.ndarray, "row column"]
    grain: Float32[np.ndarray, "row column"]
    """Fibres run along the contours of this field."""
    anomalies: tuple[Anomaly, ...]


def draw_anatomy(rng: np.random.Generator, size_px: tuple[int, int], kinds: Sequence[AnomalyKind]) -> Anatomy:
    """A lymph node on glass. What is normal does not depend on `kinds`: the same node with and without an anomaly."""
    normal, planted = rng.spawn(2)
    shape = (-(-size_px[1] // MAP_STEP_PX), -(-size_px[0] // MAP_STEP_PX))
    # A small slide gets a small node with smaller follicles, not the corner of a large one; cells keep their size.
    scale = float(np.clip(min(size_px) / 4096, 0.3, 1))
    node = _node(normal, shape)
    depth_px = _depth_px(node)
    strands = smooth_noise(normal, shape, 9 * max(scale, 0.5))
    compartments = _outside(normal, node, depth_px, scale)
    _add_interior(normal, compartments, depth_px, strands, scale)
    _add_follicles(normal, compartments, depth_px, scale)
    _add_vessels(normal, compartments, depth_px)
    capsule_px = depth_px + 6 * smooth_noise(normal, shape, 4.0)
    _add_capsule(compartments, capsule_px, scale)
    anomalies = _placed(planted, depth_px, kinds, 560 * scale)
    for anomaly in anomalies:
        _add_anomaly(planted, compartments, anomaly)
    grain = np.where(depth_px < 90 * scale, depth_px / 12, 3 * strands).astype(np.float32)
    return Anatomy(compartments, grain, anomalies)


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


def _depth_px(node: Mask) -> Float32[np.ndarray, "row column"]:
    """Level-0 pixels from the edge of the node, negative outside."""
    inside = distance_transform_edt(node)
    outside = distance_transform_edt(~node)
    return ((inside - outside) * MAP_STEP_PX).astype(np.float32)


def _outside(
    rng: np.random.Generator, node: Mask, depth_px: Float32[np.ndarray, "row column"], scale: float
) -> UInt8[np.ndarray, "row column"]:
    """Glass, with fat along part of the node."""
    width_px = scale * (130 + 150 * smooth_noise(rng, node.shape, 60 * scale))
    fat = ~node & (-depth_px < width_px)
    return np.where(fat, np.uint8(Compartment.FAT), np.uint8(Compartment.GLASS))


def _add_interior(
    rng: np.random.Generator,
    compartments: UInt8[np.ndarray, "row column"],
    depth_px: Float32[np.ndarray, "row column"],
    strands: Float32[np.ndarray, "row column"],
    scale: float,
) -> None:
    """Paracortex, with medullary cords and sinuses deep inside and strands of collagen."""
    shape = compartments.shape
    compartments[depth_px > 0] = Compartment.PARACORTEX
    medulla = depth_px + 150 * scale * smooth_noise(rng, shape, 40 * scale) > 0.62 * float(depth_px.max())
    sinuses = smooth_noise(rng, shape, 10.0)
    compartments[medulla] = Compartment.MEDULLARY_CORD
    compartments[medulla & _along_contour(sinuses, 0.3)] = Compartment.SINUS
    compartments[(depth_px > 0) & (sinuses > 0) & _along_contour(strands, 0.035)] = Compartment.COLLAGEN


def _add_follicles(
    rng: np.random.Generator,
    compartments: UInt8[np.ndarray, "row column"],
    depth_px: Float32[np.ndarray, "row column"],
    scale: float,
) -> None:
    """Germinal centres in their mantles, side by side under the capsule."""
    ripple = smooth_noise(rng, compartments.shape, 6.0)
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
        distance_px = _distance_px(compartments.shape, row, column) + 10 * ripple
        compartments[distance_px < mantle_px] = Compartment.MANTLE
        compartments[distance_px < radius_px] = Compartment.GERMINAL_CENTRE


def _add_vessels(
    rng: np.random.Generator, compartments: UInt8[np.ndarray, "row column"], depth_px: Float32[np.ndarray, "row column"]
) -> None:
    """Small vessels: blood in a ring of collagen."""
    loose = np.isin(compartments, [Compartment.PARACORTEX, Compartment.MEDULLARY_CORD])
    places = np.argwhere(loose & (depth_px > 16 * MAP_STEP_PX))
    for row, column in rng.permutation(places)[: len(places) // 1200].tolist():
        lumen_px = rng.uniform(9, 26)
        distance_px = _distance_px(compartments.shape, row, column)
        compartments[distance_px < lumen_px + 16] = Compartment.COLLAGEN
        compartments[distance_px < lumen_px] = Compartment.BLOOD


def _add_capsule(
    compartments: UInt8[np.ndarray, "row column"], depth_px: Float32[np.ndarray, "row column"], scale: float
) -> None:
    """The capsule and the sinus under it."""
    thickness_px = 24 + 26 * scale
    compartments[(depth_px > 0) & (depth_px < thickness_px + 34)] = Compartment.SINUS
    compartments[(depth_px > 0) & (depth_px < thickness_px)] = Compartment.COLLAGEN


def _placed(
    rng: np.random.Generator,
    depth_px: Float32[np.ndarray, "row column"],
    kinds: Sequence[AnomalyKind],
    radius_px: float,
) -> tuple[Anomaly, ...]:
    """Outlines within the node that do not touch; they shrink when there is too little room."""
    room_px = depth_px.copy()
    placed = []
    for kind in kinds:
        radius = min(radius_px * rng.uniform(0.92, 1.08), 0.8 * float(room_px.max()))
        row, column = rng.choice(np.argwhere(room_px >= 1.2 * radius)).tolist()
        centre = ((column + 0.5) * MAP_STEP_PX, (row + 0.5) * MAP_STEP_PX)
        placed.append(Anomaly(kind, outline(rng, centre_level0_px=centre, radius_level0_px=radius)))
        room_px = np.minimum(room_px, _distance_px(room_px.shape, row, column) - 1.2 * radius)
    return tuple(placed)


def _add_anomaly(rng: np.random.Generator, compartments: UInt8[np.ndarray, "row column"], anomaly: Anomaly) -> None:
    inside = _filled(anomaly.outline_level0_px, compartments.shape)
    if anomaly.kind == "necrosis":
        dusty = smooth_noise(rng, compartments.shape, 9.0) > 0
        compartments[inside] = Compartment.NECROSIS
        compartments[inside & dusty] = Compartment.NUCLEAR_DUST
        return
    # Nests lie where the field is high and stroma where it is low; fixation has shrunk some nests off their stroma.
    nests = smooth_noise(rng, compartments.shape, 6.0)
    retracted = smooth_noise(rng, compartments.shape, 12.0) > 0
    stroma, edge = -0.75, 0.2
    compartments[inside] = Compartment.TUMOUR_NEST
    compartments[inside & retracted & (nests < stroma + edge)] = Compartment.CLEFT
    compartments[inside & (nests < stroma)] = Compartment.TUMOUR_STROMA


def _along_contour(field: Float32[np.ndarray, "row column"], width: float) -> Mask:
    """A winding band where noise is near zero."""
    return np.asarray(np.abs(field) < width)


def _filled(line_level0_px: shapely.Polygon, shape: tuple[int, int]) -> Mask:
    """The map pixels whose centre lies within a line."""
    rows, columns = np.indices(shape, dtype=np.float32)
    shapely.prepare(line_level0_px)
    inside = shapely.contains_xy(line_level0_px, (columns + 0.5) * MAP_STEP_PX, (rows + 0.5) * MAP_STEP_PX)
    return np.asarray(inside, bool)


def _distance_px(shape: tuple[int, int], row: int, column: int) -> Float32[np.ndarray, "row column"]:
    """Level-0 pixels from a place of the map."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    return np.asarray(np.hypot(y - row, x - column) * MAP_STEP_PX, np.float32)
