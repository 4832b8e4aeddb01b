"""Whose hits on a map are counted apart: slides by any label, else tiles by z. Knows no map and no picture."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from wsi_anomaly.annotations import read_slide_groups
from wsi_anomaly.errors import AnnotationError
from wsi_anomaly.storage.arrays import read_attributes
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.record import find_record

log = logging.getLogger(__name__)

MOST_GROUPS = 8
"""That can be told apart in one picture."""
_NO_LABEL = "without label"


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
    """By any texts in a CSV, else by the threshold of the heat maps, else all tiles as one.

    Texts are in the order of the CSV; what it has no text for is a group too, the last.

    Raises:
        AnnotationError: the labels cannot be read, are too many, or none belongs to a slide.
    """
    if labels is not None:
        of_slide = _labelled(slides, labels)
        return Groups(tuple(dict.fromkeys(of_slide.values())), of_slide, None)
    mapped = next((slide for slide in slides if find_record(slide.root, "heatmap")), None)
    if mapped is None:
        return Groups(("all",), {slide.slide_id: "all" for slide in slides}, None)
    threshold = float(read_attributes(mapped.heatmap)["threshold_z"])
    return Groups((f"z up to {threshold:g}", f"z above {threshold:g}"), {}, threshold)


def _labelled(slides: Sequence[SlideFolder], labels: Path) -> dict[str, str]:
    table = read_slide_groups(labels)
    slide_ids = [slide.slide_id for slide in slides]
    if not table:
        raise AnnotationError(f"{labels.name}: none of its slides has a label. Write one into the column label.")
    if not set(table) & set(slide_ids):
        raise AnnotationError(
            f"{labels.name}: none of its slide_ids ({', '.join(sorted(table)[:3])}, ...) is a slide of this run "
            f"({', '.join(slide_ids[:3])}, ...). Use the slide_ids of slides.csv."
        )
    if unknown := sorted(set(table) - set(slide_ids)):
        log.warning("%s: these belong to no slide of the run: %s", labels.name, ", ".join(unknown))
    here = {slide_id: text for slide_id, text in table.items() if slide_id in slide_ids}
    if missing := [slide_id for slide_id in slide_ids if slide_id not in here]:
        log.warning("%s: has no label for these slides of the run: %s", labels.name, ", ".join(missing))
    of_slide = here | dict.fromkeys(missing, _NO_LABEL)
    if len(names := dict.fromkeys(of_slide.values())) > MOST_GROUPS:
        raise AnnotationError(
            f"{labels.name}: {len(names)} labels ({', '.join(list(names)[:3])}, ...), and a picture shows hits of at "
            f"most {MOST_GROUPS}. Give several slides the same label."
        )
    return of_slide
