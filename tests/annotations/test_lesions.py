"""Lesions by hand, against the challenge's definition in pixels, and of real outlines."""

from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image
from scipy import ndimage
from shapely import affinity
from skimage.measure import label, regionprops

from wsi_anomaly.annotations import Annotation, Frame, Lesions, Outline, lesions_of, read_annotation
from wsi_anomaly.annotations.lesions import major_axis

MPP = (0.25, 0.25)


def lesions_from(*polygons_um: shapely.Polygon, mpp: tuple[float, float] = MPP) -> Lesions:
    """Of outlines in microns, drawn on a slide."""
    drawn = [Outline(shapely.transform(polygon, lambda xy: xy / mpp), "") for polygon in polygons_um]
    return lesions_of(Annotation(tuple(drawn), (), ()), mpp)


def square(x: float, y: float, side: float) -> shapely.Polygon:
    """In microns."""
    return shapely.box(x, y, x + side, y + side)


def test_a_lesion_is_its_outline_widened_in_level_0_pixels() -> None:
    """By 37.5 microns, 150 pixels; its corners become round."""
    (lesion,) = lesions_from(square(100, 200, 400)).polygons
    assert lesion.bounds == pytest.approx((250, 650, 2150, 2550))
    assert lesion.area * 0.25**2 == pytest.approx(475**2 - (4 - np.pi) * 37.5**2, rel=2e-4)


def test_outlines_nearer_than_75_microns_are_one_lesion() -> None:
    """On a slide whose pixels are wider than high."""
    near, apart = ([square(0, 0, 300), square(300 + gap, 0, 300)] for gap in (74.0, 76.0))
    assert len(lesions_from(*near, mpp=(0.5, 0.25))) == 1
    assert len(lesions_from(*apart, mpp=(0.5, 0.25))) == 2
    assert len(lesions_from(*(affinity.rotate(one, 90, origin=(0, 0)) for one in near), mpp=(0.5, 0.25))) == 1
    assert len(lesions_from(*(affinity.rotate(one, 90, origin=(0, 0)) for one in apart), mpp=(0.5, 0.25))) == 2


def test_holes_are_filled_with_what_lies_in_them() -> None:
    """An island in a hole, far from its edge, is no lesion of its own."""
    ring = square(0, 0, 1000).difference(square(100, 100, 800))
    (lesion,) = lesions_from(ring, square(450, 450, 100)).polygons
    assert not lesion.interiors
    assert lesion.contains(shapely.Point(1000, 1000))


@pytest.mark.parametrize(("length", "isolated"), [(150, True), (170, True), (215, False), (400, False)])
def test_small_lesions_are_isolated_tumour_cells(length: float, *, isolated: bool) -> None:
    """Strips 20 microns wide: the major axis of the ellipse is longer than a rectangle by 2/sqrt(3), once widened."""
    strip = shapely.box(0, 0, length, 20)
    assert lesions_from(strip).isolated.tolist() == [isolated]
    assert lesions_from(affinity.rotate(strip, 30)).isolated.tolist() == [isolated]


def test_the_smallest_outline_is_a_lesion() -> None:
    """Of a tenth of a micron."""
    found = lesions_from(square(0, 0, 0.1), square(500, 0, 500))
    assert found.isolated.tolist() == [True, False]


def test_the_major_axis_of_known_shapes() -> None:
    """Of a rectangle its longer side times 2/sqrt(3), of a disc its diameter; the frame does not matter."""
    rectangle = affinity.translate(affinity.rotate(shapely.box(0, 0, 12, 5), 40), 1e5, -2e5)
    assert major_axis(rectangle) == pytest.approx(12 * 2 / 3**0.5)
    assert major_axis(shapely.Point(3, 4).buffer(10, quad_segs=200)) == pytest.approx(20, rel=1e-4)
    assert major_axis(shapely.Polygon(rectangle.exterior.coords[::-1])) == pytest.approx(12 * 2 / 3**0.5)


