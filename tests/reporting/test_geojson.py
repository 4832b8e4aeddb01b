"""What the writer puts into QuPath's files, checked by reading them back."""

import gzip
import json
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from shapely.geometry import shape

from wsi_anomaly import __version__
from wsi_anomaly.reporting.geojson import (
    MAX_FEATURES,
    Origin,
    Region,
    SlideFrame,
    TileTable,
    qupath_outline,
    write_importer,
    write_regions,
    write_tiles,
)
from wsi_anomaly.reporting.geojson_contract import validate_geojson

FRAME = SlideFrame(
    slide_id="S1",
    file_name="S1.mrxs",
    size_level0_px=(9000, 8000),
    bounds_level0_px=(1000, 2000, 3000, 4000),
    has_bounds=True,
    mpp=(0.25, 0.25),
    mpp_source="metadata",
)
ORIGIN = Origin(detector="autoencoder", threshold_z=3.0, run="r1", z_from="held-out normal slides")


def tiles_at(*origins: tuple[int, int], z: list[float] | None = None) -> TileTable:
    """Tiles of 512 pixels with these origins."""
    n = len(origins)
    return TileTable(
        index=np.arange(n) * 10,
        origins_level0_px=np.array(origins, dtype=np.int64).reshape(n, 2),
        footprint_level0_px=(512.0, 512.0),
        z=np.array(z if z is not None else [0.0] * n, dtype=np.float32),
        measurements={"tissue fraction": np.linspace(0.5, 1.0, n, dtype=np.float32)},
    )


def read(path: Path) -> dict[str, Any]:
    """The whole file."""
    content: dict[str, Any] = json.loads(
        gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    )
    return content


def test_tiles_are_whole_pixel_rectangles_counted_from_the_bounds(tmp_path: Path) -> None:
    """What QuPath crops away is subtracted."""
    (path,) = write_tiles(tmp_path, FRAME, tiles_at((1100, 2300)), ORIGIN)
    (feature,) = read(path)["features"]
    assert path.name == "S1.tiles.geojson.gz"
    assert feature["geometry"] == {
        "type": "Polygon",
        "coordinates": [[[100, 300], [612, 300], [612, 812], [100, 812], [100, 300]]],
    }


def test_tiles_are_clipped_to_the_bounds_and_dropped_outside(tmp_path: Path) -> None:
    """A tile at the border is cut, one beyond it left out, and the others keep their identifiers."""
    whole = write_tiles(tmp_path, FRAME, tiles_at((1100, 2300), (0, 0), (3900, 5900)), ORIGIN)
    features = read(whole[0])["features"]
    assert len(features) == 2
    assert shape(features[1]["geometry"]).bounds == (2900, 3900, 3000, 4000)
    frame = replace(FRAME, bounds_level0_px=(0, 0, 9000, 8000), has_bounds=False)
    all_of_them = read(write_tiles(tmp_path, frame, tiles_at((1100, 2300), (0, 0), (3900, 5900)), ORIGIN)[0])[
        "features"
    ]
    assert [feature["id"] for feature in features] == [all_of_them[0]["id"], all_of_them[2]["id"]]


def test_a_tile_at_the_threshold_has_the_class_and_one_below_has_none(tmp_path: Path) -> None:
    """Density maps and tile-to-annotation count the anomalies alone."""
    table = tiles_at((1000, 2000), (1512, 2000), (2024, 2000), z=[2.99, 3.0, 40.0])
    below, at, above = (
        feature["properties"] for feature in read(write_tiles(tmp_path, FRAME, table, ORIGIN)[0])["features"]
    )
    assert "classification" not in below
    assert at["classification"] == above["classification"] == {"name": "Anomaly", "color": [189, 0, 38]}
    assert {properties["objectType"] for properties in (below, at, above)} == {"tile"}


def test_the_colour_of_a_tile_darkens_with_its_z(tmp_path: Path) -> None:
    """The scale reads without colour vision."""
    table = tiles_at(*[(1000 + 512 * i, 2000) for i in range(5)], z=[-3.0, 1.0, 3.0, 5.0, 90.0])
    colours = [
        feature["properties"]["color"] for feature in read(write_tiles(tmp_path, FRAME, table, ORIGIN)[0])["features"]
    ]
    lightness = [np.dot([0.2126, 0.7152, 0.0722], colour) for colour in colours]
    assert lightness == sorted(lightness, reverse=True)


