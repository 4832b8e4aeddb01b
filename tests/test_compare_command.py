"""`wsi-anomaly compare`: several models over the same tiles, each as if it had been run alone."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from wsi_anomaly.cli.app import app
from wsi_anomaly.cohort import read_cohort
from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.errors import OptionsError
from wsi_anomaly.execution import Progress, Resources
from wsi_anomaly.pipeline.comparing import compare, result_names
from wsi_anomaly.slides import Slide
from wsi_anomaly.stages.score import FittedDetector, ScoreJob, ScoreOptions, score_together
from wsi_anomaly.storage.arrays import read_array
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.model import read_model
from wsi_anomaly.storage.record import find_record
from wsi_anomaly.storage.sharing import share_output
from wsi_anomaly.storage.slide_table import read_slide_table
from wsi_anomaly.storage.tiles import TileStore

PIPELINE = """
name = "tiny"
seed = {seed}
[tiles]
tile_px = {tile_px}
stride_px = {tile_px}
[detector]
name = "autoencoder"
channels = [8, 8]
[detector.training]
max_epochs = 1
"""
PROMPT = """
[prompt.model]
name = "conch"
weights = "{weights}"
"""
RESOURCES = Resources(device="cpu", workers=1, offline=True)
SLIDES = ("node", "other")
FitModel = Callable[..., Path]
WriteTiles = Callable[..., SlideFolder]


def ignore(_: object) -> None:
    """Progress."""


def command(*arguments: object) -> tuple[int, str]:
    """Exit status and standard output."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def contents(folder: Path, *parts: str) -> dict[str, bytes]:
    """Every file of some outputs of all slides, and the records of their stages."""
    files = [path for part in parts for path in (folder / "slides").glob(f"*/{part}") if path.is_file()]
    files += [path for part in parts for path in (folder / "slides").glob(f"*/{part}/**/*") if path.is_file()]
    assert files
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def written(folder: Path) -> dict[str, int]:
    """When each finished stage of each slide was written, in ns."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("**/records/*.json")}


@pytest.fixture(scope="module")
def fit_model(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> FitModel:
    """Fits a model in a folder of its own: `fit_model("a", seed=0, tile_px=64, more="")`."""

    def fit(name: str, *, seed: int = 0, tile_px: int = 64, more: str = "") -> Path:
        folder = tmp_path_factory.mktemp("models")
        (folder / "tiny.toml").write_text(PIPELINE.format(seed=seed, tile_px=tile_px) + more)
        arguments = ("-o", folder / name, "-p", folder / "tiny.toml", "--workers", 1, "--offline", "--quiet")
        assert command("fit", slides, *arguments)[0] == 0
        return folder / name

    return fit


@pytest.fixture(scope="module")
def first(fit_model: FitModel) -> Path:
    """A model."""
    return fit_model("first")


@pytest.fixture(scope="module")
def second(fit_model: FitModel) -> Path:
    """Another, of another seed."""
    return fit_model("second", seed=1)


@pytest.fixture(scope="module")
def alone(slides: Path, first: Path, second: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `run` leaves of each of the two."""
    out = tmp_path_factory.mktemp("alone")
    for model in (first, second):
        assert command("run", slides, "-m", model, "-o", out / model.name, "--workers", 1, "--quiet")[0] == 0
    return out