def blobs(seed: int) -> list[shapely.Polygon]:
    """Wavy outlines of 30 to 700 microns within 3 x 3 mm, some with holes; they may overlap."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(14):
        angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        waves = sum(random.normal(0, 0.25 / n) * np.sin(n * angle + random.uniform(0, 6)) for n in range(1, 6))
        radius = np.exp(random.uniform(np.log(15), np.log(350))) * np.exp(waves)
        corners = random.uniform(500, 2500, 2) + radius[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
        blob = shapely.Polygon(corners).buffer(0)
        found.append(blob.difference(blob.centroid.buffer(radius.mean() / 2)) if random.random() < 0.4 else blob)
    return [part for blob in found for part in shapely.get_parts(blob)]


@pytest.mark.parametrize("seed", range(4))
def test_lesions_are_those_of_the_challenge(seed: int) -> None:
    """Its definition in pixels of 2 microns: nearer than 37.5, filled, labelled with corners, axes by moments."""
    outlines, pixel_um = blobs(seed), 2.0
    y, x = np.mgrid[0:3000:pixel_um, 0:3000:pixel_um] + pixel_um / 2
    drawn = shapely.union_all(outlines)
    shapely.prepare(drawn)
    mask = shapely.contains_xy(drawn, x, y)
    near = ndimage.binary_fill_holes(ndimage.distance_transform_edt(~mask) * pixel_um < 37.5)
    expected = sorted((one.area * pixel_um**2, one.axis_major_length * pixel_um) for one in regionprops(label(near)))
    found = lesions_from(*outlines)
    measured = sorted((one.area * 0.25**2, major_axis(one) * 0.25) for one in found.polygons)
    assert len(measured) > 3
    assert len(measured) == len(expected)
    assert np.array(measured) == pytest.approx(np.array(expected), rel=0.03)
    sizes = np.array([major_axis(one) * 0.25 for one in found.polygons])
    assert found.isolated.tolist() == (sizes < 275).tolist()


def test_boxes_touch_the_lesions_that_they_show_a_part_of() -> None:
    """One shows two lesions, one lies within, one beside; the last reaches over the edge of a lesion by a pixel."""
    found = lesions_from(square(0, 0, 300), square(400, 0, 300))
    order = np.argsort([lesion.bounds[0] for lesion in found.polygons])
    boxes = np.array([[1000, 500, 2000, 600], [100, 100, 200, 200], [5000, 0, 5100, 100], [2949, 100, 3100, 200]])
    box, lesion = found.touched(boxes)
    pairs = {(int(one), int(np.flatnonzero(order == other)[0])) for one, other in zip(box, lesion, strict=True)}
    assert pairs == {(0, 0), (0, 1), (1, 0), (3, 1)}


def test_nothing_abnormal_is_no_lesion() -> None:
    """And nothing touches it."""
    found = lesions_from()
    assert len(found) == 0
    assert [len(part) for part in found.touched(np.array([[0, 0, 9, 9]]))] == [0, 0]


@pytest.mark.parametrize(
    ("name", "axes_um"),
    [
        ("Tumor_001.json", [1010, 1375]),
        ("tumor_001.xml", [1010, 1375]),
        ("tumor_073.xml", [1660]),
        ("Tumor_064.json", [150, 191, 255, 1765, 1788, 1926, 2053, 2395]),
    ],
)
def test_real_outlines_make_lesions(shared_data: Path, name: str, axes_um: list[float]) -> None:
    """Eleven areas of Tumor_064 make eight lesions, three of which are isolated tumour cells."""
    frame = Frame((200_000, 250_000), (0, 0, 200_000, 250_000))
    found = lesions_of(read_annotation(shared_data / "annotations" / name, frame=frame), (0.243, 0.243))
    axes = sorted(major_axis(lesion) * 0.243 for lesion in found.polygons)
    assert axes == pytest.approx(axes_um, abs=1.5)
    assert found.isolated.sum() == sum(axis < 275 for axis in axes_um)


def test_lesions_of_a_mask_picture_are_those_of_the_same_outline(tmp_path: Path) -> None:
    """Two squares apart, a dot that is a lesion too, and two that are one."""
    squares = [square(100, 100, 400), square(900, 100, 300), square(1250, 100, 300), square(1500, 900, 8)]
    picture = np.zeros((300, 500), np.uint8)
    for one in squares:
        x0, y0, x1, y1 = (round(edge / 4) for edge in one.bounds)
        picture[y0:y1, x0:x1] = 255
    Image.fromarray(picture).save(tmp_path / "mask.png")
    size = (500 * 16, 300 * 16)
    mask = read_annotation(tmp_path / "mask.png", frame=Frame(size, (0, 0, *size)))
    from_mask, from_outlines = lesions_of(mask, MPP), lesions_from(*squares)
    assert sorted(from_mask.isolated) == sorted(from_outlines.isolated) == [False, False, True]
    areas = [sorted(shapely.area(found.polygons)) for found in (from_mask, from_outlines)]
    assert areas[0] == pytest.approx(areas[1], rel=0.03)
