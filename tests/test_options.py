from pathlib import Path

import pytest
from pydantic import Field, field_validator

from wsi_anomaly.errors import OptionsError
from wsi_anomaly.options import Options, nearest, parse_options
from wsi_anomaly.pipeline.preset import load_pipeline, preset_names


class Inner(Options):
    """A table within a table."""

    tile_px: int = Field(256, ge=16)


class Outer(Options):
    """What a pipeline file looks like."""

    name: str
    tiles: Inner = Inner()


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    """Also one table down."""
    with pytest.raises(OptionsError, match=r"a\.toml: unknown key 'tiles\.tile_pxs' \(did you mean 'tile_px'\?\)"):
        parse_options(Outer, {"name": "a", "tiles": {"tile_pxs": 3}}, where="a.toml")


def test_all_faults_are_told_at_once() -> None:
    """Nobody wants to mend a file key by key."""
    with pytest.raises(OptionsError) as caught:
        parse_options(Outer, {"nam": "a", "tiles": {"tile_px": 1}}, where="a.toml")
    message = str(caught.value)
    assert "'nam'" in message
    assert "'name' is missing" in message
    assert "'tiles.tile_px' = 1" in message


def test_options_do_not_change() -> None:
    """What a record says was used was used."""
    with pytest.raises(ValueError, match="frozen"):
        Inner().tile_px = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_parses_and_builds_its_detector(name: str) -> None:
    """With every default written out it is the same pipeline."""
    full = load_pipeline(name).with_defaults()
    assert full.description
    assert full.with_defaults() == full


def test_a_misspelt_preset_names_the_nearest() -> None:
    """And how to see them all."""
    with pytest.raises(OptionsError, match="did you mean 'autoencoder'"):
        load_pipeline("autoencoders")


def test_a_pipeline_file_is_found_by_path(tmp_path: Path) -> None:
    """Its own values win over the defaults."""
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[tiles]\nstride_px = 128\n[detector]\nname = "autoencoder"\n')
    assert load_pipeline(path).tiles.stride_px == 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "a"\n[tile]\ntile_px = 3\n[detector]\nname = "autoencoder"', "did you mean 'tiles'"),
        ('name = "a"\nseed = = 3', "line 2"),
        ('name = "a"', "'detector' is missing"),
    ],
)
def test_a_wrong_pipeline_file_says_where_it_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    """The file is named, the key or line too."""
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(OptionsError, match=message) as caught:
        load_pipeline(path)
    assert "wrong.toml" in str(caught.value)


def test_a_missing_pipeline_file_says_so(tmp_path: Path) -> None:
    """Not a traceback."""
    with pytest.raises(OptionsError, match="no such file"):
        load_pipeline(tmp_path / "none.toml")


def test_a_wrong_option_of_the_detector_is_refused(tmp_path: Path) -> None:
    """The detector's own table is checked too."""
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[detector]\nname = "autoencoder"\nchanels = [8]\n')
    with pytest.raises(OptionsError, match="did you mean 'channels'"):
        load_pipeline(path).with_defaults()


class Named(Options):
    """With a check of its own and one of pydantic's."""

    method: str = "KNN"
    share: float = Field(0.5, gt=0)

    @field_validator("method")
    @classmethod
    def _is_known(cls, value: str) -> str:
        raise ValueError(f"PyOD has no such method ({nearest(value, ['KNN', 'LOF', 'KNNX', 'IForest', 'KN'])})")


def test_a_fault_is_told_as_it_was_written() -> None:
    """Names keep their letters, what comes before our own words is left out, and near names are told whatever case."""
    with pytest.raises(OptionsError) as caught:
        parse_options(Named, {"method": "Knnn", "share": 0}, where="a.toml")
    assert str(caught.value) == (
        "a.toml: 'method' = 'Knnn': PyOD has no such method (did you mean 'KNN', 'KNNX' or 'KN'?); "
        "'share' = 0: input should be greater than 0"
    )
    assert nearest("zzz", ["b", "A"]) == "known: A, b"
