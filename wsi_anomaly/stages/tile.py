"""Stage `tile`: read the tissue tile by tile. Reads the slide and `tissue.zarr`; writes `tiles.zarr` and a picture."""

import logging
from collections import Counter
from dataclasses import asdict

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from pydantic import Field

from wsi_anomaly.cohort import CohortSlide
from wsi_anomaly.errors import CorruptSlideError, NoTissueError
from wsi_anomaly.execution import Progress, read_ahead, report
from wsi_anomaly.imaging.geometry import Grid, area_fraction
from wsi_anomaly.options import Options
from wsi_anomaly.reporting.pictures import write_overview
from wsi_anomaly.slides import ReadRecipe, Slide
from wsi_anomaly.storage.arrays import read_array, read_attributes
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.record import Recipe, Record, Work, current_record, read_record, writing
from wsi_anomaly.storage.shards import compressed
from wsi_anomaly.storage.tiles import TilePlaces, TileStatus, TileWriter

FORMAT_VERSION = 1
PICTURE_PX = 1500
TILES_PER_RUN = 16
"""Handing a tile from thread to thread takes a tenth of the time that reading it does; so they come in runs."""

log = logging.getLogger(__name__)


class TileOptions(Options):
    """Which squares are read from a slide."""

    tile_px: int = Field(256, ge=16, le=4096)
    mpp: float = Field(0.5, gt=0.05, le=20)
    """Microns per pixel of the tiles; 0.5 is what is called 20x."""
    stride_px: int = Field(256, ge=1)
    """From one tile to the next; less than `tile_px` makes tiles overlap."""
    min_tissue_fraction: float = Field(0.5, gt=0, le=1)
    """Tiles with a smaller share of tissue are left out; a slide of specks keeps the tile that has most."""
    max_upsampling: float = Field(1.5, ge=1)
    """A slide coarser than this times `mpp` is refused: its detail was never recorded."""


def tile_slide(
    slide: CohortSlide,
    folder: SlideFolder,
    options: TileOptions,
    *,
    threads: int = 1,
) -> Record:
    """Read the tissue tiles of a slide, unless that has been done with the same options.

    Raises:
        MissingOutputError: the stage `mask` has not run.
        SlideError: the slide is too coarse, no tile holds enough tissue, or no tile can be read.
    """
    recipe = _recipe(folder, options)
    if done := current_record(folder.root, recipe):
        return done
    with Slide.open(slide.path, mpp=slide.mpp) as opened, writing(folder.root, recipe) as work:
        read_recipe = opened.recipe(options.mpp, max_upsampling=options.max_upsampling)
        grid = Grid.over(
            opened.bounds_level0_px,
            downsample=read_recipe.downsample,
            tile_px=options.tile_px,
            stride_px=options.stride_px,
        )
        places = _places(folder, grid, options)
        _write_picture(work, folder, grid, places)
        writer = TileWriter(
            work.folder / folder.tiles.name,
            places,
            tile_px=options.tile_px,
            attributes=_attributes(folder, grid, options, read_recipe),
        )
        with writer:
            counts = _read_tiles(opened, read_recipe, places, writer, options=options, threads=threads)
        if counts["corrupt"] == len(places):
            raise CorruptSlideError(
                f"{slide.slide_id}: none of its {len(places)} tissue tiles can be read. Scan again."
            )
        if counts["corrupt"]:
            log.warning("%s: %d of %d tiles cannot be read", slide.slide_id, counts["corrupt"], len(places))
        work.facts.update({"tiles": len(places), **counts})
    return read_record(folder.root, "tile")


def tiles_are_current(folder: SlideFolder, options: TileOptions) -> bool:
    """Whether `tile_slide` would have nothing to do.

    Raises:
        MissingOutputError: the stage `mask` has not run.
    """
    return current_record(folder.root, _recipe(folder, options)) is not None


def _recipe(folder: SlideFolder, options: TileOptions) -> Recipe:
    return Recipe("tile", FORMAT_VERSION, options.model_dump(), {"mask": read_record(folder.root, "mask").digest})


