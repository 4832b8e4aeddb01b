import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsi_anomaly.cli.tables import print_metrics
from wsi_anomaly.errors import AnnotationError, MissingOutputError
from wsi_anomaly.stages.evaluate import Protocol, evaluate
from wsi_anomaly.stages.evaluate.protocol import PROTOCOLS, ProtocolName
from wsi_anomaly.storage.arrays import write_arrays
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.record import Recipe, writing

TILE_PX = 32
COLUMNS = 40
WriteTiles = Callable[..., SlideFolder]
FAST = Protocol(resamples=100)


def finish(folder: SlideFolder, z: np.ndarray, *, detector: str = "one") -> None:
    """Leave scores, overview and z as the stages do."""
    size = {"size_level0_px": [COLUMNS * TILE_PX] * 2, "bounds_level0_px": [0, 0, COLUMNS * TILE_PX, COLUMNS * TILE_PX]}
    facts = {"slide_id": folder.slide_id, "mpp": [0.5, 0.5], "overview_downsample": [8.0, 8.0]}
    with writing(folder.root, Recipe("mask", 1)) as work:
        overview = np.full((COLUMNS * 4, COLUMNS * 4, 3), 240, np.uint8)
        write_arrays(work.folder / folder.tissue.name, {"overview": overview}, facts | size)
    with writing(folder.root, Recipe("score", 1, {"detector": detector})) as work:
        write_arrays(work.folder / folder.scores.name, {"scores": z[:, None]}, {"detector": detector})
    with writing(folder.root, Recipe("heatmap", 1, {"detector": detector})) as work:
        write_arrays(work.folder / folder.heatmap.name, {"z_tile": z.astype(np.float64)}, {})


def rectangle(path: Path, corners_cells: tuple[float, float, float, float], *, name: str = "Tumor") -> None:
    """An outline: left, top, right and bottom in cells of the tile grid."""
    left, top, right, bottom = corners_cells
    corners = [[x * TILE_PX, y * TILE_PX] for x, y in ((left, top), (right, top), (right, bottom), (left, bottom))]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [[*corners, corners[0]]]},
        "properties": {"objectType": "annotation", "classification": {"name": name}},
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))


@pytest.fixture
def run(write_tiles: WriteTiles, tmp_path: Path) -> RunFolder:
    """Two normal slides with z around 0, two abnormal ones with a block of 10 x 4 tiles around 3, in 400 tiles each."""
    random = np.random.default_rng(0)
    for name in ("normal_1", "normal_2", "sick_1", "sick_2"):
        folder = write_tiles(400, slide_id=name, columns=COLUMNS)
        z = random.normal(0, 1, 400).astype(np.float32)
        if name.startswith("sick"):
            grid = z.reshape(10, COLUMNS)
            grid[3:7, 5:15] += 3
            rectangle(tmp_path / "truth" / f"{name}.geojson", (5, 3, 15, 7))
        finish(folder, z)
    return RunFolder(tmp_path / "results")


def measured(run: RunFolder, tmp_path: Path, *, protocol: Protocol = FAST, **options: Any) -> dict[str, Any]:
    """Of the one detector."""
    return dict(evaluate([run], annotations=tmp_path / "truth", protocol=protocol, **options).measures)


def test_tiles_slides_and_segmentation_are_measured(run: RunFolder, tmp_path: Path) -> None:
    """Against what can be counted by hand."""
    found = measured(run, tmp_path)
    assert (found["slides"], found["abnormal_slides"]) == (4, 2)
    assert (found["tiles"], found["abnormal_tiles"]) == (1600, 80)
    assert 0.95 < found["tile_auroc"] < 1
    assert found["slide_auroc_z_max"] == 1.0
    assert found["slide_auroc_z_99"] == 1.0
    assert 0.0 < found["dice_before_erosion"] < found["dice_abnormal_slides"] < 1
    assert found["tnr_before_erosion"] == pytest.approx(0.5, abs=0.05)
    assert found["tnr_normal_slides"] == pytest.approx(0.93, abs=0.04)  # four normal values, all below 0 at 1 in 16


def test_tiles_on_the_edge_are_left_out(run: RunFolder, tmp_path: Path) -> None:
    """Positives lie fully inside, negatives fully outside."""
    for name in ("sick_1", "sick_2"):
        rectangle(tmp_path / "truth" / f"{name}.geojson", (5.5, 3.5, 14.5, 6.5))
    found = measured(run, tmp_path)
    assert found["abnormal_tiles"] == 2 * 8 * 2
    assert found["tiles"] == 1600 - 2 * (40 - 16)


