"""Faults of preparation and scanning that are no disease: folds, pen, bubbles, lost focus. Knows no cells."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from jaxtyping import Float32
from scipy.ndimage import distance_transform_edt, gaussian_filter

from wsi_anomaly.synthetic.anatomy import Anatomy, MapField
from wsi_anomaly.synthetic.anomalies import Artefact, ArtefactKind, outline
from wsi_anomaly.synthetic.disease import filled
from wsi_anomaly.synthetic.ground import enlarged_region
from wsi_anomaly.synthetic.noise import laid, lumps
from wsi_anomaly.synthetic.structures import MAP_STEP_PX

REACH_PX = 40
"""Pixels beyond a region that its disturbed picture depends on."""
_DEFOCUS_PX = 4.0
_BUBBLE_BLUR_PX = 2.0
_SECOND_LAYER_PX = (7, -11)
"""Where the upper layer of a fold comes from, down and right."""

Ink = Float32[np.ndarray, "row column stain"]
Light = Float32[np.ndarray, "row column rgb"]

_PENS = ((40, 80, 190), (40, 140, 90), (70, 70, 85), (215, 50, 70))


@dataclass(frozen=True, slots=True)
class Disturbance:
    """An artefact, and how deep within its outline each place lies."""

    artefact: Artefact
    depth_px: MapField
    colour: tuple[int, int, int]
    """Of the pen."""


def place_artefacts(rng: np.random.Generator, node: Anatomy, kinds: Sequence[ArtefactKind]) -> tuple[Disturbance, ...]:
    """One artefact of each kind, somewhere on the tissue."""
    return tuple(_placed(rng, node, kind) for kind in kinds)


def disturbed_ink(ink: Ink, disturbances: Sequence[Disturbance], *, origin_px: tuple[int, int]) -> Ink:
    """The stains of a region where tissue lies double, out of focus or under a bubble."""
    for disturbance in disturbances:
        kind = disturbance.artefact.kind
        depth_px = _depth_px(disturbance, origin_px, (ink.shape[0], ink.shape[1]))
        if kind == "pen" or depth_px.max() < -MAP_STEP_PX:
            continue
        edge_px, sigma_px = (40, _DEFOCUS_PX) if kind == "out_of_focus" else (8, _BUBBLE_BLUR_PX)
        inside = np.clip(depth_px / edge_px + 0.5, 0, 1)[..., None]
        if kind == "fold":
            ink = ink + inside * np.roll(ink, _SECOND_LAYER_PX, (0, 1))
        else:
            ink = ink + inside * (gaussian_filter(ink, (sigma_px, sigma_px, 0), truncate=3.5) - ink)
    return ink


def disturbed_light(seen: Light, disturbances: Sequence[Disturbance], *, origin_px: tuple[int, int]) -> Light:
    """What lies on the glass, or bends the light, above a region."""
    for disturbance in disturbances:
        shape = (seen.shape[0], seen.shape[1])
        depth_px = _depth_px(disturbance, origin_px, shape)
        if depth_px.max() < -MAP_STEP_PX:
            continue
        if disturbance.artefact.kind == "pen":
            seen = seen * _through_pen(disturbance, depth_px, origin_px)
        elif disturbance.artefact.kind == "bubble":
            rim = 0.75 * np.exp(-((depth_px - 6) ** 2) / 40) + 0.3 * np.exp(-((depth_px - 22) ** 2) / 60)
            haze = 0.25 * np.clip(depth_px / 8 + 0.5, 0, 1)
            seen = (seen + haze[..., None] * (235 - seen)) * (1 - rim[..., None])
    return seen


def _through_pen(disturbance: Disturbance, depth_px: MapField, origin_px: tuple[int, int]) -> Light:
    """The share of light that ink lets through: uneven, and darkest where the stroke dried."""
    streaks = 0.85 + 0.1 * laid(lumps(9.0), *origin_px, (depth_px.shape[0], depth_px.shape[1]))
    edge = 0.25 * np.exp(-((depth_px - 10) ** 2) / 80)
    amount = np.clip(depth_px / 8 + 0.5, 0, 1) * np.clip(streaks + edge, 0, 1.2)
    transmitted = np.array(disturbance.colour, np.float32) / 255
    return np.power(transmitted, amount[..., None])


def _depth_px(disturbance: Disturbance, origin_px: tuple[int, int], shape: tuple[int, int]) -> MapField:
    return enlarged_region(disturbance.depth_px, origin_px=origin_px, shape=shape)


def _placed(rng: np.random.Generator, node: Anatomy, kind: ArtefactKind) -> Disturbance:
    row, column = rng.choice(np.argwhere(node.depth_px > 60 * node.scale)).tolist()
    x, y = (column + 0.5) * MAP_STEP_PX, (row + 0.5) * MAP_STEP_PX
    if kind in ("fold", "pen"):
        line = _stroke(rng, (x, y), length_px=900 * node.scale)
        around = line.buffer(node.scale * rng.uniform(*((25, 50) if kind == "fold" else (60, 110))))
    else:
        radius_px = node.scale * rng.uniform(*((170, 330) if kind == "bubble" else (350, 600)))
        around = outline(
            rng, centre_level0_px=(x, y), radius_level0_px=radius_px, waviness=0.03 if kind == "bubble" else 0.25
        )
    rows, columns = node.depth_px.shape
    around = shapely.set_precision(around, 0.1) & shapely.box(0, 0, columns * MAP_STEP_PX, rows * MAP_STEP_PX)
    inside = filled(around, node.depth_px.shape)
    depth_px = MAP_STEP_PX * gaussian_filter(distance_transform_edt(inside) - distance_transform_edt(~inside), 0.8)
    colour = _PENS[int(rng.integers(len(_PENS)))]
    return Disturbance(Artefact(kind, around), depth_px.astype(np.float32), colour)


def _stroke(rng: np.random.Generator, centre_px: tuple[float, float], *, length_px: float) -> shapely.LineString:
    """A gently bent line through a place."""
    along = np.linspace(-1, 1, 40)
    tilt, bend, sway = rng.uniform(0, np.pi), rng.normal(0, 0.15), rng.normal(0, 0.08)
    across = bend * along**2 + sway * np.sin(4 * along)
    x = centre_px[0] + length_px * (along * np.cos(tilt) - across * np.sin(tilt))
    y = centre_px[1] + length_px * (along * np.sin(tilt) + across * np.cos(tilt))
    return shapely.LineString(np.column_stack([x, y]))
