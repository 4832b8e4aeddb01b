import gzip
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from jaxtyping import Bool
from PIL import Image

from wsi_anomaly.annotations import Outline, area_fractions, rasterise, read_labels, read_mask, read_outlines
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


def outline(*polygons: shapely.Polygon) -> Outline:
    """An area without a class."""
    return Outline(polygons[0] if len(polygons) == 1 else shapely.MultiPolygon(polygons), "")


def mask_of(path: Path, shape: tuple[int, int], size: tuple[int, int], bounds: Any = None) -> Bool[np.ndarray, "y x"]:
    """The mask within the bounds, which are the whole slide where none are given."""
    return read_mask(path, shape=shape, size_level0_px=size, bounds_level0_px=bounds or (0, 0, *size))


# Outlines


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
    """For outlines, masks and labels alike."""
    with pytest.raises(AnnotationError, match=r"^nowhere\.json: cannot be read"):
        read_outlines(tmp_path / "nowhere.json")
    with pytest.raises(AnnotationError, match=r"^nowhere\.csv: "):
        read_labels(tmp_path / "nowhere.csv")
    with pytest.raises(AnnotationError, match=r"^nowhere\.png: "):
        mask_of(tmp_path / "nowhere.png", (1, 1), (10, 10))


# Outlines as masks and shares


def test_pixels_are_inside_where_their_centres_are() -> None:
    """Pixels are 4 x 2 level-0 pixels here, so the centres are at x = 102, 106, 110 and y = 51, 53."""
    inside = rasterise(
        [outline(shapely.box(103, 50, 108, 52))], shape=(2, 3), origin_level0_px=(100, 50), downsample=(4.0, 2.0)
    )
    assert inside.tolist() == [[False, True, False], [False, False, False]]


def test_a_hole_and_every_part_of_a_multipolygon_are_drawn() -> None:
    """A ring around one pixel, and a pixel apart."""
    ring = shapely.Polygon([(0, 0), (3, 0), (3, 3), (0, 3)], [[(1, 1), (2, 1), (2, 2), (1, 2)]])
    inside = rasterise(
        [outline(ring, shapely.box(4, 0, 5, 1))], shape=(3, 5), origin_level0_px=(0, 0), downsample=(1.0, 1.0)
    )
    assert inside.astype(int).tolist() == [[1, 1, 1, 0, 1], [1, 0, 1, 0, 0], [1, 1, 1, 0, 0]]


def test_outlines_beyond_the_frame_are_cut_off() -> None:
    """On every side, and where they lie wholly outside."""
    around, outside = shapely.box(-50, -50, 50, 50), shapely.box(-20, -20, -10, 5)
    frame = {"shape": (2, 2), "origin_level0_px": (0, 0), "downsample": (1.0, 1.0)}
    assert rasterise([outline(around)], **frame).all()
    assert not rasterise([outline(outside)], **frame).any()
    assert not rasterise([], **frame).any()


def test_neighbouring_outlines_leave_no_gap_where_centres_lie_on_their_common_edge() -> None:
    """The edge at x = 1 runs through the centres of the only column."""
    halves = [outline(shapely.box(0, 0, 1, 4)), outline(shapely.box(1, 0, 2, 4))]
    assert rasterise(halves, shape=(2, 1), origin_level0_px=(0, 0), downsample=(2.0, 2.0)).all()


def test_area_fractions_are_exact_and_count_overlaps_once() -> None:
    """The union is a square of 10 with a hole of 4 in the second tile, drawn in two overlapping pieces."""
    left = shapely.box(0, 0, 7, 10)
    right = shapely.box(3, 0, 10, 10).difference(shapely.box(6, 2, 8, 4)).difference(shapely.box(3, 0, 7, 10))
    drawn = [outline(left.difference(shapely.box(6, 2, 7, 4))), outline(right), outline(shapely.box(1, 1, 2, 2))]
    tiles = np.array([[0, 0, 5, 5], [5, 0, 10, 5], [8, 8, 12, 12], [20, 20, 30, 30], [10, 0, 15, 5], [-5, -5, 15, 15]])
    expected = [1, 1 - 4 / 25, 4 / 16, 0, 0, 96 / 400]
    assert area_fractions(drawn, tiles) == pytest.approx(expected)
    assert area_fractions(drawn, tiles.astype(np.float32)) == pytest.approx(expected)


def test_area_fractions_add_up_over_the_parts_in_one_tile() -> None:
    """Two islands of 1 and a triangle of 2 in a tile of 100."""
    islands = [
        outline(shapely.box(1, 1, 2, 2), shapely.box(4, 4, 5, 5)),
        outline(shapely.Polygon([(6, 6), (8, 6), (6, 8)])),
    ]
    assert area_fractions(islands, np.array([[0, 0, 10, 10]])) == pytest.approx([0.04])


