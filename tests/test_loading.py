"""Faults of the whole run: told once, before any slide is tiled; and what is kept of scores, and called what."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from wsi_anomaly.cli.app import app
from wsi_anomaly.cohort import read_cohort
from wsi_anomaly.detectors.autoencoder import Autoencoder
from wsi_anomaly.detectors.autoencoding import AutoencoderScorer
from wsi_anomaly.detectors.fanogan import FAnoGanScorer
from wsi_anomaly.detectors.protocol import Scorer, TileBatch
from wsi_anomaly.detectors.spatial_msma import CamScorer, SpatialMsmaScorer
from wsi_anomaly.errors import ModelError, OptionsError, WsiAnomalyError
from wsi_anomaly.execution import Resources
from wsi_anomaly.pipeline import run
from wsi_anomaly.pipeline.comparing import compare
from wsi_anomaly.pipeline.explaining import map_meaning
from wsi_anomaly.pipeline.running import pipeline_of
from wsi_anomaly.stages.score import FittedDetector
from wsi_anomaly.storage.arrays import open_arrays
from wsi_anomaly.storage.layout import RunFolder
from wsi_anomaly.storage.model import read_model, write_manifest
from wsi_anomaly.synthetic import write_slide

PIPELINE = """
name = "tiny"
[tiles]
tile_px = 64
stride_px = 64
[detector]
{detector}
[detector.training]
max_epochs = 1
[score]
{score}
"""
AUTOENCODER = 'name = "autoencoder"\nchannels = [{}, 8]'
VAE = 'name = "vae"\nwidth = 4\nlatents = 4\nsamples = 1'
RESOURCES = Resources(device="cpu", workers=1, offline=True)


def ignore(_: object) -> None:
    """Progress."""


def command(*arguments: object) -> tuple[int, str]:
    """Exit status and what is printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def models(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a folder: `plain`; `keeping` maps and two reconstructions; `mapless`; `foreign`, with weights of another."""
    folder = tmp_path_factory.mktemp("models")
    texts = {
        "plain": PIPELINE.format(detector=AUTOENCODER.format(8), score=""),
        "keeping": PIPELINE.format(
            detector=AUTOENCODER.format(16), score='keep_maps = "all"\nkeep_reconstructions = "worst:2"'
        ),
        "mapless": PIPELINE.format(detector=VAE, score=""),
    }
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)
        arguments = ("-o", folder / name, "-p", folder / f"{name}.toml", "--workers", 1, "--offline", "--quiet")
        assert command("fit", slides, *arguments)[0] == 0
    shutil.copytree(folder / "plain", folder / "foreign")
    shutil.rmtree(folder / "foreign" / "detector")
    shutil.copytree(folder / "keeping" / "detector", folder / "foreign" / "detector")
    (folder / "foreign" / "manifest.json").unlink()
    write_manifest(folder / "foreign", recipe_digest="")
    return folder


@pytest.fixture(scope="module")
def finished(slides: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of `plain`."""
    out = tmp_path_factory.mktemp("run") / "results"
    return run(read_cohort([slides]), read_model(models / "plain"), out, resources=RESOURCES, listener=ignore).folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every place that an autoencoder is loaded from."""
    places: list[Path] = []
    load = Autoencoder.load

    def counted(detector: Autoencoder, checkpoint: Path, **options: Any) -> object:
        places.append(checkpoint)
        return load(detector, checkpoint, **options)

    monkeypatch.setattr(Autoencoder, "load", counted)
    return places


def run_alone(slides: Path, model: Path, out: Path, **wishes: str) -> object:
    """`run` with wishes of what is kept."""
    fitted = read_model(model)
    pipeline = pipeline_of(fitted).keeping(**wishes)  # type: ignore[arg-type]
    return run(read_cohort([slides]), fitted, out, resources=RESOURCES, listener=ignore, pipeline=pipeline)


@pytest.mark.parametrize(
    ("model", "wishes", "error", "message"),
    [
        ("foreign", {}, ModelError, "weights"),
        ("mapless", {"maps": "all"}, OptionsError, "'vae' makes no maps.*--keep-maps none"),
        ("mapless", {"reconstructions": "worst:3"}, OptionsError, r"no reconstructions.*worst:3.*under \[score\]"),
    ],
)
def test_a_model_that_cannot_do_it_ends_a_run_before_the_first_slide(  # noqa: PLR0917 - fixtures and cases
    slides: Path,
    models: Path,
    tmp_path: Path,
    model: str,
    wishes: dict[str, str],
    error: type[WsiAnomalyError],
    message: str,
) -> None:
    """One message; no slide is tiled, and none is said to have failed."""
    with pytest.raises(error, match=message):
        run_alone(slides, models / model, tmp_path / "out", **wishes)
    assert not list((tmp_path / "out").iterdir())


def test_a_model_that_cannot_do_it_ends_a_comparison_by_name(slides: Path, models: Path, tmp_path: Path) -> None:
    """Before the others have begun."""
    compared = [read_model(models / name) for name in ("plain", "foreign")]
    with pytest.raises(ModelError, match=r"^foreign: .*weights"):
        compare(read_cohort([slides]), compared, tmp_path, resources=RESOURCES, listener=ignore)
    assert not list(tmp_path.rglob("*.json"))
    assert not list(tmp_path.rglob("tiles.zarr"))


def test_a_model_that_cannot_do_it_ends_the_stage_score(models: Path, finished: RunFolder, tmp_path: Path) -> None:
    """And leaves the scores that are there."""
    out = shutil.copytree(finished.root, tmp_path / "out")
    before = (out / "slides.csv").read_bytes()
    with pytest.raises(ModelError, match="weights"):
        command("score", out, "-m", models / "foreign", "--quiet")
    with pytest.raises(OptionsError, match="makes no maps"):
        command("score", out, "-m", models / "mapless", "--keep-maps", "all", "--quiet")
    assert (out / "slides.csv").read_bytes() == before


def test_a_model_is_loaded_once_and_only_where_there_is_something_to_score(
    slides: Path, models: Path, finished: RunFolder, tmp_path: Path, loads: list[Path]
) -> None:
    """By `run`, by `compare` and by `score`; a slide that comes new is something."""
    out = shutil.copytree(finished.root, tmp_path / "plain")
    plain = read_model(models / "plain")
    run_alone(slides, models / "plain", out)
    compare(read_cohort([slides]), [plain], tmp_path, resources=RESOURCES, listener=ignore)
    assert command("score", out, "-m", models / "plain", "--quiet")[0] == 0
    assert loads == []
    shutil.copytree(slides, tmp_path / "slides")
    write_slide(tmp_path / "slides" / "third.tif", seed=5, size_px=(768, 768))
    write_slide(tmp_path / "slides" / "fourth.tif", seed=6, size_px=(768, 768))
    run_alone(tmp_path / "slides", models / "plain", out)
    assert loads == [models / "plain" / "detector"]
    run_alone(tmp_path / "slides", models / "plain", out, maps="all")
    assert len(loads) == 2


def test_what_a_pipeline_keeps_is_kept_unless_a_flag_says_otherwise(slides: Path, models: Path, tmp_path: Path) -> None:
    """By `run`, by `compare` and by `score`."""

    def kept(folder: Path) -> set[str]:
        arrays = set(open_arrays(RunFolder(folder).slide("node").scores).array_keys())
        return arrays & {"maps", "reconstructions"}

    slide, model, quiet = slides / "node.tif", models / "keeping", ("--workers", 1, "--quiet")
    assert command("run", slide, "-m", model, "-o", tmp_path / "run", *quiet)[0] == 0
    assert kept(tmp_path / "run") == {"maps", "reconstructions"}
    assert command("compare", slide, "-m", model, "-o", tmp_path, *quiet)[0] == 0
    assert kept(tmp_path / "keeping") == {"maps", "reconstructions"}
    assert command("run", slide, "-m", model, "-o", tmp_path / "run", "--keep-maps", "none", *quiet)[0] == 0
    assert kept(tmp_path / "run") == {"reconstructions"}
    flags = ("--keep-reconstructions", "none")
    assert command("score", tmp_path / "run", "-m", model, *flags, "--quiet")[0] == 0
    assert kept(tmp_path / "run") == {"maps"}
    options = json.loads((tmp_path / "keeping" / "run.json").read_text())["options"]["score"]
    assert options["keep_reconstructions"] == "worst:2"


def test_a_run_without_a_finished_slide_does_not_say_where_heat_maps_are(models: Path, tmp_path: Path) -> None:
    """But which slide failed, and where the reasons are."""
    (tmp_path / "broken.svs").write_text("no slide")
    status, printed = command("run", tmp_path / "broken.svs", "-m", models / "plain", "-o", tmp_path / "out")
    assert status == 1
    assert "heatmap.png" not in printed
    assert "No slide is finished" in printed
    assert "failed: broken" in printed


def test_a_sheet_says_what_its_maps_are() -> None:
    """In the words of the scorer, and in general ones where it has none: then nobody is told of an error."""

    class Mapper:
        """Without a word."""

        def score(self, batch: TileBatch) -> np.ndarray:
            """Nothing."""
            return np.zeros((len(batch), 1), np.float32)

        def score_map(self, batch: TileBatch) -> np.ndarray:
            """Nothing."""
            return np.zeros(batch.pixels.shape[:3], np.float32)

    def told(scorer: Scorer) -> str:
        return map_meaning(FittedDetector("some", "digest", 64, 0.5, lambda: (scorer, ("score",))))

    assert told(Mapper()) == "Map: higher is more abnormal, in the detector's own unit"
    assert told(AutoencoderScorer(nn.Identity(), torch.device("cpu"))).startswith("Residual: squared error of inten")
    for kind, words in ((SpatialMsmaScorer, "Map: -log p"), (CamScorer, "Map: Grad-CAM"), (FAnoGanScorer, "-1 to 1")):
        assert words in kind.map_meaning
