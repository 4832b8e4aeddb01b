"""The README keeps its word: commands, outputs, columns and presets that it names exist, and none is left out."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command

from wsi_anomaly import errors
from wsi_anomaly.cli.app import app
from wsi_anomaly.cohort import COLUMNS
from wsi_anomaly.pipeline import preset_names
from wsi_anomaly.storage.layout import ModelFolder, RunFolder, SlideFolder
from wsi_anomaly.storage.slide_table import SlideRow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
ERRORS = [name for name in vars(errors) if name.endswith("Error")]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_in_the_readme_and_has_help(name: str) -> None:
    """So has each of its parameters."""
    assert re.search(rf"`(wsi-anomaly )?{name}\b|wsi-anomaly {name}\b", README)
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name}"


@pytest.mark.parametrize("name", sorted(set(re.findall(r"wsi-anomaly ([a-z][a-z-]+)", README))))
def test_every_command_that_the_readme_names_exists(name: str) -> None:
    """No ghost of an old command."""
    assert name in COMMANDS


@pytest.mark.parametrize("column", [field.name for field in fields(SlideRow)] + list(COLUMNS))
def test_every_column_is_explained(column: str) -> None:
    """Of the cohort and of slides.csv."""
    assert f"`{column}`" in README


@pytest.mark.parametrize("folder", [RunFolder, SlideFolder, ModelFolder])
def test_every_output_is_in_the_output_reference(folder: type) -> None:
    """Under the name that it has on disk."""
    root = folder(Path("slide"))
    names = [name for name, value in vars(folder).items() if isinstance(value, property) and name != "workshop"]
    paths = [value for value in (getattr(root, name) for name in names) if isinstance(value, Path)]
    missing = [path.name for path in paths if path.suffix != ".lock" and path.name.replace("slide.", ".") not in README]
    assert not missing


def test_every_error_is_in_the_error_tree() -> None:
    """Which is the docstring of its module."""
    for name in ERRORS:
        assert name in (errors.__doc__ or "")


def test_every_preset_has_a_description() -> None:
    """Which is what `pipelines` prints."""
    from wsi_anomaly.pipeline import load_pipeline

    assert all(load_pipeline(name).description for name in preset_names())


def test_the_readme_opens_with_a_picture_and_two_commands() -> None:
    """And the picture exists."""
    picture = re.search(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert picture
    assert (ROOT / picture[1]).is_file()
    assert README.index("wsi-anomaly demo") < README.index("pytest") < README.index("## Use")


def test_the_changelog_names_this_version_or_the_next() -> None:
    """Every landing adds a line."""
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