def test_protocols_differ_where_paper_and_code_do(run: RunFolder, tmp_path: Path) -> None:
    """Negatives, ranks, and what z is measured against; each choice is named."""
    names: tuple[ProtocolName, ...] = ("default", "paper", "released")
    default, paper, released = (
        measured(run, tmp_path, protocol=PROTOCOLS[name].model_copy(update={"resamples": 100})) for name in names
    )
    assert released["tiles"] == 2 * 400 + 80  # of normal slides only
    assert released["tnr_normal_slides"] < 0.01  # ranks are above 0
    assert paper["tile_auroc"] == pytest.approx(default["tile_auroc"], abs=1e-6)  # ranks of tiles are the same
    assert paper["tnr_normal_slides"] != default["tnr_normal_slides"]
    tables = (run.evaluation / "tables.md").read_text()
    assert "negatives without the normal tissue of abnormal slides" in tables
    assert "Z_99 of eroded ranks" in tables


def test_all_measures_and_choices_are_in_the_json(run: RunFolder, tmp_path: Path) -> None:
    """By names that say what they are; tiles of few slides have an interval too."""
    own = Protocol(resamples=100, abnormal_from=0.5, normal_up_to=0.1, threshold_z=0.5)
    (tmp_path / "labels.csv").write_text("slide_id,label\nsick_1,macro\nsick_2,macro\n")
    found = measured(run, tmp_path, protocol=own, labels=tmp_path / "labels.csv")
    content = json.loads(run.metrics.read_text())
    assert content["protocol"] == own.model_dump(mode="json")
    assert content["protocol"]["name"] == "default"
    detector = content["detectors"]["one"]
    assert {name: detector[name] for name in found} == found
    wanted = {
        *("tiles", "abnormal_tiles", "tiles_without_score", "tile_auroc", "tile_aupr", "tile_aupr_in", "tile_aupr_out"),
        *("tile_fpr_at_95_tpr", "tile_detection_error", "slides", "abnormal_slides", "slides_without_score"),
        *(
            "slide_auroc_z_max",
            "slide_aupr_z_99",
            "slide_sensitivity_at_90_specificity_z_max",
            "slide_auroc_z_max_macro",
        ),
        *("dice_abnormal_slides", "iou_abnormal_slides", "tnr_normal_slides", "dice_abnormal_slides_macro"),
        *("dice_before_erosion", "dice_best_threshold", "iou_best_threshold", "dice_area", "iou_area", "pro_auc"),
        *("common_threshold_z", "dice_common_threshold", "iou_common_threshold", "tnr_common_threshold", "froc_score"),
        *("hausdorff_99_um", "mean_surface_distance_um", "component_tpr", "component_ppv"),
    }
    assert wanted <= set(detector)
    assert detector["intervals"]["slide_auroc_z_max"] == [1.0, 1.0]
    low, high = detector["intervals"]["tile_auroc"]
    assert low <= found["tile_auroc"] <= high


def test_everything_is_left_for_people(run: RunFolder, tmp_path: Path) -> None:
    """Tables, curves, spread, a row and a picture of each annotated slide."""
    found = evaluate([run], annotations=tmp_path / "truth", protocol=FAST)
    names = {path.name for path in run.evaluation.iterdir()}
    assert {"tables.md", "tables.tex", "slides.csv", "z_histogram.png", "calibration.png"} <= names
    rows = found.findings["one"].per_slide
    assert [row["slide_id"] for row in rows] == ["normal_1", "normal_2", "sick_1", "sick_2"]
    assert [row["label"] for row in rows] == ["normal", "normal", "abnormal", "abnormal"]
    dice = [row["dice"] for row in rows[2:]]
    assert np.mean([one for one in dice if isinstance(one, float)]) == found.measures["dice_abnormal_slides"]


def test_detectors_stand_side_by_side(run: RunFolder, tmp_path: Path, write_tiles: WriteTiles) -> None:
    """A blind one is worse, and the test between them says by how much."""
    other = tmp_path / "other"
    random = np.random.default_rng(1)
    for name in ("normal_1", "normal_2", "sick_1", "sick_2"):
        folder = write_tiles(400, slide_id=name, columns=COLUMNS, results=other)
        low = -6 if name.startswith("sick") else 0
        finish(folder, random.normal(low, 1, 400).astype(np.float32), detector="blind")
    done = evaluate([run, RunFolder(other)], annotations=tmp_path / "truth", protocol=FAST)
    assert list(done.findings) == ["one", "blind"]
    assert (done.findings["blind"].measures["tile_auroc"] or 0) < 0.6
    assert done.comparisons["blind"]["slide_auroc_z_max"].difference == 1.0
    tests = json.loads(run.metrics.read_text())["comparisons"]["blind"]
    assert tests["slide_auroc_z_max"] == {"difference": 1.0, "p_value": 0.125, "method": "paired bootstrap"}
    assert "blind" in (run.evaluation / "tables.tex").read_text()


def test_results_with_other_tiles_cannot_be_compared(run: RunFolder, tmp_path: Path, write_tiles: WriteTiles) -> None:
    """Both sizes are named."""
    folder = write_tiles(4, slide_id="sick_1", results=tmp_path / "other", tile_px=16)
    finish(folder, np.zeros(4, np.float32))
    with pytest.raises(AnnotationError, match=r"32 px.*16 px"):
        evaluate([run, RunFolder(tmp_path / "other")], annotations=tmp_path / "truth")


