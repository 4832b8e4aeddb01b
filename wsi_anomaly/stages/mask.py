"""Stage `mask`: where on the slide is tissue? Reads the slide or a user's mask; writes `tissue.zarr`."""

import logging
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from wsi_anomaly.annotations import rasterise, read_mask, read_outlines
from wsi_anomaly.cohort import CohortSlide
from wsi_anomaly.errors import NoTissueError
from wsi_anomaly.imaging.tissue import TissueOptions, looks_brightfield, tissue_mask
from wsi_anomaly.slides import Slide, fingerprint
from wsi_anomaly.storage.arrays import write_arrays
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.record import Recipe, Record, current_record, read_record, writing

FORMAT_VERSION = 1
_PICTURES = {".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"}

log = logging.getLogger(__name__)


def mask_slide(slide: CohortSlide, folder: SlideFolder, options: TissueOptions) -> Record:
    """Find the tissue of a slide, unless that has been done with the same options.

    Raises:
        SlideError: the slide cannot be read, its mpp is not known, or it has no tissue.
        AnnotationError: the user's mask cannot be used.
    """
    recipe = _recipe(slide, options)
    if done := current_record(folder.root, recipe):
        return done
    with Slide.open(slide.path, mpp=slide.mpp) as opened, writing(folder.root, recipe) as work:
        for warning in opened.warnings:
            log.warning("%s", warning)
        overview, readable = opened.overview(options.mpp)
        brightfield = looks_brightfield(overview)
        if not brightfield:
            log.warning(
                "%s: does not look like a stained brightfield slide (dark background: fluorescence?). "
                "Scores of a model fitted on stained tissue mean nothing on it.",
                slide.slide_id,
            )
        if slide.mask is None:
            tissue = tissue_mask(overview, options, readable=readable)
        else:
            tissue = _mask_of_user(slide.mask, opened, overview)
        if not tissue.any():
            source = f"the mask {slide.mask.name}" if slide.mask else "the slide"
            raise NoTissueError(
                f"{slide.slide_id}: there is no tissue on {source}. If you see some, give a mask (column 'mask' of "
                "the CSV) or change [tissue] in the pipeline file."
            )
        write_arrays(
            work.folder / folder.tissue.name,
            {"tissue": tissue, "readable": readable, "overview": overview},
            _attributes(slide, opened, overview) | {"brightfield": brightfield},
        )
        work.facts.update({"tissue_fraction": float(tissue.mean()), "brightfield": brightfield})
    return read_record(folder.root, "mask")


def mask_is_current(slide: CohortSlide, folder: SlideFolder, options: TissueOptions) -> bool:
    """Whether `mask_slide` would have nothing to do."""
    return current_record(folder.root, _recipe(slide, options)) is not None


def _recipe(slide: CohortSlide, options: TissueOptions) -> Recipe:
    inputs = {"slide": fingerprint(slide.path)}
    if slide.mask:
        inputs["mask"] = fingerprint(slide.mask)
    return Recipe("mask", FORMAT_VERSION, options.model_dump() | {"mpp_given": slide.mpp}, inputs)


def _attributes(slide: CohortSlide, opened: Slide, overview: UInt8[np.ndarray, "row column rgb"]) -> dict[str, object]:
    _, _, width, height = opened.bounds_level0_px
    return {
        "slide_id": slide.slide_id,
        "file_name": slide.path.name,
        "reader": opened.reader,
        "vendor": opened.vendor,
        "size_level0_px": list(opened.size_level0_px),
        "bounds_level0_px": list(opened.bounds_level0_px),
        "has_bounds": opened.has_bounds,
        "mpp": list(opened.mpp),
        "mpp_source": opened.mpp_source,
        # Level-0 pixels for one overview pixel, x and y: exact, since the overview has whole pixels.
        "overview_downsample": [width / overview.shape[1], height / overview.shape[0]],
    }


def _mask_of_user(
    path: Path, opened: Slide, overview: UInt8[np.ndarray, "row column rgb"]
) -> Bool[np.ndarray, "row column"]:
    """The user's mask at the resolution of the overview."""
    x, y, width, height = opened.bounds_level0_px
    shape = overview.shape[:2]
    if path.suffix.lower() in _PICTURES:
        return read_mask(
            path, shape=shape, size_level0_px=opened.size_level0_px, bounds_level0_px=(x, y, width, height)
        )
    outlines = read_outlines(path, offset_level0_px=(x, y))
    downsample = (width / shape[1], height / shape[0])
    return rasterise(outlines, shape=shape, origin_level0_px=(x, y), downsample=downsample)
