import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

from wsi_anomaly.annotations import (
    GROUPS,
    Annotation,
    Frame,
    Meaning,
    abnormal_fraction,
    parse_groups,
    read_annotation,
)
from wsi_anomaly.errors import AnnotationError

BOW_TIE = [(0, 0), (10, 10), (10, 0), (0, 10)]


def square(x: float, y: float, side: float) -> list[tuple[float, float]]:
    """The corners of a square with this top left corner."""
    return [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]


def read(path: Path, frame: Frame, groups: dict[str, Meaning] | None = None) -> Annotation:
    """The outlines of a file that is no mask."""
    annotation = read_annotation(path, frame=frame, groups=groups)
    assert isinstance(annotation, Annotation)
    return annotation


def area(annotation: Annotation) -> float:
    """Of all that is abnormal, in square pixels."""
    return shapely.union_all([outline.polygon for outline in annotation.abnormal]).area


def write_geojson(folder: Path, *features: tuple[str, list[tuple[float, float]]]) -> Path:
    """Polygons as QuPath writes them, each with its class."""
    content = {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [[*corners, corners[0]]]},
                "properties": {"classification": {"name": name}} if name else {},
            }
            for name, corners in features
        ],
    }
    path = folder / "a.geojson"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# Groups


@pytest.mark.parametrize(("group", "hole"), [("_0", "_2"), ("Tumor", "Exclusion"), ("metastases", "normal")])
def test_exclusions_of_camelyon_are_cut_out_of_the_tumour(
    write_asap: Callable[..., Path], frame: Frame, group: str, hole: str
) -> None:
    """A hole of 4 in a square of 100, and a second tumour of 25 that has none."""
    path = write_asap((group, square(0, 0, 10)), (hole, square(2, 2, 2)), (group, square(50, 50, 5)))
    annotation = read(path, frame)
    assert [outline.polygon.area for outline in annotation.abnormal] == [96, 25]
    assert [outline.polygon.area for outline in annotation.excluded] == [4]
    assert [outline.class_name for outline in (*annotation.abnormal, *annotation.excluded)] == [group, group, hole]
    assert annotation.report == ()


def test_an_area_that_is_wholly_excluded_is_left_out_and_told(write_asap: Callable[..., Path], frame: Frame) -> None:
    """Nothing of it is abnormal."""
    annotation = read(write_asap(("_0", square(1, 1, 2)), ("_0", square(50, 50, 5)), ("_2", square(0, 0, 10))), frame)
    assert area(annotation) == 25
    assert annotation.report == ("a.xml: 1 abnormal areas lie wholly in excluded ones",)


def test_an_unknown_group_is_refused_with_the_groups_that_were_found(
    write_asap: Callable[..., Path], frame: Frame
) -> None:
    """The message says how to give it a meaning."""
    path = write_asap(("Tumor", square(0, 0, 10)), ("Sinus", square(20, 0, 10)))
    with pytest.raises(AnnotationError, match=r"^a\.xml: unknown group 'Sinus' .*in the file: Sinus, Tumor;") as caught:
        read(path, frame)
    assert "Sinus=abnormal" in str(caught.value)


def test_groups_mean_what_the_user_says(write_asap: Callable[..., Path], frame: Frame) -> None:
    """Also against the defaults, and for all groups that nobody named."""
    path = write_asap(("LN_malignant", square(0, 0, 10)), ("LN_3", square(0, 0, 90)), ("Tumor", square(200, 0, 10)))
    assert area(read(path, frame, parse_groups(["*=ignored"]))) == 200
    annotation = read(path, frame, parse_groups(["ln_3=abnormal", "tumor = Ignored"]))
    assert area(annotation) == 8100
    assert annotation.report == ("a.xml: 1 areas are ignored (groups Tumor)",)


def test_areas_without_a_group_are_abnormal_and_told_where_others_have_one(
    write_asap: Callable[..., Path], frame: Frame
) -> None:
    """Whoever draws a tumour alone need not name it."""
    alone = read(write_asap(("None", square(0, 0, 10))), frame)
    assert (area(alone), alone.report) == (100, ())
    path = write_asap(("", square(0, 0, 10)), ("Tumor", square(50, 50, 10)))
    mixed = read(path, frame)
    assert area(mixed) == 200
    assert mixed.report == ("a.xml: 1 areas have no group while others do: they count as abnormal",)
    ignored = read(path, frame, parse_groups(["none=ignored"]))
    assert area(ignored) == 100
    assert ignored.report == ("a.xml: 1 areas are ignored (groups none)",)


