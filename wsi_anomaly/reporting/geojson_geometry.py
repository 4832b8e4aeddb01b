"""What QuPath makes of a GeoJSON geometry. Knows parsed JSON and shapes; knows no file and no feature."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import shapely
from shapely.geometry.base import BaseGeometry
from shapely.validation import explain_validity

SMALLEST_PX = 0.01

Json = Any

GEOMETRY_TYPES = (
    "Point",
    "MultiPoint",
    "LineString",
    "MultiLineString",
    "Polygon",
    "MultiPolygon",
    "GeometryCollection",
)


class Finding(NamedTuple):
    """What is wrong with one thing, and what to do about it."""

    severity: Literal["error", "warning"]
    rule: str
    message: str


def rejects(rule: str, message: str) -> Finding:
    """QuPath 0.5, or 0.6 and later, refuses the whole file for it, or is not known to read it."""
    return Finding("error", rule, message)


def loses(rule: str, message: str) -> Finding:
    """QuPath reads the file, but not what was meant."""
    return Finding("warning", rule, message)


def is_number(value: Json) -> bool:
    """True for numbers, which in Python would include true and false."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def geometry_findings(geometry: Json) -> Iterator[Finding]:
    """What keeps QuPath from reading a parsed JSON value as the geometry that is meant."""
    if not isinstance(geometry, dict):
        yield rejects("geometry", "has no geometry. Give it one, or leave the feature out.")
        return
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        yield rejects(
            "geometry-collection", "is a GeometryCollection, which QuPath 0.6 refuses. Write its parts one by one."
        )
    elif not isinstance(kind, str) or kind not in _CHECKS:
        yield rejects("geometry-type", f"has a geometry of type {kind!r}. Known: {', '.join(_CHECKS)}.")
    else:
        yield from _plane(geometry)
        yield from _coordinates(kind, geometry.get("coordinates"))


def _plane(geometry: dict[str, Json]) -> Iterator[Finding]:
    plane = geometry.get("plane", {})
    if not isinstance(plane, dict) or not plane.keys() <= {"c", "z", "t"}:
        yield rejects("plane", "has a plane with other members than c, z and t. Remove them.")
    elif not all(type(number) is int for number in plane.values()):
        yield rejects("plane", "has a plane whose c, z or t is no whole number. Write whole numbers.")
    if not isinstance(geometry.get("isEllipse", False), bool):
        yield rejects("ellipse", "has an isEllipse that is neither true nor false. Write true or false.")


def _coordinates(kind: str, coordinates: Json) -> Iterator[Finding]:
    depth, check = _CHECKS[kind]
    if not _is_nested_positions(coordinates, depth):
        yield rejects(
            "coordinates", f"has coordinates that are no {kind}. Nest pairs of finite numbers as GeoJSON asks."
        )
        return
    findings = list(check(coordinates))
    yield from findings
    if not any(finding.severity == "error" for finding in findings) and _smallest(coordinates) < 0:
        yield loses(
            "outside", "has negative coordinates, outside the image. Count from its top-left corner as QuPath does."
        )


def _is_nested_positions(value: Json, depth: int) -> bool:
    if not isinstance(value, list) or not value:
        return False
    if depth == 0:
        return len(value) >= 2 and all(is_number(number) and math.isfinite(number) for number in value)  # noqa: PLR2004
    return all(_is_nested_positions(item, depth - 1) for item in value)


def _smallest(value: Json) -> float:
    if isinstance(value[0], list):
        return min(_smallest(item) for item in value)
    return float(min(value[:2]))


def _anything(_: Json) -> Iterator[Finding]:
    yield from ()


def _line(line: Json) -> Iterator[Finding]:
    if len(line) < 2:  # noqa: PLR2004
        yield rejects("coordinates", "has a line of a single position. Write a Point.")


def _lines(lines: Json) -> Iterator[Finding]:
    for line in lines:
        yield from _line(line)


def _polygon(rings: Json) -> Iterator[Finding]:
    if any(ring[0][:2] != ring[-1][:2] for ring in rings):
        yield rejects("unclosed", "has a ring that is not closed. Repeat its first position at its end.")
        return
    shape = _shape(rings)
    if _is_empty(rings[0], shape):
        yield loses(
            "empty-outline", f"has an outline below {SMALLEST_PX} px, which QuPath reads as empty. Leave it out."
        )
    elif shape is None or not shape.is_valid:
        reason = explain_validity(shape) if shape else "a ring of too few positions"
        yield rejects("invalid-outline", f"has an outline that QuPath 0.6 refuses: {reason}. Try shapely.make_valid.")


def _shape(rings: Json) -> BaseGeometry | None:
    if min(map(len, rings)) < 4:  # noqa: PLR2004 - shapely's least for a closed ring
        return None
    outline, *holes = ([position[:2] for position in ring] for ring in rings)
    return shapely.Polygon(outline, holes)


def _is_empty(ring: Json, shape: BaseGeometry | None) -> bool:
    """True if the ring encloses nothing, seen from its extent, or from its hull where it crosses itself."""
    xs, ys, *_ = zip(*ring, strict=False)
    if min(max(xs) - min(xs), max(ys) - min(ys)) < SMALLEST_PX:
        return True
    return shape is not None and shape.area == 0 and shape.convex_hull.area == 0


def _polygons(parts: Json) -> Iterator[Finding]:
    if len(parts) == 1:
        yield rejects("single-part", "is a MultiPolygon of one part, which QuPath 0.5 refuses. Write a Polygon.")
    findings = [finding for part in parts for finding in _polygon(part)]
    yield from findings
    if not findings:
        yield from _together(shapely.MultiPolygon([_shape(part) for part in parts]))


def _together(shape: shapely.MultiPolygon) -> Iterator[Finding]:
    if shape.is_valid:
        return
    merged = shapely.union_all(shape.geoms)
    if shape.area - merged.area > SMALLEST_PX**2:
        yield rejects(
            "overlapping-parts", "has parts that overlap, which QuPath 0.6 refuses. Merge them (shapely.union_all)."
        )
    else:
        yield loses("touching-parts", "has parts that share an edge: QuPath 0.6 merges them. Merge them yourself.")


_CHECKS: dict[str, tuple[int, Callable[[Json], Iterator[Finding]]]] = {
    "Point": (0, _anything),
    "MultiPoint": (1, _anything),
    "LineString": (1, _line),
    "MultiLineString": (2, _lines),
    "Polygon": (2, _polygon),
    "MultiPolygon": (3, _polygons),
}
"""By type: how deep positions are nested, and what else must hold."""
