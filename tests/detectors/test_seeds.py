"""The seed of a pipeline is that of learning too, unless [detector.training] has one of its own."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from wsi_anomaly.cohort import read_cohort
from wsi_anomaly.errors import OptionsError
from wsi_anomaly.execution import Resources
from wsi_anomaly.options import parse_options
from wsi_anomaly.pipeline import fit, load_pipeline
from wsi_anomaly.pipeline.preset import Pipeline, build_detector, preset_names
from wsi_anomaly.storage.model import read_model
from wsi_anomaly.synthetic import write_cohort
from wsi_anomaly.testing import TilesInMemory, smooth_tiles

TRAINING = {"batch_size": 8, "max_epochs": 1}


def pipeline(seed: int | None = None, /, **training: Any) -> Pipeline:
    """A tiny autoencoder."""
    table: dict[str, Any] = {
        "name": "tiny",
        "tiles": {"tile_px": 64, "stride_px": 64},
        "detector": {"name": "autoencoder", "channels": [4], "training": TRAINING | training},
    }
    return parse_options(Pipeline, table if seed is None else table | {"seed": seed}, where="test")


@pytest.mark.parametrize(
    ("given", "effective"), [((None, {}), 0), ((7, {}), 7), ((7, {"seed": 0}), 0), ((None, {"seed": 3}), 3)]
)
def test_the_seed_of_learning_is_the_pipelines_unless_it_is_given(
    given: tuple[int | None, dict[str, int]], effective: int
) -> None:
    """An explicit one wins, also if it is 0; what is written out is what was used."""
    seed, training = given
    written = pipeline(seed, **training).with_defaults()
    assert written.detector["training"]["seed"] == effective
    detector: Any = build_detector(written.model_copy(update={"seed": 99}))
    assert detector.training.seed == effective


@pytest.mark.parametrize("name", preset_names())
def test_every_detector_learns_by_the_pipelines_seed(name: str) -> None:
    """Wherever its options have it, and also where the pipeline file has no table for them."""
    detector: Any = build_detector(load_pipeline(name).model_copy(update={"seed": 5}))
    options = json.dumps(detector.model_dump(mode="json"))
    assert set(re.findall(r'"seed": (\d+)', options)) == {"5"}


def test_a_training_table_that_is_none_is_still_refused_by_name() -> None:
    """The seed does not hide the mistake."""
    wrong = pipeline(7).model_copy(update={"detector": {"name": "autoencoder", "training": 3}})
    with pytest.raises(OptionsError, match=r"training.*3"):
        build_detector(wrong)


def test_pipelines_of_another_seed_learn_otherwise(tmp_path: Path) -> None:
    """Other first weights, another order: other weights in the end. An equal seed gives equal bytes."""
    tiles = TilesInMemory(smooth_tiles(16, 32, seed=1))
    learnt = []
    for place, one in enumerate((pipeline(1), pipeline(2), pipeline(1), pipeline(2, seed=1))):
        build_detector(one).fit(tiles, tmp_path / str(place), device="cpu")
        learnt.append((tmp_path / str(place) / "weights.safetensors").read_bytes())
    assert learnt[0] != learnt[1]
    assert learnt[0] == learnt[2] == learnt[3]


def test_a_model_tells_the_seed_that_it_learnt_by(tmp_path: Path) -> None:
    """In its pipeline file, where nobody gave it one."""
    cohort = write_cohort(
        tmp_path, seed=3, size_px=(512, 512), normal_slides=2, normal_test_slides=0, abnormal_test_slides=0
    )
    slides = read_cohort([cohort.normal_slides[0].parent])
    resources = Resources(device="cpu", workers=1)
    fit(slides, pipeline(7), tmp_path / "model", resources=resources, listener=lambda _: None)
    assert read_model(tmp_path / "model").pipeline["detector"]["training"]["seed"] == 7