@pytest.fixture(scope="module")
def compared(slides: Path, first: Path, second: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `compare` leaves of both."""
    out = tmp_path_factory.mktemp("compared")
    status, printed = command("compare", slides, "--models", first, second, "-o", out, "--workers", 1)
    assert status == 0
    assert all(name in printed for name in ("first:", "second:", *SLIDES))
    return out


@pytest.mark.parametrize("name", ["first", "second"])
def test_results_are_the_bytes_of_a_run_alone(alone: Path, compared: Path, name: str) -> None:
    """Scores, heat maps, tables, GeoJSON and records of each slide."""
    parts = ("*.zarr", "*.csv", "*.geojson*", "records")
    assert contents(compared / name, *parts) == contents(alone / name, *parts)
    assert {path.name for path in (compared / name).iterdir()} == {path.name for path in (alone / name).iterdir()}


def test_tiles_lie_on_disk_once(compared: Path) -> None:
    """The second model's folder links to the first one's, and neither needs the other."""
    files = [path for path in (compared / "first" / "slides" / "node" / "tiles.zarr").rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert path.samefile(compared / "second" / path.relative_to(compared / "first"))


def test_each_tile_is_read_once_for_all_models(
    slides: Path, first: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the slide, and from the tile store."""
    from_slide, from_store, read, read_tiles = [], [], Slide.read, TileStore.read

    def count_read(slide: Slide, *arguments: object, **options: object) -> np.ndarray:
        from_slide.append(arguments)
        return read(slide, *arguments, **options)  # type: ignore[arg-type]

    def count_tiles(store: TileStore, indices: np.ndarray) -> np.ndarray:
        from_store.extend(indices.tolist())
        return read_tiles(store, indices)

    monkeypatch.setattr(Slide, "read", count_read)
    monkeypatch.setattr(TileStore, "read", count_tiles)
    cohort, models = read_cohort([slides / "node.tif"]), [read_model(first), read_model(second)]
    (summary, _) = compare(cohort, models, tmp_path, resources=RESOURCES, listener=ignore)
    tiles = summary.rows[0].tiles
    assert tiles
    assert len(from_slide) == tiles
    assert sorted(from_store) == list(range(tiles))


def test_a_second_comparison_does_nothing_and_a_run_goes_on_from_it(
    slides: Path, first: Path, second: Path, compared: Path, tmp_path: Path
) -> None:
    """In whichever order the models are given; what one model lost is made again, and nothing else."""
    out = Path(shutil.copytree(compared, tmp_path / "out"))
    before = written(out)
    assert command("compare", slides, "-m", second, "-m", first, "-o", out, "--quiet") == (0, "")
    assert command("run", slides, "-m", second, "-o", out / "second", "--quiet") == (0, "")
    assert written(out) == before
    shutil.rmtree(out / "second" / "slides" / "node" / "scores.zarr")
    assert command("compare", slides, "-m", first, "-m", second, "-o", out, "--quiet")[0] == 0
    changed = {name for name, moment in written(out).items() if moment != before[name]}
    assert changed == {"second/slides/node/records/score.json"}
    assert contents(out / "second", "*.zarr") == contents(compared / "second", "*.zarr")


def test_a_model_that_joins_later_takes_the_tiles_that_are_there(  # noqa: PLR0917 - fixtures
    slides: Path, first: Path, second: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even in front, and from a `run`: the slides are not read again."""
    shutil.copytree(alone / "first", tmp_path / "first")
    monkeypatch.setattr(Slide, "open", classmethod(lambda *_, **__: pytest.fail("a slide was opened")))
    assert command("compare", slides, "-m", second, "-m", first, "-o", tmp_path, "--quiet")[0] == 0
    assert contents(tmp_path / "second", "scores.zarr") == contents(alone / "second", "scores.zarr")


def test_what_was_finished_before_an_interruption_is_kept(
    slides: Path, first: Path, second: Path, alone: Path, tmp_path: Path
) -> None:
    """The slide that was under way is begun again, by both models, and no lock is left behind."""

    def interrupt(progress: Progress) -> None:
        if (progress.stage, progress.slide_id) == ("score", "other"):
            raise KeyboardInterrupt

    models = [read_model(first), read_model(second)]
    with pytest.raises(KeyboardInterrupt):
        compare(read_cohort([slides]), models, tmp_path, resources=RESOURCES, listener=interrupt)
    finished = written(tmp_path)
    assert {f"{name}/slides/node/records/export.json" for name in ("first", "second")} <= set(finished)
    assert not list(tmp_path.glob("**/*.lock"))
    assert not list(tmp_path.glob("**/*.partial"))
    assert command("compare", slides, "-m", first, "-m", second, "-o", tmp_path, "--quiet")[0] == 0
    assert finished.items() <= written(tmp_path).items()
    assert contents(tmp_path / "first", "scores.zarr") == contents(alone / "first", "scores.zarr")


def test_one_bad_slide_stops_nothing(slides: Path, first: Path, second: Path, tmp_path: Path) -> None:
    """It is in both tables with its reason, and in the log once for each model; the exit status is 1."""
    shutil.copytree(slides, tmp_path / "slides")
    (tmp_path / "slides" / "broken.svs").write_text("no slide")
    out = tmp_path / "out"
    arguments = ("-m", first, "-m", second, "-o", out, "--workers", 2, "--log-file", tmp_path / "log.jsonl")
    status, printed = command("compare", tmp_path / "slides", *arguments)
    assert status == 1
    assert "not a slide" in printed
    assert "second: broken" in (tmp_path / "log.jsonl").read_text()
    for name in ("first", "second"):
        rows = read_slide_table(out / name / "slides.csv")
        assert {slide_id: row.status for slide_id, row in rows.items()} == {
            "broken": "failed",
            "node": "done",
            "other": "done",
        }


def test_labels_are_evaluated_at_the_end(compared: Path, slides: Path, first: Path, second: Path) -> None:
    """As `evaluate` does: the models side by side, in the first one's folder."""
    labels = compared / "labels.csv"
    labels.write_text("slide_id,label\nnode,normal\nother,abnormal\n")
    status, printed = command("compare", slides, "-m", first, "-m", second, "-o", compared, "--labels", labels)
    assert status == 0
    assert "slide auroc z max" in printed
    assert set(json.loads((compared / "first" / "metrics.json").read_text())["detectors"]) == {"first", "second"}


def test_models_of_other_tiles_are_refused_by_name(
    slides: Path, first: Path, fit_model: FitModel, tmp_path: Path
) -> None:
    """With what differs, before anything is written."""
    coarse = fit_model("coarse", tile_px=128, more="\n[tissue]\nmpp = 16.0\n")
    with pytest.raises(OptionsError, match=r"coarse.*first.*\[tissue\] mpp is 16.0.*tile_px is 128 instead of 64"):
        command("compare", slides, "-m", first, "-m", coarse, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "SLIDES --models A B",
        "SLIDES --models A B -o OUT",
        "SLIDES -m A -m B",
        "-m A --models B -- SLIDES",
        "-m A B -q SLIDES",
    ],
)
def test_models_are_given_side_by_side_or_one_by_one(arguments: str) -> None:
    """All values up to the next option are models, and two dashes are the end of options."""
    read = get_command(app).commands["compare"].make_context("compare", arguments.split()).params  # type: ignore[attr-defined]
    assert read["models"] == [Path("A"), Path("B")]
    assert read["slides"] == [Path("SLIDES")]


def test_slides_that_models_took_are_missed_with_a_remedy() -> None:
    """They look like one more model."""
    result = CliRunner().invoke(app, ["compare", "--models", "a", "b", "slides/test"])
    assert result.exit_code == 2
    assert "Missing argument 'SLIDES...'" in result.output
    assert "--models A B -- SLIDES" in " ".join(result.output.replace("│", " ").split())


def test_models_of_one_name_are_told_apart() -> None:
    """By the folders above, as far as needed; also on disks that take upper and lower case for the same."""
    assert result_names([Path("/m/a"), Path("/m/b")]) == ("a", "b")
    assert result_names([Path("/x/a"), Path("/y/a"), Path("/y/b")]) == ("x-a", "y-a", "b")
    assert result_names([Path("/x/m/a"), Path("/y/m/a")]) == ("x-m-a", "y-m-a")
    assert result_names([Path("/x/a"), Path("/y/A")]) == ("x-a", "y-A")
    assert result_names([Path("/a"), Path("/x/a")]) == ("a", "x-a")
    with pytest.raises(OptionsError, match="given twice"):
        result_names([Path("/m/a"), Path("/m/b/../a")])


def test_a_model_is_never_written_into(slides: Path, first: Path) -> None:
    """Though its folder has the name that its results would have."""
    before = sorted(path.name for path in first.iterdir())
    with pytest.raises(OptionsError, match="is a model"):
        command("compare", slides, "-m", first, "-o", first.parent)
    assert sorted(path.name for path in first.iterdir()) == before


@pytest.mark.slow
def test_equal_prompts_are_made_once(
    slides: Path, fit_model: FitModel, first: Path, small_conch: Path, tmp_path: Path
) -> None:
    """Two models that describe tiles alike share them; a model without prompts stands beside them."""
    more = PROMPT.format(weights=small_conch)
    models = [fit_model("a", more=more), fit_model("b", seed=1, more=more), first]
    described: list[str] = []

    def listen(progress: Progress) -> None:
        if progress.stage == "prompt" and progress.finished:
            described.append(progress.slide_id)

    read = [read_model(model) for model in models]
    compare(read_cohort([slides]), read, tmp_path, resources=RESOURCES, listener=listen)
    assert sorted(described) == sorted(SLIDES)
    assert contents(tmp_path / "a", "prompts.zarr") == contents(tmp_path / "b", "prompts.zarr")
    assert [(tmp_path / name / "keyword_frequency.csv").exists() for name in ("a", "b", "first")] == [True, True, False]
    arguments = ("-m", models[1], "-o", tmp_path / "alone", "--offline", "--workers", 1, "--quiet")
    assert command("run", slides, *arguments)[0] == 0
    assert contents(tmp_path / "b", "scores.zarr") == contents(tmp_path / "alone", "scores.zarr")


class Red:
    """Scores a tile by its first red value; gives up at the second batch where told."""

    def __init__(self, *, gives_up: bool = False) -> None:
        self._gives_up = gives_up
        self.batches = 0

    def score(self, batch: TileBatch) -> np.ndarray:
        """One column."""
        self.batches += 1
        if self._gives_up and self.batches == 2:
            raise RuntimeError("no more")
        return batch.pixels[:, 0, 0, :1].astype(np.float32)


def job(folder: SlideFolder, scorer: Red) -> ScoreJob:
    """Of one model."""
    detector = FittedDetector("red", "digest", 32, 0.5, lambda: (scorer, ("red",)))
    return ScoreJob(folder, detector, ScoreOptions(), seed=0)


def test_a_detector_that_fails_leaves_the_others_their_turn(write_tiles: WriteTiles, tmp_path: Path) -> None:
    """Its error is in its own future, its unfinished work is gone, and the other has all tiles."""
    folders = [write_tiles(12, corrupt=(3,), results=tmp_path / name) for name in "ab"]
    scorers = [Red(gives_up=True), Red()]
    failed, done = score_together(list(map(job, folders, scorers)), batch_size=5)
    with pytest.raises(RuntimeError, match="no more"):
        failed.result()
    assert done.result() > 0
    assert [scorer.batches for scorer in scorers] == [2, 3]
    assert not (folders[0].root / "score.partial").exists()
    assert find_record(folders[0].root, "score") is None
    red = read_array(folders[1].tiles, "pixels")[:, :1, 0, 0].astype(np.float32)
    red[3] = np.nan
    np.testing.assert_array_equal(read_array(folders[1].scores, "scores"), red)


def test_nobody_reads_on_for_detectors_that_have_all_failed(write_tiles: WriteTiles, tmp_path: Path) -> None:
    """The slide is over with the last of them."""
    scorers = [Red(gives_up=True), Red(gives_up=True)]
    jobs = [job(write_tiles(40, results=tmp_path / name), scorer) for name, scorer in zip("ab", scorers, strict=True)]
    assert all(ended.exception() for ended in score_together(jobs, batch_size=5))
    assert [scorer.batches for scorer in scorers] == [2, 2]


def test_tiles_that_cannot_be_read_fail_every_detector(write_tiles: WriteTiles, tmp_path: Path) -> None:
    """None of them keeps half a slide, or waits."""
    folders = [write_tiles(12, results=tmp_path / name) for name in "ab"]
    for path in (folders[0].tiles / "pixels" / "c").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:100])
    ended = score_together([job(folder, Red()) for folder in folders], batch_size=5)
    assert all(one.exception() for one in ended)
    assert not any((folder.root / "score.partial").exists() for folder in folders)


def test_a_shared_output_outlives_its_first_owner(write_tiles: WriteTiles, tmp_path: Path) -> None:
    """It is as good as the original, and an older one in its place is replaced."""
    source, target = write_tiles(6), RunFolder(tmp_path / "other").slide("node")
    write_tiles(5, results=tmp_path / "other")
    pixels, record = read_array(source.tiles, "pixels"), find_record(source.root, "tile")
    share_output("tile", source.root, target.root)
    shutil.rmtree(source.root)
    assert find_record(target.root, "tile") == record
    np.testing.assert_array_equal(read_array(target.tiles, "pixels"), pixels)


def test_a_disk_without_links_gets_copies(
    write_tiles: WriteTiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, with more room taken."""

    def refuse(*_: object) -> None:
        raise OSError("no links here")

    source, target = write_tiles(6), RunFolder(tmp_path / "other").slide("node")
    monkeypatch.setattr(os, "link", refuse)
    share_output("tile", source.root, target.root)
    np.testing.assert_array_equal(read_array(target.tiles, "pixels"), read_array(source.tiles, "pixels"))
