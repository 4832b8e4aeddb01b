"""JSON files of outlines, GeoJSON as QuPath writes it or plain lists of vertices -> polygons. Gives them no meaning."""

import gzip
import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import shapely.geometry

from wsi_anomaly.annotations.outlines import Area, Drawn, Outline, mended
from wsi_anomaly.errors import AnnotationError

_log = logging.getLogger(__name__)

_POLYGONS = ("Polygon", "MultiPolygon")
_NO_AREAS = {
    "Point": "point",
    "MultiPoint": "point set",
    "LineString": "line",
    "MultiLineString": "line",
}
_VERTEX_LISTS = {"positive": "Tumor", "negative": "Exclusion"}
_ADVICE = "export annotations as GeoJSON from QuPath"


def read_outlines(path: Path, *, offset_level0_px: tuple[int, int] = (0, 0)) -> tuple[Outline, ...]:
    """The areas of a GeoJSON file as QuPath writes it: a FeatureCollection, a list or one Feature, gzipped or not.

    QuPath counts from the corner of the slide's bounds, so the caller passes their (x, y) as `offset_level0_px`, and it
    is added. An outline that crosses itself is mended: every part that the line goes round belongs to it. Features
    without an area (points, lines, empty ones) are left out. Both are counted in a logged warning.

    Raises:
        AnnotationError: the file cannot be read, is not JSON, or holds no area.
    """
    features = list(_features(_read_json(path)))
    drawn = [(_polygon(feature), feature) for feature in features]
    valid = [(mended(polygon), polygon.is_valid, feature) for polygon, feature in drawn if polygon is not None]
    kept = [(polygon, as_drawn, feature) for polygon, as_drawn, feature in valid if polygon.area > 0]
    if not kept:
        raise AnnotationError(f"{path.name}: no polygon in it; {_ADVICE}")
    if len(kept) < len(features):
        _log.warning(
            "%s: %d of %d features are no areas and left out", path.name, len(features) - len(kept), len(features)
        )
    if crossing := sum(not as_drawn for _, as_drawn, _ in kept):
        _log.warning("%s: %d of %d outlines cross themselves and were mended", path.name, crossing, len(kept))
    return tuple(Outline(_shifted(polygon, offset_level0_px), _class_name(feature)) for polygon, _, feature in kept)


def drawn_in_json(path: Path, *, offset_level0_px: tuple[int, int]) -> tuple[Drawn, ...]:
    """Every feature of a GeoJSON file, to which the offset is added as in `read_outlines`.

    Also the lists of vertices in level-0 pixels into which tools for Camelyon16 turn its XML files,
    `{"positive": [{"name", "vertices"}], "negative": [...]}`: their groups are "Tumor" and "Exclusion".

    Raises:
        AnnotationError: the file cannot be read, is not JSON, or holds something else.
    """
    content = _read_json(path)
    if isinstance(content, dict) and isinstance(content.get("positive"), list):
        return tuple(_vertex_lists(path, content))
    return tuple(
        _drawn(path, number, feature, offset_level0_px) for number, feature in enumerate(_features(content), start=1)
    )


def _drawn(path: Path, number: int, feature: Mapping[str, Any], offset_level0_px: tuple[int, int]) -> Drawn:
    where = f"feature {number}"
    if not isinstance(feature.get("type"), str):
        raise AnnotationError(f"{path.name}: {where} is no GeoJSON; {_ADVICE}")
    polygon = _polygon(feature)
    name = _class_name(feature)
    groups = dict.fromkeys(name for name in (name, name.partition(":")[0]) if name)
    return Drawn(where, tuple(groups), _kind(feature), None if polygon is None else _shifted(polygon, offset_level0_px))


def _vertex_lists(path: Path, content: Mapping[str, Any]) -> Iterator[Drawn]:
    for key, group in _VERTEX_LISTS.items():
        for number, entry in enumerate(content.get(key) or [], start=1):
            where = f"{key} polygon {number}"
            try:
                vertices = np.array(entry["vertices"], np.float64).reshape(-1, 2)
            except (LookupError, TypeError, ValueError) as error:
                raise AnnotationError(f"{path.name}: {where} has no list of [x, y] called 'vertices'") from error
            if not np.isfinite(vertices).all():
                raise AnnotationError(f"{path.name}: {where} has a vertex that is no number")
            yield Drawn(where, (group,), "polygon", shapely.Polygon(vertices) if len(vertices) > 2 else None)  # noqa: PLR2004


def _read_json(path: Path) -> Any:  # noqa: ANN401 - whatever the user's file holds
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return json.loads(content.decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error) as error:  # the last two: a cut-off or damaged gzip file
        raise AnnotationError(f"{path.name}: cannot be read ({error.__class__.__name__})") from error
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path.name}: not JSON; {_ADVICE}") from error


def _features(content: object) -> Iterator[Mapping[str, Any]]:
    """The features of a collection, of a list, or the one that it is; each followed by its child objects."""
    if isinstance(content, list):
        for item in content:
            yield from _features(item)
    elif isinstance(content, dict) and isinstance(content.get("features"), list):
        yield from _features(content["features"])
    elif isinstance(content, dict):
        yield content
        properties = content.get("properties")
        yield from _features(properties.get("childObjects") if isinstance(properties, dict) else None)


def _geometry(feature: Mapping[str, Any]) -> object:
    return feature.get("geometry", feature)  # QuPath takes a bare geometry for an annotation too


def _kind(feature: Mapping[str, Any]) -> str:
    geometry = _geometry(feature)
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    return "polygon" if kind in _POLYGONS else _NO_AREAS.get(str(kind), "feature without a polygon")


def _polygon(feature: Mapping[str, Any]) -> Area | None:
    geometry = _geometry(feature)
    if not isinstance(geometry, dict) or geometry.get("type") not in _POLYGONS:
        return None
    try:
        with np.errstate(invalid="ignore"):  # NaN among the corners is refused below
            drawn = shapely.force_2d(shapely.geometry.shape(geometry))
    except (shapely.errors.ShapelyError, LookupError, TypeError, ValueError):
        return None
    return drawn if np.isfinite(shapely.get_coordinates(drawn)).all() else None


def _shifted(polygon: Area, offset_level0_px: tuple[int, int]) -> Area:
    return shapely.transform(polygon, lambda xy: xy + offset_level0_px)


def _class_name(feature: Mapping[str, Any]) -> str:
    """The class in any of the ways that versions of QuPath write it."""
    properties = feature.get("properties")
    classification = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(classification, dict):
        names = classification.get("names")
        return ": ".join(map(str, names)) if isinstance(names, list) else str(classification.get("name") or "")
    return classification if isinstance(classification, str) else ""