def test_a_group_within_a_group_means_what_the_outer_one_means(write_asap: Callable[..., Path], frame: Frame) -> None:
    """Groups that contain each other in a circle mean nothing."""
    path = write_asap(("small", square(0, 0, 10)), groups={"small": "lesions", "lesions": "Tumor", "Tumor": "None"})
    assert read(path, frame).abnormal[0].class_name == "small"
    circle = write_asap(("small", square(0, 0, 10)), groups={"small": "large", "large": "small"})
    with pytest.raises(AnnotationError, match="unknown group 'small'"):
        read(circle, frame)


def test_classes_of_qupath_mean_what_they_say(tmp_path: Path, frame: Frame) -> None:
    """A derived class means what its base means; what is to be ignored is cut out."""
    features = [
        ("Tumor: Positive", square(0, 0, 10)),
        ("Ignore*", square(0, 0, 5)),
        ("Region*", square(0, 0, 500)),
        ("", square(100, 100, 1)),
        ("Necrosis", square(200, 0, 2)),
    ]
    assert area(read(write_geojson(tmp_path, *features), frame)) == 75 + 1 + 4
    with pytest.raises(AnnotationError, match="unknown group 'Stroma'"):
        read(write_geojson(tmp_path, ("Stroma", square(0, 0, 10))), frame)


@pytest.mark.parametrize("text", ["Tumor", "Tumor=bad", "=abnormal", ""])
def test_a_meaning_that_is_none_is_refused(text: str) -> None:
    """The message shows the form."""
    with pytest.raises(AnnotationError, match="NAME=abnormal"):
        parse_groups([text])


def test_default_groups_are_in_the_letters_that_they_are_looked_up_by() -> None:
    """An upper-case name would never be found."""
    assert all(name == name.casefold() for name in GROUPS)


# ASAP


def asap(folder: Path, annotations: str) -> Path:
    """A file with these elements."""
    path = folder / "a.xml"
    path.write_text(f"<ASAP_Annotations>\n<Annotations>\n{annotations}\n</Annotations></ASAP_Annotations>")
    return path


def coordinates(*points: tuple[object, object, object]) -> str:
    """Elements of (Order, X, Y); an attribute that is None is left out."""
    named = [zip(("Order", "X", "Y"), point, strict=True) for point in points]
    attributes = [" ".join(f'{name}="{value}"' for name, value in point if value is not None) for point in named]
    return "".join(f"<Coordinate {text}/>" for text in attributes)


def test_corners_stand_in_the_order_that_the_file_states(tmp_path: Path, frame: Frame) -> None:
    """In the order of the lines these corners are a bow tie; without any order the lines count."""
    points = [(0, 0, 0), (2, 10, 10), (1, 10, 0), (3, 0, 10)]
    path = asap(tmp_path, f'<Annotation Type="Polygon">{coordinates(*points)}</Annotation>')
    assert (area(read(path, frame)), read(path, frame).report) == (100, ())
    unordered = coordinates(*[(None, x, y) for _, x, y in points])
    path = asap(tmp_path, f'<Annotation Type="Polygon">{unordered}</Annotation>')
    assert area(read(path, frame)) == 50


def test_missing_attributes_are_done_without(tmp_path: Path, frame: Frame) -> None:
    """An annotation without name, type and group is an abnormal polygon."""
    path = asap(tmp_path, f"<Annotation>{coordinates((0, 0, 0), (1, 4, 0), (2, 0, 4))}</Annotation>")
    assert area(read(path, frame)) == 8


def test_a_decimal_comma_is_read(tmp_path: Path, frame: Frame) -> None:
    """Some systems write it."""
    points = coordinates((0, "0,5", 0), (1, "4,5", 0), (2, "0,5", 4))
    assert read(asap(tmp_path, f"<Annotation>{points}</Annotation>"), frame).abnormal[0].polygon.bounds[0] == 0.5


