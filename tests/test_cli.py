"""What a user types and what comes back: messages, tables, exit status."""

import json
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from wsi_anomaly import __version__, plugins
from wsi_anomaly.cli.app import app, main
from wsi_anomaly.cli.tables import listing_lines
from wsi_anomaly.errors import KeywordError, MissingOutputError, ModelError, OptionsError
from wsi_anomaly.pipeline import doctor
from wsi_anomaly.plugins import DETECTORS
from wsi_anomaly.storage.slide_table import read_slide_table
from wsi_anomaly.synthetic import write_slide

PIPELINE = """
name = "tiny"
[tiles]
tile_px = 64
stride_px = 64
[detector]
name = "autoencoder"
channels = [8, 8]
[detector.training]
max_epochs = 1
"""


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command, as `main` would leave it."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one slide."""
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "node.tif", seed=1, size_px=(1024, 1024))
    return folder


@pytest.fixture(scope="module")
def workplace(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a model has been fitted, in `model`."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.toml").write_text(PIPELINE)
    status, out, _ = command("fit", slides, "-o", folder / "model", "-p", folder / "tiny.toml", "--workers", 1)
    assert status == 0
    assert "Next: wsi-anomaly run" in out
    return folder


def test_every_stage_alone_ends_where_a_run_ends(slides: Path, workplace: Path, tmp_path: Path) -> None:
    """Mask, tile, score, heatmap, export give the bytes of `run`."""
    pipeline = workplace / "model" / "pipeline.toml"
    alone, whole = tmp_path / "alone", tmp_path / "whole"
    for arguments in (
        ("mask", slides, "-o", alone, "-p", pipeline),
        ("tile", slides, "-o", alone, "-p", pipeline),
        ("score", alone, "-m", workplace / "model"),
        ("heatmap", alone, "-m", workplace / "model"),
        ("export", alone),
    ):
        assert command(*arguments)[0] == 0
    status, out, _ = command("run", slides, "-m", workplace / "model", "-o", whole)
    assert status == 0
    assert "node" in out
    files = [path for path in sorted((whole / "slides").rglob("*")) if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert (alone / path.relative_to(whole)).read_bytes() == path.read_bytes(), path


def test_calibrate_measures_against_other_normal_slides(slides: Path, workplace: Path, tmp_path: Path) -> None:
    """The reference file it writes is what `heatmap --reference` reads; the mean z is then 0."""
    results, reference = tmp_path / "results", tmp_path / "reference.json"
    assert command("run", slides, "-m", workplace / "model", "-o", results)[0] == 0
    assert command("calibrate", results, "-o", reference)[0] == 0
    assert command("heatmap", results, "--reference", reference)[0] == 0
    import zarr

    z = zarr.open_array(results / "slides" / "node" / "heatmap.zarr" / "z_tile")[...]
    assert np.asarray(z).mean() == pytest.approx(0, abs=1e-6)


def test_a_stage_before_its_time_says_which_comes_first(slides: Path, workplace: Path, tmp_path: Path) -> None:
    """With the command to run."""
    status, _, _ = command("tile", slides, "-o", tmp_path / "results", "-p", workplace / "tiny.toml")
    assert status == 1
    assert "wsi-anomaly mask" in (tmp_path / "results" / "slides.csv").read_text()


def test_tiles_of_another_size_are_refused_with_the_remedy(slides: Path, workplace: Path, tmp_path: Path) -> None:
    """A model is fitted for one tile size."""
    results = tmp_path / "results"
    for stage in ("mask", "tile"):
        assert command(stage, slides, "-o", results)[0] == 0
    assert command("score", results, "-m", workplace / "model")[0] == 1
    reason = (results / "slides.csv").read_text()
    assert "256 px" in reason
    assert "64 px" in reason
    assert "--pipeline" in reason


def test_evaluate_prints_and_writes_the_slide_level_auroc(slides: Path, workplace: Path, tmp_path: Path) -> None:
    """One class only has none."""
    results = tmp_path / "results"
    command("run", slides, "-m", workplace / "model", "-o", results)
    (tmp_path / "labels.csv").write_text("slide_id,label\nnode,normal\n")
    status, out, _ = command("evaluate", results, "--labels", tmp_path / "labels.csv")
    assert status == 0
    assert "slide auroc z max" in out
    measured = json.loads((results / "metrics.json").read_text())["detectors"]["autoencoder"]
    assert measured["slide_auroc_z_max"] is None
    assert "Dice" in (results / "evaluation" / "tables.md").read_text()


def test_a_log_file_holds_one_json_object_a_line(slides: Path, workplace: Path, tmp_path: Path) -> None:
    """With time, level and message, and no folder of the user's."""
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "broken.svs").write_text("no slide")
    log = tmp_path / "log.jsonl"
    status, _, _ = command(
        "run", tmp_path / "slides", "-m", workplace / "model", "-o", tmp_path / "results", "--log-file", log
    )
    assert status == 1
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"time", "level", "logger", "message"} <= set(entries[0])
    assert any(entry["level"] == "error" and "broken" in entry["message"] for entry in entries)
    assert str(slides) not in log.read_text()


