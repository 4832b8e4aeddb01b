"""What is known of each slide: the detector's z and a pathologist's truth, on one tile grid. Measures nothing."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from wsi_anomaly.annotations import (
    AbnormalMask,
    Annotation,
    Frame,
    Matched,
    Meaning,
    SlideLabel,
    abnormal_fraction,
    lesions_of,
    read_annotation,
)
from wsi_anomaly.errors import AnnotationError, MissingOutputError
from wsi_anomaly.imaging.geometry import Grid
from wsi_anomaly.imaging.heatmap import SlideScores, erode, on_grid, slide_scores
from wsi_anomaly.stages.evaluate.protocol import Protocol
from wsi_anomaly.storage.arrays import read_array, read_attributes
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.record import find_record
from wsi_anomaly.storage.tiles import TileStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evidence:
    """One slide as one detector sees it, and as people do. Maps are made when they are first asked for."""

    slide_id: str
    label: SlideLabel
    share: Float64[np.ndarray, " tile"] | None
    """Of each tile that is abnormal; None for an abnormal slide on which nothing abnormal is outlined."""
    z_tile: Float64[np.ndarray, " tile"]
    """Before erosion; NaN where there is none."""
    ranks: Float64[np.ndarray, " tile"] | None
    """The share of the cohort's tiles that lie lower, where the protocol asks for it."""
    cells: Int32[np.ndarray, "tile rowcol"]
    tile_grid: Grid
    cell_um: float
    folder: SlideFolder
    annotation: Annotation | AbnormalMask | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the grid."""
        return self.tile_grid.shape

    @property
    def mpp(self) -> tuple[float, float]:
        """Of level 0, along x and y."""
        return _mpp(self.tile_grid, self.cell_um)

    @property
    def tile_boxes(self) -> Float64[np.ndarray, "tile corners"]:
        """What each tile shows, as (x0, y0, x1, y1) in level-0 pixels."""
        return _boxes(self.tile_grid.origins(self.cells), self.tile_grid)

    def grid(self, values: Float64[np.ndarray, " tile"]) -> Float32[np.ndarray, "row column"]:
        """Values of the tiles on the slide's grid, NaN elsewhere."""
        return on_grid(values, self.cells, self.shape)

    @cached_property
    def z(self) -> Float32[np.ndarray, "row column"]:
        """Before erosion."""
        return self.grid(self.z_tile)

    @cached_property
    def z_eroded(self) -> Float32[np.ndarray, "row column"]:
        """After one erosion."""
        return erode(self.z)

    @cached_property
    def truth(self) -> Bool[np.ndarray, "row column"]:
        """The cells that the annotation touches."""
        touched = np.zeros(self.shape, np.bool_)
        if self.share is not None:
            touched[tuple(self.cells[self.share > 0].T)] = True
        return touched

    def scores(self, protocol: Protocol) -> SlideScores:
        """Z_MAX and Z_99."""
        return self._rank_scores if protocol.slide_scores_of == "ranks" and self.ranks is not None else self._z_scores

    @cached_property
    def _z_scores(self) -> SlideScores:
        return slide_scores(self.z_eroded)

    @cached_property
    def _rank_scores(self) -> SlideScores:
        assert self.ranks is not None  # noqa: S101 - for the type checker
        return slide_scores(erode(self.grid(self.ranks)))


def gather(
    run: RunFolder,
    truth: Matched,
    protocol: Protocol,
    groups: Mapping[str, Meaning] = MappingProxyType({}),
    mask_values: frozenset[int] | None = None,
) -> list[Evidence]:
    """All slides of a run that have a heat map. What was mended or left out of annotations is logged.

    A slide that nobody labelled is abnormal if something abnormal is annotated on it, else normal. `mask_values` are
    the numbers in mask pictures that mean abnormal; without any, the one number besides 0.

    Raises:
        MissingOutputError: no slide has a heat map.
        AnnotationError: an annotation cannot be read.
    """
    evidence = [_evidence(folder, truth, groups, mask_values) for folder in mapped_slides(run)]
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


def _evidence(
    folder: SlideFolder, truth: Matched, groups: Mapping[str, Meaning], mask_values: frozenset[int] | None
) -> Evidence:
    store, slide_id = TileStore(folder.tiles), folder.slide_id
    path, label = truth.annotations.get(slide_id), truth.labels.get(slide_id)
    cell_um = float(store.attributes["stride_px"] * store.attributes["tile_mpp"])
    annotation, share = None, np.zeros(len(store))
    outlined = False
    if path is not None:
        with _named(slide_id):
            annotation = _annotation(path, folder, groups, mask_values)
            share = abnormal_fraction(annotation, _boxes(store.places.origins, store.grid))
            # It may lie where there is no tile.
            outlined = bool(share.any() or len(lesions_of(annotation, _mpp(store.grid, cell_um))))
    label = label or SlideLabel(abnormal=outlined)
    if outlined and not label.abnormal:
        log.warning("%s: labelled normal, and something abnormal is annotated on it", slide_id)
    return Evidence(
        slide_id,
        label,
        share if outlined or not label.abnormal else None,
        z_tile=np.asarray(read_array(folder.heatmap, "z_tile"), np.float64),
        ranks=None,
        cells=store.places.cells,
        tile_grid=store.grid,
        cell_um=cell_um,
        folder=folder,
        annotation=annotation,
    )


def _mpp(grid: Grid, cell_um: float) -> tuple[float, float]:
    across, down = grid.stride_level0_px
    return cell_um / across, cell_um / down


def _boxes(origins: Int64[np.ndarray, "tile xy"], grid: Grid) -> Float64[np.ndarray, "tile corners"]:
    return np.hstack([origins, origins + np.array(grid.footprint_level0_px)]).astype(np.float64)


def _annotation(
    path: Path, folder: SlideFolder, groups: Mapping[str, Meaning], mask_values: frozenset[int] | None
) -> Annotation | AbnormalMask:
    attributes = read_attributes(folder.tissue)
    width, height = attributes["size_level0_px"]
    x, y, across, down = attributes["bounds_level0_px"]
    frame = Frame((width, height), (x, y, across, down))
    annotation = read_annotation(path, frame=frame, groups=groups, abnormal_values=mask_values)
    for line in annotation.report:
        log.warning("%s: %s", folder.slide_id, line)
    return annotation


@contextmanager
def _named(slide_id: str) -> Iterator[None]:
    """Messages about annotations name the slide."""
    try:
        yield
    except AnnotationError as error:
        raise AnnotationError(f"{slide_id}: {error}") from error


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
    """Abnormal slides on which nothing abnormal is outlined: they count at the slide level only."""
    return tuple(dict.fromkeys(one.slide_id for slides in evidence.values() for one in slides if one.share is None))
