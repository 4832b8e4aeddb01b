"""Each row of what QuPath reads, refuses and loses, as a fact about the validator."""

import gzip
import json
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsi_anomaly.reporting.geojson_contract import FAULTS_A_RULE, Report, validate_geojson

SQUARE = {"type": "Polygon", "coordinates": [[[0, 0], [8, 0], [8, 8], [0, 8], [0, 0]]]}
HOLE = [[2, 2], [4, 2], [4, 4], [2, 4], [2, 2]]
IDENTIFIER = "0f7d0c1e-6c0b-4d52-9d0a-6a8f5f3f9f57"


def feature(**changes: Any) -> dict[str, Any]:
    """A sound annotation but for `changes`."""
    return {"type": "Feature", "geometry": SQUARE, "properties": {}, **changes}


def with_properties(**properties: Any) -> dict[str, Any]:
    """A sound feature but for these properties."""
    return feature(properties=properties)


def with_geometry(kind: str, coordinates: Any, **more: Any) -> dict[str, Any]:
    """A sound feature but for this geometry."""
    return feature(geometry={"type": kind, "coordinates": coordinates, **more})


def report_of(content: Any, folder: Path) -> Report:
    """What the validator says of `content` (JSON, or text as it stands)."""
    path = folder / "file.geojson"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return validate_geojson(path)


SOUND = {
    "feature collection": {"type": "FeatureCollection", "features": [feature()]},
    "collection with members of its own": {"type": "FeatureCollection", "crs": {}, "name": 1, "features": [feature()]},
    "type after the features": {"features": [feature()], "type": "FeatureCollection"},
    "array of features": [feature(), feature()],
    "array of arrays": [[feature()]],
    "one feature": feature(),
    "bare geometry": SQUARE,
    "identifier": feature(id=IDENTIFIER),
    "no properties": {"type": "Feature", "geometry": SQUARE},
    "plane": with_geometry("Polygon", SQUARE["coordinates"], plane={"c": -1, "z": 0, "t": 0}),
    "ellipse": with_geometry("Polygon", SQUARE["coordinates"], isEllipse=True),
    "nucleus of a cell": feature(nucleusGeometry=SQUARE, properties={"objectType": "cell"}),
    "object types": [with_properties(objectType=kind) for kind in ("annotation", "detection", "tile", "cell", "root")],
    "object type by its short name": with_properties(type="tile"),
    "name": with_properties(name="a"),
    "name that is a number": with_properties(name=7),
    "no class": with_properties(classification=None),
    "class by name": with_properties(classification="A: B"),
    "class with colour": with_properties(classification={"name": "A", "color": [1, 2, 3]}),
    "class with opacity": with_properties(classification={"name": "A", "color": [1, 2, 3, 4]}),
    "class of any colour": with_properties(classification={"name": "A", "color": None}),
    "class of several names": with_properties(classification={"names": ["A", "B"], "color": [1, 2, 3]}),
    "class as once written": with_properties(classification={"name": "A", "colorRGB": -65536}),
    "colour": with_properties(color=[0, 128, 255]),
    "packed colour": with_properties(color=-65536),
    "measurements": with_properties(measurements={"a": 1, "b": 2.5, "c": "NaN", "d": "-Infinity", "e": "1.5"}),
    "measurements as an array": with_properties(measurements=[{"name": "a", "value": 1.5}]),
    "literal NaN": json.dumps(with_properties(measurements={"a NaN \\": float("nan"), "b": -float("inf")})),
    "metadata": with_properties(metadata={"fillOpacity": "0.4", "n": 1, "b": True}),
    "locked": with_properties(isLocked=True),
    "children": with_properties(childObjects=[feature()], objectType="annotation"),
    "children by their short name": with_properties(children=[]),
    "hole": with_geometry("Polygon", [*SQUARE["coordinates"], HOLE]),
    "two parts": with_geometry("MultiPolygon", [SQUARE["coordinates"], [[[x + 20, y] for x, y in HOLE]]]),
    "point": with_geometry("Point", [1, 2]),
    "points": with_geometry("MultiPoint", [[1, 2], [3, 4]]),
    "line": with_geometry("LineString", [[1, 2], [3, 4]]),
    "lines": with_geometry("MultiLineString", [[[1, 2], [3, 4]]]),
    "triangle": with_geometry("Polygon", [[[0, 0], [8, 0], [8, 8], [0, 0]]]),
    "byte order mark": "\ufeff" + json.dumps(feature()),
}

