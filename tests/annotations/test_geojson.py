import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import shapely

from wsi_anomaly.annotations import read_outlines
from wsi_anomaly.errors import AnnotationError

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
HOLE = [[2, 2], [4, 2], [4, 4], [2, 4], [2, 2]]
BOW_TIE = [[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]
OVERLAPPING_ITSELF = [[0, 0], [10, 0], [10, 10], [4, 10], [4, 4], [6, 4], [6, 6], [0, 6], [0, 0]]


def feature(*rings: list[list[int]], classification: object = None) -> dict[str, Any]:
    """One area as QuPath writes it."""
    properties = {"objectType": "annotation"} | ({"classification": classification} if classification else {})
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": list(rings)}, "properties": properties}


def written(folder: Path, content: object) -> Path:
    """The content as a GeoJSON file."""
    path = folder / "outlines.geojson"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("container", ["collection", "list", "feature", "geometry"])
def test_outlines_are_read_from_whatever_holds_them(tmp_path: Path, container: str) -> None:
    """QuPath reads a collection, a list, one feature and a bare geometry."""
    one = feature(SQUARE)
    content = {
        "collection": {"type": "FeatureCollection", "features": [one]},
        "list": [one],
        "feature": one,
        "geometry": one["geometry"],
    }[container]
    (found,) = read_outlines(written(tmp_path, content))
    assert found.polygon.equals(shapely.box(0, 0, 10, 10))
    assert found.class_name == ""


def test_outlines_are_read_from_gzip_and_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Compression is known by the content, whatever the name."""
    text = json.dumps(feature(SQUARE))
    (tmp_path / "a.geojson.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.json").write_text(text, encoding="utf-8-sig")
    assert read_outlines(tmp_path / "a.geojson.gz") == read_outlines(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("classification", "name"),
    [
        (None, ""),
        ("Tumor", "Tumor"),
        ({"name": "Tumor", "color": [200, 0, 0]}, "Tumor"),
        ({"name": "Tumor", "colorRGB": -3670016}, "Tumor"),
        ({"names": ["Tumor", "Positive"], "color": [200, 0, 0]}, "Tumor: Positive"),
    ],
)
def test_the_class_is_read_as_every_version_of_qupath_writes_it(
    tmp_path: Path, classification: object, name: str
) -> None:
    """A name, an object with a name, or the names of a derived class."""
    (found,) = read_outlines(written(tmp_path, feature(SQUARE, classification=classification)))
    assert found.class_name == name


def test_a_hole_stays_a_hole(tmp_path: Path) -> None:
    """100 square pixels without 4."""
    (found,) = read_outlines(written(tmp_path, feature(SQUARE, HOLE)))
    assert found.polygon.area == 96


def test_the_offset_is_added_to_what_qupath_counts_from_the_bounds(tmp_path: Path) -> None:
    """Holes move along."""
    (found,) = read_outlines(written(tmp_path, feature(SQUARE, HOLE)), offset_level0_px=(1000, 200))
    assert found.polygon.bounds == (1000, 200, 1010, 210)
    assert not found.polygon.contains(shapely.Point(1003, 203))


def test_a_bow_tie_keeps_both_its_halves_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each half is a triangle of 25 square pixels."""
    with caplog.at_level(logging.WARNING):
        (found,) = read_outlines(written(tmp_path, [feature(BOW_TIE)]))
    assert found.polygon.is_valid
    assert found.polygon.area == 50
    assert "1 of 1 outlines cross themselves" in caplog.text


def test_where_a_line_overlaps_itself_is_no_hole(tmp_path: Path) -> None:
    """The square that the line goes round twice belongs to the area."""
    (found,) = read_outlines(written(tmp_path, feature(OVERLAPPING_ITSELF)))
    assert found.polygon.is_valid
    assert found.polygon.contains(shapely.Point(5, 5))


def test_features_without_an_area_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Points, lines, empty and broken polygons, and nothing at all."""
    geometries = [
        {"type": "Point", "coordinates": [1, 2]},
        {"type": "LineString", "coordinates": [[0, 0], [5, 5]]},
        {"type": "Polygon", "coordinates": []},
        {"type": "Polygon", "coordinates": [[[0, 0], [5, 5], [0, 0]]]},
        {"type": "Polygon", "coordinates": [[[0, 0], [5, 5], [10, 10], [0, 0]]]},
        {"type": "Polygon", "coordinates": [[[0, 0], [5, float("nan")], [9, 1], [0, 0]]]},
        {"type": "Polygon", "coordinates": [["a", "b"]]},
        {"type": "Polygon"},
        None,
    ]
    features = [{"type": "Feature", "geometry": geometry, "properties": {}} for geometry in geometries]
    with caplog.at_level(logging.WARNING):
        (found,) = read_outlines(written(tmp_path, [*features, feature(SQUARE)]))
    assert found.polygon.area == 100
    assert "9 of 10 features are no areas" in caplog.text


def test_the_children_of_an_area_are_areas_too(tmp_path: Path) -> None:
    """A tumour drawn inside a tissue outline is not lost."""
    parent = feature(SQUARE, classification="Tissue")
    parent["properties"]["childObjects"] = [feature(HOLE, classification="Tumor")]
    assert [found.class_name for found in read_outlines(written(tmp_path, parent))] == ["Tissue", "Tumor"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<ASAP_Annotations/>",
        b"\xff\xfe\x00",
        b"\x1f\x8bnot gzip",
        gzip.compress(b"{}", mtime=0)[:-9],
        b"[" * 100_000,
        b"{}",
        b"[]",
        b"3",
        b'{"type": "FeatureCollection", "features": []}',
        b'{"type": "FeatureCollection", "features": [null, 1, "a"]}',
    ],
)
def test_a_file_without_any_area_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    """No JSON, or JSON that is no GeoJSON."""
    path = tmp_path / "outlines.geojson"
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=r"^outlines\.geojson: "):
        read_outlines(path)


def test_a_file_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    """Without the folders above it."""
    with pytest.raises(AnnotationError, match=r"^nowhere\.json: cannot be read"):
        read_outlines(tmp_path / "nowhere.json")