def _places(folder: SlideFolder, grid: Grid, options: TileOptions) -> TilePlaces:
    """The cells with enough tissue.

    Raises:
        NoTissueError: there are none.
    """
    tissue = read_array(folder.tissue, "tissue")
    downsample = np.array(read_attributes(folder.tissue)["overview_downsample"])
    cells = grid.cells()
    origins = grid.origins(cells)
    corners = np.hstack([origins, origins + grid.footprint_level0_px]).astype(np.float64)
    in_overview = (corners - np.tile(grid.origin_level0_px, 2)) / np.tile(downsample, 2)
    fraction = area_fraction(tissue, in_overview)
    if not fraction.any():
        raise NoTissueError(f"{folder.slide_id}: there is no tissue on its tile grid")
    kept = fraction >= options.min_tissue_fraction
    if not kept.any():
        log.warning(
            "%s: no tile has %.0f %% tissue; only the one that has most, %.0f %%, is used",
            folder.slide_id,
            100 * options.min_tissue_fraction,
            100 * fraction.max(),
        )
        kept = fraction == fraction.max()
    return TilePlaces(origins[kept], cells[kept], fraction[kept].astype(np.float32))


def _read_tiles(
    opened: Slide,
    read_recipe: ReadRecipe,
    places: TilePlaces,
    writer: TileWriter,
    *,
    options: TileOptions,
    threads: int,
) -> dict[str, int]:
    """Read all places in order; how many overhang the slide and how many cannot be read."""
    size = (options.tile_px, options.tile_px)
    footprint = (options.tile_px * read_recipe.downsample[0], options.tile_px * read_recipe.downsample[1])

    def read(origins: Int64[np.ndarray, "tile xy"]) -> tuple[list[bytes], list[TileStatus]]:
        chunks, status = [], []
        for x, y in origins.tolist():
            try:
                pixels = opened.read((x, y), size, read_recipe)
            except CorruptSlideError as error:
                log.info("%s", error)
                pixels = np.zeros((*size, 3), np.uint8)
                status.append(TileStatus.CORRUPT)
            else:
                status.append(TileStatus.PADDED if _overhangs(opened, x, y, footprint) else TileStatus.OK)
            chunks += compressed(pixels[None])
        return chunks, status

    counts: Counter[TileStatus] = Counter()
    runs = np.split(places.origins, range(TILES_PER_RUN, len(places), TILES_PER_RUN))
    for chunks, status in read_ahead(read, runs, threads=threads):
        writer.append(chunks, status)
        counts.update(status)
        report(Progress("tile", writer.slide_id, counts.total(), len(places)))
    return {"padded": counts[TileStatus.PADDED], "corrupt": counts[TileStatus.CORRUPT]}


def _overhangs(opened: Slide, x: int, y: int, footprint_level0_px: tuple[float, float]) -> bool:
    """By more than the rounding of its origin."""
    width, height = opened.size_level0_px
    return x + footprint_level0_px[0] > width + 1 or y + footprint_level0_px[1] > height + 1


def _attributes(folder: SlideFolder, grid: Grid, options: TileOptions, read_recipe: ReadRecipe) -> dict[str, object]:
    slide = read_attributes(folder.tissue)
    return slide | {
        "tile_px": options.tile_px,
        "tile_mpp": options.mpp,
        "stride_px": options.stride_px,
        "grid": asdict(grid),
        "read_recipe": asdict(read_recipe),
    }


def _write_picture(work: Work, folder: SlideFolder, grid: Grid, places: TilePlaces) -> None:
    attributes = read_attributes(folder.tissue)
    overview, tissue, shrunk = _thumbnails(folder)
    downsample = np.array(attributes["overview_downsample"]) * shrunk
    width, height = np.array(grid.footprint_level0_px) / downsample
    write_overview(
        work.folder / folder.overview.name,
        overview,
        tissue,
        overview_mpp=float(downsample[0] * attributes["mpp"][0]),
        tile_origins_px=(places.origins - np.array(grid.origin_level0_px)) / downsample,
        tile_size_px=(float(width), float(height)),
        slide_id=folder.slide_id,
    )


def _thumbnails(
    folder: SlideFolder,
) -> tuple[UInt8[np.ndarray, "row column rgb"], Bool[np.ndarray, "row column"], int]:
    """Overview and tissue small enough to draw, and how many times smaller: the memory of a drawing shall not grow."""
    overview = Image.fromarray(read_array(folder.tissue, "overview"))
    shrunk = max(1, max(overview.size) // PICTURE_PX)
    tissue = Image.fromarray(read_array(folder.tissue, "tissue").astype(np.uint8))
    return np.asarray(overview.reduce(shrunk)), np.asarray(tissue.reduce(shrunk)) > 0, shrunk
