"""What disease does to the map of a lymph node. Knows no cells and no colours."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import shapely

from wsi_anomaly.synthetic.anatomy import Anatomy, MapField, Mask, StructureMap, along_contour, distance_px
from wsi_anomaly.synthetic.anomalies import WIDEST, Anomaly, AnomalyKind, outline
from wsi_anomaly.synthetic.noise import smooth_noise
from wsi_anomaly.synthetic.structures import MAP_STEP_PX, Structure

_RADIUS_PX: dict[AnomalyKind, float] = {"micrometastasis": 240, "isolated_tumour_cells": 150}
_LARGE_PX = 560
"""Radius of every other kind, on a slide of 4096 px."""


def planted(
    rng: np.random.Generator, node: Anatomy, kinds: Sequence[AnomalyKind]
) -> tuple[Anatomy, tuple[Anomaly, ...]]:
    """The node with an anomaly of each kind, and where they are. Outside their outlines nothing changes."""
    anomalies = _placed(rng, node, kinds)
    structures, grain = node.structures.copy(), node.grain.copy()
    for anomaly in anomalies:
        inside = filled(anomaly.outline_level0_px, structures.shape)
        if anomaly.kind in ("metastasis", "micrometastasis"):
            _add_metastasis(rng, structures, inside)
        elif anomaly.kind == "isolated_tumour_cells":
            structures[inside] = Structure.LONE_TUMOUR_CELLS
        elif anomaly.kind == "necrosis":
            dusty = smooth_noise(rng, structures.shape, 9.0) > 0
            structures[inside] = Structure.NECROSIS
            structures[inside & dusty] = Structure.NUCLEAR_DUST
        elif anomaly.kind == "fibrosis":
            structures[inside] = Structure.FIBROSIS
            grain[inside] = 5 * smooth_noise(rng, structures.shape, 14.0)[inside]
        else:
            septa = along_contour(smooth_noise(rng, structures.shape, 10.0), 0.09)
            structures[inside] = Structure.MUCIN
            structures[inside & septa] = Structure.TUMOUR_STROMA
    return replace(node, structures=structures, grain=grain), anomalies


def filled(line_level0_px: shapely.Polygon, shape: tuple[int, ...]) -> Mask:
    """The map pixels whose centre lies within a line."""
    rows, columns = np.indices(shape, dtype=np.float32)
    shapely.prepare(line_level0_px)
    inside = shapely.contains_xy(line_level0_px, (columns + 0.5) * MAP_STEP_PX, (rows + 0.5) * MAP_STEP_PX)
    return np.asarray(inside, bool)


def _placed(rng: np.random.Generator, node: Anatomy, kinds: Sequence[AnomalyKind]) -> tuple[Anomaly, ...]:
    """Outlines within the node that do not touch; they shrink when there is too little room."""
    room_px = node.depth_px.copy()
    placed = []
    for kind in kinds:
        radius = _RADIUS_PX.get(kind, _LARGE_PX) * node.scale * rng.uniform(0.92, 1.08)
        radius = min(radius, 0.8 * float(room_px.max()))
        row, column = rng.choice(np.argwhere(room_px >= (1 + WIDEST) * radius)).tolist()
        centre = ((column + 0.5) * MAP_STEP_PX, (row + 0.5) * MAP_STEP_PX)
        placed.append(Anomaly(kind, outline(rng, centre_level0_px=centre, radius_level0_px=radius)))
        room_px = np.minimum(room_px, distance_px(room_px.shape, row, column) - (1 + WIDEST) * radius)
    return tuple(placed)


def _add_metastasis(rng: np.random.Generator, structures: StructureMap, inside: Mask) -> None:
    """Nests where a field is high and stroma where it is low; in part of it the nests are glands with a lumen."""
    nests = smooth_noise(rng, structures.shape, 6.0)
    retracted = smooth_noise(rng, structures.shape, 12.0) > 0
    # In deviations of noise: a quarter of it is glandular, a fifth stroma.
    gland, stroma, edge = 0.6, -0.85, 0.2
    glandular = smooth_noise(rng, structures.shape, 30.0) > gland
    structures[inside] = Structure.TUMOUR_NEST
    # Fixation has shrunk some nests off their stroma.
    structures[inside & retracted & (nests < stroma + edge)] = Structure.CLEFT
    structures[inside & (nests < stroma)] = Structure.TUMOUR_STROMA
    _add_glands(structures, inside & glandular, smooth_noise(rng, structures.shape, 5.5))


def _add_glands(structures: StructureMap, where: Mask, tubes: MapField) -> None:
    wall, lumen = -0.1, 0.95
    structures[where] = Structure.TUMOUR_STROMA
    structures[where & (tubes > wall)] = Structure.TUMOUR_GLAND
    structures[where & (tubes > lumen)] = Structure.GLAND_LUMEN
