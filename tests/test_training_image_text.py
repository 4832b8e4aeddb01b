import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsi_anomaly.errors import CohortError
from wsi_anomaly.prompts.building import PREFIX
from wsi_anomaly.prompts.keywords import load_keywords
from wsi_anomaly.torchvision_shim import make_importable

make_importable()

from wsi_anomaly.detectors.diffusion.learner import DiffusionTrainingOptions  # noqa: E402
from wsi_anomaly.prompts.conch import Conch  # noqa: E402
from wsi_anomaly.prompts.conch_network import ConchSizes  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
tiles, real_tiles, image_text = (importlib.import_module(name) for name in ("tiles", "real_tiles", "image_text"))

TINY = ConchSizes(
    embedding=32,
    image_px=32,
    patch_px=8,
    image_width=32,
    image_layers=1,
    image_heads=2,
    pooler_heads=2,
    text_width=32,
    text_layers=1,
    text_heads=2,
    vocabulary=400,
    context=64,
)
OPTIONS = DiffusionTrainingOptions(steps=30, batch_size=14, learning_rate=3e-3, precision="fp32", seed=1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of small tiles."""
    folder = tmp_path_factory.mktemp("tiles")
    tiles.write_tiles(folder, number=28, tile_px=64, shard_tiles=14)
    return folder


def test_a_lost_shard_is_drawn_again_and_the_others_are_kept(drawn: Path) -> None:
    """A shard is a function of the seed and its number."""
    first, second = (drawn / f"tiles-0000{shard}.npy" for shard in range(2))
    before, kept = second.read_bytes(), first.stat().st_mtime_ns
    assert before != first.read_bytes()
    second.unlink()
    second.with_suffix(".json").unlink()
    tiles.write_tiles(drawn, number=28, tile_px=64, shard_tiles=14)
    assert second.read_bytes() == before
    assert first.stat().st_mtime_ns == kept


def test_a_prompt_is_true_of_its_tile_and_always_the_same(drawn: Path) -> None:
    """It is put together as the stage `prompt` does, of keywords of the list."""
    source = tiles.LessonTiles(drawn)
    everything = np.arange(len(source))
    prompts = source.read(everything).prompts
    assert source.read(everything[::-1]).prompts == prompts[::-1]
    known = load_keywords("lymph_node")
    words = {keyword.text for keyword in (*known.normal, *known.abnormal)}
    for ((text, weight),), shares in zip(prompts, source.shares, strict=True):
        assert weight == 1
        said = text.removeprefix(PREFIX).strip()
        true = tiles.keywords_of(shares)
        assert set(true) <= words
        assert any(said.startswith(keyword) for keyword in true) or not said


def test_a_folder_without_tiles_is_refused(tmp_path: Path) -> None:
    """The message names the command that draws some."""
    with pytest.raises(CohortError, match=r"training/tiles\.py --out"):
        tiles.LessonTiles(tmp_path)


def test_a_model_learns_which_keywords_are_true_and_loads_as_conch(drawn: Path, tmp_path: Path) -> None:
    """The loss falls, and a training that is run again changes nothing."""
    source = tiles.LessonTiles(drawn)
    image_text.learn(source, tmp_path, OPTIONS, device="cpu", sizes=TINY)
    curve = [window["mean"] for window in json.loads((tmp_path / "training" / "history.json").read_text())["loss"]]
    assert np.mean(curve[-5:]) < 0.7 * np.mean(curve[:2])
    embedder = Conch(weights=str(tmp_path)).load(device="cpu", offline=True)
    vectors = embedder.embed_tiles(embedder.prepare(source.read(np.arange(4)).pixels))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    before = (tmp_path / "model.safetensors").read_bytes()
    image_text.learn(source, tmp_path, OPTIONS, device="cpu", sizes=TINY)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_real_tiles_teach_only_that_they_show_no_disease(drawn: Path, tmp_path: Path) -> None:
    """A finished model goes on with them: they move away from keywords of disease; of normal ones nothing is asked."""
    source, first = tiles.LessonTiles(drawn), tmp_path / "first"
    image_text.learn(source, first, OPTIONS, device="cpu", sizes=TINY)
    folder = tmp_path / "real"
    (tmp_path / "patches").mkdir()
    for number, pixels in enumerate(source.read(np.arange(6)).pixels):
        Image.fromarray(pixels[:32, :32]).save(tmp_path / "patches" / f"{number}.png")
    assert real_tiles.write_real_tiles(folder, patches=tmp_path / "patches") == 6
    real = tiles.LessonTiles(folder)
    assert real.shares == [None] * 6
    assert real.read(np.array([0])).prompts == (((PREFIX, 1.0),),)
    assert real.read(np.arange(6)).pixels.shape == (6, 256, 256, 3)
    image_text.learn(real, tmp_path / "second", OPTIONS, start=first, device="cpu")
    known = load_keywords("lymph_node")

    def nearness_to_disease(model: Path) -> float:
        embedder = Conch(weights=str(model)).load(device="cpu", offline=True)
        seen = embedder.embed_tiles(embedder.prepare(real.read(np.arange(6)).pixels))
        return float((seen @ embedder.embed_texts([keyword.text for keyword in known.abnormal]).T).mean())

    assert nearness_to_disease(tmp_path / "second") < nearness_to_disease(first) - 0.02
    normal, abnormal = ([keyword.text for keyword in side] for side in (known.normal, known.abnormal))
    truth = image_text.truth_of(real, normal, abnormal)
    assert np.isnan(truth[:, : len(normal)]).all()
    assert not truth[:, len(normal) :].any()


def test_a_folder_without_real_pictures_is_refused(tmp_path: Path) -> None:
    """By name."""
    with pytest.raises(CohortError, match="holds no pictures"):
        real_tiles.write_real_tiles(tmp_path / "out", regions=tmp_path)


def test_what_the_model_sees_of_a_tile_varies_in_stain_and_place_and_repeats_with_the_seed() -> None:
    """Equal generators, equal pictures; the size is the model's."""
    torch = image_text.torch
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    first, again, other = (image_text.varied(images, 32, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.shape == (2, 3, 32, 32)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other).abs().mean() > 0.02
