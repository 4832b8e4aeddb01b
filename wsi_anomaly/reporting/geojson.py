"""Write scores and regions as QuPath objects. Knows arrays, polygons and files; knows no slide reader and no stage.

The contract with QuPath 0.5 and later, as decided here:

- Tiles go to `<slide_id>.tiles.geojson.gz`, regions to `<slide_id>.regions.geojson`; beyond 100,000 objects a further
  part each, `<slide_id>.tiles.2.geojson.gz` and so on. Without objects there is no file, since QuPath complains of an
  empty one. Parts that an earlier, larger export left behind are removed.
- Coordinates are pixels of the slide as QuPath opens it: level 0 without what lies outside the slide's bounds.
- Tiles at or above the threshold have the class "Anomaly", others have none, so that density maps and "tile
  classifications to annotations" work on the anomalies alone. There is one threshold, hence one class; a colon in its
  name would make QuPath derive further ones. Each tile also has the colour of its z-score.
- Every object of a kind has the same measurements on every slide; an unknown value is the string "NaN".
- Identifiers depend on slide, detector, kind and index alone: a second import replaces, and never doubles.
- The member `wsi_anomaly`, which QuPath ignores, says where the file comes from.
"""

import gzip
import json
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import shapely
from jaxtyping import Float, Int64
from shapely import affinity
from shapely.geometry.base import BaseGeometry

from wsi_anomaly import __version__
from wsi_anomaly.reporting.colours import z_colours

MAX_FEATURES = 100_000
"""Objects in one file. QuPath needs about 5 KB of memory for each while it reads."""

PRECISION_PX = 0.01
"""The grid that QuPath 0.6 and later snaps outlines to."""

ANOMALY_CLASS = {"name": "Anomaly", "color": [189, 0, 38]}
Z_MEASUREMENT = "anomaly z"

_NAMESPACE = uuid.UUID("0f7d0c1e-6c0b-5d52-9d0a-6a8f5f3f9f57")
_BLOCK = 4096
_IMPORTER = "import_wsi_anomaly.groovy"


@dataclass(frozen=True, slots=True)
class SlideFrame:
    """The slide as QuPath opens it."""

    slide_id: str
    file_name: str
    """Of the slide, with its suffix: QuPath's image name, by which the importer finds its files."""
    size_level0_px: tuple[int, int]
    bounds_level0_px: tuple[int, int, int, int]
    """x, y, width, height; the whole slide where it has no bounds."""
    has_bounds: bool
    mpp: tuple[float, float]
    mpp_source: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Which run made the objects."""

    detector: str
    threshold_z: float
    run: str
    """Something that names the run: a folder name, a digest."""
    z_from: str
    """What z-scores are measured against."""


@dataclass(frozen=True, slots=True)
class TileTable:
    """The tiles of one slide with what was measured of each."""

    index: Int64[np.ndarray, " tile"]
    origins_level0_px: Int64[np.ndarray, "tile xy"]
    footprint_level0_px: tuple[float, float]
    z: Float[np.ndarray, " tile"]
    measurements: Mapping[str, Float[np.ndarray, " tile"]]
    """Beside the z-score. ASCII names with their unit, the same for every slide."""


@dataclass(frozen=True, slots=True)
class Region:
    """An area over the threshold."""

    polygon: BaseGeometry
    """In level-0 pixels; may have holes and parts, and need not be valid."""
    name: str
    measurements: Mapping[str, float]


def write_tiles(folder: Path, frame: SlideFrame, tiles: TileTable, origin: Origin) -> list[Path]:
    """Write the tiles for QuPath's measurement maps; returns the files, none where no tile lies within the bounds."""
    corners_px = _corners_px(tiles, frame)
    kept = np.flatnonzero(np.all(corners_px[:, 2:] > corners_px[:, :2], axis=1))
    features = _tile_features(tiles, corners_px, kept, frame=frame, origin=origin)
    return _write_parts(folder, frame, origin, kind="tiles", features=features, count=len(kept))


def write_regions(folder: Path, frame: SlideFrame, regions: Sequence[Region], origin: Origin) -> list[Path]:
    """Write the regions as locked annotations; returns the files, none where no region of a pixel or more is left."""
    outlines = ((index, region, qupath_outline(region.polygon, frame)) for index, region in enumerate(regions))
    kept = [(index, region, outline) for index, region, outline in outlines if outline is not None]
    features = (
        _feature(
            _identifier(frame, origin, "region", index), outline.__geo_interface__, _region_properties(region, origin)
        )
        for index, region, outline in kept
    )
    return _write_parts(folder, frame, origin, kind="regions", features=features, count=len(kept))


def write_importer(folder: Path) -> Path:
    """Put the QuPath script that imports a whole run into `folder`."""
    path = folder / _IMPORTER
    path.write_bytes(files("wsi_anomaly.reporting").joinpath(_IMPORTER).read_bytes())
    return path


def qupath_outline(polygon: BaseGeometry, frame: SlideFrame) -> BaseGeometry | None:
    """A level-0 outline as QuPath can read it, in its frame; None if nothing is left of it.

    It is valid, clipped to the bounds, and has no part below 1 px²: QuPath 0.5 refuses a multipolygon of one part,
    0.6 one that crosses or overlaps itself.
    """
    x, y, width, height = frame.bounds_level0_px
    seen = shapely.intersection(_polygonal(polygon), shapely.box(x, y, x + width, y + height))
    snapped = shapely.set_precision(affinity.translate(_polygonal(seen), -x, -y), PRECISION_PX)
    parts = [part for part in shapely.get_parts(_polygonal(snapped)) if part.area >= 1.0]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)


