"""The whole way on small made-up slides: fit, run, run again, kill, damage."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsi_anomaly.cohort import CohortSlide, read_cohort
from wsi_anomaly.errors import CohortError, LockedOutputError, ModelError, OutputError
from wsi_anomaly.execution import Progress, Resources
from wsi_anomaly.pipeline import fit, load_pipeline, run
from wsi_anomaly.pipeline.demonstration import demonstrate
from wsi_anomaly.stages.evaluate import evaluate
from wsi_anomaly.storage.arrays import read_array, read_attributes
from wsi_anomaly.storage.layout import RunFolder
from wsi_anomaly.storage.lock import locked
from wsi_anomaly.storage.model import Model, read_model
from wsi_anomaly.storage.slide_table import read_slide_table
from wsi_anomaly.storage.tiles import TileStore
from wsi_anomaly.synthetic import Cohort, write_cohort, write_pyramid

PIPELINE = """
name = "tiny"
description = "Small enough for a test."

[tiles]
tile_px = 64
stride_px = 64

[heatmap]
threshold_z = 2.0

[detector]
name = "autoencoder"
channels = [8, 16, 16]

[detector.training]
learning_rate = 2e-3
batch_size = 16
max_epochs = 6
"""
RESOURCES = Resources(device="cpu", workers=1)


def ignore(_: Progress) -> None:
    """Nobody looks on."""


def contents(folder: Path) -> dict[str, str]:
    """The digest of every output; dates and timings live in run.json and slides.csv alone."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name not in ("run.json", "slides.csv", "metrics.json") and "evaluation" not in path.parts
    }


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Three normal slides to learn from, one normal and one abnormal to test on."""
    return write_cohort(
        tmp_path_factory.mktemp("slides"),
        seed=3,
        size_px=(1024, 1024),
        normal_slides=3,
        normal_test_slides=1,
        abnormal_test_slides=1,
    )


@pytest.fixture(scope="module")
def pipeline_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of the user's own."""
    path = tmp_path_factory.mktemp("pipeline") / "tiny.toml"
    path.write_text(PIPELINE)
    return path


