"""Stage `export`: findings for QuPath and for spreadsheets. Reads tiles, scores, heat map; writes GeoJSON and CSV."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from wsi_anomaly.imaging import regions
from wsi_anomaly.reporting import geojson
from wsi_anomaly.storage.arrays import read_array, read_attributes
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.record import Recipe, Record, current_record, read_record, writable, writing
from wsi_anomaly.storage.scores import ScoreStatus, read_scores
from wsi_anomaly.storage.tiles import TileStatus, TileStore

FORMAT_VERSION = 1


def export_slide(folder: SlideFolder) -> Record:
    """Write a slide's tiles and regions for QuPath and its tiles as CSV, unless that has been done.

    Raises:
        MissingOutputError: the stage `heatmap` has not run.
    """
    heatmap = read_record(folder.root, "heatmap")
    recipe = Recipe("export", FORMAT_VERSION, {}, {"heatmap": heatmap.digest})
    if done := current_record(folder.root, recipe):
        return done
    store, facts = TileStore(folder.tiles), heatmap.facts
    columns = _columns(folder, store)
    origin = geojson.Origin(
        detector=str(read_attributes(folder.scores)["detector"]),
        threshold_z=facts["threshold_z"],
        run=heatmap.digest[:16],
        z_from=facts["z_from"],
    )
    frame = _frame(store.attributes)
    with writing(folder.root, recipe) as work:
        failed = read_array(folder.scores, "status") == ScoreStatus.FAILED
        _write_table(work.folder / folder.tile_table.name, store, columns, failed)
        geojson.write_tiles(work.folder, frame, _tiles(store, columns), origin)
        found = _regions(folder, store, threshold_z=facts["threshold_z"])
        geojson.write_regions(work.folder, frame, found, origin)
        work.facts.update({"regions": len(found)})
    return read_record(folder.root, "export")


def write_importer(run: RunFolder) -> None:
    """Put the QuPath script that imports all slides into the run folder."""
    with writable(run.root):
        geojson.write_importer(run.root)


def _columns(folder: SlideFolder, store: TileStore) -> dict[str, Float64[np.ndarray, " tile"]]:
    """What is known of each tile, under the names that the CSV and QuPath share; NaN for unreadable tiles."""
    scores, names = read_scores(folder.scores)
    rows, columns = store.places.cells.T
    return {
        "anomaly z": np.asarray(read_array(folder.heatmap, "z_eroded")[rows, columns], np.float64),
        "anomaly z before erosion": read_array(folder.heatmap, "z_tile"),
        **{f"score {name}": np.asarray(scores[:, index], np.float64) for index, name in enumerate(names)},
        "tissue fraction": np.asarray(store.places.tissue_fraction, np.float64),
    }


def _tiles(store: TileStore, columns: Mapping[str, Float64[np.ndarray, " tile"]]) -> geojson.TileTable:
    known = np.flatnonzero(np.isfinite(np.stack(list(columns.values()))).all(axis=0))  # JSON holds no NaN
    return geojson.TileTable(
        index=known,
        origins_level0_px=store.places.origins[known],
        footprint_level0_px=store.grid.footprint_level0_px,
        z=columns[geojson.Z_MEASUREMENT][known],
        measurements={name: values[known] for name, values in columns.items() if name != geojson.Z_MEASUREMENT},
    )


def _regions(folder: SlideFolder, store: TileStore, *, threshold_z: float) -> list[geojson.Region]:
    um2_per_cell = (store.attributes["stride_px"] * store.attributes["tile_mpp"]) ** 2
    found = regions.regions_over(read_array(folder.heatmap, "z_eroded"), threshold_z, store.grid)
    return [
        geojson.Region(
            polygon=region.polygon,
            name=f"Anomaly {number}",
            measurements={
                "anomaly z max": region.z_max,
                "anomaly z mean": region.z_mean,
                "area um^2": region.cells * um2_per_cell,
            },
        )
        for number, region in enumerate(found, start=1)
    ]


def _frame(slide: Mapping[str, Any]) -> geojson.SlideFrame:
    x, y, width, height = slide["bounds_level0_px"]
    return geojson.SlideFrame(
        slide_id=slide["slide_id"],
        file_name=slide["file_name"],
        size_level0_px=(slide["size_level0_px"][0], slide["size_level0_px"][1]),
        bounds_level0_px=(x, y, width, height),
        has_bounds=slide["has_bounds"],
        mpp=(slide["mpp"][0], slide["mpp"][1]),
        mpp_source=slide["mpp_source"],
    )


def _write_table(
    path: Path,
    store: TileStore,
    columns: Mapping[str, Float64[np.ndarray, " tile"]],
    failed: Bool[np.ndarray, " tile"],
) -> None:
    """One row a tile, in the order of the tile store; level-0 pixels of the file, not of QuPath."""
    places = store.places
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["tile", "x_level0_px", "y_level0_px", "row", "column", "status", *columns])
        for index in range(len(store)):
            values = (f"{column[index]:.7g}" if np.isfinite(column[index]) else "" for column in columns.values())
            status = "failed" if failed[index] else TileStatus(int(store.status[index])).name.lower()
            writer.writerow([index, *places.origins[index], *places.cells[index], status, *values])