def _polygonal(geometry: BaseGeometry) -> BaseGeometry:
    """Valid, and without the points and lines that repairs and cuts leave behind."""
    # The other method of shapely fails where a ring has collapsed.
    repaired = shapely.make_valid(geometry, method="structure", keep_collapsed=False)
    pieces = shapely.get_parts(shapely.get_parts(repaired))
    return shapely.union_all([piece for piece in pieces if piece.geom_type == "Polygon"])


def _corners_px(tiles: TileTable, frame: SlideFrame) -> Int64[np.ndarray, "tile x0y0x1y1"]:
    """Whole-pixel corners in QuPath's frame, clipped to it."""
    x, y, width, height = frame.bounds_level0_px
    ends = np.rint(tiles.origins_level0_px + np.asarray(tiles.footprint_level0_px)).astype(np.int64)
    corners = np.concatenate([tiles.origins_level0_px, ends], axis=1) - np.array([x, y, x, y])
    clipped: Int64[np.ndarray, "tile x0y0x1y1"] = np.clip(corners, 0, np.array([width, height, width, height]))
    return clipped


def _tile_features(
    tiles: TileTable,
    corners_px: Int64[np.ndarray, "tile x0y0x1y1"],
    kept: Int64[np.ndarray, " kept"],
    *,
    frame: SlideFrame,
    origin: Origin,
) -> Iterator[str]:
    for start in range(0, len(kept), _BLOCK):
        block = kept[start : start + _BLOCK]
        z = tiles.z[block].astype(np.float64)
        columns = {Z_MEASUREMENT: z, **{name: column[block] for name, column in tiles.measurements.items()}}
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        looks = zip(z_colours(z).tolist(), np.isnan(z).tolist(), (z >= origin.threshold_z).tolist(), strict=True)
        places = zip(tiles.index[block].tolist(), corners_px[block].tolist(), strict=True)
        for (index, corners), look, row in zip(places, looks, rows, strict=True):
            properties = _tile_properties(dict(zip(columns, row, strict=True)), *look)
            yield _feature(_identifier(frame, origin, "tile", index), _rectangle(corners), properties)


def _tile_properties(values: dict[str, float], colour: list[int], unknown: bool, anomalous: bool) -> dict[str, Any]:  # noqa: FBT001
    properties: dict[str, Any] = {"objectType": "tile"}
    if anomalous:
        properties["classification"] = ANOMALY_CLASS
    if not unknown:
        properties["color"] = colour
    return {**properties, "measurements": _measurements(values)}


def _region_properties(region: Region, origin: Origin) -> dict[str, Any]:
    return {
        "objectType": "annotation",
        "name": region.name,
        "classification": ANOMALY_CLASS,
        "isLocked": True,
        "measurements": _measurements(region.measurements),
        # The importer recognises the regions of an earlier import by their detector.
        "metadata": {"fillOpacity": "0.2", "wsi_anomaly detector": origin.detector},
    }


def _rectangle(corners: list[int]) -> dict[str, Any]:
    x0, y0, x1, y1 = corners
    return {"type": "Polygon", "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]}


def _feature(identifier: str, geometry: Mapping[str, Any], properties: Mapping[str, Any]) -> str:
    return _json({"type": "Feature", "id": identifier, "geometry": geometry, "properties": properties})


def _identifier(frame: SlideFrame, origin: Origin, kind: str, index: int) -> str:
    return str(uuid.uuid5(_NAMESPACE, json.dumps([frame.slide_id, origin.detector, kind, index])))


def _measurements(values: Mapping[str, float]) -> dict[str, float | str]:
    return {name: _number(value) for name, value in values.items()}


def _number(value: float) -> float | str:
    """To seven digits, which is what QuPath keeps; what JSON has no number for as text."""
    if math.isfinite(value):
        return float(f"{value:.7g}")
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _write_parts(
    folder: Path, frame: SlideFrame, origin: Origin, *, kind: str, features: Iterator[str], count: int
) -> list[Path]:
    suffix = ".geojson.gz" if kind == "tiles" else ".geojson"
    parts = math.ceil(count / MAX_FEATURES)

    def path_of(part: int) -> Path:
        return folder / f"{frame.slide_id}.{kind}{'' if part == 1 else f'.{part}'}{suffix}"

    paths = [path_of(part) for part in range(1, parts + 1)]
    for part, path in enumerate(paths, start=1):
        with _replacing(path) as stream:
            header = _json(_provenance(frame, origin, (part, parts)))
            stream.write(f'{{"type":"FeatureCollection","wsi_anomaly":{header},"features":['.encode())
            for position, feature in enumerate(islice(features, MAX_FEATURES)):
                stream.write(f"{',' if position else ''}\n{feature}".encode())
            stream.write(b"\n]}\n")
    stale = parts + 1
    while path_of(stale).exists():
        path_of(stale).unlink()
        stale += 1
    return paths


def _provenance(frame: SlideFrame, origin: Origin, part: tuple[int, int]) -> dict[str, Any]:
    return {
        "schema": 1,
        "version": __version__,
        "slide": frame.file_name,
        "slide_id": frame.slide_id,
        "run": origin.run,
        "detector": origin.detector,
        "threshold_z": origin.threshold_z,
        "z_from": origin.z_from,
        "frame": "openslide-bounds" if frame.has_bounds else "level-0",
        "level0_size": frame.size_level0_px,
        "bounds": frame.bounds_level0_px,
        "mpp": frame.mpp,
        "mpp_source": frame.mpp_source,
        "part": part,
    }


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO | gzip.GzipFile]:
    """A file that takes its name when it is complete; compressed without name and time: equal content, equal bytes."""
    unfinished = path.with_name(f"{path.name}.partial")
    with unfinished.open("wb") as raw:
        if path.suffix == ".gz":
            with closing(gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0)) as packed:
                yield packed
        else:
            yield raw
    unfinished.replace(path)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
