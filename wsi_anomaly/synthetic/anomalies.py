"""Planted anomalies: where their outlines run, and their export as GeoJSON. Knows no pixels."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import NAMESPACE_URL, uuid5

import numpy as np
import shapely

AnomalyKind = Literal["metastasis", "necrosis"]

_CLASSIFICATIONS: dict[AnomalyKind, dict[str, Any]] = {
    "metastasis": {"name": "Tumor", "color": [200, 0, 0]},
    "necrosis": {"name": "Necrosis", "color": [50, 50, 50]},
}


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One planted anomaly and the line around it."""

    kind: AnomalyKind
    outline_level0_px: shapely.Polygon


def outline(
    rng: np.random.Generator, *, centre_level0_px: tuple[float, float], radius_level0_px: float
) -> shapely.Polygon:
    """A wavy closed line of about that radius, to a tenth of a pixel."""
    angle = np.linspace(0, 2 * np.pi, 144, endpoint=False)
    orders = np.arange(2, 9)
    amplitude = rng.normal(0, 0.3, orders.size) / orders
    phase = rng.uniform(0, 2 * np.pi, orders.size)
    radius = radius_level0_px * (1 + amplitude @ np.cos(orders[:, None] * angle + phase[:, None]))
    x, y = centre_level0_px
    return shapely.Polygon(np.round(np.column_stack([x + radius * np.cos(angle), y + radius * np.sin(angle)]), 1))


def write_annotations(path: Path, anomalies: Sequence[Anomaly]) -> None:
    """Write the outlines as GeoJSON annotations in level-0 pixels, as QuPath reads and writes them."""
    features = [_feature(anomaly) for anomaly in anomalies]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


def _feature(anomaly: Anomaly) -> dict[str, Any]:
    geometry = shapely.geometry.mapping(anomaly.outline_level0_px)
    return {
        "type": "Feature",
        # QuPath keeps a UUID and offers to skip objects it already has, so the same outline gets the same one.
        "id": str(uuid5(NAMESPACE_URL, f"{anomaly.kind} {anomaly.outline_level0_px.wkt}")),
        "geometry": geometry,
        "properties": {"objectType": "annotation", "classification": _CLASSIFICATIONS[anomaly.kind]},
    }