def test_area_fractions_of_nothing_are_zero_and_of_no_tiles_empty() -> None:
    """Both happen: a slide without tumour, a slide without tissue."""
    assert area_fractions([], np.array([[0, 0, 1, 1]])).tolist() == [0]
    assert area_fractions([outline(shapely.box(0, 0, 1, 1))], np.empty((0, 4))).shape == (0,)


def test_area_fractions_agree_with_counted_pixels() -> None:
    """A blob with 200 corners over 64 tiles, against its pixels at a sixteenth of a tile's side."""
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    radius = 45 + 10 * np.cos(5 * angle)
    blob = outline(shapely.Polygon(np.column_stack([64 + radius * np.cos(angle), 64 + radius * np.sin(angle)])))
    y, x = np.mgrid[0:128:16, 0:128:16].reshape(2, -1)
    fractions = area_fractions([blob], np.column_stack([x, y, x + 16, y + 16]))
    pixels = rasterise([blob], shape=(128, 128), origin_level0_px=(0, 0), downsample=(1.0, 1.0))
    counted = pixels.reshape(8, 16, 8, 16).mean(axis=(1, 3)).ravel()
    assert fractions == pytest.approx(counted, abs=0.02)
    assert fractions.sum() * 256 == pytest.approx(blob.polygon.area)


# Masks

CHECKS = np.array([[0, 1, 0], [2, 0, 255]], np.uint8)


def picture(mode: str) -> Image.Image:
    """`CHECKS` as a picture of the mode, where pixels above 0 stand out in one channel only."""
    grey = Image.fromarray(CHECKS)
    if mode == "RGB":
        return Image.merge("RGB", [Image.new("L", grey.size), Image.new("L", grey.size), grey])
    if mode == "RGBA":
        return Image.merge("RGBA", [*[Image.new("L", grey.size, 9)] * 3, grey])
    if mode == "LA":
        return Image.merge("LA", [grey, Image.new("L", grey.size, 255)])
    if mode == "P":
        grey = grey.copy()
        grey.putpalette([255, 255, 255, 0, 0, 0] + [7] * 762)
        return grey
    if mode == "1":
        return Image.fromarray(CHECKS > 0)
    return Image.fromarray(CHECKS.astype({"L": np.uint8, "I;16": np.uint16, "F": np.float32}[mode]))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *[(mode, "png") for mode in ("L", "1", "P", "LA", "RGB", "RGBA", "I;16")],
        *[(mode, "tif") for mode in ("L", "1", "P", "RGB", "RGBA", "I;16", "F")],
    ],
)
def test_any_value_above_zero_is_tissue_in_every_kind_of_picture(tmp_path: Path, mode: str, suffix: str) -> None:
    """Grey, black and white, palette (its number, not its colour), colour, transparency, 16 bit, float."""
    drawn = picture(mode)
    assert drawn.mode == mode
    drawn.save(tmp_path / f"mask.{suffix}")
    assert mask_of(tmp_path / f"mask.{suffix}", (2, 3), (3000, 2000)).tolist() == (CHECKS > 0).tolist()


def test_a_mask_is_resampled_to_the_nearest_pixel(tmp_path: Path) -> None:
    """Up by repetition, down by the pixel at the centre."""
    picture("L").save(tmp_path / "mask.png")
    up = mask_of(tmp_path / "mask.png", (4, 6), (3000, 2000))
    assert up.tolist() == np.kron(CHECKS > 0, np.ones((2, 2), np.bool_)).astype(np.bool_).tolist()
    Image.fromarray(np.kron(CHECKS, np.ones((5, 5), np.uint8))).save(tmp_path / "large.png")
    assert mask_of(tmp_path / "large.png", (2, 3), (3000, 2000)).tolist() == (CHECKS > 0).tolist()


def test_a_mask_of_the_whole_frame_gives_what_lies_within_the_bounds(tmp_path: Path) -> None:
    """The bounds are the last two columns of the lower row."""
    picture("L").save(tmp_path / "mask.png")
    found = mask_of(tmp_path / "mask.png", (2, 4), (3000, 2000), (1000, 1000, 2000, 1000))
    assert found.tolist() == [[False, False, True, True]] * 2


def test_a_mask_of_the_proportions_of_the_bounds_shows_the_bounds(tmp_path: Path) -> None:
    """QuPath exports what it shows, which is the bounds."""
    picture("L").save(tmp_path / "mask.png")
    found = mask_of(tmp_path / "mask.png", (2, 3), (8000, 8000), (1000, 1000, 3000, 2000))
    assert found.tolist() == (CHECKS > 0).tolist()


def test_proportions_that_fit_to_a_pixel_win_over_those_that_fit_roughly(tmp_path: Path) -> None:
    """Frame (1.25) and bounds (1.23) are both within two per cent of the picture, which is the bounds."""
    mask = np.zeros((650, 800), np.uint8)
    mask[0, 0] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert mask_of(tmp_path / "mask.png", (650, 800), (10000, 8000), (1000, 1000, 8000, 6500))[0, 0]


