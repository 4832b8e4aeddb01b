import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from wsi_anomaly.errors import LockedOutputError, MissingOutputError, OutputError
from wsi_anomaly.storage.record import Recipe, current_record, find_record, read_record, writing


def write(folder: Path, recipe: Recipe, text: str = "pixels") -> None:
    """What a stage does."""
    with writing(folder, recipe) as work:
        (work.folder / "out.txt").write_text(text)
        work.facts["letters"] = len(text)


def test_an_output_is_current_until_an_option_or_an_input_changes(tmp_path: Path) -> None:
    """Options and input digests are in the digest."""
    recipe = Recipe("tile", 1, {"tile_px": 256}, {"mask": "abc"})
    write(tmp_path, recipe)
    assert current_record(tmp_path, recipe) is not None
    assert current_record(tmp_path, Recipe("tile", 1, {"tile_px": 128}, {"mask": "abc"})) is None
    assert current_record(tmp_path, Recipe("tile", 1, {"tile_px": 256}, {"mask": "def"})) is None
    assert current_record(tmp_path, Recipe("tile", 2, {"tile_px": 256}, {"mask": "abc"})) is None


def test_the_order_of_options_does_not_matter() -> None:
    """Equal options, equal digest."""
    assert Recipe("a", 1, {"x": 1, "y": 2}).digest == Recipe("a", 1, {"y": 2, "x": 1}).digest


def test_facts_come_back_with_the_record(tmp_path: Path) -> None:
    """A later stage reads figures without opening arrays."""
    write(tmp_path, Recipe("tile", 1), "four")
    record = read_record(tmp_path, "tile")
    assert record.facts == {"letters": 4}
    assert record.outputs == ("out.txt",)


def test_a_stage_that_raises_leaves_nothing_and_keeps_the_earlier_result(tmp_path: Path) -> None:
    """Nothing finished is lost, nothing half-made is seen."""
    recipe = Recipe("tile", 1)
    write(tmp_path, recipe, "first")
    with pytest.raises(RuntimeError), writing(tmp_path, Recipe("tile", 2)) as work:
        (work.folder / "out.txt").write_text("second")
        raise RuntimeError
    assert (tmp_path / "out.txt").read_text() == "first"
    assert current_record(tmp_path, recipe) is not None
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob("*.lock"))


def test_a_deleted_output_is_made_again(tmp_path: Path) -> None:
    """A record alone does not count."""
    write(tmp_path, Recipe("tile", 1))
    (tmp_path / "out.txt").unlink()
    assert find_record(tmp_path, "tile") is None


def test_an_output_that_the_new_result_lacks_is_removed(tmp_path: Path) -> None:
    """Old regions must not stand beside a new heat map."""
    with writing(tmp_path, Recipe("export", 1)) as work:
        (work.folder / "regions").write_text("old")
        (work.folder / "table").write_text("old")
    with writing(tmp_path, Recipe("export", 2)) as work:
        (work.folder / "table").write_text("new")
    assert not (tmp_path / "regions").exists()
    assert (tmp_path / "table").read_text() == "new"


def test_a_stage_that_has_not_run_is_named_with_its_command(tmp_path: Path) -> None:
    """The message says what to do."""
    with pytest.raises(MissingOutputError, match="wsi-anomaly tile"):
        read_record(tmp_path, "tile")


def test_a_folder_output_is_replaced_whole(tmp_path: Path) -> None:
    """No file of the old folder survives in the new."""
    for version, name in ((1, "old"), (2, "new")):
        with writing(tmp_path, Recipe("tile", version)) as work:
            (work.folder / "tiles.zarr").mkdir()
            (work.folder / "tiles.zarr" / name).touch()
    assert [path.name for path in (tmp_path / "tiles.zarr").iterdir()] == ["new"]


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    """The second names the first."""
    with (
        writing(tmp_path, Recipe("tile", 1)),
        pytest.raises(LockedOutputError, match=str(os.getpid())),
        writing(tmp_path, Recipe("tile", 1)),
    ):
        pass


def test_a_killed_writer_does_not_lock_its_successor_out(tmp_path: Path) -> None:
    """Lock and half-made files of a dead process are cleared away."""
    script = f"""
        from pathlib import Path
        import os, signal
        from wsi_anomaly.storage.record import Recipe, writing
        with writing(Path({str(tmp_path)!r}), Recipe("tile", 1)) as work:
            (work.folder / "half").write_text("made")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "tile.lock").exists()
    assert find_record(tmp_path, "tile") is None
    write(tmp_path, Recipe("tile", 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.txt", "records"]


def test_a_resumable_stage_finds_what_it_left_only_for_the_same_recipe(tmp_path: Path) -> None:
    """An unfinished fit with other options starts anew."""
    with pytest.raises(RuntimeError), writing(tmp_path, Recipe("fit", 1), resume=True) as work:
        (work.folder / "epoch").write_text("3")
        raise RuntimeError
    with pytest.raises(RuntimeError), writing(tmp_path, Recipe("fit", 1), resume=True) as work:
        assert (work.folder / "epoch").read_text() == "3"
        raise RuntimeError
    with writing(tmp_path, Recipe("fit", 2), resume=True) as work:
        assert not (work.folder / "epoch").exists()


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "Free some space"), (errno.EACCES, "permissions")])
def test_what_the_system_says_of_the_disk_becomes_an_error_with_a_remedy(
    tmp_path: Path, number: int, remedy: str
) -> None:
    """Full disk and missing permission are told apart."""
    with pytest.raises(OutputError, match=remedy), writing(tmp_path, Recipe("tile", 1)):
        raise OSError(number, os.strerror(number))


def test_a_file_where_the_folder_should_be_is_an_output_error(tmp_path: Path) -> None:
    """Also when nothing can be created at all."""
    (tmp_path / "taken").touch()
    with pytest.raises(OutputError, match="taken"), writing(tmp_path / "taken", Recipe("tile", 1)):
        pass


def test_the_record_says_what_made_the_output(tmp_path: Path) -> None:
    """Provenance for people."""
    write(tmp_path, Recipe("tile", 1, {"tile_px": 256}, {"mask": "abc"}))
    content = json.loads((tmp_path / "records" / "tile.json").read_text())
    assert content["recipe"]["options"] == {"tile_px": 256}
    assert content["recipe"]["inputs"] == {"mask": "abc"}
    assert content["package_version"]
