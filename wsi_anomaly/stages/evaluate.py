"""Stage `evaluate`: do findings agree with what people say? Reads heat maps, labels, outlines; writes metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from wsi_anomaly.annotations import area_fractions, read_labels, read_outlines
from wsi_anomaly.errors import AnnotationError, MissingOutputError
from wsi_anomaly.imaging.metrics import auroc, dice, iou, tnr
from wsi_anomaly.storage.arrays import read_array, read_attributes
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.record import find_record, write_json
from wsi_anomaly.storage.tiles import TileStore

ABNORMAL_FRACTION = 0.5
"""A tile counts as abnormal from this share inside an outline; tiles cut by an outline less than that are left out."""

Metrics = dict[str, float | int | None]


def evaluate(run: RunFolder, *, labels: Path | None = None, annotations: Path | None = None) -> Metrics:
    """Slide-level AUROC from a CSV of labels, tile-level AUROC from outlines. Also written to `metrics.json`.

    A slide without an outline file has no abnormal tile. AUROC is None where only one class is there.

    Raises:
        MissingOutputError: no slide has a heat map.
        AnnotationError: labels or outlines cannot be read, or none belongs to a slide of this run.
    """
    slides = {folder.slide_id: folder for folder in run.slides() if find_record(folder.root, "heatmap")}
    if not slides:
        raise MissingOutputError(f"{run.root}: no slide has a heat map. Run: wsi-anomaly run SLIDES -o {run.root}")
    metrics: Metrics = {"slides": len(slides)}
    if labels is not None:
        metrics |= _slide_level(slides, read_labels(labels), labels.name)
    if annotations is not None:
        metrics |= _tile_level(slides, annotations)
    write_json(run.metrics, metrics)
    return metrics


def _slide_level(slides: Mapping[str, SlideFolder], labels: Mapping[str, bool], name: str) -> Metrics:
    labelled = [slide_id for slide_id in slides if slide_id in labels]
    if not labelled:
        raise AnnotationError(
            f"{name}: none of its slide_ids ({', '.join(sorted(labels)[:3])}, ...) is a slide of this run "
            f"({', '.join(sorted(slides)[:3])}, ...). Use the slide_ids of slides.csv."
        )
    truth = np.array([labels[slide_id] for slide_id in labelled])
    metrics: Metrics = {"labelled_slides": len(labelled), "abnormal_slides": int(truth.sum())}
    for measure in ("z_max", "z_99"):
        values = [float(read_attributes(slides[slide_id].heatmap)[measure]) for slide_id in labelled]
        metrics[f"slide_auroc_{measure}"] = auroc(np.array(values), truth)
    return metrics


def _tile_level(slides: Mapping[str, SlideFolder], annotations: Path) -> Metrics:
    if not annotations.is_dir():
        raise AnnotationError(f"{annotations}: there is no such folder. Give one with <slide_id>.geojson files.")
    files = {slide_id: annotations / f"{slide_id}.geojson" for slide_id in slides}
    if not any(path.exists() for path in files.values()):
        raise AnnotationError(
            f"{annotations.name}: has no outlines of the slides of this run; they are looked for as "
            f"{next(iter(files.values())).name} and so on. Name them after the slide_ids of slides.csv."
        )
    z = [np.asarray(read_array(folder.heatmap, "z_tile")) for folder in slides.values()]
    share = [_share_inside(folder, files[slide_id]) for slide_id, folder in slides.items()]
    all_z, all_share = np.concatenate(z), np.concatenate(share)
    certain = np.isfinite(all_z) & ((all_share == 0) | (all_share >= ABNORMAL_FRACTION))
    truth = all_share[certain] >= ABNORMAL_FRACTION
    return {
        "tiles": int(certain.sum()),
        "abnormal_tiles": int(truth.sum()),
        "tile_auroc": auroc(all_z[certain], truth),
        **_segmentation(list(slides.values()), share),
    }


def _segmentation(slides: Sequence[SlideFolder], share: Sequence[Float64[np.ndarray, " _"]]) -> Metrics:
    """Eroded z over 0 against the tiles that an outline touches: means over slides, as AnoPILaD reports them."""
    dices, ious, tnrs = [], [], []
    for folder, inside in zip(slides, share, strict=True):
        store = TileStore(folder.tiles)
        rows, columns = store.places.cells[store.readable].T
        found, truth = read_array(folder.heatmap, "z_eroded")[rows, columns] > 0, inside[store.readable] > 0
        if truth.any():
            dices.append(dice(found, truth))
            ious.append(iou(found, truth))
        elif (specificity := tnr(found, truth)) is not None:
            tnrs.append(specificity)
    measures = {"dice_abnormal_slides": dices, "iou_abnormal_slides": ious, "tnr_normal_slides": tnrs}
    return {name: float(np.mean(values)) if values else None for name, values in measures.items()}


def _share_inside(folder: SlideFolder, outlines: Path) -> Float64[np.ndarray, " tile"]:
    """The share of each tile's area that lies inside the outlines."""
    store = TileStore(folder.tiles)
    if not outlines.exists():
        return np.zeros(len(store))
    boxes = np.hstack([store.places.origins, store.places.origins + np.array(store.grid.footprint_level0_px)])
    # QuPath's frame begins where the slide's bounds, and so the grid, do.
    shapes = read_outlines(outlines, offset_level0_px=store.grid.origin_level0_px)
    return area_fractions(shapes, boxes.astype(np.float64))