def test_what_is_no_area_is_left_out_and_told_by_kind_and_line(tmp_path: Path, frame: Frame) -> None:
    """Dots, point sets, measurements, two corners, and three on a line."""
    flat = coordinates((0, 0, 0), (1, 1, 1), (2, 2, 2))
    path = asap(
        tmp_path,
        '<Annotation Type="Dot" PartOfGroup="no one knows"><Coordinate X="1" Y="1"/></Annotation>\n'
        f'<Annotation Type="PointSet">{flat}</Annotation>\n'
        '<Annotation Type="Dot"/>\n'
        f'<Annotation Type="Measurement">{flat}</Annotation>\n'
        f'<Annotation Type="Polygon">{coordinates((0, 0, 0), (1, 5, 5))}</Annotation>\n'
        f'<Annotation Type="Spline">{flat}</Annotation>\n',
    )
    annotation = read(path, frame)
    assert annotation.abnormal == ()
    assert annotation.report == (
        "a.xml: 2 dots (line 3, line 5) without an area, left out",
        "a.xml: 1 measurement (line 6) without an area, left out",
        "a.xml: 1 point set (line 4) without an area, left out",
        "a.xml: 2 polygons (line 7, line 8) without an area or with fewer than 3 corners, left out",
        "a.xml: no abnormal area in it",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: broken XML"),
        (b"<ASAP_Annotations>\n<Annotations>\n</ASAP_Annotations>", "line 3: broken XML .*mismatched tag"),
        (b"<ASAP_Annotations>\n<Annotation>", "line 2: broken XML"),
        (b"\x89PNG", "line 1: broken XML"),
        (b"<Annotations><Annotation/></Annotations>", "no XML of ASAP .*<Annotations>"),
        (b'<ASAP_Annotations><Annotation>\n<Coordinate X="1"/></Annotation></ASAP_Annotations>', "line 2: .*X and Y"),
        (b'<ASAP_Annotations><Annotation><Coordinate X="a" Y="2"/></Annotation></ASAP_Annotations>', "line 1: .*X and"),
        (b'<ASAP_Annotations><Annotation><Coordinate X="nan" Y="2"/></Annotation></ASAP_Annotations>', "X and Y"),
    ],
)
def test_malformed_xml_is_refused_with_its_line(tmp_path: Path, frame: Frame, content: bytes, message: str) -> None:
    """No tag closed, no XML, XML of another program, and points without coordinates."""
    (tmp_path / "a.xml").write_bytes(content)
    with pytest.raises(AnnotationError, match=rf"^a\.xml(, |: ).*{message}"):
        read(tmp_path / "a.xml", frame)


# JSON


def test_geojson_counts_from_the_bounds_and_xml_from_the_file(
    tmp_path: Path, write_asap: Callable[..., Path], frame: Frame
) -> None:
    """As QuPath and ASAP do."""
    scanned = Frame(frame.size_level0_px, (300, 200, 400, 400))
    json_outline = read(write_geojson(tmp_path, ("Tumor", square(1, 2, 10))), scanned).abnormal[0]
    xml_outline = read(write_asap(("Tumor", square(1, 2, 10))), scanned).abnormal[0]
    assert json_outline.polygon.bounds == (301, 202, 311, 212)
    assert xml_outline.polygon.bounds == (1, 2, 11, 12)


