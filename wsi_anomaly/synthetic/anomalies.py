"""What was planted on a slide, disease or artefact: where outlines run, their export as GeoJSON. Knows no pixels."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import NAMESPACE_URL, uuid5

import numpy as np
import shapely

AnomalyKind = Literal["metastasis", "micrometastasis", "isolated_tumour_cells", "necrosis", "fibrosis", "mucin"]
ArtefactKind = Literal["fold", "pen", "bubble", "out_of_focus"]

_CLASSIFICATIONS: dict[AnomalyKind | ArtefactKind, dict[str, Any]] = {
    "metastasis": {"name": "Tumor", "color": [200, 0, 0]},
    "micrometastasis": {"name": "Tumor", "color": [200, 0, 0]},
    "isolated_tumour_cells": {"name": "Tumor", "color": [200, 0, 0]},
    "necrosis": {"name": "Necrosis", "color": [50, 50, 50]},
    "fibrosis": {"name": "Fibrosis", "color": [0, 128, 128]},
    "mucin": {"name": "Mucin", "color": [90, 90, 200]},
    "fold": {"name": "Artefact: Fold", "color": [180, 180, 180]},
    "pen": {"name": "Artefact: Pen", "color": [180, 180, 180]},
    "bubble": {"name": "Artefact: Bubble", "color": [180, 180, 180]},
    "out_of_focus": {"name": "Artefact: Out of focus", "color": [180, 180, 180]},
}


WIDEST = 0.2
"""No outline lies further from its mean radius than this share of it."""


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One planted disease and the line around it."""

    kind: AnomalyKind
    outline_level0_px: shapely.Polygon


@dataclass(frozen=True, slots=True)
class Artefact:
    """One planted fault of preparation or scanning, which is no disease, and the line around it."""

    kind: ArtefactKind
    outline_level0_px: shapely.Polygon


def outline(
    rng: np.random.Generator, *, centre_level0_px: tuple[float, float], radius_level0_px: float, waviness: float = 0.3
) -> shapely.Polygon:
    """A wavy closed line of about that radius, to a tenth of a pixel."""
    angle = np.linspace(0, 2 * np.pi, 144, endpoint=False)
    orders = np.arange(2, 9)
    amplitude = rng.normal(0, waviness, orders.size) / orders
    phase = rng.uniform(0, 2 * np.pi, orders.size)
    wave = amplitude @ np.cos(orders[:, None] * angle + phase[:, None])
    radius = radius_level0_px * (1 + wave * min(1.0, WIDEST / np.abs(wave).max()))
    x, y = centre_level0_px
    return shapely.Polygon(np.round(np.column_stack([x + radius * np.cos(angle), y + radius * np.sin(angle)]), 1))


def write_annotations(path: Path, planted: Sequence[Anomaly | Artefact]) -> None:
    """Write the outlines as GeoJSON annotations in level-0 pixels, as QuPath reads and writes them."""
    features = [_feature(each) for each in planted]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


def _feature(planted: Anomaly | Artefact) -> dict[str, Any]:
    geometry = shapely.geometry.mapping(planted.outline_level0_px)
    return {
        "type": "Feature",
        # QuPath keeps a UUID and offers to skip objects it already has, so the same outline gets the same one.
        "id": str(uuid5(NAMESPACE_URL, f"{planted.kind} {planted.outline_level0_px.wkt}")),
        "geometry": geometry,
        "properties": {"objectType": "annotation", "classification": _CLASSIFICATIONS[planted.kind]},
    }
