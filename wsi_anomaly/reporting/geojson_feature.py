"""What QuPath makes of the members and properties of a GeoJSON feature. Knows parsed JSON; knows no file."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from wsi_anomaly.reporting.geojson_geometry import Finding, Json, geometry_findings, is_number, loses, rejects

OBJECT_TYPES = ("annotation", "detection", "tile", "cell", "tmaCore", "root")
FLOAT32_MAX = 3.4028235e38

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_NUMBER_TEXT = re.compile(r"NaN|-?Infinity|[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def feature_findings(feature: dict[str, Any]) -> Iterator[Finding]:
    """What keeps QuPath from reading a feature as it is meant; not looking at features within it."""
    if feature.get("type") != "Feature":
        yield rejects("feature-type", f'has the type {feature.get("type")!r}. Write "type": "Feature".')
    if "id" in feature and not is_identifier(feature["id"]):
        yield loses("id", f"has the id {feature['id']!r}, which QuPath drops. Use a UUID with its dashes.")
    for name in _PROPERTIES.keys() & feature.keys() - {"type"}:
        yield loses("misplaced", f"has {name!r} beside its properties, where it is ignored. Move it into them.")
    yield from geometry_findings(feature.get("geometry"))
    properties = feature.get("properties", {})
    if not isinstance(properties, dict):
        yield rejects("properties", "has properties that are no object. Write {} or leave them out.")
        return
    yield from _nucleus(feature, object_type(properties))
    for name, value in properties.items():
        check = _PROPERTIES.get(name)
        if check is None:
            yield loses(
                "unknown-property", f"has the property {name!r}, which QuPath ignores. Use measurements or metadata."
            )
        else:
            yield from check(value)


def is_identifier(value: object) -> bool:
    """True for what QuPath keeps as the identifier of an object."""
    return isinstance(value, str) and _UUID.fullmatch(value) is not None


def object_type(properties: dict[str, Any]) -> str:
    """What kind of object QuPath makes of a feature with these properties."""
    names = (properties[key] for key in ("objectType", "object_type", "type") if key in properties)
    found = next(names, "annotation")
    return found if found in OBJECT_TYPES else "annotation"


def class_colour(properties: dict[str, Any]) -> tuple[str, Any] | None:
    """The name of a feature's class and the colour that the feature asks for; None if it asks for none."""
    given = properties.get("classification")
    if not isinstance(given, dict) or not isinstance(given.get("color"), list):
        return None
    names = given.get("names", [given.get("name")])
    return (": ".join(map(str, names)), given["color"]) if isinstance(names, list) else None


def _nucleus(feature: dict[str, Any], kind: str) -> Iterator[Finding]:
    if "nucleusGeometry" not in feature:
        return
    if kind == "cell":
        yield from geometry_findings(feature["nucleusGeometry"])
    else:
        yield loses("nucleus", 'has a nucleusGeometry, which only cells have. Write "objectType": "cell".')


def _object_type(value: object) -> Iterator[Finding]:
    if value == "tmaCore":
        yield loses("tma-core", "is a tmaCore, which QuPath skips. Write it as an annotation.")
    elif value not in OBJECT_TYPES:
        yield loses(
            "object-type", f"has the objectType {value!r}, read as annotation. Known: {', '.join(OBJECT_TYPES)}."
        )


def _old_object_type(value: object) -> Iterator[Finding]:
    yield loses("deprecated", "has an object_type, which is deprecated. Name it objectType.")
    yield from _object_type(value)


def _name(value: object) -> Iterator[Finding]:
    if not isinstance(value, str) and not is_number(value):
        yield rejects("name", "has a name that is no text. Write text, or leave it out.")


def _classification(value: object) -> Iterator[Finding]:
    if value is None:
        return
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            yield loses("class-text", "has JSON text as its class, read as its name. Write the object, not its text.")
    elif isinstance(value, dict):
        yield from _class_object(value)
    else:
        yield rejects("classification", "has a classification that is no text, object or null. Write one of these.")


def _class_object(value: dict[str, Any]) -> Iterator[Finding]:
    names = value["names"] if "names" in value else [value.get("name")]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        yield rejects("class-name", "has a classification without a name. Give it a name, or names.")
    if "color" in value:
        if value["color"] is not None and not _is_rgb(value["color"]):
            yield rejects(
                "class-colour", f"has the class colour {value['color']!r}. Write [red, green, blue], 0 to 255."
            )
    elif type(value.get("colorRGB")) is not int:
        yield rejects("class-colour", "has a class without colour. Add [red, green, blue] or null.")


def _colour(value: object) -> Iterator[Finding]:
    if type(value) is not int and not _is_rgb(value):
        yield rejects("colour", f"has the color {value!r}. Write [red, green, blue], 0 to 255.")


def _is_rgb(value: object) -> bool:
    """True for three or four channels; the fourth is opacity."""
    return (
        isinstance(value, list)
        and len(value) in (3, 4)
        and all(type(channel) is int and 0 <= channel <= 255 for channel in value)  # noqa: PLR2004
    )


def _measurements(value: object) -> Iterator[Finding]:
    if isinstance(value, dict):
        for name, number in value.items():
            if number is None:
                yield loses("measurement-dropped", f'has no value for {name!r}, so it is dropped. Write "NaN".')
            else:
                yield from _measurement(name, number)
    elif isinstance(value, list) and all(isinstance(item, dict) and "name" in item for item in value):
        for item in value:
            yield from _measurement(item["name"], item.get("value"))
    else:
        yield rejects("measurements", "has measurements that are no object. Write {name: number}.")


def _measurement(name: object, value: Json) -> Iterator[Finding]:
    if isinstance(value, bool):
        yield loses("measurement-dropped", f"has true or false for {name!r}, so it is dropped. Write 1 or 0.")
    elif not is_number(value) and not (isinstance(value, str) and _NUMBER_TEXT.fullmatch(value)):
        yield rejects("measurement", f'has {value!r} for {name!r}. Write a number, or "NaN".')
    elif FLOAT32_MAX < abs(float(value)) < math.inf:
        yield loses("measurement-range", f"has {value!r} for {name!r}, which QuPath keeps as infinite. Scale it.")


def _metadata(value: object) -> Iterator[Finding]:
    if not isinstance(value, dict) or not all(isinstance(entry, str | int | float) for entry in value.values()):
        yield rejects("metadata", "has metadata that are not text by name. Write {name: text}.")


def _is_locked(value: object) -> Iterator[Finding]:
    if not isinstance(value, bool):
        yield rejects("locked", "has an isLocked that is neither true nor false. Write true or false.")


def _children(value: object) -> Iterator[Finding]:
    if not isinstance(value, list):
        yield rejects("children", "has childObjects that are no array. Write an array of features.")


_PROPERTIES: dict[str, Callable[[object], Iterator[Finding]]] = {
    "objectType": _object_type,
    "object_type": _old_object_type,
    "type": _object_type,
    "name": _name,
    "classification": _classification,
    "color": _colour,
    "measurements": _measurements,
    "metadata": _metadata,
    "isLocked": _is_locked,
    "childObjects": _children,
    "children": _children,
}
"""By property that QuPath reads: what must hold of its value."""