@pytest.fixture(scope="module")
def model(cohort: Cohort, pipeline_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """What `fit` makes of the normal slides."""
    out = tmp_path_factory.mktemp("models") / "tiny"
    slides = read_cohort([cohort.normal_slides[0].parent])
    fitted, failed = fit(slides, load_pipeline(pipeline_file), out, resources=RESOURCES, listener=ignore)
    assert not failed
    return fitted


@pytest.fixture(scope="module")
def finished(cohort: Cohort, model: Model, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("run") / "results"
    summary = run(to_test(cohort), model, out, resources=RESOURCES, listener=ignore)
    assert not summary.failed
    return summary.folder


def to_test(cohort: Cohort) -> tuple[CohortSlide, ...]:
    """The slides to test on."""
    return read_cohort([cohort.test_slides[0].parent])


def copied(folder: RunFolder, tmp_path: Path) -> tuple[RunFolder, dict[str, str]]:
    """A copy of a finished run, to work on, and what it holds."""
    copy = tmp_path / "results"
    shutil.copytree(folder.root, copy)
    return RunFolder(copy), contents(copy)


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """The names of the outputs that differ, without the slide."""
    return {
        Path(name).parts[2].split(".", 1)[0] for name in after if before.get(name) != after[name] and "slides" in name
    }


def test_the_planted_anomaly_is_found(finished: RunFolder, cohort: Cohort) -> None:
    """The abnormal slide scores higher, and its abnormal tiles too."""
    metrics = evaluate([finished], labels=cohort.labels, annotations=cohort.annotations).measures
    assert metrics["slide_auroc_z_max"] == 1.0
    assert metrics["tile_auroc"] > 0.8  # a few epochs on small tiles; the demo asks for more
    assert json.loads(finished.metrics.read_text())["detectors"]["autoencoder"].items() >= metrics.items()


def test_every_output_of_a_slide_is_there(finished: RunFolder) -> None:
    """Under the names that the README promises."""
    folder = finished.slide("test_02")
    names = {path.name for path in folder.root.iterdir()}
    assert names == {
        "tissue.zarr", "tiles.zarr", "overview.png", "scores.zarr", "heatmap.zarr", "heatmap.png", "records",
        "test_02.tiles.csv", "test_02.tiles.geojson.gz", "test_02.regions.geojson",
    }  # fmt: skip


def test_the_outputs_agree_tile_by_tile(finished: RunFolder) -> None:
    """Tile i is the same tile in the store, the scores and the CSV, and lies where its cell says."""
    import csv

    folder = finished.slide("test_02")
    store, z = TileStore(folder.tiles), read_array(folder.heatmap, "z_eroded")
    with folder.tile_table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(store) == len(read_array(folder.scores, "scores"))
    for index in (0, len(rows) // 2, len(rows) - 1):
        row, column = store.places.cells[index]
        assert [int(rows[index]["x_level0_px"]), int(rows[index]["y_level0_px"])] == store.places.origins[
            index
        ].tolist()
        assert float(rows[index]["anomaly z"]) == pytest.approx(z[row, column], rel=1e-6)


def test_pixels_in_the_store_are_those_of_the_slide(finished: RunFolder, cohort: Cohort) -> None:
    """At the origin that the store names, read by OpenSlide itself."""
    import openslide

    store = TileStore(finished.slide("test_02").tiles)
    slide = openslide.OpenSlide(cohort.test_slides[1])
    for index in (0, len(store) - 1):
        x, y = store.places.origins[index].tolist()
        expected = np.asarray(slide.read_region((x, y), 0, (64, 64)).convert("RGB"))
        assert (store.read(np.array([index]))[0] == expected).all()


def test_a_second_run_does_nothing(finished: RunFolder, cohort: Cohort, model: Model, tmp_path: Path) -> None:
    """Not even touch a file."""
    copy, before = copied(finished, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in copy.root.glob("slides/**/*")}
    summary = run(to_test(cohort), model, copy.root, resources=RESOURCES, listener=ignore)
    assert contents(copy.root) == before
    assert {path: path.stat().st_mtime_ns for path in copy.root.glob("slides/**/*")} == times
    assert [row.seconds for row in summary.rows] == [
        row.seconds for row in read_slide_table(finished.slide_table).values()
    ]


def test_without_erosion_the_map_is_left_as_it_is(
    finished: RunFolder, cohort: Cohort, model: Model, tmp_path: Path
) -> None:
    """A place as small as one tile counts: no slide scores lower, and some higher."""
    copy, _ = copied(finished, tmp_path)
    pipeline = load_pipeline(model.folder.pipeline)
    plain = pipeline.model_copy(update={"heatmap": pipeline.heatmap.model_copy(update={"erosion": False})})
    summary = run(to_test(cohort), model, copy.root, resources=RESOURCES, listener=ignore, pipeline=plain)
    for slide in copy.slides():
        z, shown = (read_array(slide.heatmap, name) for name in ("z", "z_eroded"))
        assert np.array_equal(z, shown, equal_nan=True)
    eroded = {slide_id: row.z_max for slide_id, row in read_slide_table(finished.slide_table).items()}
    assert all(row.z_max >= eroded[row.slide_id] for row in summary.rows)
    assert any(row.z_max > eroded[row.slide_id] for row in summary.rows)


@pytest.mark.parametrize(
    ("table", "option", "value", "redone"),
    [
        ("heatmap", "threshold_z", 4.0, {"heatmap", "test_01", "test_02", "records"}),
        (
            "tiles",
            "min_tissue_fraction",
            0.9,
            {"tiles", "overview", "scores", "heatmap", "test_01", "test_02", "records"},
        ),
    ],
)
def test_a_changed_option_redoes_what_depends_on_it_and_nothing_else(  # noqa: PLR0917 - fixtures and cases
    finished: RunFolder,
    cohort: Cohort,
    model: Model,
    tmp_path: Path,
    table: str,
    option: str,
    value: float,
    redone: set[str],
) -> None:
    """By the digests of the records."""
    copy, before = copied(finished, tmp_path)
    pipeline = load_pipeline(model.folder.pipeline)
    stage = getattr(pipeline, table).model_copy(update={option: value})
    changed_pipeline = pipeline.model_copy(update={table: stage})
    run(to_test(cohort), model, copy.root, resources=RESOURCES, listener=ignore, pipeline=changed_pipeline)
    assert changed(before, contents(copy.root)) <= redone
    assert "heatmap" in changed(before, contents(copy.root))


def test_batch_size_and_workers_do_not_change_a_byte(
    finished: RunFolder, cohort: Cohort, model: Model, tmp_path: Path
) -> None:
    """Where and how work runs is not what it finds."""
    resources = Resources(device="cpu", workers=2, batch_size=7)
    run(to_test(cohort), model, tmp_path / "other", resources=resources, listener=ignore)
    assert contents(tmp_path / "other") == contents(finished.root)


@pytest.mark.parametrize("stage", ["tile", "score", "export"])
def test_a_run_killed_in_a_stage_goes_on_to_the_same_bytes(
    finished: RunFolder, cohort: Cohort, model: Model, tmp_path: Path, stage: str
) -> None:
    """SIGKILL, with lock files and half-made outputs left behind."""
    script = f"""
import os, signal
from pathlib import Path
from wsi_anomaly.cohort import read_cohort
from wsi_anomaly.execution import Resources
from wsi_anomaly.pipeline import run
from wsi_anomaly.storage.model import read_model
def kill(progress):
    if progress.stage == {stage!r} and (progress.tiles_done > 20 or progress.finished):
        os.kill(os.getpid(), signal.SIGKILL)
run(read_cohort([Path({str(cohort.test_slides[0].parent)!r})]), read_model(Path({str(model.folder.root)!r})),
    Path({str(tmp_path / "results")!r}), resources=Resources(device="cpu", workers=1), listener=kill)
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert contents(tmp_path / "results") != contents(finished.root)
    run(to_test(cohort), model, tmp_path / "results", resources=RESOURCES, listener=ignore)
    assert contents(tmp_path / "results") == contents(finished.root)


def test_a_killed_fit_goes_on_to_the_same_model(
    cohort: Cohort, pipeline_file: Path, model: Model, tmp_path: Path
) -> None:
    """To the same bytes of every file."""
    out = tmp_path / model.folder.root.name
    arguments = [
        "fit",
        str(cohort.normal_slides[0].parent),
        "-o",
        str(out),
        "-p",
        str(pipeline_file),
        "--device",
        "cpu",
    ]
    process = subprocess.Popen([sys.executable, "-m", "wsi_anomaly", *arguments], stderr=subprocess.DEVNULL)
    unfinished = out.with_name(f"{out.name}.fit") / "fit.partial" / "detector"
    deadline = time.monotonic() + 120
    while not (unfinished.is_dir() and any(unfinished.iterdir())):
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    again = subprocess.run(
        [sys.executable, "-m", "wsi_anomaly", *arguments], check=False, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert contents(out) == contents(model.folder.root)


def test_fitting_the_same_again_is_done_already(cohort: Cohort, model: Model, pipeline_file: Path) -> None:
    """The model is not touched."""
    before = contents(model.folder.root)
    slides = read_cohort([cohort.normal_slides[0].parent])
    fit(slides, load_pipeline(pipeline_file), model.folder.root, resources=RESOURCES, listener=ignore)
    assert contents(model.folder.root) == before


def test_a_model_is_never_overwritten_by_another(cohort: Cohort, model: Model, pipeline_file: Path) -> None:
    """It may have taken days."""
    pipeline = load_pipeline(pipeline_file).model_copy(update={"seed": 9})
    slides = read_cohort([cohort.normal_slides[0].parent])
    with pytest.raises(OutputError, match="another name"):
        fit(slides, pipeline, model.folder.root, resources=RESOURCES, listener=ignore)


def test_whole_slides_are_held_out(model: Model) -> None:
    """Two to learn from, one to measure against."""
    assert model.reference.source == "held-out normal slides"
    assert model.reference.slides == 1
    split = json.loads(model.folder.workshop.split.read_text())
    assert split["by"] == "slides"
    assert not set(split["train"]) & set(split["reference"])


def test_a_single_slide_is_split_into_blocks(cohort: Cohort, pipeline_file: Path, tmp_path: Path) -> None:
    """And the model says so."""
    slides = read_cohort([cohort.normal_slides[0]])
    fitted, _ = fit(slides, load_pipeline(pipeline_file), tmp_path / "one", resources=RESOURCES, listener=ignore)
    assert fitted.reference.source == "held-out blocks of one normal slide"
    tiles = len(TileStore(fitted.folder.workshop.slide("normal_01").tiles))
    assert 0 < fitted.reference.scores["mse"].count < tiles


def test_z_from_cohort_is_said_in_the_outputs(cohort: Cohort, model: Model, tmp_path: Path) -> None:
    """In run.json, reference.json and every heat map; the mean z of all tiles is 0."""
    summary = run(to_test(cohort), model, tmp_path / "results", resources=RESOURCES, listener=ignore, z_from="cohort")
    folder = summary.folder
    assert json.loads(folder.run.read_text())["z_from"] == "cohort"
    z = [read_array(slide.heatmap, "z_tile") for slide in folder.slides()]
    assert np.concatenate(z).mean() == pytest.approx(0, abs=1e-6)
    for slide in folder.slides():
        assert read_attributes(slide.heatmap)["z_from"] == "the cohort under test"


def test_one_bad_slide_does_not_stop_the_others(cohort: Cohort, model: Model, tmp_path: Path) -> None:
    """It is in slides.csv with its reason, and everything else is done."""
    folder = tmp_path / "slides"
    folder.mkdir()
    shutil.copy(cohort.test_slides[0], folder)
    (folder / "broken.svs").write_text("no slide")
    summary = run(read_cohort([folder]), model, tmp_path / "results", resources=RESOURCES, listener=ignore)
    rows = read_slide_table(tmp_path / "results" / "slides.csv")
    assert rows["test_01"].status == "done"
    assert rows["broken"].status == "failed"
    assert "broken" in rows["broken"].reason
    assert [row.slide_id for row in summary.failed] == ["broken"]


def test_a_corrupt_tile_is_left_out_of_every_statistic(
    cohort: Cohort, model: Model, finished: RunFolder, tmp_path: Path, ruin_tiles: object
) -> None:
    """The rest of the slide is scored as if nothing had happened."""
    folder = tmp_path / "slides"
    folder.mkdir()
    slide = Path(shutil.copy(cohort.test_slides[1], folder))
    ruin_tiles(slide, [5])  # type: ignore[operator]
    summary = run(read_cohort([folder]), model, tmp_path / "results", resources=RESOURCES, listener=ignore)
    row = summary.rows[0]
    assert row.status == "done"
    assert row.corrupt_tiles
    damaged, whole = summary.folder.slide("test_02"), finished.slide("test_02")
    store = TileStore(damaged.tiles)
    assert np.isnan(read_array(damaged.heatmap, "z_tile")[~store.readable]).all()
    assert (~store.readable).sum() == row.corrupt_tiles
    expected = {
        tuple(o): s
        for o, s in zip(
            TileStore(whole.tiles).places.origins.tolist(), read_array(whole.scores, "scores")[:, 0], strict=True
        )
    }
    shared = [
        (score, expected[tuple(origin)])
        for origin, score in zip(
            store.places.origins[store.readable].tolist(),
            read_array(damaged.scores, "scores")[store.readable, 0],
            strict=True,
        )
        if tuple(origin) in expected
    ]
    assert len(shared) > 50
    assert all(one == other for one, other in shared)


def test_two_runs_into_one_folder_at_once_are_refused(cohort: Cohort, model: Model, tmp_path: Path) -> None:
    """The second names the first and leaves it alone."""
    folder = RunFolder(tmp_path / "results")
    with locked(folder.lock), pytest.raises(LockedOutputError, match=str(os.getpid())):
        run(to_test(cohort), model, folder.root, resources=RESOURCES, listener=ignore)


def test_a_full_disk_ends_the_run_with_a_remedy_and_keeps_what_is_finished(
    cohort: Cohort, model: Model, tmp_path: Path
) -> None:
    """Made with a limit on file size; the next run goes on."""
    script = f"""
import resource
from pathlib import Path
from wsi_anomaly.cohort import read_cohort
from wsi_anomaly.execution import Resources
from wsi_anomaly.pipeline import run
from wsi_anomaly.storage.model import read_model
from wsi_anomaly.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
try:
    run(read_cohort([Path({str(cohort.test_slides[0].parent)!r})]), read_model(Path({str(model.folder.root)!r})),
        Path({str(tmp_path / "results")!r}), resources=Resources(workers=1), listener=lambda progress: None)
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert "Free some space" in done.stdout, done.stderr
    summary = run(to_test(cohort), model, tmp_path / "results", resources=RESOURCES, listener=ignore)
    assert not summary.failed


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "detector" / "weights.safetensors").unlink(), "missing"),
        (lambda path: (path / "detector" / "weights.safetensors").write_bytes(b"x"), "damaged"),
        (lambda path: (path / "manifest.json").unlink(), "no manifest"),
        (lambda path: (path / "manifest.json").write_text("{"), "damaged"),
        (shutil.rmtree, "no such model"),
    ],
)
def test_a_damaged_model_is_refused_by_name(model: Model, tmp_path: Path, damage: object, message: str) -> None:
    """Before any slide is read."""
    copy = tmp_path / "model"
    shutil.copytree(model.folder.root, copy)
    damage(copy)  # type: ignore[operator]
    with pytest.raises(ModelError, match=message):
        read_model(copy)


