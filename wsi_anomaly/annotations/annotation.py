"""One slide's annotation file -> what is abnormal on the slide, and how much of each tile. Opens no slide."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import shapely
from jaxtyping import Float64, Real

from wsi_anomaly.annotations.abnormal_mask import AbnormalMask, read_abnormal_mask
from wsi_anomaly.annotations.asap import drawn_in_asap
from wsi_anomaly.annotations.coverage import area_fractions
from wsi_anomaly.annotations.frame import Frame
from wsi_anomaly.annotations.geojson import drawn_in_json
from wsi_anomaly.annotations.groups import GROUPS, Meaning, meaning_of
from wsi_anomaly.annotations.outlines import Area, Drawn, Outline, mended
from wsi_anomaly.errors import AnnotationError

PICTURE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg")
JSON_SUFFIXES = (".geojson", ".json", ".geojson.gz", ".json.gz")
SUFFIXES = (".xml", *JSON_SUFFIXES, *PICTURE_SUFFIXES)

_MOST_NAMED = 10
_EDGE_PX = 1


@dataclass(frozen=True, slots=True)
class Annotation:
    """What somebody outlined on one slide, in level-0 pixels."""

    abnormal: tuple[Outline, ...]
    """What is left of the abnormal areas without the excluded ones; they may overlap each other."""
    excluded: tuple[Outline, ...]
    report: tuple[str, ...]
    """What was mended or left out, each with the name of the file and the lines or numbers of what it concerns."""


def read_annotation(
    path: Path,
    *,
    frame: Frame,
    groups: Mapping[str, Meaning] | None = None,
    abnormal_values: Collection[int] | None = None,
) -> Annotation | AbnormalMask:
    """The annotation in an XML file of ASAP, a (Geo)JSON file or a mask picture, told apart by the suffix.

    GeoJSON counts from the corner of the slide's bounds, as QuPath does; everything else from level 0 of the file.
    `groups` says what the groups or classes of outlines mean where `GROUPS` does not or otherwise; `abnormal_values`
    which numbers of a mask are abnormal.

    Raises:
        AnnotationError: the file cannot be read, has a group without a meaning, or all its areas lie outside the slide.
    """
    name = path.name.lower()
    if name.endswith(PICTURE_SUFFIXES):
        return read_abnormal_mask(path, frame=frame, abnormal_values=abnormal_values)
    if name.endswith(".xml"):
        drawn = drawn_in_asap(path)
    elif name.endswith(JSON_SUFFIXES):
        drawn = drawn_in_json(path, offset_level0_px=frame.bounds_level0_px[:2])
    else:
        raise AnnotationError(f"{path.name}: no kind of annotation that is known: give {', '.join(SUFFIXES)}")
    return _annotation(path.name, drawn, frame, groups or {})


def abnormal_fraction(
    annotation: Annotation | AbnormalMask, boxes: Real[np.ndarray, "tile 4"]
) -> Float64[np.ndarray, " tile"]:
    """The share of each box (x0, y0, x1, y1 in level-0 pixels) that is abnormal, 0 to 1.

    Raises:
        AnnotationError: the annotation is a mask that cannot be read.
    """
    if isinstance(annotation, AbnormalMask):
        return annotation.fractions(boxes)
    return area_fractions(annotation.abnormal, boxes)


def _annotation(name: str, drawn: Sequence[Drawn], frame: Frame, groups: Mapping[str, Meaning]) -> Annotation:
    areas, report = _areas(name, drawn)
    inside, outside = _on_slide(name, areas, frame)
    meanings = _meanings(name, [entry for entry, _ in inside], groups)
    named: dict[Meaning, list[Outline]] = {"abnormal": [], "excluded": [], "ignored": []}
    for (entry, polygon), meaning in zip(inside, meanings, strict=True):
        named[meaning].append(Outline(polygon, entry.groups[0] if entry.groups else ""))
    report += outside
    if named["ignored"]:
        classes = sorted({outline.class_name or "none" for outline in named["ignored"]})
        report.append(f"{name}: {len(named['ignored'])} areas are ignored (groups {', '.join(classes)})")
    nameless = sum(not outline.class_name for outline in named["abnormal"])
    if nameless and any(entry.groups for entry, _ in inside):
        report.append(f"{name}: {nameless} areas have no group while others do: they count as abnormal")
    abnormal = _without(named["abnormal"], named["excluded"])
    if len(abnormal) < len(named["abnormal"]):
        report.append(f"{name}: {len(named['abnormal']) - len(abnormal)} abnormal areas lie wholly in excluded ones")
    if not abnormal:
        report.append(f"{name}: no abnormal area in it")
    return Annotation(abnormal, tuple(named["excluded"]), tuple(report))


def _areas(name: str, drawn: Sequence[Drawn]) -> tuple[list[tuple[Drawn, Area]], list[str]]:
    """The entries with some area, mended, and what was mended or left out."""
    polygons = [
        (entry, None if entry.shape is None else mended(entry.shape)) for entry in drawn if entry.kind == "polygon"
    ]
    areas = [(entry, polygon) for entry, polygon in polygons if polygon is not None and polygon.area > 0]
    flat = [entry for entry, polygon in polygons if polygon is None or polygon.area == 0]
    crossing = [entry for entry, _ in areas if entry.shape is not None and not entry.shape.is_valid]
    report = []
    others = sorted((entry for entry in drawn if entry.kind != "polygon"), key=lambda entry: entry.kind)
    for kind, entries in groupby(others, key=lambda entry: entry.kind):
        report.append(f"{name}: {_counted(list(entries), kind)} without an area, left out")
    if flat:
        report.append(f"{name}: {_counted(flat, 'polygon')} without an area or with fewer than 3 corners, left out")
    if crossing:
        report.append(f"{name}: {_counted(crossing, 'polygon')} of {len(areas)} crossing themselves, mended")
    return areas, report


def _on_slide(
    name: str, areas: Sequence[tuple[Drawn, Area]], frame: Frame
) -> tuple[list[tuple[Drawn, Area]], list[str]]:
    """The areas that lie on the slide at least in part, and what is to be told of the others."""
    if not areas:
        return [], []
    width, height = frame.size_level0_px
    x0, y0, x1, y1 = shapely.bounds([polygon for _, polygon in areas]).T
    off = (x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height)
    over = ~off & ((x0 < -_EDGE_PX) | (y0 < -_EDGE_PX) | (x1 > width + _EDGE_PX) | (y1 > height + _EDGE_PX))
    if off.all():
        raise AnnotationError(
            f"{name}: all {len(areas)} polygons (the first: {areas[0][0].where}, at x {x0[0]:.0f}, y {y0[0]:.0f}) lie "
            f"outside the slide of {width} x {height} px. Is it the annotation of another slide, or drawn on a reduced "
            "copy? Coordinates must be level-0 pixels"
        )
    report = []
    for which, fault in ((off, "outside the slide, left out"), (over, "reaching beyond the slide, kept as drawn")):
        if which.any():
            report.append(
                f"{name}: {_counted([areas[i][0] for i in np.flatnonzero(which).tolist()], 'polygon')} {fault}"
            )
    return [area for area, left_out in zip(areas, off, strict=True) if not left_out], report


def _meanings(name: str, entries: Sequence[Drawn], groups: Mapping[str, Meaning]) -> list[Meaning]:
    meanings = [meaning_of(entry.groups, groups) for entry in entries]
    unknown = sorted({entry.groups[0] for entry, meaning in zip(entries, meanings, strict=True) if meaning is None})
    if unknown:
        found = sorted({group for entry in entries for group in entry.groups[:1]})
        known = ", ".join(group for group in GROUPS if group)
        raise AnnotationError(
            f"{name}: unknown group {', '.join(map(repr, unknown))} (groups in the file: {', '.join(found)}; known: "
            f"{known}). Say what each means with --group: {unknown[0]}=abnormal, "
            f"{unknown[0]}=excluded or {unknown[0]}=ignored, or "
            "*=ignored for all others"
        )
    return [meaning for meaning in meanings if meaning is not None]


def _without(abnormal: Sequence[Outline], excluded: Sequence[Outline]) -> tuple[Outline, ...]:
    """The abnormal areas with the excluded ones cut out; those that vanish are left out."""
    if not excluded:
        return tuple(abnormal)
    holes = np.array([outline.polygon for outline in excluded])
    tree = shapely.STRtree(holes)
    cut = []
    for outline in abnormal:
        within = holes[tree.query(outline.polygon, predicate="intersects")]
        rest = outline.polygon.difference(shapely.union_all(within)) if len(within) else outline.polygon
        if rest.area > 0:
            cut.append(replace(outline, polygon=rest))
    return tuple(cut)


def _counted(entries: Sequence[Drawn], kind: str) -> str:
    """Such as "2 dots (line 3, line 9)"."""
    places = ", ".join(entry.where for entry in entries[:_MOST_NAMED])
    more = ", ..." if len(entries) > _MOST_NAMED else ""
    return f"{len(entries)} {kind}{'s' if len(entries) > 1 else ''} ({places}{more})"
