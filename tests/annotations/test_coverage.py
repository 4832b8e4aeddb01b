import numpy as np
import pytest
import shapely

from wsi_anomaly.annotations import Outline, area_fractions, rasterise
from wsi_anomaly.annotations import coverage as coverage_module
from wsi_anomaly.annotations.outlines import mended


def outline(*polygons: shapely.Polygon) -> Outline:
    """An area without a class."""
    return Outline(polygons[0] if len(polygons) == 1 else shapely.MultiPolygon(polygons), "")


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


def wild_polygons(seed: int, corners: int, count: int) -> list[Outline]:
    """Lines through random whole pixels, mended: many islands and holes, and corners on the edges of tiles."""
    rng = np.random.default_rng(seed)
    return [Outline(mended(shapely.Polygon(rng.integers(0, 64, (corners, 2)))), "") for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_polygons_cut_into_pieces_cover_what_they_cover_whole(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Against the intersection of the union with each tile."""
    monkeypatch.setattr(coverage_module, "_MAX_CORNERS", 12)
    outlines = wild_polygons(seed, corners=24, count=3)
    y, x = np.mgrid[0:64:8, 0:64:8].reshape(2, -1)
    tiles = np.column_stack([x, y, x + 8, y + 8]).astype(np.float64)
    union = shapely.union_all([outline.polygon for outline in outlines])
    expected = shapely.area(shapely.intersection(union, shapely.box(*tiles.T))) / 64
    assert area_fractions(outlines, tiles) == pytest.approx(expected, abs=1e-9)


def test_a_fast_cut_that_goes_wrong_is_made_again_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong are an error, an area that is lost, and a piece with a crossing that changes its area when it is mended."""
    monkeypatch.setattr(coverage_module, "_MAX_CORNERS", 12)
    outlines = wild_polygons(0, corners=24, count=1)
    tile = np.array([[0, 0, 64, 64]], np.float64)
    right = outlines[0].polygon.area / 64**2

    def fails(*_: object) -> shapely.Geometry:
        raise shapely.errors.GEOSException

    bow_tie = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
    for wrong in (fails, lambda *_: shapely.Polygon(), lambda *_: bow_tie):
        monkeypatch.setattr(coverage_module, "_clip", wrong)
        assert area_fractions(outlines, tile) == pytest.approx([right])


def test_pieces_of_one_polygon_and_of_several_are_both_counted_once() -> None:
    """A fine circle of 2000 corners is cut into pieces; a second one lies half over it."""
    angle = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    circle = shapely.Polygon(np.column_stack([500 + 400 * np.cos(angle), 500 + 400 * np.sin(angle)]))
    moved = shapely.transform(circle, lambda xy: xy + np.array([400, 0]))
    y, x = np.mgrid[0:1000:100, 0:1400:100].reshape(2, -1)
    tiles = np.column_stack([x, y, x + 100, y + 100])
    assert area_fractions([outline(circle)], tiles).sum() * 100**2 == pytest.approx(circle.area)
    both = area_fractions([outline(circle), outline(moved)], tiles)
    assert both.sum() * 100**2 == pytest.approx(circle.union(moved).area)
    assert (both <= 1).all()
