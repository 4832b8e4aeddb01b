"""Fixtures for the tests of annotations: the frame of a slide and small files of ASAP."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from wsi_anomaly.annotations import Frame

Corners = Sequence[tuple[float, float]]


@pytest.fixture
def frame() -> Frame:
    """A slide of 1000 x 800 pixels, all of it scanned."""
    return Frame((1000, 800), (0, 0, 1000, 800))


@pytest.fixture
def write_asap(tmp_path: Path) -> Callable[..., Path]:
    """Writes an XML file, `write_asap(("Tumor", [(0, 0), ...]), ..., groups={"Tumor": "None"})`; groups: parents."""

    def write(*polygons: tuple[str, Corners], groups: Mapping[str, str] | None = None, name: str = "a.xml") -> Path:
        lines = ['<?xml version="1.0"?>', "<ASAP_Annotations>", "<Annotations>"]
        for group, corners in polygons:
            points = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}" />' for i, (x, y) in enumerate(corners))
            lines.append(
                f'<Annotation Name="A" Type="Polygon" PartOfGroup="{group}" Color="#F4FA58"><Coordinates>{points}'
                "</Coordinates></Annotation>"
            )
        lines += ["</Annotations>", "<AnnotationGroups>"]
        lines += [f'<Group Name="{group}" PartOfGroup="{parent}" />' for group, parent in (groups or {}).items()]
        path = tmp_path / name
        path.write_text("\n".join([*lines, "</AnnotationGroups>", "</ASAP_Annotations>"]), encoding="utf-8")
        return path

    return write