def test_lists_of_vertices_are_read_as_level_0_pixels(tmp_path: Path) -> None:
    """The negative ones are holes of the positive ones."""
    content: dict[str, Any] = {
        "positive": [{"name": "a", "vertices": square(0, 0, 10)}, {"name": "b", "vertices": [[0, 0], [1, 1]]}],
        "negative": [{"name": "c", "vertices": square(0, 0, 2)}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    annotation = read(tmp_path / "a.json", Frame((100, 100), (5, 5, 50, 50)))
    assert annotation.abnormal[0].polygon.bounds == (0, 0, 10, 10)
    assert area(annotation) == 96
    assert "positive polygon 2" in annotation.report[0]


@pytest.mark.parametrize(
    "content",
    [
        '{"positive": [{"name": "a"}]}',
        '{"positive": [{"vertices": [[1, 2, 3]]}]}',
        '{"positive": [{"vertices": [["a", 2]]}]}',
        '{"positive": [3]}',
        '{"positive": [{"vertices": [[NaN, 1], [2, 2], [3, 3]]}]}',
        '{"a": 1}',
        "[{}]",
        "no JSON",
    ],
)
def test_json_that_holds_no_outlines_is_refused_by_name(tmp_path: Path, frame: Frame, content: str) -> None:
    """With the number of what is at fault."""
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(AnnotationError, match=r"^a\.json: "):
        read(tmp_path / "a.json", frame)


def test_points_and_lines_of_qupath_are_told_by_kind(tmp_path: Path, frame: Frame) -> None:
    """They have no area; a file with nothing else is a slide without anything abnormal."""
    kinds = [("Point", [1, 2]), ("MultiPoint", [[1, 2]]), ("LineString", [[0, 0], [1, 1]]), ("Circle", 1)]
    features = [{"type": "Feature", "geometry": {"type": kind, "coordinates": where}} for kind, where in kinds]
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    annotation = read(tmp_path / "a.geojson", frame)
    assert annotation.report == (
        "a.geojson: 1 feature without a polygon (feature 4) without an area, left out",
        "a.geojson: 1 line (feature 3) without an area, left out",
        "a.geojson: 1 point (feature 1) without an area, left out",
        "a.geojson: 1 point set (feature 2) without an area, left out",
        "a.geojson: no abnormal area in it",
    )


# Polygons


def test_crossing_polygons_are_mended_and_told(write_asap: Callable[..., Path], frame: Frame) -> None:
    """Also the ones that are cut out."""
    annotation = read(
        write_asap(("_0", square(0, 0, 10)), ("_0", [(20 + x, y) for x, y in BOW_TIE]), ("_2", BOW_TIE)), frame
    )
    assert area(annotation) == 50 + 50
    assert annotation.report == ("a.xml: 2 polygons (line 5, line 6) of 3 crossing themselves, mended",)


def test_polygons_outside_the_slide_are_left_out_and_those_at_its_edge_kept(
    write_asap: Callable[..., Path], frame: Frame
) -> None:
    """The slide is 1000 x 800; a line along its edge is no fault."""
    path = write_asap(
        ("_0", square(1000, 0, 10)), ("_0", square(0, -20, 20)), ("_0", square(995, 5, 10)), ("_0", square(0, 0, 800))
    )
    annotation = read(path, frame)
    assert len(annotation.abnormal) == 2
    assert annotation.report == (
        "a.xml: 2 polygons (line 4, line 5) outside the slide, left out",
        "a.xml: 1 polygon (line 6) reaching beyond the slide, kept as drawn",
    )


def test_an_annotation_wholly_outside_its_slide_is_refused(write_asap: Callable[..., Path], frame: Frame) -> None:
    """It belongs to another slide, and to count it as nothing would turn the measurement round."""
    path = write_asap(("_0", square(1000, 0, 10)), ("_0", square(0, 900, 20)))
    with pytest.raises(AnnotationError, match=r"^a\.xml: all 2 polygons .*line 4, at x 1000, y 0.*1000 x 800 px"):
        read(path, frame)


def test_many_faults_are_counted_and_the_first_ten_named(write_asap: Callable[..., Path], frame: Frame) -> None:
    """A report stays a line."""
    (told,) = read(write_asap(*[("_0", BOW_TIE)] * 30), frame).report
    assert told.startswith("a.xml: 30 polygons (line 4, line 5, ")
    assert told.endswith("line 13, ...) of 30 crossing themselves, mended")


def test_the_share_of_tiles_is_that_of_the_abnormal_areas_without_holes(
    write_asap: Callable[..., Path], frame: Frame
) -> None:
    """A tile inside, one with half of the hole, one cut by the edge, one outside."""
    path = write_asap(("_0", square(0, 0, 25)), ("_0", square(0, 0, 20)), ("_2", square(15, 0, 10)))
    tiles = np.array([[0, 0, 10, 10], [10, 0, 20, 10], [20, 10, 30, 20], [100, 100, 110, 110]])
    assert abnormal_fraction(read(path, frame), tiles).tolist() == [1, 0.5, 0.5, 0]


def test_an_annotation_of_an_unknown_kind_is_refused(tmp_path: Path, frame: Frame) -> None:
    """With the suffixes that are known."""
    with pytest.raises(AnnotationError, match=r"^a\.svg: .*\.xml, \.geojson"):
        read(tmp_path / "a.svg", frame)
    with pytest.raises(AnnotationError, match=r"^a\.xml: cannot be read"):
        read(tmp_path / "a.xml", frame)
