import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from PIL import Image

from wsi_anomaly.errors import CohortError, OptionsError
from wsi_anomaly.execution import Resources
from wsi_anomaly.pipeline.preset import Pipeline, build_detector
from wsi_anomaly.pipeline.prompting import build_prompter
from wsi_anomaly.plugins import DETECTORS, installed
from wsi_anomaly.testing import odd_tiles, smooth_tiles

if sys.platform != "linux":
    pytest.skip("the benchmark limits and measures its processes as only Linux can", allow_module_level=True)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
quality, row, table = (importlib.import_module(name) for name in ("quality", "quality_row", "quality_table"))

ENTRIES = quality.entries_of(BENCHMARKS / "quality.toml")
TINY = {"name": "autoencoder", "channels": [8, 8], "training": {"learning_rate": 1e-2, "max_epochs": 2}}
PLACES = ("reference", "normal", "tumour")

WriteTiles = Callable[..., Path]


@pytest.fixture
def write_folders(tmp_path: Path) -> WriteTiles:
    """Writes all folders of tiles, odd ones for tumour: `write_folders(seed=1)`. They become 32 px wide."""

    def write(*, seed: int = 1) -> Path:
        for place in (row.TRAIN, *row.folders()):
            side, mode = (16, "RGB") if place.startswith("pcam") else (64, "RGBA")
            make = odd_tiles if "tumor" in place else smooth_tiles
            made = make(24 if place == row.TRAIN else 6, side, seed=0 if place == row.TRAIN else seed)
            (tmp_path / "tiles" / place).mkdir(parents=True, exist_ok=True)
            for i, tile in enumerate(made):
                Image.fromarray(tile).convert(mode).save(tmp_path / "tiles" / place / f"{i:02}.png")
        return tmp_path / "tiles"

    return write


def settings(tiles: Path, *, budget_minutes: float = 5.0, seed: int = 0) -> Any:
    """With a work folder beside the tiles."""
    return row.Settings(tiles, tiles.parent / "work", seed, "cpu", budget_minutes)


def write_rows(path: Path, **detector: Any) -> Path:
    """A file with one row."""
    path.write_text(tomli_w.dumps({"row": [{"name": "tiny", "detector": TINY | detector}]}))
    return path


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_each_row_is_one_that_its_detector_takes(entry: Any) -> None:
    """Options that were renamed are noticed here, not after minutes of training."""
    build_detector(Pipeline(name=entry.name, detector=row.seeded(entry.detector, 3)))


def test_each_installed_detector_has_a_row() -> None:
    """Whether the file names it or not."""
    assert {entry.detector["name"] for entry in ENTRIES} == installed(DETECTORS).keys()


def test_a_detector_that_the_file_does_not_name_runs_with_its_defaults(tmp_path: Path) -> None:
    """So new ones appear by themselves."""
    entries = quality.entries_of(write_rows(tmp_path / "rows.toml"))
    assert [entry.name for entry in entries[:2]] == ["tiny", "anoddpm, defaults"]
    assert entries[1].detector == {"name": "anoddpm"}


def test_rows_are_chosen_by_their_name_or_by_their_detector() -> None:
    """A name that is neither is refused with the nearest one."""
    names = [entry.name for entry in quality.chosen(ENTRIES, ["anopilad with prompts", "anoddpm"])]
    assert "anopilad with prompts" in names
    assert "anopilad without prompts" not in names
    assert any(name.startswith("anoddpm") for name in names)
    with pytest.raises(OptionsError, match="did you mean 'anopilad with prompts'"):
        quality.chosen(ENTRIES, ["anopilad with prompt"])


def test_tiles_of_both_sources_come_at_one_scale(write_folders: WriteTiles) -> None:
    """PatchCamelyon is enlarged twice, Camelyon16 halved and rid of its transparency."""
    tiles = write_folders()
    assert row.read_tiles(tiles, "pcam/test_tumor")[0].shape == (6, 32, 32, 3)
    assert row.read_tiles(tiles, "camelyon16/tumor")[0].shape == (6, 32, 32, 3)
    with pytest.raises(CohortError, match="no PNG files"):
        row.read_tiles(tiles, "pcam/elsewhere")