def test_a_model_travels(cohort: Cohort, model: Model, finished: RunFolder, tmp_path: Path) -> None:
    """Copied elsewhere it gives the same bytes."""
    shutil.copytree(model.folder.root, tmp_path / "moved" / model.folder.root.name)
    moved = read_model(tmp_path / "moved" / model.folder.root.name)
    run(to_test(cohort), moved, tmp_path / "results", resources=RESOURCES, listener=ignore)
    assert contents(tmp_path / "results") == contents(finished.root)


def test_a_cohort_of_training_slides_leaves_nothing_to_test(cohort: Cohort, model: Model, tmp_path: Path) -> None:
    """The split column is heeded."""
    table = tmp_path / "cohort.csv"
    table.write_text(f"path,split\n{cohort.normal_slides[0]},train\n")
    with pytest.raises(CohortError, match="none to test"):
        run(read_cohort([table]), model, tmp_path / "results", resources=RESOURCES, listener=ignore)


def test_a_slide_without_tissue_has_failed(model: Model, tmp_path: Path) -> None:
    """It is no empty success."""
    write_pyramid(tmp_path / "glass.tif", np.full((600, 600, 3), 243, np.uint8), mpp=0.5)
    summary = run(
        read_cohort([tmp_path / "glass.tif"]), model, tmp_path / "results", resources=RESOURCES, listener=ignore
    )
    assert "no tissue" in summary.failed[0].reason