def test_a_mask_of_other_proportions_is_refused_with_the_sizes(tmp_path: Path) -> None:
    """Stretching it would put tissue where there is none."""
    Image.new("L", (100, 110)).save(tmp_path / "mask.png")
    with pytest.raises(AnnotationError, match=r"mask\.png: 100 x 110 px; .*3000 x 2000.*500 x 500"):
        mask_of(tmp_path / "mask.png", (2, 3), (3000, 2000), (0, 0, 500, 500))


def test_a_pyramid_is_read_at_the_level_that_is_just_fine_enough(tmp_path: Path) -> None:
    """Levels of 400, 200 and 100 pixels differ in their values, so that the one that was read shows."""
    levels = [Image.new("L", (400, 400), 0), Image.new("L", (200, 200), 1), Image.new("L", (100, 100), 0)]
    levels.append(Image.new("L", (300, 120), 0))
    levels[0].save(tmp_path / "mask.tif", save_all=True, append_images=levels[1:], compression="tiff_lzw")
    assert mask_of(tmp_path / "mask.tif", (150, 150), (4000, 4000)).all()
    assert not mask_of(tmp_path / "mask.tif", (100, 100), (4000, 4000)).any()
    assert not mask_of(tmp_path / "mask.tif", (500, 500), (4000, 4000)).any()
    assert not mask_of(tmp_path / "mask.tif", (150, 150), (4000, 4000), (0, 0, 2000, 2000)).any()


def test_a_mask_may_have_more_pixels_than_pillow_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is lifted for the mask and stays for everybody else."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with Image.new("L", (100, 100), 1) as drawn:
        drawn.save(tmp_path / "mask.png")
        drawn.save(tmp_path / "mask.tif")
    assert mask_of(tmp_path / "mask.png", (10, 10), (1000, 1000)).all()
    assert mask_of(tmp_path / "mask.tif", (10, 10), (1000, 1000)).all()
    assert Image.MAX_IMAGE_PIXELS == 2


@pytest.mark.parametrize("name", ["mask.jpg", "mask.tif"])
def test_a_mask_stored_as_jpeg_is_refused(tmp_path: Path, name: str) -> None:
    """Its ringing is above 0 all around the tissue."""
    options = {"compression": "jpeg"} if name.endswith("tif") else {}
    Image.new("L", (100, 100), 1).save(tmp_path / name, **options)
    with pytest.raises(AnnotationError, match=name):
        mask_of(tmp_path / name, (10, 10), (1000, 1000))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_damaged_mask_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    """Cut off in the middle, or no picture at all."""
    path = tmp_path / f"mask.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (200, 200), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(AnnotationError, match=rf"^mask\.{suffix}: "):
        mask_of(path, (10, 10), (1000, 1000))
    path.write_bytes(b"no picture")
    with pytest.raises(AnnotationError, match="no PNG or TIFF"):
        mask_of(path, (10, 10), (1000, 1000))


# Labels


def test_labels_are_read_in_letters_of_any_case(tmp_path: Path) -> None:
    """True is abnormal."""
    (tmp_path / "labels.csv").write_text(
        "slide_id;label\na;Normal\nb;ABNORMAL\nc;0\nd;1\ne;tumor\n\nf;Tumour\n", encoding="utf-8-sig"
    )
    expected = {"a": False, "b": True, "c": False, "d": True, "e": True, "f": True}
    assert read_labels(tmp_path / "labels.csv") == expected


def test_all_faulty_labels_are_listed_at_once_by_row_number(tmp_path: Path) -> None:
    """A label that is misread would turn a measurement round."""
    (tmp_path / "labels.csv").write_text("label,slide_id\nnormal,a\nbenign,b\n\n1,a\n0,\n,c\n", encoding="utf-8")
    with pytest.raises(AnnotationError) as caught:
        read_labels(tmp_path / "labels.csv")
    assert str(caught.value).splitlines() == [
        "labels.csv has faults; mend them and run again:",
        "  row 3: label 'benign' is none of normal, 0, abnormal, tumor, tumour, 1",
        "  row 5: 'a' is there already",
        "  row 6: slide_id is empty",
        "  row 7: label '' is none of normal, 0, abnormal, tumor, tumour, 1",
    ]


@pytest.mark.parametrize("content", [b"", b"slide_id\na\n", b"slide_id,class\na,normal\n", b"\xff\xfe"])
def test_a_table_that_holds_no_labels_is_refused(tmp_path: Path, content: bytes) -> None:
    """By name, with the columns it should have."""
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(AnnotationError, match=r"^labels\.csv: "):
        read_labels(tmp_path / "labels.csv")


# Real annotations


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
