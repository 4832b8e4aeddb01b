"""Whose hits on a map are counted apart: slides by label, else tiles by z. Knows no map and no picture."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from wsi_anomaly.annotations import read_slide_labels
from wsi_anomaly.errors import AnnotationError
from wsi_anomaly.storage.arrays import read_attributes
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.record import find_record

log = logging.getLogger(__name__)

_LABELS = ("normal", "abnormal", "macro", "micro", "itc", "without label")


@dataclass(frozen=True, slots=True)
class Groups:
    """Their names, and to which a tile belongs."""

    names: tuple[str, ...]
    of_slide: Mapping[str, str]
    threshold_z: float | None

    def of_tiles(self, slide_id: str, z: Float64[np.ndarray, " tile"]) -> Int64[np.ndarray, " tile"]:
        """The position of each tile's group; -1 for a tile without z where z decides."""
        if self.threshold_z is not None:
            return np.where(np.isfinite(z), (z > self.threshold_z).astype(np.int64), -1)
        return np.full(len(z), self.names.index(self.of_slide[slide_id]), np.int64)


def groups_of(slides: Sequence[SlideFolder], labels: Path | None) -> Groups:
    """By the labels of a CSV as `evaluate` takes it, else by the threshold of the heat maps, else all tiles as one.

    Raises:
        AnnotationError: the labels cannot be read, or none belongs to a slide.
    """
    if labels is not None:
        of_slide = _labelled(slides, labels)
        return Groups(tuple(name for name in _LABELS if name in of_slide.values()), of_slide, None)
    mapped = next((slide for slide in slides if find_record(slide.root, "heatmap")), None)
    if mapped is None:
        return Groups(("all",), {slide.slide_id: "all" for slide in slides}, None)
    threshold = float(read_attributes(mapped.heatmap)["threshold_z"])
    return Groups((f"z up to {threshold:g}", f"z above {threshold:g}"), {}, threshold)


def _labelled(slides: Sequence[SlideFolder], labels: Path) -> dict[str, str]:
    table = read_slide_labels(labels)
    slide_ids = [slide.slide_id for slide in slides]
    if not set(table) & set(slide_ids):
        raise AnnotationError(
            f"{labels.name}: none of its slide_ids ({', '.join(sorted(table)[:3])}, ...) is a slide of this run "
            f"({', '.join(slide_ids[:3])}, ...). Use the slide_ids of slides.csv."
        )
    if unknown := sorted(set(table) - set(slide_ids)):
        log.warning("%s: these belong to no slide of the run: %s", labels.name, ", ".join(unknown))
    names = {name: label.subgroup or ("abnormal" if label.abnormal else "normal") for name, label in table.items()}
    return {slide_id: names.get(slide_id, "without label") for slide_id in slide_ids}