def test_a_truncated_slide_has_failed_or_says_what_it_lost(cohort: Cohort, model: Model, tmp_path: Path) -> None:
    """Half a file is never scored as if it were whole."""
    whole = cohort.test_slides[1].read_bytes()
    (tmp_path / "half.tif").write_bytes(whole[: len(whole) // 2])
    summary = run(
        read_cohort([tmp_path / "half.tif"]), model, tmp_path / "results", resources=RESOURCES, listener=ignore
    )
    row = summary.rows[0]
    assert row.status == "failed" or row.corrupt_tiles
    assert "internal error" not in row.reason


@pytest.mark.parametrize("kind", ["picture", "outlines"])
def test_a_users_mask_takes_the_place_of_the_tissue_detection(
    cohort: Cohort, model: Model, tmp_path: Path, kind: str
) -> None:
    """Only the right half is tiled."""
    slide = cohort.test_slides[0]
    if kind == "picture":
        mask = tmp_path / "mask.png"
        Image.fromarray(np.repeat([[0, 255]], 64, axis=0).repeat(32, axis=1).astype(np.uint8)).save(mask)
    else:
        mask = tmp_path / "mask.geojson"
        ring = [[512, 0], [1024, 0], [1024, 1024], [512, 1024], [512, 0]]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        mask.write_text(json.dumps({"type": "Feature", "geometry": geometry, "properties": {}}))
    (tmp_path / "cohort.csv").write_text(f"slide_id,path,mask\nmasked,{slide},{mask}\n")
    summary = run(
        read_cohort([tmp_path / "cohort.csv"]), model, tmp_path / "results", resources=RESOURCES, listener=ignore
    )
    origins = TileStore(summary.folder.slide("masked").tiles).places.origins
    assert len(origins) == 8 * 16
    assert origins[:, 0].min() == 512


def test_a_slide_with_bounds_is_tiled_within_them_and_exported_as_qupath_sees_it(
    cohort: Cohort, model: Model, tmp_path: Path, drop_tiles: Callable[[Path, list[int]], None]
) -> None:
    """QuPath crops to the bounds: its frame begins where they do, the CSV keeps to the file's."""
    slide = Path(shutil.copy(cohort.test_slides[1], tmp_path / "sparse.tif"))
    drop_tiles(slide, [0, 1, 2, 3, 4, 8, 12])  # the upper row and the left column of 4 x 4
    folder = run(read_cohort([slide]), model, tmp_path / "results", resources=RESOURCES, listener=ignore).folder
    outputs = folder.slide("sparse")
    places = TileStore(outputs.tiles).places
    assert places.origins.min(axis=0).tolist() == [256, 256]
    with gzip.open(outputs.root / "sparse.tiles.geojson.gz", "rt") as file:
        exported = json.load(file)
    corners = np.array([feature["geometry"]["coordinates"][0][0] for feature in exported["features"]])
    assert (corners == places.origins - 256).all()
    assert exported["wsi_anomaly"]["bounds"] == [256, 256, 768, 768]


@pytest.mark.slow
def test_the_demo_finds_what_it_planted(tmp_path: Path) -> None:
    """Slide AUROC 1.0, tile AUROC at least 0.88, on the slides that every newcomer sees; pictures of each slide."""
    found = demonstrate(tmp_path, resources=Resources(device="cpu"), listener=ignore)
    assert found.evaluation.measures["slide_auroc_z_max"] == 1.0
    assert found.evaluation.measures["slide_auroc_z_99"] == 1.0
    assert (found.evaluation.measures["tile_auroc"] or 0.0) >= 0.88
    for slide in found.summary.folder.slides():
        assert all(path.exists() for path in (slide.heatmap_picture, slide.prompt_picture, slide.score_picture))
    assert found.most_abnormal.regions.exists()
    assert found.truth.exists()
