"""Where a model is looked for that a user names, or does not."""

from pathlib import Path

import pytest

from wsi_anomaly.errors import ModelError
from wsi_anomaly.shipped import DEFAULT_MODEL, local_place, model_place, shipped_models


def test_without_a_name_it_is_the_one_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name too, unless a folder of the user's own has that name; other paths stay what they are."""
    monkeypatch.chdir(tmp_path)
    assert shipped_models() == (DEFAULT_MODEL,)
    assert (model_place(None) / "manifest.json").is_file()
    assert model_place(Path(DEFAULT_MODEL)) == model_place(None)
    assert model_place(Path("mine")) == Path("mine")
    (tmp_path / DEFAULT_MODEL).mkdir()
    assert model_place(Path(DEFAULT_MODEL)) == Path(DEFAULT_MODEL)


def test_a_part_that_does_not_ship_is_refused_by_name() -> None:
    """The message says what there is."""
    with pytest.raises(ModelError, match=rf"shipped:breast/base.*does not come.*{DEFAULT_MODEL}"):
        local_place("shipped:breast/base")
    assert local_place(f"shipped:{DEFAULT_MODEL}/base").is_dir()


def test_a_model_does_not_tell_where_its_maker_kept_it() -> None:
    """Libraries write such paths into their configs."""
    texts = [path.read_text(encoding="utf-8") for path in model_place(None).rglob("*.json")]
    assert len(texts) > 5
    assert not [text for text in texts if "_name_or_path" in text]