def test_unknown_values_keep_their_column(tmp_path: Path) -> None:
    """Measurement names are the same for every tile, and a value that is not known is read as such."""
    table = tiles_at((1000, 2000), (1512, 2000), z=[float("nan"), float("inf")])
    (path,) = write_tiles(tmp_path, FRAME, table, ORIGIN)
    unknown, endless = (feature["properties"] for feature in read(path)["features"])
    assert unknown["measurements"] == {"anomaly z": "NaN", "tissue fraction": 0.5}
    assert endless["measurements"]["anomaly z"] == "Infinity"
    assert "color" not in unknown
    assert "classification" not in unknown
    assert "classification" in endless


def test_the_origin_of_the_objects_is_told_before_them(tmp_path: Path) -> None:
    """An importer learns slide, run and frame from the head of the file."""
    (path,) = write_tiles(tmp_path, FRAME, tiles_at((1000, 2000)), ORIGIN)
    content = read(path)
    assert list(content) == ["type", "wsi_anomaly", "features"]
    assert content["wsi_anomaly"] == {
        "schema": 1,
        "version": __version__,
        "slide": "S1.mrxs",
        "slide_id": "S1",
        "run": "r1",
        "detector": "autoencoder",
        "threshold_z": 3.0,
        "z_from": "held-out normal slides",
        "frame": "openslide-bounds",
        "level0_size": [9000, 8000],
        "bounds": [1000, 2000, 3000, 4000],
        "mpp": [0.25, 0.25],
        "mpp_source": "metadata",
        "part": [1, 1],
    }


def test_a_slide_without_bounds_says_so(tmp_path: Path) -> None:
    """The frame is that of level 0."""
    frame = replace(FRAME, bounds_level0_px=(0, 0, 9000, 8000), has_bounds=False)
    (path,) = write_tiles(tmp_path, frame, tiles_at((1100, 2300)), ORIGIN)
    assert read(path)["wsi_anomaly"]["frame"] == "level-0"
    assert shape(read(path)["features"][0]["geometry"]).bounds[:2] == (1100, 2300)


def test_identifiers_tell_slides_detectors_kinds_and_tiles_apart(tmp_path: Path) -> None:
    """The same tile has the same identifier in every export, and no two objects share one."""
    region = Region(shapely.box(1000, 2000, 1500, 2500), "a", {})
    seen = []
    for slide_id in ("S1", "S2"):
        for detector in ("a", "b"):
            frame, origin = replace(FRAME, slide_id=slide_id), replace(ORIGIN, detector=detector)
            paths = write_tiles(tmp_path, frame, tiles_at((1000, 2000), (2000, 3000)), origin)
            paths += write_regions(tmp_path, frame, [region], origin)
            seen += [feature["id"] for path in paths for feature in read(path)["features"]]
    assert len(set(seen)) == len(seen) == 12
    assert all(str(uuid.UUID(identifier)) == identifier for identifier in seen)
    later = write_tiles(tmp_path, frame, tiles_at((1000, 2000)), replace(origin, threshold_z=1.0, run="x"))
    assert read(later[0])["features"][0]["id"] == seen[9]


def test_a_region_is_a_locked_filled_annotation(tmp_path: Path) -> None:
    """It shows without a click, cannot be moved by accident, and keeps its hole."""
    ring = shapely.box(1100, 2100, 1500, 2500).difference(shapely.box(1200, 2200, 1300, 2300))
    (path,) = write_regions(tmp_path, FRAME, [Region(ring, "Region 1", {"area um^2": 9375.0, "max z": 7.1})], ORIGIN)
    (feature,) = read(path)["features"]
    assert path.name == "S1.regions.geojson"
    assert shape(feature["geometry"]).equals(shapely.transform(ring, lambda xy: xy - [1000, 2000]))
    assert feature["properties"] == {
        "objectType": "annotation",
        "name": "Region 1",
        "classification": {"name": "Anomaly", "color": [189, 0, 38]},
        "isLocked": True,
        "measurements": {"area um^2": 9375.0, "max z": 7.1},
        "metadata": {"fillOpacity": "0.2", "wsi_anomaly detector": "autoencoder"},
    }


