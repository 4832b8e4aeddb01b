"""Outlines: valid polygons in level-0 pixels, and the pixels within them. Reads no file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import shapely
from jaxtyping import Bool

Area: TypeAlias = shapely.Polygon | shapely.MultiPolygon


@dataclass(frozen=True, slots=True)
class Outline:
    """One annotated area, in level-0 pixels."""

    polygon: Area
    """Valid and of some area, with holes."""
    class_name: str
    """As QuPath shows it ("Tumor", "Tumor: Positive"), or its group in ASAP; "" where the area has neither."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One entry of an annotation file as it stands there: nothing is checked or mended yet."""

    where: str
    """Its line or its number in the file, for messages."""
    groups: tuple[str, ...]
    """The name of its group or class, followed by those that this one is part of; empty where it has none."""
    kind: str
    """What it is, for messages: "polygon", "dot", "line"."""
    shape: Area | None
    """In level-0 pixels; None where the entry is no area."""


def mended(polygon: Area) -> Area:
    """The polygon, where its line crosses itself with every part that the line goes round."""
    if polygon.is_valid:
        return polygon
    # The method "linework" would punch a hole wherever a hand-drawn line overlaps itself.
    whole = shapely.make_valid(polygon, method="structure", keep_collapsed=False)
    # Rounding can leave a crossing of a hair's breadth; a buffer of 0 alone would drop half of a bow tie.
    return whole if whole.is_valid else whole.buffer(0)


def rasterise(
    outlines: Sequence[Outline],
    *,
    shape: tuple[int, int],
    origin_level0_px: tuple[int, int],
    downsample: tuple[float, float],
) -> Bool[np.ndarray, "row column"]:
    """The pixels whose centres lie in an outline or on its edge.

    `shape` is (rows, columns), `origin_level0_px` the (x, y) of the top left corner of the array and `downsample` the
    width and height of its pixels in level-0 pixels.
    """
    inside = np.zeros(shape, np.bool_)
    for outline in outlines:
        x0, y0, x1, y1 = (np.array(outline.polygon.bounds) - [*origin_level0_px] * 2) / ([*downsample] * 2)
        rows = np.arange(max(0, int(y0)), min(shape[0], int(y1) + 1))
        columns = np.arange(max(0, int(x0)), min(shape[1], int(x1) + 1))
        if rows.size == 0 or columns.size == 0:
            continue
        x = origin_level0_px[0] + (columns + 0.5) * downsample[0]
        y = origin_level0_px[1] + (rows + 0.5) * downsample[1]
        shapely.prepare(outline.polygon)
        inside[np.ix_(rows, columns)] |= shapely.intersects_xy(outline.polygon, x[None, :], y[:, None])
    return inside