def test_quiet_prints_errors_only(slides: Path, workplace: Path, tmp_path: Path) -> None:
    """Nothing when all is well."""
    status, out, err = command("run", slides, "-m", workplace / "model", "-o", tmp_path / "results", "--quiet")
    assert (status, out, err) == (0, "", "")


def test_slides_without_mpp_are_done_when_the_user_gives_it(workplace: Path, tmp_path: Path) -> None:
    """By --mpp or in a table; the message says both."""
    path = tmp_path / "slides" / "bare.tif"
    path.parent.mkdir()
    with tifffile.TiffWriter(path) as file:
        pixels = np.full((512, 512, 3), 243, np.uint8)
        pixels[100:400, 100:400] = (150, 90, 160)
        file.write(pixels, tile=(256, 256), photometric="rgb", metadata=None)
    model, results = workplace / "model", tmp_path / "results"
    assert command("run", path.parent, "-m", model, "-o", results)[0] == 1
    assert "--mpp" in (results / "slides.csv").read_text()
    assert command("run", path.parent, "-m", model, "-o", results, "--mpp", 0.5)[0] == 0
    (tmp_path / "cohort.csv").write_text("slide_id,path,mpp\nbare,slides/bare.tif,0.5\n")
    assert command("run", tmp_path / "cohort.csv", "-m", model, "-o", results)[0] == 0


def test_the_real_slides_end_as_they_should(workplace: Path, tmp_path: Path, shared_data: Path) -> None:
    """Each format and each fault of the shared folder; two more slides are done when a table gives their mpp."""
    model = workplace / "model"
    assert command("run", shared_data / "slides", "-m", model, "-o", tmp_path / "all")[0] == 1
    rows = read_slide_table(tmp_path / "all" / "slides.csv")
    assert rows["cmu-1-small-region"].status == "done"
    assert (tmp_path / "all" / "slides" / "cmu-1-small-region" / "heatmap.png").exists()
    assert "--mpp" in rows["kidney-48-5"].reason
    assert "--mpp" in rows["tcga-cr-7395-01a-01-ts1"].reason
    assert "too coarse" in rows["camelyon_overview"].reason
    assert "not a slide" in rows["broken"].reason
    assert rows["fluorescence 2 (560)"].status == "done" or "no tissue" in rows["fluorescence 2 (560)"].reason
    assert command("run", shared_data / "slides" / "cohort.csv", "-m", model, "-o", tmp_path / "table")[0] == 0
    assert set(read_slide_table(tmp_path / "table" / "slides.csv")) == {"cmu-1", "tcga-cr-7395", "kidney-48-5"}


def test_a_dark_slide_is_warned_of(workplace: Path, tmp_path: Path, shared_data: Path) -> None:
    """Fluorescence is not stained brightfield."""
    slide = shared_data / "slides" / "fluorescence 2 (560).ndpi"
    log = tmp_path / "log.jsonl"
    command("run", slide, "-m", workplace / "model", "-o", tmp_path / "results", "--log-file", log)
    assert "does not look like a stained brightfield slide" in log.read_text()


@pytest.mark.parametrize("mpp", [0, -1, 1e6])
def test_an_absurd_mpp_is_refused(workplace: Path, slides: Path, tmp_path: Path, mpp: float) -> None:
    """Whoever gives it."""
    with pytest.raises(Exception, match="mpp"):
        command("run", slides, "-m", workplace / "model", "-o", tmp_path / "results", "--mpp", mpp)


@pytest.mark.parametrize("name", ["detectors", "pipelines", "doctor"])
def test_looking_around_prints_a_table(name: str) -> None:
    """And finds nothing missing."""
    status, out, _ = command(name)
    assert status == 0
    assert "autoencoder" in out


def test_detectors_are_listed_with_what_they_need_and_give() -> None:
    """In a pipe each is one line, to be searched."""
    _, out, _ = command("detectors")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert re.search(
        r"prompts, GPU +mse_latent; map; reconstruction +mse.* normal tissue +Kim et al., MICCAI 2025 +.*Open RAIL",
        lines["anopilad"],
    )
    assert re.search(
        r"nothing +mse; map; reconstruction +can rank tumour below .* +Gong et al., ICCV 2019 +- +wsi-anomaly$",
        lines["autoencoder"],
    )
    assert re.search(
        r"the extra anomalib +anomalib; map \(some\) +ranks.* +Akcay et al., ICIP 2022 +anomalib: Apache",
        lines["anomalib"],
    )
    assert "spatial_msma; map " in lines["spatial_msma"]


