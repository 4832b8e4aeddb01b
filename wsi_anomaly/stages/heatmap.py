"""Stage `heatmap`: how far does each place deviate? Reads tiles, scores, a reference; writes `heatmap.zarr`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from wsi_anomaly.errors import ModelError
from wsi_anomaly.imaging.geometry import Grid
from wsi_anomaly.imaging.heatmap import erode, on_grid, slide_scores
from wsi_anomaly.imaging.zscore import z_scores
from wsi_anomaly.options import Options
from wsi_anomaly.reporting.pictures import ZSummary, write_heatmap
from wsi_anomaly.storage.arrays import read_array, read_attributes, write_arrays
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.record import Recipe, Record, Work, current_record, read_record, writing
from wsi_anomaly.storage.reference import Reference
from wsi_anomaly.storage.scores import read_scores
from wsi_anomaly.storage.tiles import TileStore

FORMAT_VERSION = 1


class HeatmapOptions(Options):
    """How the heat map is read."""

    scores: tuple[str, ...] = ()
    """The detector's scores whose z-scores are averaged; empty means its first one."""
    erosion: bool = True
    """Whether a cell takes the least z of two by two cells, as in the paper: noise goes, and what is one tile large."""
    threshold_z: float = 2.0
    """Eroded z above which tissue belongs to a region."""


def map_slide(folder: SlideFolder, reference: Reference, options: HeatmapOptions) -> Record:
    """Make the heat map of a slide, unless that has been done with the same scores, reference and options.

    Raises:
        MissingOutputError: the stage `score` has not run.
        ModelError: the reference does not know one of the scores.
    """
    inputs = {"scores": read_record(folder.root, "score").digest, "reference": reference.digest}
    recipe = Recipe("heatmap", FORMAT_VERSION, options.model_dump(mode="json"), inputs)
    if done := current_record(folder.root, recipe):
        return done
    store = TileStore(folder.tiles)
    z_tile = z_of_tiles(folder, reference, options)
    z = on_grid(z_tile, store.places.cells, store.grid.shape)
    eroded = erode(z) if options.erosion else z
    cell_um2 = (store.attributes["stride_px"] * store.attributes["tile_mpp"]) ** 2
    z_max, z_99 = slide_scores(eroded)
    facts = {
        "z_max": z_max,
        "z_99": z_99,
        "area_over_0_um2": float((eroded > 0).sum() * cell_um2),
        "area_over_threshold_um2": float((eroded > options.threshold_z).sum() * cell_um2),
        "tissue_um2": float(np.isfinite(z).sum() * cell_um2),
        "erosion": options.erosion,
        "threshold_z": options.threshold_z,
        "z_from": reference.source,
    }
    with writing(folder.root, recipe) as work:
        geometry = {name: store.attributes[name] for name in ("slide_id", "grid", "tile_px", "tile_mpp", "stride_px")}
        write_arrays(
            work.folder / folder.heatmap.name, {"z": z, "z_eroded": eroded, "z_tile": z_tile}, geometry | facts
        )
        _write_picture(work, folder, store.grid, eroded=eroded, facts=facts)
        work.facts.update(facts)
    return read_record(folder.root, "heatmap")


def z_of_tiles(folder: SlideFolder, reference: Reference, options: HeatmapOptions) -> Float64[np.ndarray, " tile"]:
    """The mean of the chosen z-scores; NaN for tiles without a score.

    Raises:
        ModelError: the reference, or what was scored, does not know one of them.
    """
    scores, names = read_scores(folder.scores)
    chosen = options.scores or names[:1]
    for name in chosen:
        if name not in names or name not in reference.scores:
            raise ModelError(
                f"{folder.slide_id}: there is no score '{name}' (scored: {', '.join(names)}; in the reference: "
                f"{', '.join(reference.scores)}). Correct 'scores' in [heatmap] or score again with the right model."
            )
    columns = [names.index(name) for name in chosen]
    return np.asarray(z_scores(scores[:, columns], [reference.scores[name] for name in chosen]).mean(1))


def _write_picture(
    work: Work, folder: SlideFolder, grid: Grid, *, eroded: Float32[np.ndarray, "row column"], facts: Mapping[str, Any]
) -> None:
    attributes = read_attributes(folder.tissue)
    across, down = attributes["overview_downsample"]
    write_heatmap(
        work.folder / folder.heatmap_picture.name,
        read_array(folder.tissue, "overview"),
        eroded,
        overview_mpp=across * attributes["mpp"][0],
        grid_extent_px=(
            0.0,
            0.0,
            grid.shape[1] * grid.stride_level0_px[0] / across,
            grid.shape[0] * grid.stride_level0_px[1] / down,
        ),
        slide_id=folder.slide_id,
        summary=ZSummary(
            z_max=facts["z_max"],
            z_99=facts["z_99"],
            threshold_z=facts["threshold_z"],
            area_over_um2=facts["area_over_threshold_um2"],
            z_from=facts["z_from"],
        ),
    )
