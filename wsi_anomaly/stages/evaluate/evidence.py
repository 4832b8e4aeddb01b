"""What is known of each slide: the detector's z and a pathologist's truth, on one tile grid. Measures nothing."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32

from wsi_anomaly.annotations import (
    AbnormalMask,
    Annotation,
    Frame,
    Matched,
    Meaning,
    SlideLabel,
    abnormal_fraction,
    read_annotation,
)
from wsi_anomaly.errors import AnnotationError, MissingOutputError
from wsi_anomaly.imaging.heatmap import SlideScores, erode, on_grid, slide_scores
from wsi_anomaly.stages.evaluate.protocol import Protocol
from wsi_anomaly.storage.arrays import read_array, read_attributes
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.record import find_record
from wsi_anomaly.storage.tiles import TileStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One slide as one detector sees it, and as people do."""

    slide_id: str
    label: SlideLabel
    share: Float64[np.ndarray, " tile"] | None
    """Of each tile that is abnormal; None for an abnormal slide without annotation."""
    z_tile: Float64[np.ndarray, " tile"]
    """Before erosion; NaN where there is none."""
    ranks: Float64[np.ndarray, " tile"] | None
    """The share of the cohort's tiles that lie lower, where the protocol asks for it."""
    cells: Int32[np.ndarray, "tile rowcol"]
    shape: tuple[int, int]
    cell_um: float
    folder: SlideFolder
    annotation: Annotation | AbnormalMask | None

    def grid(self, values: Float64[np.ndarray, " tile"]) -> Float32[np.ndarray, "row column"]:
        """Values of the tiles on the slide's grid, NaN elsewhere."""
        return on_grid(values, self.cells, self.shape)

    @property
    def z(self) -> Float32[np.ndarray, "row column"]:
        """Before erosion."""
        return self.grid(self.z_tile)

    @property
    def z_eroded(self) -> Float32[np.ndarray, "row column"]:
        """After one erosion."""
        return erode(self.z)

    @property
    def truth(self) -> Bool[np.ndarray, "row column"]:
        """The cells that the annotation touches."""
        share = np.zeros(len(self.cells)) if self.share is None else self.share
        return np.nan_to_num(self.grid(share)) > 0

    def scores(self, protocol: Protocol) -> SlideScores:
        """Z_MAX and Z_99."""
        values = self.ranks if protocol.slide_scores_of == "ranks" and self.ranks is not None else self.z_tile
        return slide_scores(erode(self.grid(values)))


def gather(
    run: RunFolder, truth: Matched, protocol: Protocol, groups: Mapping[str, Meaning] = MappingProxyType({})
) -> list[Evidence]:
    """All slides of a run that have a heat map.

    A slide that nobody labelled is abnormal if something abnormal is annotated on it, else normal.

    Raises:
        MissingOutputError: no slide has a heat map.
        AnnotationError: an annotation cannot be read.
    """
    folders = mapped_slides(run)
    evidence = [_evidence(folder, truth, groups) for folder in folders]
    if protocol.z_from == "cohort":
        evidence = _against_cohort(evidence)
    return _ranked(evidence) if "ranks" in {protocol.slide_scores_of, protocol.specificity_of} else evidence


def mapped_slides(run: RunFolder) -> list[SlideFolder]:
    """The slides with a heat map.

    Raises:
        MissingOutputError: there is none.
    """
    folders = [folder for folder in run.slides() if find_record(folder.root, "heatmap")]
    if not folders:
        raise MissingOutputError(f"{run.root}: no slide has a heat map. Run: wsi-anomaly run SLIDES -o {run.root}")
    return folders


def _evidence(folder: SlideFolder, truth: Matched, groups: Mapping[str, Meaning]) -> Evidence:
    store, slide_id = TileStore(folder.tiles), folder.slide_id
    path, label = truth.annotations.get(slide_id), truth.labels.get(slide_id)
    annotation = _annotation(path, folder, groups) if path else None
    share: Float64[np.ndarray, " tile"] | None = np.zeros(len(store))
    if annotation is not None:
        boxes = np.hstack([store.places.origins, store.places.origins + np.array(store.grid.footprint_level0_px)])
        share = abnormal_fraction(annotation, boxes.astype(np.float64))
    elif label is not None and label.abnormal:
        share = None
    if label is None:
        label = SlideLabel(abnormal=share is not None and bool(share.any()))
    return Evidence(
        slide_id,
        label,
        share,
        z_tile=np.asarray(read_array(folder.heatmap, "z_tile"), np.float64),
        ranks=None,
        cells=store.places.cells,
        shape=store.grid.shape,
        cell_um=float(store.attributes["stride_px"] * store.attributes["tile_mpp"]),
        folder=folder,
        annotation=annotation,
    )


def _annotation(path: Path, folder: SlideFolder, groups: Mapping[str, Meaning]) -> Annotation | AbnormalMask:
    attributes = read_attributes(folder.tissue)
    width, height = attributes["size_level0_px"]
    x, y, across, down = attributes["bounds_level0_px"]
    try:
        annotation = read_annotation(path, frame=Frame((width, height), (x, y, across, down)), groups=groups)
    except AnnotationError as error:
        raise AnnotationError(f"{folder.slide_id}: {error}") from error
    for line in annotation.report if isinstance(annotation, Annotation) else ():
        log.warning("%s", line)
    return annotation


def _against_cohort(evidence: Sequence[Evidence]) -> list[Evidence]:
    """Mean 0 and deviation 1 over all tiles of the cohort; where all are equal, 0."""
    everything = np.concatenate([one.z_tile for one in evidence])
    mean, deviation = np.nanmean(everything), np.nanstd(everything) or 1.0
    return [replace(one, z_tile=(one.z_tile - mean) / deviation) for one in evidence]


def _ranked(evidence: Sequence[Evidence]) -> list[Evidence]:
    """With the percentile rank of each tile among all of the cohort, 0 to 1; ties share their highest."""
    everything = np.concatenate([one.z_tile for one in evidence])
    ordered = np.sort(everything[np.isfinite(everything)])

    def ranks(z: Float64[np.ndarray, " tile"]) -> Float64[np.ndarray, " tile"]:
        return np.where(np.isfinite(z), np.searchsorted(ordered, z, side="right") / len(ordered), np.nan)

    return [replace(one, ranks=ranks(one.z_tile)) for one in evidence]


def without_truth(evidence: Mapping[str, Sequence[Evidence]]) -> tuple[str, ...]:
    """Abnormal slides that nobody annotated: they count at the slide level only."""
    return tuple(dict.fromkeys(one.slide_id for slides in evidence.values() for one in slides if one.share is None))
