"""Pictures of slides with the heat maps of all detectors and what people outlined, side by side. Measures nothing."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import shapely
from jaxtyping import Float64

from wsi_anomaly.annotations import AbnormalMask, Annotation, Outline
from wsi_anomaly.reporting.comparison_figure import ComparedMap, write_comparison
from wsi_anomaly.stages.evaluate.evidence import Evidence
from wsi_anomaly.stages.evaluate.measures import Findings, Measure
from wsi_anomaly.storage.arrays import read_array, read_attributes

log = logging.getLogger(__name__)

MOST_PICTURES = 20
_Seen = tuple[Evidence, Mapping[str, Measure | str]]
"""A slide, and what was measured on it."""


def write_pictures(folder: Path, evidence: Mapping[str, Sequence[Evidence]], findings: Mapping[str, Findings]) -> None:
    """One of each annotated slide that all detectors have seen, `<slide_id>.png`: the first 20 by slide_id."""
    seen = {detector: _by_slide(evidence[detector], found) for detector, found in findings.items()}
    shared = sorted(set.intersection(*(set(slides) for slides in seen.values())))
    annotated = [slide_id for slide_id in shared if _annotation(seen, slide_id)]
    drawn = annotated[:MOST_PICTURES]
    for slide_id in drawn:
        _write_picture(folder / f"{slide_id}.png", {detector: slides[slide_id] for detector, slides in seen.items()})
    if len(drawn) < len(annotated):
        log.info(
            "%d of the %d annotated slides are drawn, the first by slide_id: %s to %s",
            *(len(drawn), len(annotated), drawn[0], drawn[-1]),
        )


def _by_slide(evidence: Sequence[Evidence], found: Findings) -> dict[str, _Seen]:
    measured = {str(row["slide_id"]): row for row in found.per_slide}
    return {one.slide_id: (one, measured[one.slide_id]) for one in evidence}


def _annotation(seen: Mapping[str, Mapping[str, _Seen]], slide_id: str) -> Annotation | AbnormalMask | None:
    """The same for all detectors."""
    return next(iter(seen.values()))[slide_id][0].annotation


def _write_picture(path: Path, seen: Mapping[str, _Seen]) -> None:
    one, _ = next(iter(seen.values()))
    attributes = read_attributes(one.folder.tissue)
    downsample = np.array(attributes["overview_downsample"], np.float64)
    origin = one.tile_grid.origin_level0_px
    abnormal, excluded = _outlined(one.annotation, float(downsample.max()))
    write_comparison(
        path,
        read_array(one.folder.tissue, "overview"),
        [_compared(detector, *slide, downsample) for detector, slide in seen.items()],
        abnormal=[(ring - origin) / downsample for ring in _rings(abnormal)],
        excluded=[(ring - origin) / downsample for ring in _rings(excluded)],
        slide_id=one.slide_id,
        overview_mpp=float(downsample[0] * attributes["mpp"][0]),
    )


def _outlined(
    annotation: Annotation | AbnormalMask | None, pixel_level0_px: float
) -> tuple[Sequence[Outline], Sequence[Outline]]:
    """What is abnormal and what is excluded; of a mask picture as finely as the overview shows it."""
    if isinstance(annotation, AbnormalMask):
        return annotation.outlines(pixel_level0_px), ()
    return (annotation.abnormal, annotation.excluded) if annotation else ((), ())


def _rings(outlines: Sequence[Outline]) -> Iterator[Float64[np.ndarray, "corner xy"]]:
    """The lines around areas and around their holes, in level-0 pixels."""
    for part in shapely.get_parts([outline.polygon for outline in outlines]):
        for ring in (part.exterior, *part.interiors):
            yield np.asarray(ring.coords, np.float64)[:, :2]


def _compared(
    detector: str, one: Evidence, measured: Mapping[str, Measure | str], downsample: Float64[np.ndarray, " xy"]
) -> ComparedMap:
    """Overview and grid begin where the slide's bounds do."""
    rows, columns = one.shape
    width, height = np.array([columns, rows]) * one.tile_grid.stride_level0_px / downsample
    z_99, dice = (None if measured[name] is None else float(measured[name] or 0) for name in ("z_99", "dice"))
    return ComparedMap(detector, one.z_eroded, (0.0, 0.0, float(width), float(height)), z_99=z_99, dice=dice)
