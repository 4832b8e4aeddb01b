"""The lesion level: which lesions a detector finds at how many false alarms a slide (FROC). Reads no run folder."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64

from wsi_anomaly.annotations import Lesions, lesions_of
from wsi_anomaly.imaging.froc import FALSE_POSITIVES, FrocCurve, SlideFindings, froc, peaks_of, slide_findings
from wsi_anomaly.stages.evaluate.evidence import Evidence
from wsi_anomaly.stages.evaluate.protocol import Protocol

SUPPRESSION_UM = 187.0
"""How near two detections may not lie: 768 px at level 0 of Camelyon16, the radius of Liu et al. (arXiv 1703.02442)."""

Hits = tuple[Int64[np.ndarray, " hit"], Int64[np.ndarray, " hit"]]
"""Numbers of tiles or detections, and beside each that of a lesion which it hits."""

_NO_LESIONS = Lesions(np.empty(0, object), np.empty(0, np.bool_))
_NO_HITS: Hits = (np.empty(0, np.int64), np.empty(0, np.int64))


def lesion_level(
    evidence: Sequence[Evidence], protocol: Protocol
) -> tuple[FrocCurve | None, dict[str, float | int | None]]:
    """The FROC curve over all slides whose truth is known, and its measures; None without a lesion to find.

    Lesions are those of `lesions_of`. A detection is a cell of the eroded map that no higher one within 187 µm
    suppresses, whatever its z: thresholds come with the curve. False positives are averaged over all these slides,
    normal ones too, as the challenge does. Those "at the threshold" are detections above the protocol's `threshold_z`.

    Raises:
        AnnotationError: a mask cannot be read.
    """
    known = [one for one in evidence if one.share is not None]
    lesions = [_NO_LESIONS if one.annotation is None else lesions_of(one.annotation, one.mpp) for one in known]
    # The challenge asks whether a point lies in a lesion. What is detected here are tiles: nothing says where in its
    # tile an anomaly lies, and the centre of a tile may lie beside a lesion that is smaller. So a tile hits every
    # lesion that it shows a part of.
    touched = [
        found.touched(one.tile_boxes) if len(found) else _NO_HITS for one, found in zip(known, lesions, strict=True)
    ]
    slides = [_findings(*slide) for slide in zip(known, lesions, touched, strict=True)]
    curve = froc(slides)
    wanted = sum(len(slide.lesions) for slide in slides)
    found = sum(int((slide.lesions > protocol.threshold_z).sum()) for slide in slides)
    false = sum(int((slide.false_positives > protocol.threshold_z).sum()) for slide in slides)
    measures: dict[str, float | int | None] = {
        "lesions": wanted,
        "ignored_lesions": sum(int(one.isolated.sum()) for one in lesions),
        "lesions_without_tiles": sum(_without_tiles(*slide) for slide in zip(lesions, touched, strict=True)),
        "froc_score": curve.score if curve else None,
    }
    measures |= {f"froc_sensitivity_at_{rate:g}": curve.at(rate) if curve else None for rate in FALSE_POSITIVES}
    return curve, measures | {
        "lesion_sensitivity_at_threshold": found / wanted if wanted else None,
        "false_positives_at_threshold": false / len(slides) if slides else None,
    }


def _findings(one: Evidence, lesions: Lesions, touched: Hits) -> SlideFindings:
    peaks = peaks_of(one.z_eroded, SUPPRESSION_UM / one.cell_um)
    detection_of_cell = np.full(one.shape, -1)
    detection_of_cell[tuple(peaks.T)] = np.arange(len(peaks))
    tile, lesion = touched
    detection = detection_of_cell[tuple(one.cells[tile].T)]
    confidences: Float32[np.ndarray, " detection"] = one.z_eroded[tuple(peaks.T)]
    detected = detection >= 0
    return slide_findings(confidences, (detection[detected], lesion[detected]), lesions.isolated)


def _without_tiles(lesions: Lesions, touched: Hits) -> int:
    """How many lesions to find no tile touches: mostly because the tissue mask leaves them out."""
    wanted = np.flatnonzero(~lesions.isolated)
    return int(np.isin(wanted, touched[1], invert=True).sum())