REFUSED = {
    "geometry": [feature(geometry=None), {"type": "Feature", "properties": {}}, feature(geometry=[1])],
    "geometry-type": [with_geometry("Circle", [1, 2]), feature(geometry={"coordinates": []})],
    "geometry-collection": [feature(geometry={"type": "GeometryCollection", "geometries": [SQUARE]})],
    "plane": [
        with_geometry("Point", [1, 2], plane={"c": 0, "z": 0, "t": 0, "x": 0}),
        with_geometry("Point", [1, 2], plane={"c": 0.5}),
    ],
    "ellipse": [with_geometry("Polygon", SQUARE["coordinates"], isEllipse="yes")],
    "coordinates": [
        with_geometry("Polygon", [[0, 0], [1, 1]]),
        with_geometry("Polygon", []),
        with_geometry("Point", ["1", "2"]),
        with_geometry("Point", [True, 2]),
        json.dumps(with_geometry("Point", [float("nan"), 2])),
        with_geometry("LineString", [[1, 2]]),
    ],
    "unclosed": [with_geometry("Polygon", [[[0, 0], [8, 0], [8, 8], [0, 8]]])],
    "invalid-outline": [
        with_geometry("Polygon", [[[0, 0], [8, 8], [8, 0], [0, 8], [0, 0]]]),
        with_geometry("Polygon", [*SQUARE["coordinates"], [[x + 20, y] for x, y in HOLE]]),
        with_geometry("Polygon", [*SQUARE["coordinates"], [[1, 1], [2, 2], [1, 1]]]),
    ],
    "single-part": [with_geometry("MultiPolygon", [SQUARE["coordinates"]])],
    "overlapping-parts": [with_geometry("MultiPolygon", [SQUARE["coordinates"], [[[x + 3, y] for x, y in HOLE]]])],
    "properties": [feature(properties=None), feature(properties=[])],
    "name": [with_properties(name=["a"])],
    "classification": [with_properties(classification=3)],
    "class-name": [with_properties(classification={"color": [1, 2, 3]})],
    "class-colour": [
        with_properties(classification={"name": "A"}),
        with_properties(classification={"name": "A", "color": "#ff0000"}),
        with_properties(classification={"name": "A", "color": [1, 2]}),
        with_properties(classification={"name": "A", "color": [0.5, 0.5, 0.5]}),
    ],
    "colour": [with_properties(color="#ff0000"), with_properties(color=[1, 2, 300])],
    "measurement": [
        with_properties(measurements={"a": "high"}),
        with_properties(measurements={"a": [1]}),
        with_properties(measurements=[{"name": "a", "value": None}]),
    ],
    "measurements": [with_properties(measurements=3), with_properties(measurements=[1])],
    "metadata": [with_properties(metadata={"a": {}}), with_properties(metadata="a")],
    "locked": [with_properties(isLocked="yes")],
    "children": [with_properties(childObjects={})],
    "features": [{"type": "FeatureCollection"}],
    "feature-type": [
        {"type": "FeatureCollection", "features": [{"geometry": SQUARE}]},
        {"type": "FeatureCollection", "features": [3]},
    ],
    "unreadable": ["", "{", '{"type": "Feature"', "[1] 2", "plain text", '{"a": 1e999}', "[" * 200_000],
}

