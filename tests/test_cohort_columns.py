"""What a cohort's table says of slides, on its way to a detector that looks at it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wsi_anomaly.__main__ import main
from wsi_anomaly.cohort import CohortSlide, read_cohort
from wsi_anomaly.errors import OutputError
from wsi_anomaly.execution import Resources
from wsi_anomaly.pipeline import Pipeline, fit, load_pipeline
from wsi_anomaly.pipeline.preparing import keep_cohort_values
from wsi_anomaly.storage.cohort_values import categories_of, read_cohort_values, write_cohort_values
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.record import read_record
from wsi_anomaly.storage.scores import read_scores
from wsi_anomaly.synthetic import write_slide

PIPELINE = """
name = "facts"
[tiles]
tile_px = 64
stride_px = 64
[prompt]
keywords = "lymph_node"
templates = false
[prompt.model]
name = "conch"
weights = "{weights}"
[detector]
name = "gnsm"
columns = ["scanner"]
width = 16
blocks = 1
[detector.training]
max_epochs = 5
"""


SPLIT = {"a": "train", "b": "train", "c": "reference", "d": "test"}
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`wsi-anomaly` as a shell runs it: the exit status, and all that it prints as one line."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["wsi-anomaly", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), " ".join("".join(capsys.readouterr()).split())

    return call


def table(folder: Path, **scanners: str) -> Path:
    """A cohort of slides by their scanners."""
    path = folder / "cohort.csv"
    rows = [f"{name}.tif,{SPLIT[name]},{scanner}" for name, scanner in scanners.items()]
    path.write_text("\n".join(["path,split,scanner", *rows]))
    return path


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four slides."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(SPLIT):
        write_slide(folder / f"{name}.tif", seed=seed, size_px=(1024, 1024))
    return folder


@pytest.fixture(scope="module")
def model(slides: Path, small_conch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fitted to slides of two scanners."""
    folder = tmp_path_factory.mktemp("fit")
    (folder / "facts.toml").write_text(PIPELINE.format(weights=small_conch))
    pipeline = load_pipeline(folder / "facts.toml")
    cohort = read_cohort([table(slides, a="Aperio", b="Hamamatsu", c="Aperio")], columns=pipeline.cohort_columns)
    resources = Resources(device="cpu", workers=1, offline=True)
    fit(cohort, pipeline, folder / "model", resources=resources, listener=lambda _: None)
    return folder / "model"


def scores(out: Path) -> np.ndarray:
    """Of the tiles of the slide to test."""
    return read_scores(RunFolder(out).slide("d").scores)[0][:, 0]


def test_a_value_that_normal_slides_lack_raises_the_scores(
    command: Command, model: Path, slides: Path, tmp_path: Path
) -> None:
    """Said of the same slide: nothing but the score is made again, and nearly all tiles score higher."""
    run = ("run", slides / "cohort.csv", "--model", model, "--out", tmp_path, "--device", "cpu", "--quiet")
    table(slides, d="Aperio")
    assert command(*run)[0] == 0
    known, tiled = scores(tmp_path), RunFolder(tmp_path).slide("d").tiles.stat().st_mtime_ns
    table(slides, d="Philips")
    assert command(*run)[0] == 0
    assert (scores(tmp_path) > known).mean() > 0.9
    assert RunFolder(tmp_path).slide("d").tiles.stat().st_mtime_ns == tiled
    assert "Philips" in str(read_record(RunFolder(tmp_path).slide("d").root, "score").recipe)


def test_slides_in_no_table_are_refused(command: Command, model: Path, slides: Path, tmp_path: Path) -> None:
    """The message names the slide and the columns; nothing is tiled."""
    status, said = command("run", slides, "--model", model, "--out", tmp_path / "results")
    assert status != 0
    assert "a.tif: is in no table, and the detector looks at the cohort's columns scanner. Name all in a CSV" in said
    assert not (tmp_path / "results").exists()


def test_a_table_without_the_column_is_refused(command: Command, model: Path, slides: Path) -> None:
    """The message names it."""
    (slides / "short.csv").write_text("path\na.tif\n")
    assert (
        "the column scanner is missing, which the detector looks at"
        in command("run", slides / "short.csv", "--model", model)[1]
    )


def test_other_columns_are_refused_as_ever(command: Command, model: Path, slides: Path) -> None:
    """What a detector does not ask for may be what nobody wanted to hand on."""
    (slides / "long.csv").write_text("path,scanner,patient\na.tif,Aperio,Jane\n")
    assert "unknown column 'patient'" in command("run", slides / "long.csv", "--model", model)[1]


def test_values_are_the_same_numbers_in_any_company(tmp_path: Path) -> None:
    """An empty cell is unknown; without columns there is nothing, and nothing is left of earlier ones."""
    path = SlideFolder(tmp_path / "a").cohort_values
    write_cohort_values(path, {"scanner": "Aperio", "stain": ""})
    one, other = categories_of(read_cohort_values(path), 2), categories_of({"stain": "x", "scanner": "Aperio"}, 1)
    assert one is not None
    assert other is not None
    assert one.shape == (2, 2)
    assert one[1, 0] == other[0, 1] != other[0, 0]
    assert one[0, 1] == -1
    write_cohort_values(path, {})
    assert read_cohort_values(path) == {}
    assert categories_of({}, 3) is None


def test_damaged_values_are_refused_by_name(tmp_path: Path) -> None:
    """The message says what to do."""
    (tmp_path / "cohort.json").write_text("[")
    with pytest.raises(OutputError, match=r"cohort\.json: is damaged .* run the same command again"):
        read_cohort_values(tmp_path / "cohort.json")


def test_only_the_columns_that_a_pipeline_names_are_kept(tmp_path: Path) -> None:
    """So models that are compared on one cohort see no more of it than in a run of their own."""
    slide = CohortSlide("a", tmp_path / "a.tif", values={"scanner": "Aperio", "stain": "H&E"})
    folder = SlideFolder(tmp_path / "a")
    for detector, kept in (({"name": "gnsm", "columns": ["stain"]}, {"stain": "H&E"}), ({"name": "autoencoder"}, {})):
        keep_cohort_values(slide, folder, Pipeline(name="test", detector=detector))
        assert read_cohort_values(folder.cohort_values) == kept


def test_one_table_is_cohort_and_truth(command: Command, model: Path, slides: Path, tmp_path: Path) -> None:
    """`run` leaves its labels alone, `evaluate` the columns that the run looked at."""
    truth = slides / "truth.csv"
    truth.write_text("path,slide_id,scanner,label\nd.tif,d,Aperio,normal\na.tif,a,Aperio,abnormal\n")
    assert command("run", truth, "--model", model, "--out", tmp_path, "--device", "cpu", "--quiet")[0] == 0
    for option in ("--annotations", "--labels"):
        status, said = command("evaluate", tmp_path, option, truth)
        assert status == 0, said
        assert "slide auroc z max" in said
    truth.write_text(truth.read_text().replace("scanner", "skanner"))
    assert "unknown column 'skanner'" in command("evaluate", tmp_path, "--labels", truth)[1]