class Plain:
    """What a third party may have registered: neither paper nor needs, and an option without a default."""

    def __init__(self, depth: int) -> None:
        self.depth = depth


class Telling:
    """It says itself what there is."""

    score_names = ("odd", "odder")
    outputs = ("map",)
    paper = "Somebody, 2030"
    needs = ("embeddings",)


def test_a_plug_in_that_tells_nothing_is_listed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dashes; one that cannot be loaded hides none of the others and is named with the reason."""
    places = {"plain": "Plain", "telling": "Telling"}
    offered = {name: EntryPoint(name, f"{__name__}:{place}", DETECTORS) for name, place in places.items()}
    offered["bare"] = EntryPoint("bare", "package_that_nobody_has:Detector", DETECTORS)
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(Plain=Plain, Telling=Telling))  # type: ignore[arg-type]
    monkeypatch.setattr(plugins, "installed", lambda _: offered)
    status, out, _ = command("detectors")
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["plain"].split()[-6:] == ["-"] * 6
    assert re.search(r"embeddings +odd, odder; map +- +Somebody, 2030 +- +-$", lines["telling"])
    assert lines["bare"].split() == ["bare", *"-------"]
    assert "pip install package_that_nobody_has" in out


@pytest.mark.parametrize("screen", [None, 20, 60, 80, 100, 140, 200, 400])
def test_no_word_of_a_listing_is_cut(screen: int | None) -> None:
    """Neither on a narrow screen nor on a wide one; only a word longer than the screen goes over its edge."""
    columns = ("detector", "what it does", "paper")
    rows = [
        ("short", "Guesses what is normal and finds whatever else there is, in forty lines of text.", "-"),
        ("a-rather-long-name", "Little.", "Somebody-With-A-Name et al., Transactions of Something 2030"),
    ]
    lines = list(listing_lines(columns, rows, screen))
    printed = " ".join(lines).split()
    assert all(word in printed for row in rows for cell in row for word in cell.split())
    if screen is None:
        assert len(lines) == 3
    elif screen >= 40:
        assert max(map(len, lines)) <= screen
    assert (lines[0].split()[:2] == ["detector", "what"]) == (screen is None or screen >= 80)


@pytest.mark.parametrize("name", ["prompt", "heatmap"])
def test_names_in_brackets_are_not_lost_from_the_help(name: str) -> None:
    """Rich takes them for markup."""
    assert f"[{name}] options" in " ".join(command(name, "--help")[1].replace("│", " ").split())


def test_the_doctor_tells_which_extra_is_missing_and_calls_it_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the line that installs it; and says so where it is there."""
    monkeypatch.setattr(Telling, "extra", "no_such_package", raising=False)
    monkeypatch.setattr(plugins, "load_plugin", lambda *_: Telling)
    monkeypatch.setattr(doctor, "load_plugin", lambda *_: Telling)
    entry = EntryPoint("odd", "odd:Odd", DETECTORS)
    monkeypatch.setattr(doctor, "installed", lambda _: {"odd": entry})
    findings = {finding.what: finding for finding in doctor.examine()}
    assert findings["detector odd"].well
    assert "no_such_package is not installed" in findings["detector odd"].found
    assert "pip install 'wsi-anomaly[no_such_package]'" in findings["detector odd"].remedy
    assert {"pyod", "scikit-learn", "zuko"} <= findings.keys()
    status, out, _ = command("doctor")
    assert status == 0
    assert re.search(r"note +detector odd", out)
    assert "pip install 'wsi-anomaly[no_such_package]'" in out
    monkeypatch.setattr(Telling, "extra", "numpy")
    (finding,) = [finding for finding in doctor.examine() if finding.what == "detector odd"]
    assert not finding.remedy


def test_keyword_lists_are_listed_and_printed() -> None:
    """With their categories and source."""
    status, out, _ = command("keywords")
    assert status == 0
    assert all(name in out for name in ("lymph_node", "breast", "colon", "kidney"))
    status, out, _ = command("keywords", "lymph_node")
    assert status == 0
    assert re.search(r"medullary sinuses +sinus +normal", out)
    assert "Source: AnoPILaD" in out