LOST = {
    "id": [feature(id="7"), feature(id=7), feature(id=IDENTIFIER.replace("-", ""))],
    "repeated-id": [[feature(id=IDENTIFIER), feature(id=IDENTIFIER.upper())]],
    "misplaced": [feature(objectType="tile"), feature(classification="A"), feature(measurements={"a": 1})],
    "nucleus": [feature(nucleusGeometry=SQUARE)],
    "object-type": [with_properties(objectType="nucleus"), with_properties(objectType=3)],
    "tma-core": [with_properties(objectType="tmaCore")],
    "deprecated": [with_properties(object_type="tile")],
    "class-text": [with_properties(classification='{"name": "A"}')],
    "class-recoloured": [
        [
            with_properties(classification={"name": "A", "color": [1, 2, 3]}),
            with_properties(classification={"name": "A", "color": [3, 2, 1]}),
        ]
    ],
    "measurement-dropped": [
        with_properties(measurements={"a": None}),
        with_properties(measurements={"a": True}),
    ],
    "measurement-range": [with_properties(measurements={"a": 1e39})],
    "unknown-property": [with_properties(score=3)],
    "empty-outline": [
        with_geometry("Polygon", [[[0, 0], [8, 0], [0, 0]]]),
        with_geometry("Polygon", [[[0, 0], [8, 8], [4, 4], [0, 0]]]),
        with_geometry("Polygon", [[[0, 0], [0.005, 0], [0.005, 0.005], [0, 0.005], [0, 0]]]),
    ],
    "touching-parts": [with_geometry("MultiPolygon", [SQUARE["coordinates"], [[[x + 6, y] for x, y in HOLE]]])],
    "outside": [with_geometry("Point", [-1, 5])],
    "skipped": [[feature(), {"a": 1}], [feature(), 3]],
    "empty": [{"type": "FeatureCollection", "features": []}, []],
}


@pytest.mark.parametrize("content", SOUND.values(), ids=SOUND.keys())
def test_what_both_versions_read_has_no_fault(content: Any, tmp_path: Path) -> None:
    """A row that QuPath accepts is not complained of."""
    report = report_of(content, tmp_path)
    assert report.faults == ()
    assert report.features > 0


@pytest.mark.parametrize(("rule", "content"), [(rule, content) for rule, rows in REFUSED.items() for content in rows])
def test_what_either_version_refuses_is_one_error(rule: str, content: Any, tmp_path: Path) -> None:
    """A row for which QuPath refuses the whole file is an error, and nothing beside it is."""
    report = report_of(content, tmp_path)
    assert [fault.rule for fault in report.faults if fault.severity == "error"] == [rule]
    assert not report.is_readable


@pytest.mark.parametrize(("rule", "content"), [(rule, content) for rule, rows in LOST.items() for content in rows])
def test_what_quietly_gets_lost_is_one_warning(rule: str, content: Any, tmp_path: Path) -> None:
    """A row that QuPath reads otherwise than it was meant is a warning, and the file stays readable."""
    report = report_of(content, tmp_path)
    assert [(fault.severity, fault.rule) for fault in report.faults] == [("warning", rule)]
    assert report.is_readable


def test_a_fault_names_the_feature_and_the_remedy(tmp_path: Path) -> None:
    """The user learns which feature it is, by place and identifier, and what to do."""
    collection = {"type": "FeatureCollection", "features": [feature(), feature(id=IDENTIFIER, geometry=None)]}
    (fault,) = report_of(collection, tmp_path).faults
    assert (fault.where, fault.feature_id) == ("features[1]", IDENTIFIER)
    assert str(fault) == (f"error: features[1] ({IDENTIFIER}) has no geometry. Give it one, or leave the feature out.")


def test_features_within_features_are_checked_and_counted(tmp_path: Path) -> None:
    """A child at fault fails the file as its parent would, and is found by its place."""
    child = with_properties(children=[feature(geometry=None)])
    report = report_of([feature(), with_properties(childObjects=[feature(), child])], tmp_path)
    assert report.features == 5
    assert [fault.where for fault in report.faults] == ["[1].childObjects[1].children[0]"]


