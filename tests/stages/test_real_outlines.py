"""An evaluation against real outlines of Camelyon16, of detectors that see everything and nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shapely

from wsi_anomaly.annotations import Annotation, Frame, area_fractions, read_annotation
from wsi_anomaly.imaging.geometry import Grid
from wsi_anomaly.stages.evaluate import evaluate
from wsi_anomaly.storage.layout import RunFolder, SlideFolder

TILE_PX = 512.0
"""At level 0."""

WriteMapped = Callable[..., SlideFolder]

REAL = {
    "tumor_001": "Tumor_001.json",
    "tumor_064": "Tumor_064.json",
    "tumor_073": "tumor_073.xml",
}


@pytest.fixture
def real_outlines(shared_data: Path) -> dict[str, Annotation]:
    """Of the slides in `REAL`."""
    found = {}
    for slide_id, name in REAL.items():
        frame = Frame((200_000, 250_000), (0, 0, 200_000, 250_000))
        annotation = read_annotation(shared_data / "annotations" / name, frame=frame)
        assert isinstance(annotation, Annotation)
        found[slide_id] = annotation
    return found


def planted_run(
    write_mapped: WriteMapped, outlines: dict[str, Annotation], tmp_path: Path, shared_data: Path, *, planted: float
) -> dict[str, float | int | None]:
    """The measures of z that is noise, and higher by `planted` times the share of a tile in the outlines."""
    random = np.random.default_rng(5)
    rows = []
    for slide_id, annotation in outlines.items():
        x1, y1 = shapely.total_bounds([outline.polygon for outline in annotation.abnormal])[2:]
        shape = (int(y1 // TILE_PX) + 8, int(x1 // TILE_PX) + 8)
        grid = Grid((0, 0), (TILE_PX, TILE_PX), (TILE_PX, TILE_PX), shape)
        share = area_fractions(annotation.abnormal, grid.boxes(grid.cells()))
        write_mapped(slide_id, shape, random.normal(0, 0.1 if planted else 1, len(share)) + planted * share)
        rows.append(f"{slide_id},{shared_data / 'annotations' / REAL[slide_id]}")
    for number in range(3):
        write_mapped(f"normal_{number}", (100, 100), random.normal(0, 0.1 if planted else 1, 10_000))
    (tmp_path / "truth.csv").write_text("\n".join(["slide_id,annotation", *rows]))
    return dict(evaluate([RunFolder(tmp_path / "results")], annotations=tmp_path / "truth.csv").measures)


def test_a_detector_that_sees_the_real_outlines_is_near_perfect(
    shared_data: Path, tmp_path: Path, write_mapped: WriteMapped, real_outlines: dict[str, Annotation]
) -> None:
    """The share of a tile in the tumour is its z, with a little noise; eight lesions of three slides count."""
    found = planted_run(write_mapped, real_outlines, tmp_path, shared_data, planted=10.0)
    assert (found["lesions"], found["ignored_lesions"], found["lesions_without_tiles"]) == (8, 3, 0)
    assert found["tile_auroc"] > 0.9999
    assert found["slide_auroc_z_max"] == 1
    assert found["froc_score"] > 0.95
    assert found["pro_auc"] > 0.65  # erosion takes away the edges of small areas
    assert found["dice_best_threshold"] > 0.7


def test_a_blind_detector_is_at_chance_on_the_real_outlines(
    shared_data: Path, tmp_path: Path, write_mapped: WriteMapped, real_outlines: dict[str, Annotation]
) -> None:
    """Where z is noise, few of the lesions lie under the highest cells, and no tile is told from another."""
    found = planted_run(write_mapped, real_outlines, tmp_path, shared_data, planted=0.0)
    assert found["tile_auroc"] == pytest.approx(0.5, abs=0.05)
    assert found["froc_score"] < 0.1
    assert found["pro_auc"] < 0.3
    assert found["dice_best_threshold"] < 0.1
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert metrics["detectors"]["planted"]["lesions"] == 8
