"""XML files of ASAP -> polygons and the names of their groups. Gives neither a meaning and mends no polygon."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

import numpy as np
import shapely

from wsi_anomaly.annotations.outlines import Drawn
from wsi_anomaly.errors import AnnotationError

_NO_AREAS = {"dot": "dot", "pointset": "point set", "measurement": "measurement"}
_UNGROUPED = ("", "none")
_MIN_CORNERS = 3


def drawn_in_asap(path: Path) -> tuple[Drawn, ...]:
    """Every annotation of the file, in level-0 pixels of the slide file.

    Corners stand in the order of their attribute `Order`. A spline is taken as straight lines between its points, as
    ASAP itself does when it makes a mask. Of a group within a group both names are given.

    Raises:
        AnnotationError: the file cannot be read, is no XML of ASAP, or a point lacks X or Y (with its line).
    """
    parser = expat.ParserCreate()
    file = _AsapFile(path.name, parser)
    parser.StartElementHandler = file.start
    try:
        with path.open("rb") as opened:
            parser.ParseFile(opened)
    except OSError as error:
        raise AnnotationError(f"{path.name}: cannot be read ({error.__class__.__name__})") from error
    except expat.ExpatError as error:
        raise AnnotationError(
            f"{path.name}, line {error.lineno}: broken XML ({expat.ErrorString(error.code)}); save it again in ASAP"
        ) from error
    return tuple(file.drawn(entry) for entry in file.entries)


@dataclass(slots=True)
class _Entry:
    """One element Annotation while the file is read."""

    line: int
    kind: str
    group: str
    points: list[tuple[float, float, float]] = field(default_factory=list)
    """Order, x, y."""


class _AsapFile:
    """What has been read of a file; `start` is called at each opening tag."""

    def __init__(self, name: str, parser: expat.XMLParserType) -> None:
        self.entries: list[_Entry] = []
        self._name = name
        self._parser = parser
        self._parents: dict[str, str] = {}
        self._empty = True

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        if tag == "Coordinate" and self.entries:  # first, as there are a hundred thousand of them
            points = self.entries[-1].points
            order = _number(attributes.get("Order", ""))
            x, y = _number(attributes.get("X", "")), _number(attributes.get("Y", ""))
            if not math.isfinite(x + y):
                raise AnnotationError(
                    f"{self._name}, line {self._parser.CurrentLineNumber}: a Coordinate without numbers for X and Y; "
                    "mend the line or save the file again in ASAP"
                )
            points.append((order if math.isfinite(order) else len(points), x, y))
        elif self._empty and tag != "ASAP_Annotations":
            raise AnnotationError(f"{self._name}: no XML of ASAP (it begins with <{tag}>); export it from ASAP")
        elif tag == "Annotation":
            kind = attributes.get("Type", "Polygon").strip().lower()
            self.entries.append(_Entry(self._parser.CurrentLineNumber, kind, attributes.get("PartOfGroup", "").strip()))
        elif tag == "Group":
            self._parents[attributes.get("Name", "").strip()] = attributes.get("PartOfGroup", "").strip()
        self._empty = False

    def drawn(self, entry: _Entry) -> Drawn:
        kind = _NO_AREAS.get(entry.kind, "polygon")
        area = None
        if kind == "polygon" and len(entry.points) >= _MIN_CORNERS:
            corners = np.array(sorted(entry.points, key=lambda point: point[0]))[:, 1:]
            area = shapely.Polygon(corners)
        return Drawn(f"line {entry.line}", self._lineage(entry.group), kind, area)

    def _lineage(self, group: str) -> tuple[str, ...]:
        names: list[str] = []
        while group.lower() not in _UNGROUPED and group not in names:
            names.append(group)
            group = self._parents.get(group, "")
        return tuple(names)


def _number(text: str) -> float:
    """NaN where the text is none. Some systems write a decimal comma."""
    try:
        return float(text)
    except ValueError:
        return _number(text.replace(",", ".")) if "," in text else math.nan