def test_an_abnormal_slide_without_outlines_counts_at_the_slide_level_only(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And is named."""
    (tmp_path / "truth" / "sick_2.geojson").unlink()
    (tmp_path / "labels.csv").write_text("slide_id,label\nnormal_1,normal\nsick_1,macro\nsick_2,abnormal\n")
    with caplog.at_level(logging.WARNING):
        found = measured(run, tmp_path, labels=tmp_path / "labels.csv")
    assert found["abnormal_slides"] == 2
    assert found["abnormal_tiles"] == 40
    assert "slide_auroc_z_max_macro" in found
    assert "abnormal without annotation, so at the slide level only: sick_2" in caplog.text
    assert "they count as normal: normal_2" in caplog.text


def test_one_class_has_no_auroc_but_the_rest(run: RunFolder, tmp_path: Path) -> None:
    """None, not an error."""
    (tmp_path / "labels.csv").write_text(
        "slide_id,label\nnormal_1,normal\nnormal_2,normal\nsick_1,normal\nsick_2,normal\n"
    )
    done = evaluate([run], labels=tmp_path / "labels.csv", protocol=FAST)
    found = done.measures
    assert any(line.startswith("no slide is abnormal") for line in done.findings["one"].warnings)
    assert found["tile_auroc"] is None
    assert found["slide_auroc_z_max"] is None
    assert found["dice_abnormal_slides"] is None
    assert found["tnr_normal_slides"] is not None


def test_a_detector_that_cannot_be_trusted_is_marked(run: RunFolder, tmp_path: Path) -> None:
    """In the findings and below the table."""
    for name in ("normal_1", "normal_2", "sick_1", "sick_2"):
        finish(run.slide(name), np.linspace(5, 6, 400).astype(np.float32))
    warnings = evaluate([run], annotations=tmp_path / "truth", protocol=FAST).findings["one"].warnings
    table = (run.evaluation / "tables.md").read_text().replace("\\", "")
    for warning in ("100% of the normal tiles lie above z = 0", "median z of 5.5: it differs from the reference"):
        assert any(warning in found for found in warnings)
        assert warning in table


def test_a_group_that_nobody_knows_can_be_given_a_meaning(run: RunFolder, tmp_path: Path) -> None:
    """The message says how."""
    for name in ("sick_1", "sick_2"):
        rectangle(tmp_path / "truth" / f"{name}.geojson", (5, 3, 15, 7), name="Befund")
    with pytest.raises(AnnotationError, match=r"sick_1.*Befund.*Befund=abnormal"):
        measured(run, tmp_path)
    assert measured(run, tmp_path, groups={"Befund": "abnormal"})["abnormal_tiles"] == 80


def test_the_user_says_which_values_of_a_mask_are_abnormal(run: RunFolder, tmp_path: Path) -> None:
    """Here 2, on 8 x 4 tiles of either slide; the other value is around it."""
    mask = np.zeros((COLUMNS * 4, COLUMNS * 4), np.uint8)
    mask[8:32, 16:64] = 1
    mask[12:28, 20:52] = 2
    for name in ("sick_1", "sick_2"):
        (tmp_path / "truth" / f"{name}.geojson").unlink()
        Image.fromarray(mask).save(tmp_path / "truth" / f"{name}.png")
    assert measured(run, tmp_path, mask_values=frozenset({2}))["abnormal_tiles"] == 2 * 8 * 4
    assert measured(run, tmp_path, mask_values=frozenset({1, 2}))["abnormal_tiles"] == 2 * 12 * 6


def test_the_terminal_shows_what_people_ask_for_first(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One column a detector, with intervals; a page at most; tests between them below."""
    other = RunFolder(tmp_path / "other")
    shutil.copytree(run.root, other.root)
    print_metrics(evaluate([run, other], annotations=tmp_path / "truth", protocol=FAST))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 30
    assert lines[0].split() == ["measure", "results", "other"]
    tiles = next(line for line in lines if line.startswith(" tile auroc"))
    assert re.fullmatch(r" tile auroc +(0\.\d{3} \(0\.\d{3} to [01]\.\d{3}\) +){2}", tiles)
    assert next(line for line in lines if line.startswith(" slide auroc z max")).split()[4:] == ["1.000", "1.000"]
    assert "results less other: slide auroc z max +0.000, p = 1 (DeLong)" in lines


def test_labels_of_other_slides_are_refused(run: RunFolder, tmp_path: Path) -> None:
    """With what is there."""
    (tmp_path / "labels.csv").write_text("slide_id,label\nnobody,normal\n")
    with pytest.raises(AnnotationError, match=r"nobody.*normal_1"):
        evaluate([run], labels=tmp_path / "labels.csv")


def test_without_heat_maps_there_is_nothing_to_evaluate(tmp_path: Path) -> None:
    """The command that makes them is named."""
    with pytest.raises(MissingOutputError, match="wsi-anomaly run"):
        evaluate([RunFolder(tmp_path)], labels=tmp_path / "labels.csv")