@pytest.mark.parametrize(
    ("outline", "kind", "area"),
    [
        (shapely.Polygon([(1000, 2000), (1100, 2100), (1100, 2000), (1000, 2100)]), "MultiPolygon", 5000),
        (
            shapely.GeometryCollection(
                [shapely.box(1000, 2000, 1100, 2100), shapely.box(1050, 2000, 1150, 2100), shapely.Point(1500, 2500)]
            ),
            "Polygon",
            15000,
        ),
        (shapely.MultiPolygon([shapely.box(1000, 2000, 1100, 2100)]), "Polygon", 10000),
        (
            shapely.MultiPolygon([shapely.box(1000, 2000, 1100, 2100), shapely.box(1050, 2000, 1150, 2100)]),
            "Polygon",
            15000,
        ),
        (shapely.box(0, 0, 1100, 2100), "Polygon", 10000),
        (
            shapely.MultiPolygon([shapely.box(1000, 2000, 1100, 2100), shapely.box(1200, 2000, 1200.9, 2001)]),
            "Polygon",
            10000,
        ),
    ],
    ids=["bow tie", "mixed collection", "one part", "overlapping parts", "beyond the bounds", "a speck beside it"],
)
def test_outlines_are_repaired_to_what_qupath_reads(outline: Any, kind: str, area: float) -> None:
    """Neither version refuses what is left, and nothing of a pixel or more is lost."""
    repaired = qupath_outline(outline, FRAME)
    assert repaired is not None
    assert repaired.is_valid
    assert (repaired.geom_type, repaired.area) == (kind, area)


def test_without_objects_there_is_no_file(tmp_path: Path) -> None:
    """QuPath complains of empty files, and one from an earlier export would tell a lie."""
    inside, outside = shapely.box(1000, 2000, 1100, 2100), shapely.box(0, 0, 900, 900)
    write_tiles(tmp_path, FRAME, tiles_at((1000, 2000)), ORIGIN)
    write_regions(tmp_path, FRAME, [Region(inside, "a", {})], ORIGIN)
    assert write_tiles(tmp_path, FRAME, tiles_at((0, 0)), ORIGIN) == []
    assert write_regions(tmp_path, FRAME, [Region(outside, "a", {})], ORIGIN) == []
    assert list(tmp_path.iterdir()) == []


def test_files_are_equal_byte_for_byte_on_repetition(tmp_path: Path) -> None:
    """Neither time nor name of the file gets into it."""
    table = tiles_at((1000, 2000), (1512, 2000), z=[1.0, float("nan")])
    first = [path.read_bytes() for path in write_tiles(tmp_path, FRAME, table, ORIGIN)]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert [path.read_bytes() for path in write_tiles(elsewhere, FRAME, table, ORIGIN)] == first
    assert first[0][4:8] == bytes(4)


