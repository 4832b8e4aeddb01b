"""The small model taught from nothing, in miniature: tiles, both models, the sealed folder, and a slide run with it."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from wsi_anomaly.cohort import read_cohort
from wsi_anomaly.execution import Resources
from wsi_anomaly.options import parse_options
from wsi_anomaly.pipeline.preset import Pipeline
from wsi_anomaly.pipeline.running import run
from wsi_anomaly.prompts.conch_network import ConchSizes
from wsi_anomaly.storage.model import read_model
from wsi_anomaly.synthetic import write_slide
from wsi_anomaly.torchvision_shim import make_importable

make_importable()

from wsi_anomaly.detectors.diffusion.learner import DiffusionTrainingOptions  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
tiles, real_tiles, image_text, vae, diffusion, release = (
    importlib.import_module(name) for name in ("tiles", "real_tiles", "image_text", "vae", "diffusion", "release")
)

TINY = ConchSizes(
    embedding=16,
    image_px=32,
    patch_px=8,
    image_width=16,
    image_layers=1,
    image_heads=2,
    pooler_heads=2,
    text_width=16,
    text_layers=1,
    text_heads=2,
    vocabulary=400,
    context=64,
)
STEPS = DiffusionTrainingOptions(steps=2, batch_size=4, learning_rate=1e-3, precision="fp32")
PARTS = {"unet", "vae", "text_encoder"}


def pipeline(model: Path) -> Pipeline:
    """As the preset, but two steps long, with base and image-text model where this test puts them."""
    table: dict[str, Any] = {
        "name": "miniature",
        "prompt": {"model": {"name": "conch", "weights": str(model / "image-text")}},
        "detector": {
            "name": "anopilad",
            "base": str(model / "base"),
            "scores": ["keyword_shift", "embedding", "mse_latent"],
            "sampler": {"name": "unipc", "steps": 2},
            "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3},
        },
    }
    return parse_options(Pipeline, table, where="test")


def assert_described(source: Any) -> None:
    """Real tiles have a prompt of keywords of normal tissue, and nobody takes these for known structures."""
    real = np.flatnonzero([shares is None for shares in source.shares])
    normal = {keyword.text for keyword in release.load_keywords("lymph_node").normal}
    for ((text, _),) in source.read(real).prompts:
        assert any(keyword in text for keyword in normal)
    assert len(real) == 6


@pytest.mark.slow
def test_a_model_taught_from_nothing_runs_over_a_slide(tmp_path: Path) -> None:
    """Every command's function in turn; what comes out is half precision, sealed, and finds its own parts."""
    taught, out = tmp_path / "tiles", tmp_path / "mini"
    tiles.write_tiles(taught, number=14, shard_tiles=14)
    patches = tmp_path / "patches"
    patches.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(100, 200, (96, 96, 3), np.uint8)
        Image.fromarray(pixels).save(patches / f"{number}.png")
    assert real_tiles.write_real_tiles(taught, patches=patches) == 6
    image_text.learn(tiles.LessonTiles(taught), tmp_path / "seeing", STEPS, device="cpu", sizes=TINY)
    real_tiles.describe_real_tiles(taught, tmp_path / "seeing")
    source = tiles.LessonTiles(taught)
    assert_described(source)
    vae.learn_vae(source, tmp_path / "vae", STEPS, size="tiny", device="cpu")
    vae.learn_vae(source, tmp_path / "vae2", STEPS, start=tmp_path / "vae", device="cpu")
    diffusion.learn_base(source, tmp_path / "vae2", tmp_path / "base", STEPS, size="tiny", device="cpu")
    diffusion.publish(tmp_path / "base" / "training" / "model", tmp_path / "base", half=True)

    release.copy_parts(out, base=tmp_path / "base", image_text=tmp_path / "seeing")
    normal = release.normal_tiles(taught, 10)
    assert len(normal) == 10
    release.release(out, pipeline(out), learnt=normal, reference=normal, device="cpu")

    weights = {path.parent.name: load_file(path) for path in (out / "base").rglob("*.safetensors")}
    assert set(weights) == PARTS
    assert {str(array.dtype) for part in weights.values() for array in part.values()} == {"float16"}
    manifest = json.loads((out / "manifest.json").read_text())
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == found - {"manifest.json"}

    (tmp_path / "slides").mkdir()
    write_slide(tmp_path / "slides" / "node.tif", seed=5, size_px=(768, 768))
    slides = read_cohort([tmp_path / "slides"])
    summary = run(
        slides, read_model(out), tmp_path / "results", resources=Resources(device="cpu"), listener=lambda _: None
    )
    assert [row.status for row in summary.rows] == ["done"]
    assert summary.rows[0].z_max is not None


def test_half_of_what_is_learnt_is_made_up_and_none_of_it_is_diseased(tmp_path: Path) -> None:
    """Evenly spaced over the folder."""
    tiles.write_tiles(tmp_path, number=28, tile_px=64, shard_tiles=28)
    diseased = {keyword.text for keyword in release.load_keywords("lymph_node").abnormal}
    chosen = release.normal_tiles(tmp_path, 12)
    assert 1 <= len(chosen) <= 6  # there are no real ones
    for index in chosen.chosen:
        assert not diseased & set(tiles.keywords_of(chosen.tiles.shares[index]))
