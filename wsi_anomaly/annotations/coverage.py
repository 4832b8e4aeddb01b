"""How much of each tile outlines cover: exact areas of intersections, never a count of pixels. Reads no file."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import shapely
from jaxtyping import Bool, Float64, Int64, Real, Shaped

from wsi_anomaly.annotations.outlines import Outline, mended

_MAX_CORNERS = 256
"""Polygons with more are cut into pieces first: the time of an intersection grows with what lies outside the tile."""
_AREA_TOLERANCE = 1e-9

Box = tuple[float, float, float, float]
Polygons: TypeAlias = Sequence[shapely.Geometry] | Shaped[np.ndarray, " polygon"]
Cut = Callable[[shapely.Geometry, Box], shapely.Geometry]


def area_fractions(outlines: Sequence[Outline], boxes: Real[np.ndarray, "tile 4"]) -> Float64[np.ndarray, " tile"]:
    """The exact share of each box (x0, y0, x1, y1 in level-0 pixels) that the outlines cover together, 0 to 1."""
    shares = np.zeros(len(boxes), np.float64)
    polygons = [outline.polygon for outline in outlines]
    near = boxes_near(boxes, polygons)
    shares[near] = _fractions(polygons, shapely.box(*boxes[near].T.astype(np.float64)))
    return shares


def boxes_near(boxes: Real[np.ndarray, "tile 4"], polygons: Polygons) -> Int64[np.ndarray, " near"]:
    """The boxes that reach into the frame of all polygons: to make a geometry of each of the others takes long."""
    if not len(polygons):
        return np.empty(0, np.int64)
    x0, y0, x1, y1 = shapely.total_bounds(polygons)
    return np.flatnonzero((boxes[:, 0] <= x1) & (boxes[:, 1] <= y1) & (boxes[:, 2] >= x0) & (boxes[:, 3] >= y0))


def _fractions(
    polygons: Sequence[shapely.Geometry], tiles: Shaped[np.ndarray, " tile"]
) -> Float64[np.ndarray, " tile"]:
    pieces, owners = _pieces(polygons)
    tree = shapely.STRtree(tiles)
    covered = np.zeros(len(tiles), np.float64)
    covered[tree.query(pieces, predicate="covers")[1]] = 1
    piece, tile = tree.query(pieces, predicate="intersects")
    open_ = covered[tile] < 1
    piece, tile = piece[open_], tile[open_]
    parts = shapely.intersection(pieces[piece], tiles[tile])
    shared = _has_several(owners[piece], tile, len(tiles))[tile]
    np.add.at(covered, tile[~shared], shapely.area(parts[~shared]) / shapely.area(tiles[tile[~shared]]))
    for one, together in _grouped(parts[shared], tile[shared]):
        covered[one] = shapely.area(shapely.union_all(together)) / shapely.area(tiles[one])
    return np.clip(covered, 0, 1)


def _pieces(polygons: Sequence[shapely.Geometry]) -> tuple[Shaped[np.ndarray, " piece"], Int64[np.ndarray, " piece"]]:
    """Polygons of few corners that make up the given ones, and the index of the one each is of.

    Pieces of the same polygon share no area.
    """
    parts, owners = shapely.get_parts(list(polygons), return_index=True)
    cut = [_subdivided(part) for part in parts]
    pieces = np.array([piece for group in cut for piece in group], dtype=object)
    return pieces, np.repeat(owners.astype(np.int64), [len(group) for group in cut])


def _subdivided(polygon: shapely.Polygon) -> list[shapely.Geometry]:
    try:
        pieces = [mended(piece) for piece in _halved(polygon, _clip)]
        if abs(shapely.area(pieces).sum() / polygon.area - 1) < _AREA_TOLERANCE:
            return pieces
    except shapely.errors.GEOSException:
        pass
    return _halved(polygon, _intersect)


def _clip(geometry: shapely.Geometry, box: Box) -> shapely.Geometry:
    """Twenty times faster than an intersection, and once in a thousand times wrong or invalid: to be checked."""
    return shapely.clip_by_rect(geometry, *box)


def _intersect(geometry: shapely.Geometry, box: Box) -> shapely.Geometry:
    return shapely.intersection(geometry, shapely.box(*box))


def _halved(polygon: shapely.Geometry, cut: Cut) -> list[shapely.Geometry]:
    """The polygon cut across its longer side again and again, until no piece has many corners."""
    pieces, large = [], [polygon]
    while large:
        geometry = large.pop()
        if shapely.get_num_coordinates(geometry) <= _MAX_CORNERS:
            pieces.append(geometry)
            continue
        x0, y0, x1, y1 = geometry.bounds
        if x1 - x0 >= y1 - y0:
            halves = [(x0, y0, (x0 + x1) / 2, y1), ((x0 + x1) / 2, y0, x1, y1)]
        else:
            halves = [(x0, y0, x1, (y0 + y1) / 2), (x0, (y0 + y1) / 2, x1, y1)]
        large += [cut(geometry, half) for half in halves]
    return pieces


def _has_several(
    owners: Int64[np.ndarray, " part"], tile: Int64[np.ndarray, " part"], tiles: int
) -> Bool[np.ndarray, " {tiles}"]:
    """Whether parts of more than one polygon, which may overlap, lie in each tile."""
    pairs = np.unique(np.column_stack([tile, owners]), axis=0)
    return np.bincount(pairs[:, 0], minlength=tiles) > 1


def _grouped(
    parts: Shaped[np.ndarray, " part"], tile: Int64[np.ndarray, " part"]
) -> list[tuple[int, Shaped[np.ndarray, " _"]]]:
    """The parts of each tile."""
    order = np.argsort(tile, kind="stable")
    tiles, starts = np.unique(tile[order], return_index=True)
    return list(zip(tiles.tolist(), np.split(parts[order], starts[1:]), strict=True)) if len(tiles) else []
