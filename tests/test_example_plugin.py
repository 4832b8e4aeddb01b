"""The guide for plug-in authors keeps its word: its example is a package that can be installed, found and used."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from wsi_anomaly.storage.arrays import read_attributes
from wsi_anomaly.storage.layout import RunFolder
from wsi_anomaly.synthetic import write_slide

EXAMPLE = Path(__file__).parent / "example_plugin"
GUIDE = (EXAMPLE.parents[1] / "docs" / "plugins.md").read_text()
SHOWN = {
    "wsi_anomaly_surroundings.py": "python",
    "test_surroundings.py": "python",
    "pyproject.toml": "toml",
    "surroundings.toml": "toml",
}


@pytest.mark.parametrize("name", SHOWN)
def test_the_guide_shows_the_example_as_it_is(name: str) -> None:
    """To the letter."""
    assert f"```{SHOWN[name]}\n{(EXAMPLE / name).read_text()}```\n" in GUIDE


def test_the_guide_names_what_a_detector_may_be() -> None:
    """Every protocol, and every line of the table of detectors."""
    from wsi_anomaly.detectors import protocol

    optional = [name for name, value in vars(protocol).items() if getattr(value, "_is_protocol", False)]
    named = {*optional, "paper", "needs", "caution", "licence_of", "outputs"} - {"Protocol"}
    assert {name for name in named if f"`{name}`" not in GUIDE} == set()


@pytest.mark.slow
def test_the_example_is_installed_found_and_used(tmp_path: Path) -> None:
    """From the command line, by its entry point: a model is fitted, and a made-up slide ends with its heat map."""
    install(tmp_path / "installed")
    slides = tmp_path / "slides"
    slides.mkdir()
    write_slide(slides / "node.tif", seed=1, size_px=(1024, 1024))
    model, results = tmp_path / "model", tmp_path / "results"
    pipeline = EXAMPLE / "surroundings.toml"
    elsewhere(tmp_path / "installed", "fit", slides, "-o", model, "-p", pipeline)
    elsewhere(tmp_path / "installed", "run", slides, "-m", model, "-o", results)
    folder = RunFolder(results).slide("node")
    assert folder.heatmap_picture.exists()
    assert read_attributes(folder.scores)["score_names"] == ["guess_error"]


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling, which builds it, is not here")
def test_the_example_can_be_built(tmp_path: Path) -> None:
    """By pip, with its entry point, and without the tests."""
    source = shutil.copytree(EXAMPLE, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", tmp_path / "target", source]
    subprocess.run(command, check=True, capture_output=True)
    assert {path.name for path in (tmp_path / "target").glob("*.py")} == {"wsi_anomaly_surroundings.py"}
    (points,) = (tmp_path / "target").glob("*.dist-info/entry_points.txt")
    assert "surroundings = wsi_anomaly_surroundings:Surroundings" in points.read_text()


def install(folder: Path) -> None:
    """What an installer does, where the network and a build backend may both be missing."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = (
        (f"[{group}]", *(f"{name} = {place}" for name, place in points.items()))
        for group, points in project["entry-points"].items()
    )
    (info / "entry_points.txt").write_text("\n".join(line for group in groups for line in group) + "\n")
    shutil.copy(EXAMPLE / "wsi_anomaly_surroundings.py", folder)


def elsewhere(installed: Path, *arguments: object) -> None:
    """The command in another process, which finds what is installed in a folder of its own."""
    command = [sys.executable, "-m", "wsi_anomaly", *map(str, arguments), "--workers", "1", "--device", "cpu"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