def test_many_faults_of_one_rule_do_not_hide_another(tmp_path: Path) -> None:
    """Only the first faults of a rule are described, but all are counted."""
    report = report_of([feature(id="x")] * 50 + [feature(geometry=None)], tmp_path)
    assert report.counts == {"id": 50, "geometry": 1}
    assert (report.errors, report.warnings) == (1, 50)
    assert len(report.faults) == FAULTS_A_RULE + 1


@pytest.mark.parametrize("suffix", [".json", ".geojson", ".json.gz", ".geojson.gz", ".zip"])
def test_every_container_is_read(suffix: str, tmp_path: Path) -> None:
    """The same feature at fault is found in each kind of file that QuPath opens."""
    path = tmp_path / f"objects{suffix}"
    text = json.dumps([feature(id="x")]).encode()
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("one.geojson", text)
            archive.writestr("two.json", text)
            archive.writestr("notes.txt", "nothing")
    else:
        path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    report = validate_geojson(path)
    places = ["one.geojson: [0]", "two.json: [0]"] if suffix == ".zip" else ["[0]"]
    assert [(fault.rule, fault.where) for fault in report.faults] == [("id", place) for place in places]


def test_damaged_files_are_faults_and_not_tracebacks(tmp_path: Path) -> None:
    """A missing, cut, mislabelled or wrongly encoded file is reported like any other fault."""
    packed = gzip.compress(json.dumps([feature()] * 1000).encode())
    contents = {
        "cut.geojson.gz": packed[: len(packed) // 2],
        "plain.geojson.gz": b"[]",
        "packed.geojson": packed,
        "broken.zip": b"PK\x03\x04",
        "latin.geojson": b'{"type":"Feature","name":"\xe9"}',
        "objects.xml": b"<a/>",
        "empty.geojson.gz": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        report = validate_geojson(tmp_path / name)
        assert "unreadable" in report.counts, name
    assert validate_geojson(tmp_path / "absent.geojson").counts["unreadable"] == 1


def test_features_before_the_damage_are_still_checked(tmp_path: Path) -> None:
    """A cut file is reported together with what was wrong before the cut."""
    report = report_of(json.dumps([feature(id="x")] * 3)[:-30], tmp_path)
    assert report.counts["id"] == 2
    assert report.counts["unreadable"] == 1


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Ten megabytes of features, most of them children of one, take less than one megabyte."""
    path = tmp_path / "large.geojson"
    blank = feature(properties={"metadata": {"text": "x" * 50_000}})
    path.write_text(json.dumps([with_properties(childObjects=[blank] * 200)]))
    validate_geojson(path)
    tracemalloc.start()
    report = validate_geojson(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.features == 201
    assert path.stat().st_size > 10_000_000
    assert peak < 1_000_000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["objectType", "type", "name", "classification", "color", "measurements", "metadata", "childObjects", "isLocked"]
)
KINDS = st.sampled_from(["Point", "Polygon", "MultiPolygon", "LineString", "Circle"])
POSITIONS = st.lists(st.lists(st.floats() | st.integers(-9, 9), min_size=1, max_size=3), max_size=5)
COORDINATES = JSON | POSITIONS | st.lists(POSITIONS, max_size=3) | st.lists(st.lists(POSITIONS, max_size=2), max_size=3)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    properties=JSON | st.dictionaries(KEYS, JSON, max_size=4),
    geometry=JSON | st.fixed_dictionaries({"type": KINDS, "coordinates": COORDINATES}),
    identifier=JSON,
)
def test_no_json_makes_the_validator_fail(tmp_path: Path, properties: Any, geometry: Any, identifier: Any) -> None:
    """Whatever the members hold, the answer is a report."""
    report = report_of([feature(id=identifier, geometry=geometry, properties=properties)], tmp_path)
    assert report.errors + report.warnings == sum(report.counts.values())