def test_a_keyword_file_is_checked(tmp_path: Path) -> None:
    """The fault and its line."""
    (tmp_path / "mine.toml").write_text(
        'organ = "x"\nsource = "x"\nnote = "x"\nnormal = [\n  { text = "Capsule", category = "stroma" },\n'
        '  { text = "capsule", category = "stroma" },\n]\n'
    )
    with pytest.raises(KeywordError, match=r"line 6.*'capsule'"):
        command("keywords", tmp_path / "mine.toml")


def test_prompts_are_described_and_explained(slides: Path, small_conch: Path, tmp_path: Path) -> None:
    """The stage alone: arrays, table, chart, and the picture of one slide."""
    results = tmp_path / "results"
    (tmp_path / "mine.toml").write_text(
        f'name = "mine"\n[tiles]\ntile_px = 64\nstride_px = 64\n[prompt.model]\nname = "conch"\n'
        f'weights = "{small_conch}"\n[detector]\nname = "autoencoder"\n'
    )
    for stage in ("mask", "tile"):
        assert command(stage, slides, "-o", results, "-p", tmp_path / "mine.toml")[0] == 0
    arguments = ("prompt", results, "-p", tmp_path / "mine.toml", "--offline")
    status, out, _ = command(*arguments, "--explain", "node")
    assert status == 0
    assert "prompts.png" in out
    folder = results / "slides" / "node"
    assert (folder / "prompts.png").stat().st_size > 50_000
    assert (results / "keyword_frequency.csv").exists()
    assert (results / "keyword_frequency.png").exists()
    with pytest.raises(MissingOutputError, match="did you mean 'node'"):
        command(*arguments, "--explain", "nod")


def test_conch_without_weights_says_what_to_do_at_once(slides: Path, tmp_path: Path) -> None:
    """Offline: no time-out, no traceback."""
    results = tmp_path / "results"
    for stage in ("mask", "tile"):
        assert command(stage, slides, "-o", results)[0] == 0
    with pytest.raises(ModelError, match=r"MahmoodLab/conch: is not on this machine.*--offline"):
        command("prompt", results, "--offline")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("-p", "autoencoder"), r"no table \[prompt\]"), (("-p", "autoencoder", "-m", "MODEL"), "not both")],
)
def test_a_pipeline_without_prompts_describes_nothing(
    slides: Path, workplace: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    """And only one of model and pipeline can say how."""
    results = tmp_path / "results"
    for stage in ("mask", "tile"):
        assert command(stage, slides, "-o", results)[0] == 0
    typed = [workplace / "model" if argument == "MODEL" else argument for argument in arguments]
    with pytest.raises(OptionsError, match=message):
        command("prompt", results, *typed)


def test_a_printed_preset_is_a_pipeline_file(tmp_path: Path) -> None:
    """Saved and changed, it is the user's own."""
    from wsi_anomaly.pipeline import load_pipeline

    _, out, _ = command("pipelines", "autoencoder")
    (tmp_path / "mine.toml").write_text(out)
    assert load_pipeline(tmp_path / "mine.toml") == load_pipeline("autoencoder").with_defaults()


def test_the_version_is_printed() -> None:
    """For bug reports."""
    assert command("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "EMPTY", "-m", "MODEL"), "no slide"),
        (("run", "NOWHERE", "-m", "MODEL"), "nowhere"),
        (("run", "EMPTY", "-m", "NOWHERE"), "no slide|no such model"),
        (("fit", "SLIDES", "-o", "OUT", "-p", "autoencodr"), "did you mean 'autoencoder'"),
        (("fit", "SLIDES", "-o", "FILE"), "is no model"),
        (("run", "SLIDES", "-m", "MODEL", "-o", "FILE"), "cannot be written"),
        (("heatmap", "OUT"), "not run|Give --model"),
        (("score", "NOWHERE", "-m", "MODEL"), "has run for no slide"),
    ],
)
def test_what_a_user_can_cause_is_one_message_and_exit_status_1(  # noqa: PLR0917 - fixtures and cases
    slides: Path,
    workplace: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Never a traceback."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    places = {
        "SLIDES": slides,
        "MODEL": workplace / "model",
        "EMPTY": tmp_path / "empty",
        "NOWHERE": tmp_path / "nowhere",
        "OUT": tmp_path / "out",
        "FILE": tmp_path / "file",
    }
    typed = [str(places.get(argument, argument)) for argument in arguments]
    monkeypatch.setattr("sys.argv", ["wsi-anomaly", *typed])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("Error:")
    assert re.search(message, " ".join(error.split()), re.IGNORECASE), error
    assert "Traceback" not in error


def test_wrong_usage_has_exit_status_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As shells expect."""
    monkeypatch.setattr("sys.argv", ["wsi-anomaly", "run"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "Missing argument" in capsys.readouterr().err
