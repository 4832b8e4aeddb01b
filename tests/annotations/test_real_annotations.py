import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from jaxtyping import Bool
from PIL import Image, ImageDraw

from wsi_anomaly.annotations import (
    AbnormalMask,
    Annotation,
    Frame,
    Outline,
    abnormal_fraction,
    area_fractions,
    find_annotations,
    read_annotation,
    read_mask,
    read_outlines,
)
from wsi_anomaly.errors import AnnotationError


def feature(*rings: list[list[int]], classification: object = None) -> dict[str, Any]:
    """One area as QuPath writes it."""
    properties = {"objectType": "annotation"} | ({"classification": classification} if classification else {})
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": list(rings)}, "properties": properties}


def written(folder: Path, content: object) -> Path:
    """The content as a GeoJSON file."""
    path = folder / "outlines.geojson"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def mask_of(path: Path, shape: tuple[int, int], size: tuple[int, int], bounds: Any = None) -> Bool[np.ndarray, "y x"]:
    """The mask within the bounds, which are the whole slide where none are given."""
    return read_mask(path, shape=shape, size_level0_px=size, bounds_level0_px=bounds or (0, 0, *size))


def test_the_truth_mask_of_a_camelyon_slide_keeps_its_tissue_at_an_eighth_of_its_size(
    shared_data: Path, tmp_path: Path
) -> None:
    """The area differs by less than a per cent from the full picture's; as the JPEG that it is, it is refused."""
    source = shared_data / "annotations" / "mask_patient_051_node_2.jpg"
    with Image.open(source) as jpeg:
        truth = np.asarray(jpeg) > 127
    Image.fromarray(truth.astype(np.uint8)).save(tmp_path / "mask.png")
    rows, columns = truth.shape
    found = mask_of(tmp_path / "mask.png", (rows // 8, columns // 8), (columns * 16, rows * 16))
    assert truth.any()
    assert found.mean() == pytest.approx(truth.mean(), rel=0.01)
    with pytest.raises(AnnotationError, match="no PNG or TIFF"):
        mask_of(source, (rows // 8, columns // 8), (columns * 16, rows * 16))


@pytest.mark.parametrize("name", ["Tumor_001", "Tumor_064", "Tumor_073"])
def test_real_tumour_outlines_survive_geojson_and_tell_tumour_from_tissue(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    """Areas of tiles add up to the area of the outlines; the file itself is JSON but no GeoJSON."""
    source = shared_data / "annotations" / f"{name}.json"
    drawn = [area["vertices"] for area in json.loads(source.read_text())["positive"]]
    outlines = read_outlines(written(tmp_path, [feature([*ring, ring[0]], classification="Tumor") for ring in drawn]))
    assert {found.class_name for found in outlines} == {"Tumor"}
    assert all(found.polygon.is_valid for found in outlines)
    union = shapely.union_all([found.polygon for found in outlines])
    x0, y0, x1, y1 = union.bounds
    y, x = np.mgrid[y0:y1:512, x0:x1:512].reshape(2, -1)
    fractions = area_fractions(outlines, np.column_stack([x, y, x + 512, y + 512]))
    assert fractions.sum() * 512**2 == pytest.approx(union.area)
    with pytest.raises(AnnotationError, match="no polygon"):
        read_outlines(source)


def test_real_tumour_tiles_lie_in_the_real_outlines_and_normal_tiles_outside(shared_data: Path, tmp_path: Path) -> None:
    """The tiles of slide tumor_073 carry their level-0 origin in their names and are 256 pixels wide."""
    rings = [
        area["vertices"]
        for area in json.loads((shared_data / "annotations" / "Tumor_073.json").read_text())["positive"]
    ]
    outlines = read_outlines(written(tmp_path, [feature([*ring, ring[0]]) for ring in rings]))
    for kind, inside in (("tumor", True), ("normal", False)):
        names = [path.stem.split("_") for path in sorted((shared_data / "tiles" / "camelyon16" / kind).glob("*.png"))]
        origins = np.array([[int(x), int(y)] for *_, x, y in names])
        fractions = area_fractions(outlines, np.hstack([origins, origins + 256]))
        assert len(fractions) == 16
        assert ((fractions > 0) == inside).all()


WHOLE = Frame((200_000, 250_000), (0, 0, 200_000, 250_000))
MPP = 0.243


def read(path: Path) -> Annotation:
    """The outlines of a file, on a slide that is large enough for all of them."""
    annotation = read_annotation(path, frame=WHOLE)
    assert isinstance(annotation, Annotation)
    return annotation


def shoelace_mm2(rings: Sequence[np.ndarray]) -> float:
    """The area within the lines, of each on its own, by Gauss' formula."""
    doubled = [np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) for x, y in (ring.astype(float).T for ring in rings)]
    return float(np.abs(doubled).sum() / 2 * MPP**2 / 1e6)


def rings_in(path: Path) -> list[np.ndarray]:
    """The corners of every polygon of a file, found without any of our code."""
    if path.suffix == ".json":
        return [np.array(area["vertices"]) for area in json.loads(path.read_text())["positive"]]
    parts = path.read_text().split("<Annotation ")[1:]
    return [np.array(re.findall(r'X="([^"]+)" Y="([^"]+)"', part), np.float64) for part in parts]


def area_mm2(outlines: Sequence[Outline]) -> float:
    """Of all outlines together."""
    return float(shapely.union_all([found.polygon for found in outlines]).area * MPP**2 / 1e6)


@pytest.mark.parametrize(
    ("name", "abnormal", "mm2", "crossing"),
    [
        ("Tumor_001.json", 2, 0.67182, 1),
        ("tumor_001.xml", 2, 0.67182, 1),
        ("Tumor_073.json", 1, 0.53507, 0),
        ("tumor_073.xml", 1, 0.53507, 0),
    ],
)
def test_every_camelyon_file_gives_its_polygons_and_their_area(
    shared_data: Path, name: str, abnormal: int, mm2: float, crossing: int
) -> None:
    """At 0.243 microns a pixel; a line that touches itself hardly changes what Gauss' formula gives."""
    path = shared_data / "annotations" / name
    annotation = read(path)
    assert len(annotation.abnormal) == abnormal
    assert annotation.excluded == ()
    assert all(found.polygon.is_valid for found in annotation.abnormal)
    assert area_mm2(annotation.abnormal) == pytest.approx(mm2, abs=5e-6)
    assert area_mm2(annotation.abnormal) == pytest.approx(shoelace_mm2(rings_in(path)), rel=1e-3)
    assert len(annotation.report) == crossing


def test_holes_of_a_real_tumour_are_cut_out_as_pillow_fills_them(shared_data: Path) -> None:
    """Tumor_064 has 11 areas and 24 holes, 6 of which cross themselves; Pillow also fills the line, half a per cent."""
    path = shared_data / "annotations" / "Tumor_064.json"
    annotation = read(path)
    assert (len(annotation.abnormal), len(annotation.excluded)) == (11, 24)
    (told,) = annotation.report
    assert told.startswith("Tumor_064.json: 6 polygons (positive polygon 2, ")
    content = json.loads(path.read_text())
    origin = np.min([ring.min(axis=0) for ring in rings_in(path)], axis=0)
    width, height = np.max([ring.max(axis=0) for ring in rings_in(path)], axis=0) - origin
    picture = Image.new("1", (int(width) // 8 + 2, int(height) // 8 + 2))
    for key, fill in (("positive", 1), ("negative", 0)):
        for entry in content[key]:
            corners = ((np.array(entry["vertices"]) - origin) / 8).tolist()
            ImageDraw.Draw(picture).polygon([(x, y) for x, y in corners], fill=fill)
    filled = np.count_nonzero(np.asarray(picture)) * (8 * MPP / 1000) ** 2
    assert area_mm2(annotation.abnormal) == pytest.approx(filled, rel=0.005)
    assert area_mm2(annotation.abnormal) < shoelace_mm2(rings_in(path))


@pytest.mark.parametrize("number", ["001", "073"])
def test_xml_and_json_of_a_slide_agree(shared_data: Path, number: str) -> None:
    """To the last pixel."""
    folder = shared_data / "annotations"
    one, other = (read(folder / name).abnormal for name in (f"Tumor_{number}.json", f"tumor_{number}.xml"))
    for left, right in zip(one, other, strict=True):
        assert left.polygon.symmetric_difference(right.polygon).area == 0


def test_tiles_over_a_real_tumour_with_holes_add_up_to_its_area(shared_data: Path) -> None:
    """17,374 tiles of 512 pixels."""
    annotation = read(shared_data / "annotations" / "Tumor_064.json")
    union = shapely.union_all([found.polygon for found in annotation.abnormal])
    x0, y0, x1, y1 = union.bounds
    y, x = np.mgrid[y0:y1:512, x0:x1:512].reshape(2, -1)
    shares = abnormal_fraction(annotation, np.column_stack([x, y, x + 512, y + 512]))
    assert shares.sum() * 512**2 == pytest.approx(union.area)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("asap-dot.xml", "1 dot (line 4) without an area, left out"),
        ("asap-pointset.xml", "1 point set (line 4) without an area, left out"),
    ],
)
def test_genuine_points_of_asap_are_no_areas(shared_data: Path, name: str, told: str) -> None:
    """The report says so and that nothing is left."""
    annotation = read(shared_data / "annotations" / name)
    assert annotation.abnormal == ()
    assert annotation.report == (f"{name}: {told}", f"{name}: no abnormal area in it")


def test_a_genuine_polygon_of_asap_is_read(shared_data: Path) -> None:
    """Its six corners have fractions, and it has no group."""
    path = shared_data / "annotations" / "asap-polygon.xml"
    annotation = read(path)
    assert annotation.abnormal[0].polygon.bounds == (22693.1875, 16551.1797, 23067.4531, 16710.6367)
    assert area_mm2(annotation.abnormal) == pytest.approx(shoelace_mm2(rings_in(path)))
    assert annotation.report == ()


@pytest.mark.parametrize("name", ["mask_patient_051_node_2.jpg", "out_patient_051_node_2.jpg"])
def test_the_masks_of_a_camelyon17_slide_are_read(shared_data: Path, name: str) -> None:
    """Against counted pixels; one pixel of them is 16 of the slide here."""
    path = shared_data / "annotations" / name
    with Image.open(path) as picture:
        above = np.asarray(picture) > 127
    size = (4639 * 16, 3503 * 16)
    mask = read_annotation(path, frame=Frame(size, (0, 0, *size)))
    assert isinstance(mask, AbnormalMask)
    y, x = np.mgrid[0 : size[1] : 512, 0 : size[0] : 512].reshape(2, -1)
    shares = abnormal_fraction(mask, np.column_stack([x, y, x + 512, y + 512]))
    assert shares.sum() * 32**2 == pytest.approx(np.count_nonzero(above))
    inside = [above[top : top + 32, left : left + 32].sum() / 32**2 for top, left in zip(y // 16, x // 16, strict=True)]
    assert shares == pytest.approx(inside, abs=1e-12)


def test_real_files_are_matched_to_their_slides(shared_data: Path) -> None:
    """The XML and the JSON of a slide are one too many."""
    folder = shared_data / "annotations"
    matched = find_annotations(folder, ["Tumor_064", "patient_051_node_2", "normal_001"])
    assert matched.annotations == {
        "Tumor_064": folder / "Tumor_064.json",
        "patient_051_node_2": folder / "mask_patient_051_node_2.jpg",
        "normal_001": None,
    }
    assert matched.missing == ("normal_001",)
    assert "out_patient_051_node_2.jpg" in matched.unmatched
    with pytest.raises(AnnotationError, match=r"Tumor_001\.json, tumor_001\.xml \(tumor_001\)"):
        find_annotations(folder, ["tumor_001"])
