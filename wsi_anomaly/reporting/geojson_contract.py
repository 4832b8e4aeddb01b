"""Hold a GeoJSON file against what QuPath reads, and name the features at fault. Writes nothing.

Errors make QuPath 0.5, or 0.6 and later, refuse the whole file; warnings are information that it drops or changes
without a word. What is neither documented nor observed to be read counts as an error.
"""

import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wsi_anomaly.errors import AnnotationError
from wsi_anomaly.reporting.geojson_feature import class_colour, feature_findings, is_identifier, object_type
from wsi_anomaly.reporting.geojson_geometry import GEOMETRY_TYPES, Finding, geometry_findings, loses, rejects
from wsi_anomaly.reporting.geojson_reader import read_elements

MAX_FEATURES = 100_000
MAX_ANNOTATIONS = 10_000
FAULTS_A_RULE = 10
"""So many faults of one rule are described; the others are counted."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that QuPath would refuse or lose."""

    severity: Literal["error", "warning"]
    rule: str
    where: str
    """The place of the feature, such as `features[3]`; empty for the file."""
    feature_id: str | None
    message: str

    def __str__(self) -> str:
        identity = f" ({self.feature_id})" if self.feature_id else ""
        return f"{self.severity}: {self.where or 'the file'}{identity} {self.message}"


@dataclass(frozen=True, slots=True)
class Report:
    """What QuPath would make of a file."""

    features: int
    faults: tuple[Fault, ...]
    """The first of each rule, in the order of the file."""
    counts: Mapping[str, int]
    """How many faults there are of each rule."""
    errors: int
    warnings: int

    @property
    def is_readable(self) -> bool:
        """True if QuPath would not refuse the file."""
        return self.errors == 0


@dataclass(slots=True)
class _Tally:
    """What was seen so far. Grows with the identifiers, the classes and the rules broken, not with the features."""

    features: int = 0
    annotations: int = 0
    identifiers: set[int] = field(default_factory=set)
    class_colours: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    severities: Counter[str] = field(default_factory=Counter)

    def add(self, finding: Finding, where: str = "", feature_id: str | None = None) -> None:
        self.counts[finding.rule] += 1
        self.severities[finding.severity] += 1
        if self.counts[finding.rule] <= FAULTS_A_RULE:
            self.faults.append(Fault(finding.severity, finding.rule, where, feature_id, finding.message))


def validate_geojson(path: Path) -> Report:
    """Check a file of any container that QuPath opens, one feature in memory at a time.

    A file that cannot be read at all, or only in part, is reported as such with what was found up to there.
    """
    tally = _Tally()
    try:
        for element in read_elements(path):
            _check_element(tally, element.where, element.value)
    except AnnotationError as error:
        tally.add(rejects("unreadable", f"cannot be read: {error}"))
    for finding in _file_findings(tally):
        tally.add(finding)
    return Report(
        features=tally.features,
        faults=tuple(tally.faults),
        counts=dict(tally.counts),
        errors=tally.severities["error"],
        warnings=tally.severities["warning"],
    )


def _check_element(tally: _Tally, where: str, value: object) -> None:
    within_feature_array = where.rpartition("[")[0].endswith(("features", "childObjects", "children"))
    members: dict[str, Any] = value if isinstance(value, dict) else {}
    kind = members.get("type")
    if members and (within_feature_array or kind == "Feature"):
        _check_feature(tally, where, members)
    elif kind == "FeatureCollection":
        if not isinstance(members.get("features"), list):
            tally.add(rejects("features", "is a FeatureCollection without an array of features. Add it."), where)
    elif kind in GEOMETRY_TYPES:
        tally.features += 1
        tally.annotations += 1
        for finding in geometry_findings(value):
            tally.add(finding, where)
    elif within_feature_array:
        tally.add(rejects("feature-type", "is no feature. Write an object of type Feature."), where)
    else:
        tally.add(loses("skipped", "is neither feature nor geometry, so QuPath skips it. Remove it."), where)


def _check_feature(tally: _Tally, where: str, feature: dict[str, Any]) -> None:
    tally.features += 1
    properties = feature.get("properties")
    identifier = feature.get("id")
    if not isinstance(properties, dict):
        properties = {}
    tally.annotations += object_type(properties) == "annotation"
    findings = [*feature_findings(feature), *_repeated(tally, identifier), *_recoloured(tally, properties)]
    for finding in findings:
        tally.add(finding, where, identifier if isinstance(identifier, str) else None)


def _repeated(tally: _Tally, identifier: object) -> Iterator[Finding]:
    if not isinstance(identifier, str) or not is_identifier(identifier):
        return
    number = uuid.UUID(identifier).int
    if number in tally.identifiers:
        yield loses("repeated-id", "has the id of an earlier feature. Give each feature its own.")
    tally.identifiers.add(number)


def _recoloured(tally: _Tally, properties: dict[str, Any]) -> Iterator[Finding]:
    asked = class_colour(properties)
    if asked is None:
        return
    name, colour = asked
    first = tally.class_colours.setdefault(name, colour)
    if first != colour:
        yield loses(
            "class-recoloured", f"has {colour} for the class {name!r}, first seen with {first}. Use color instead."
        )


def _file_findings(tally: _Tally) -> Iterator[Finding]:
    if tally.features == 0:
        yield loses("empty", "has no features, of which QuPath complains. Leave it out.")
    if tally.features > MAX_FEATURES:
        yield loses(
            "many-features", f"has {tally.features} features. Split it at {MAX_FEATURES}, or QuPath runs out of memory."
        )
    if tally.annotations > MAX_ANNOTATIONS:
        yield loses(
            "many-annotations",
            f"has {tally.annotations} annotations, which are slow to draw. Write tiles or detections.",
        )
