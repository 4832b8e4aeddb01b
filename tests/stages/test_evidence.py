"""What is known of a slide: truth, label, and what the user is told of annotations."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from PIL import Image

from wsi_anomaly.annotations import Matched, SlideLabel
from wsi_anomaly.errors import AnnotationError
from wsi_anomaly.stages.evaluate import evaluate
from wsi_anomaly.stages.evaluate.evidence import Evidence, gather
from wsi_anomaly.stages.evaluate.lesions import lesion_level
from wsi_anomaly.stages.evaluate.protocol import PROTOCOLS
from wsi_anomaly.storage.layout import RunFolder, SlideFolder

TILE_PX = 512
"""At level 0."""

WriteMapped = Callable[..., SlideFolder]


def gathered(tmp_path: Path, path: Path | None, label: SlideLabel | None = None, **options: object) -> Evidence:
    """Of the one slide, "a"."""
    truth = Matched(MappingProxyType({"a": path}), MappingProxyType({"a": label}), (), ())
    (one,) = gather(RunFolder(tmp_path / "results"), truth, PROTOCOLS["default"], **options)
    return one


def asap(path: Path, *annotations: tuple[str, Sequence[tuple[float, float]]]) -> Path:
    """Annotations of a type, with their points."""
    lines = ["<ASAP_Annotations><Annotations>"]
    for kind, points in annotations:
        listed = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(points))
        lines.append(f'<Annotation Type="{kind}" PartOfGroup="Tumor"><Coordinates>{listed}</Coordinates></Annotation>')
    path.write_text("\n".join([*lines, "</Annotations></ASAP_Annotations>"]))
    return path


ABNORMAL, NORMAL = SlideLabel(abnormal=True), SlideLabel(abnormal=False)
SQUARE = ((0.0, 0.0), (1024.0, 0.0), (1024.0, 1024.0), (0.0, 1024.0))


def test_points_are_no_outline_of_an_abnormal_slide(tmp_path: Path, write_mapped: WriteMapped) -> None:
    """It counts as abnormal without annotation; one that nobody labelled, or that is normal, has a truth: nothing."""
    write_mapped("a", (4, 4), np.zeros(16))
    path = asap(tmp_path / "a.xml", ("Dot", [(700, 700)]), ("PointSet", [(1, 1), (5, 5), (9, 1)]))
    assert gathered(tmp_path, path, ABNORMAL).share is None
    assert gathered(tmp_path, path, NORMAL).share.sum() == 0
    unlabelled = gathered(tmp_path, path)
    assert (unlabelled.share.sum(), unlabelled.label.abnormal) == (0, False)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "a.png")
    assert gathered(tmp_path, tmp_path / "a.png", ABNORMAL).share is None
    assert gathered(tmp_path, None, ABNORMAL).share is None


def test_an_outline_where_no_tile_lies_makes_a_slide_abnormal(tmp_path: Path, write_mapped: WriteMapped) -> None:
    """The grid begins further to the right: all tiles are normal, and a lesion is missed."""
    write_mapped("a", (4, 4), np.zeros(16), origin=4096)
    one = gathered(tmp_path, asap(tmp_path / "a.xml", ("Polygon", SQUARE)))
    assert one.label.abnormal
    assert one.share.sum() == 0
    found = lesion_level([one], PROTOCOLS["default"])[1]
    assert (found["lesions"], found["lesions_without_tiles"], found["froc_score"]) == (1, 1, 0)


def test_an_outline_on_a_slide_labelled_normal_is_told(
    tmp_path: Path, write_mapped: WriteMapped, caplog: pytest.LogCaptureFixture
) -> None:
    """The label stands, and so do the tiles."""
    write_mapped("a", (4, 4), np.zeros(16))
    one = gathered(tmp_path, asap(tmp_path / "b.xml", ("Polygon", SQUARE)), NORMAL)
    assert (one.label.abnormal, one.share.sum()) == (False, 4)
    assert "a: labelled normal, and something abnormal is annotated on it" in caplog.text


def test_what_was_mended_or_left_out_is_told_with_the_slide(
    tmp_path: Path, write_mapped: WriteMapped, caplog: pytest.LogCaptureFixture
) -> None:
    """Through the whole evaluation, from a table that names the file otherwise; the truth is what is left."""
    write_mapped("a", (4, 4), np.linspace(-1, 1, 16))
    bow_tie = [(0, 0), (1024, 1024), (1024, 0), (0, 1024)]
    flat, outside = [(9, 9), (50, 50), (90, 90)], [(9000 + x, y) for x, y in SQUARE]
    drawn = (("Polygon", bow_tie), ("Polygon", flat), ("Polygon", outside), ("Dot", [(5, 5)]))
    asap(tmp_path / "drawing.xml", *drawn)
    (tmp_path / "truth.csv").write_text("slide_id,annotation\na,drawing.xml\n")
    with caplog.at_level(logging.WARNING):
        evaluate([RunFolder(tmp_path / "results")], annotations=tmp_path / "truth.csv")
    for told in (
        "a: drawing.xml: 1 dot (line 5) without an area, left out",
        "a: drawing.xml: 1 polygon (line 3) without an area or with fewer than 3 corners, left out",
        "a: drawing.xml: 1 polygon (line 2) of 2 crossing themselves, mended",
        "a: drawing.xml: 1 polygon (line 4) outside the slide, left out",
    ):
        assert told in caplog.text
    one = gathered(tmp_path, tmp_path / "drawing.xml")
    assert one.share.sum() * TILE_PX**2 == pytest.approx(1024**2 / 2)


def test_an_annotation_of_another_slide_is_refused_with_both_names(tmp_path: Path, write_mapped: WriteMapped) -> None:
    """That of the slide and that of the file."""
    write_mapped("a", (4, 4), np.zeros(16))
    asap(tmp_path / "drawing.xml", ("Polygon", [(9000 + x, y) for x, y in SQUARE]))
    (tmp_path / "truth.csv").write_text("slide_id,annotation\na,drawing.xml\n")
    with pytest.raises(AnnotationError, match=r"^a: drawing.xml: all 1 polygons .* lie outside the slide"):
        evaluate([RunFolder(tmp_path / "results")], annotations=tmp_path / "truth.csv")


def test_the_values_of_a_mask_that_are_abnormal_can_be_told(
    tmp_path: Path, write_mapped: WriteMapped, caplog: pytest.LogCaptureFixture
) -> None:
    """Without, several are refused with the name of the slide; what the reader says of the picture is logged."""
    write_mapped("a", (4, 4), np.zeros(16))
    Image.fromarray(np.repeat(np.arange(4, dtype=np.uint8), 16)[None].repeat(64, 0)).save(tmp_path / "b.png")
    with pytest.raises(AnnotationError, match=r"^a: b.png: holds the numbers 1, 2, 3 besides 0"):
        gathered(tmp_path, tmp_path / "b.png")
    one = gathered(tmp_path, tmp_path / "b.png", mask_values=frozenset({2, 3}))
    assert one.share.reshape(4, 4).tolist() == [[0, 0, 1, 1]] * 4
    assert lesion_level([one], PROTOCOLS["default"])[1]["lesions"] == 1
    Image.fromarray(np.full((64, 64), 200, np.uint8)).save(tmp_path / "b.jpg")
    gathered(tmp_path, tmp_path / "b.jpg")
    assert "a: b.jpg: stored as JPEG" in caplog.text