def test_nothing_but_normal_training_tiles_is_learnt_from(write_folders: WriteTiles, tmp_path: Path) -> None:
    """Other tiles in all other folders leave the very same weights."""
    entry = row.Entry(name="tiny", detector=TINY)
    weights = []
    for seed in (1, 2):
        row.measured(entry, settings(write_folders(seed=seed)), tmp_path / str(seed))
        weights.append((tmp_path / str(seed) / "detector" / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_the_seed_reaches_training_unless_a_row_says_another() -> None:
    """One number repeats the whole table."""
    assert row.seeded(TINY, 5)["training"] == {"seed": 5, **TINY["training"]}
    assert row.seeded(TINY | {"training": {"seed": 1}}, 5)["training"] == {"seed": 1}


def test_a_row_is_described_by_its_own_image_text_model(
    write_folders: WriteTiles, tmp_path: Path, tiny_base: Path, small_conch: Path
) -> None:
    """Each tile gets keywords of its own and a base is found where the row says."""
    entry = row.Entry(
        name="prompted",
        base=str(tiny_base),
        prompt={"templates": False, "model": {"name": "conch", "weights": str(small_conch)}},
        detector={
            "name": "anopilad",
            "sampler": {"name": "unipc", "steps": 2},
            "training": {"steps": 1, "batch_size": 2},
        },
    )
    here = settings(write_folders())
    describe = row.describer(entry, build_prompter(entry.prompt, Resources(device="cpu", offline=True)))
    batch = row.described("pcam/test_tumor", here, describe)
    assert [len(prompt) for prompt in batch.prompts] == [10] * 6
    result = row.measured(entry, here, tmp_path / "out")
    assert result["steps"] == 1
    assert {place: len(scores) for place, scores in result["scores"]["mse_latent"].items()} == dict.fromkeys(
        row.folders(), 6
    )


def test_a_finished_row_is_not_done_again(
    write_folders: WriteTiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints the same table from what the first run left; another seed is another row."""
    tiles, rows = write_folders(), write_rows(tmp_path / "rows.toml")
    command = ["quality.py", "--tiles", str(tiles), "--rows", str(rows), "--only", "tiny", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    printed = []
    for _ in range(2):
        quality.main()
        printed.append(capsys.readouterr())
    assert "log.txt" in printed[0].err
    assert not printed[1].err
    assert printed[0].out == printed[1].out
    assert "| tiny                     | mse " in printed[0].out
    result = json.loads(next(tmp_path.glob("tiny-*/result.json")).read_text())
    assert result["steps"] == 4
    assert 0 < result["peak_gib"] < 4
    (entry,) = quality.chosen(quality.entries_of(rows), ["tiny"])
    kept = row.Settings(tiles, tmp_path, 0, "cpu", result["cpu_minutes"] / 2)
    assert "stopped" in quality.finished(entry, kept)["reason"]
    assert quality.finished(entry, row.Settings(tiles, tmp_path, 1, "cpu", 5.0)) is None


def test_a_row_over_its_budget_is_stopped_and_says_so(write_folders: WriteTiles, tmp_path: Path) -> None:
    """It takes its share of the time, and the others still have their turn."""
    endless = {"learning_rate": 1e-9, "max_epochs": 10**9, "patience": 10**9}
    rows = write_rows(tmp_path / "rows.toml", training=endless)
    entry = quality.entries_of(rows)[0]
    result = quality.run(entry, settings(write_folders(), budget_minutes=1 / 60), rows)
    assert result == {"reason": "stopped: more than the 0.0166667 CPU minutes of the budget"}


def test_a_row_whose_detector_cannot_be_used_gives_the_reason(write_folders: WriteTiles, tmp_path: Path) -> None:
    """The last words of its process; a missing base is told before one starts."""
    rows = write_rows(tmp_path / "rows.toml", name="autoencodr")
    here = settings(write_folders())
    last_words = quality.run(quality.entries_of(rows)[0], here, rows)["reason"]
    assert last_words == "error: no detector is named 'autoencodr' (did you mean 'autoencoder'?)"
    left_out = quality.run(row.Entry(name="x", detector=TINY, base=str(tmp_path / "nowhere")), here, rows)
    assert left_out == {"reason": "left out: there is no base model at nowhere"}


def test_directions_are_never_turned_round() -> None:
    """A score that ranks normal tiles first has an AUROC of 0, and z-scores are against the reference."""
    low, high = np.arange(4, dtype=np.float32), np.arange(10, 14, dtype=np.float32)
    assert table.measures(low, low, high, seed=0)[0] == "1.000 (1.000-1.000)"
    auroc, _, fpr, mean_z = table.measures(low, high, low, seed=0)
    assert (auroc, fpr) == ("0.000 (0.000-0.000)", "1.00")
    assert mean_z == f"{10 / low.std():.2f}"


def test_what_is_missing_stands_below_the_table() -> None:
    """Tiles without a score, tiles of a refused size, and rows that were stopped."""
    scores = {"reference": [1, 2, 3], "normal": [1, None, 2], "tumour": [5, 6, 7]}
    results = {
        "whole": {"scores": {"mse": scores}, "steps": 1200, "minutes": 1.0},
        "picky": {"scores": {"mse": {}}, "refused": {"tumour": "tiles are 3 px"}},
        "slow": {"reason": "stopped"},
    }
    text = table.quality_table(results, PLACES, seed=0, costs=("steps", "minutes"))
    assert "1,200" in text
    assert "- whole, mse: 1 of 6 tiles have no score and are left out" in text
    assert "- picky: tiles are 3 px\n- slow: stopped\n" in text


def test_baselines_see_what_they_are_named_after() -> None:
    """Darker tiles are denser; only structure varies."""
    dark, light = (np.full((20, 20, 3), value, np.uint8) for value in (60, 200))
    assert quality.mean_optical_density(dark) > quality.mean_optical_density(light) > 0
    assert quality.local_deviation(dark) == pytest.approx(0, abs=1e-4)
    assert quality.local_deviation(odd_tiles(1, 20, seed=0)[0]) > 10


def test_the_shared_tiles_fit(shared_data: Path) -> None:
    """Two scales of real tiles, in their own folders, none of them twice."""
    pixels, names = row.read_tiles(shared_data / "tiles", "camelyon16/tumor")
    assert pixels.shape == (16, 128, 128, 3)
    assert len(set(names)) == 16
    assert row.read_tiles(shared_data / "tiles", "pcam/test_tumor")[0].shape == (300, 192, 192, 3)