EXPORT_OF_A_QUARTER_MILLION_TILES = """
import resource, sys
from pathlib import Path
import numpy as np
from wsi_anomaly.reporting.geojson import Origin, SlideFrame, TileTable, write_tiles
index = np.arange(250_000)
table = TileTable(index, np.stack([index % 500, index // 500], axis=1) * 16, (16, 16), np.zeros(len(index)), {})
frame = SlideFrame("S1", "S1.svs", (8000, 8000), (0, 0, 8000, 8000), False, (0.5, 0.5), "metadata")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_tiles(Path(sys.argv[1]), frame, table, Origin("a", 3.0, "r", "normal"))
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(growth * (1 if sys.platform == 'darwin' else 1024))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell how much memory a process used at most")
def test_a_quarter_million_tiles_are_streamed_into_three_files(tmp_path: Path) -> None:
    """No file is more than QuPath can take, memory stays far below the size of the data, and stale parts go."""
    # In a process of its own: a quarter million times, the checks of types that tests run with take minutes.
    command = [sys.executable, "-c", EXPORT_OF_A_QUARTER_MILLION_TILES, str(tmp_path)]
    growth_bytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    paths = sorted(tmp_path.iterdir())
    texts = [gzip.decompress(path.read_bytes()) for path in paths]
    assert [path.name for path in paths] == [f"S1.tiles.{part}geojson.gz" for part in ("2.", "3.", "")]
    assert [text.count(b'"type":"Feature"') for text in texts] == [MAX_FEATURES, 50_000, MAX_FEATURES]
    assert [b'"part":[%d,3]' % part in text[:800] for part, text in zip((2, 3, 1), texts, strict=True)] == [True] * 3
    assert growth_bytes < sum(map(len, texts)) / 2
    write_tiles(tmp_path, FRAME, tiles_at((1000, 2000)), ORIGIN)
    assert [path.name for path in tmp_path.iterdir()] == ["S1.tiles.geojson.gz"]


def test_an_interrupted_export_leaves_the_earlier_file(tmp_path: Path) -> None:
    """A name without .partial is a complete file."""
    (path,) = write_tiles(tmp_path, FRAME, tiles_at((1000, 2000)), ORIGIN)
    before = path.read_bytes()
    uneven = replace(tiles_at((1000, 2000), (1512, 2000)), measurements={"a": np.zeros(2), "b": np.zeros(2)})
    uneven.measurements["b"].resize(1, refcheck=False)
    with pytest.raises(IndexError):
        write_tiles(tmp_path, FRAME, uneven, ORIGIN)
    assert path.read_bytes() == before


def test_the_importer_knows_the_names_that_the_writer_uses(tmp_path: Path) -> None:
    """The script and the files agree on measurement, metadata and the members of the head."""
    script = write_importer(tmp_path).read_text(encoding="utf-8")
    region = Region(shapely.box(1000, 2000, 1100, 2100), "a", {})
    content = read(write_regions(tmp_path, FRAME, [region], ORIGIN)[0])
    assert 'MEASUREMENT = "anomaly z"' in script
    assert f'DETECTOR = "{list(content["features"][0]["properties"]["metadata"])[1]}"' in script
    for member in ("slide", "detector", "bounds", "level0_size"):
        assert member in content["wsi_anomaly"]
        assert f'"{member}"' in script


XY = st.tuples(st.floats(900, 4200), st.floats(1900, 6200))
RINGS = st.lists(XY, min_size=3, max_size=8)
BOXES = st.builds(
    lambda x, y, w, h: shapely.box(x, y, x + w, y + h),
    *(st.integers(950, 1100), st.integers(1950, 2100), st.integers(1, 60), st.integers(1, 60)),
)
POLYGONS = RINGS.map(shapely.Polygon) | st.builds(lambda shell, hole: shapely.Polygon(shell, [hole]), RINGS, RINGS)
SHAPES = (
    POLYGONS
    | BOXES
    | st.lists(POLYGONS, min_size=1, max_size=3).map(shapely.MultiPolygon)
    | st.lists(BOXES, min_size=1, max_size=5).map(shapely.MultiPolygon)
)


COLLAPSED = shapely.Polygon([(900, 1900)] * 3, [[(900, 1901), (900, 1902), (901, 1900)]])


@example(
    outlines=[COLLAPSED, shapely.MultiPolygon([COLLAPSED, shapely.box(1000, 2000, 1100, 2100)])],
    origins=[],
    side=1.0,
    z=2.0,
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    outlines=st.lists(SHAPES, max_size=3),
    origins=st.lists(st.tuples(st.integers(-900, 9000), st.integers(-900, 9000)), max_size=4),
    side=st.floats(0.5, 3000.0),
    z=st.floats(width=32),
)
def test_whatever_is_written_passes_the_contract(
    tmp_path: Path, outlines: list[Any], origins: list[tuple[int, int]], side: float, z: float
) -> None:
    """Holes, touching or overlapping parts, bow-ties and slivers: no fault and no warning."""
    table = replace(tiles_at(*origins, z=[z] * len(origins)), footprint_level0_px=(side, side))
    regions = [Region(outline, "Region", {"max z": z}) for outline in outlines]
    paths = write_tiles(tmp_path, FRAME, table, ORIGIN) + write_regions(tmp_path, FRAME, regions, ORIGIN)
    for path in paths:
        report = validate_geojson(path)
        assert report.faults == ()
        assert report.features > 0
