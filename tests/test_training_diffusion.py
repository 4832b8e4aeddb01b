"""Facts about the small Stable Diffusion that is taught from nothing, on tiny sizes: learning, files, resume."""

import importlib
import json
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Int64
from PIL import Image
from safetensors.torch import load_file

from wsi_anomaly.detectors.diffusion.backbone import encode, load_backbone, quiet_libraries
from wsi_anomaly.detectors.diffusion.conditioning import PromptEncoder
from wsi_anomaly.detectors.diffusion.learner import DiffusionTrainingOptions
from wsi_anomaly.detectors.protocol import Prompt, TileBatch
from wsi_anomaly.devices import intensities
from wsi_anomaly.errors import ModelError
from wsi_anomaly.testing import TilesInMemory, odd_tiles, smooth_tiles

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
diffusion, vae = (importlib.import_module(name) for name in ("diffusion", "vae"))

TILE_PX = 64
PROMPTS: tuple[Prompt, ...] = (
    (("a histopathological photograph of germinal center and macrophages", 1.0),),
    (("a histopathological photograph of", 1.0), ("capsule", 1.0), ("and", 1.0), ("dense connective tissue", 1.0)),
)


class StoppedError(Exception):
    """What stands in for a crash."""


class Described(TilesInMemory):
    """Smooth tiles and odd ones in turn, each kind under a prompt of its own; may fail at a read."""

    def __init__(self, number: int = 8, *, fail_at_read: int = 0) -> None:
        pixels = smooth_tiles(number, TILE_PX, seed=0)
        pixels[1::2] = odd_tiles(number // 2, TILE_PX, seed=1)
        super().__init__(pixels)
        self._fail_at_read = fail_at_read
        self._numbers = count(1)

    def read(self, indices: Int64[np.ndarray, " tile"]) -> TileBatch:
        """The tiles at these positions, unless it is time to fail."""
        if next(self._numbers) == self._fail_at_read:  # two threads read, and no number must be lost
            raise StoppedError
        batch = super().read(indices)
        return TileBatch(batch.pixels, batch.seeds, tuple(PROMPTS[index % 2] for index in indices.tolist()))


class Trained(NamedTuple):
    """Where a training of both parts lies."""

    vae: Path
    base: Path


def options(steps: int) -> DiffusionTrainingOptions:
    """Fast ones; a long training is saved but once."""
    settings: dict[str, Any] = {"batch_size": 4, "learning_rate": 3e-3, "precision": "fp32", "ema_decay": 0.9}
    return DiffusionTrainingOptions(steps=steps, save_every=2 if steps < 10 else 1000, **settings)


def learn_vae(out: Path, *, steps: int = 5, tiles: Described | None = None) -> None:
    """A few steps."""
    vae.learn_vae(tiles or Described(), out, options(steps), size="tiny", device="cpu")


def learn_base(trained_vae: Path, out: Path, *, steps: int = 5, tiles: Described | None = None) -> None:
    """A few steps."""
    diffusion.learn_base(tiles or Described(), trained_vae, out, options(steps), size="tiny", device="cpu")


def losses(folder: Path) -> list[float]:
    """Of each step."""
    return [window["mean"] for window in json.loads((folder / "history.json").read_bytes())["loss"]]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Both parts from nothing, in so many steps that they learn something, published in half precision."""
    folder = tmp_path_factory.mktemp("trained")
    learn_vae(folder / "vae", steps=50)
    learn_base(folder / "vae", folder / "base", steps=50)
    diffusion.publish(folder / "base" / "training" / "model", folder / "base", half=True)
    return Trained(folder / "vae", folder / "base")


def test_both_losses_fall(trained: Trained) -> None:
    """The VAE sees its tiles again, the UNet sees some of the noise."""
    first, later = (np.mean(losses(trained.vae)[part]) for part in (slice(5), slice(-5, None)))
    assert later < 0.7 * first
    first, later = (np.mean(losses(trained.base / "training")[part]) for part in (slice(5), slice(-20, None)))
    assert later < 0.95 * first


def test_a_base_is_taught_further(trained: Trained, tmp_path: Path) -> None:
    """It begins where the one that it starts from has come to."""
    out, start = tmp_path / "further", trained.base / "training" / "model"
    diffusion.learn_base(Described(), trained.vae, out, options(5), start=start, device="cpu")
    assert np.mean(losses(out / "training")[:5]) < 0.95 * np.mean(losses(trained.base / "training")[:5])


def test_latents_have_a_deviation_of_one(trained: Trained) -> None:
    """As the noise schedule expects; the factor is in the VAE's config, and so in the base."""
    backbone = load_backbone(str(trained.base), offline=True)
    latents = encode(backbone.vae, intensities(torch.from_numpy(Described().pixels)) * 2 - 1)
    assert latents.std().item() == pytest.approx(1, abs=0.02)
    assert latents.shape == (8, 4, TILE_PX // 8, TILE_PX // 8)


def test_the_folder_is_a_base_of_the_detector_in_half_precision(trained: Trained) -> None:
    """Weights are the trained ones but for rounding, all of them in safetensors; and pictures tell how it went."""
    assert load_backbone(str(trained.base), offline=True).prediction_type == "epsilon"
    names = [name for name in contents(trained.base) if name.endswith(".safetensors") and "training" not in name]
    assert len(names) == 3
    for name in names:
        half, full = load_file(trained.base / name), load_file(trained.base / "training" / "model" / name)
        assert {tensor.dtype for tensor in half.values()} == {torch.float16}
        assert all(torch.allclose(half[key].float(), full[key], rtol=1e-3, atol=1e-6) for key in full)
    for folder in (trained.vae, trained.base / "training"):
        for picture in ("loss.png", "samples.png"):
            with Image.open(folder / picture) as opened:
                assert min(opened.size) > TILE_PX


def test_plain_diffusers_makes_pictures_with_it(trained: Trained) -> None:
    """Whoever knows Stable Diffusion needs none of our code."""
    with quiet_libraries():
        pipeline = StableDiffusionPipeline.from_pretrained(trained.base, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline("lymph node", num_inference_steps=2, height=TILE_PX, width=TILE_PX, output_type="np").images
    assert made.shape == (1, TILE_PX, TILE_PX, 3)
    assert np.isfinite(made).all()


@pytest.mark.parametrize("prompt", [*PROMPTS, ()])
def test_texts_are_learnt_as_the_detector_will_say_them(prompt: Prompt, trained: Trained) -> None:
    """Fragments joined to one text have the embeddings that compel gives to fragments, an empty prompt too."""
    backbone = load_backbone(str(trained.base), offline=True)
    with torch.no_grad():
        learnt = backbone.text_encoder(diffusion.tokens_of(backbone.tokenizer, [prompt])).last_hidden_state
    asked = PromptEncoder(backbone.tokenizer, backbone.text_encoder).encode([prompt])
    assert torch.allclose(learnt, asked, atol=1e-5)


def test_each_keyword_is_a_few_tokens(trained: Trained) -> None:
    """The tokenizer knows the words of the list: none is spelt."""
    tokenizer = load_backbone(str(trained.base), offline=True).tokenizer
    ((text, _),) = PROMPTS[0]
    assert tokenizer.tokenize(text) == [f"{word}</w>" for word in text.split()]
    assert 600 < len(tokenizer) < 2000


@pytest.mark.parametrize(("learn", "fail_at_read"), [("vae", 6), ("base", 12)])
def test_a_stopped_training_goes_on_to_the_same_files(learn: str, fail_at_read: int, tmp_path: Path) -> None:
    """To the byte; the pictures too."""
    learn_vae(tmp_path / "vae")
    learners: dict[str, Callable[..., None]] = {
        "vae": learn_vae,
        "base": lambda out, **given: learn_base(tmp_path / "vae", out, **given),
    }
    learners[learn](tmp_path / "whole", tiles=Described(24))
    with pytest.raises(StoppedError):
        learners[learn](tmp_path / "stopped", tiles=Described(24, fail_at_read=fail_at_read))
    assert list((tmp_path / "stopped").rglob("training.pt"))
    learners[learn](tmp_path / "stopped", tiles=Described(24))
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_base_without_a_vae_says_how_to_get_one(tmp_path: Path) -> None:
    """Nothing was trained there, or not to its end."""
    with pytest.raises(ModelError, match=r"no VAE can be loaded .* training/diffusion.py vae"):
        learn_base(tmp_path / "nowhere", tmp_path / "base")


def test_crops_are_parts_of_their_tiles_turned_and_mirrored() -> None:
    """Each a function of its seed, and all eight ways to lay a square down occur."""
    tile = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(1, 16, 16, 3)
    windows = np.lib.stride_tricks.sliding_window_view(tile[0], (6, 6), axis=(0, 1)).reshape(-1, 3, 6, 6)
    found = {window.tobytes() for window in windows}
    ways = set()
    for seed in range(60):
        crop = vae.crops(tile, np.array([seed], np.uint64))[0]
        laid = [np.rot90(side, turns) for side in (crop, crop[:, ::-1]) for turns in range(4)]
        (way,) = [i for i, square in enumerate(laid) if square.transpose(2, 0, 1).tobytes() in found]
        ways.add(way)
    assert ways == set(range(8))


def test_edges_and_stains_that_are_lost_cost_more_than_their_size() -> None:
    """Three times where an error of 1 changes from pixel to pixel, six times where it is the same all over."""
    flat, checked = torch.ones(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    checked[..., ::2] = -1
    assert vae.unlikeness(torch.zeros(1, 3, 16, 16)).item() == 0
    assert vae.unlikeness(checked).item() == pytest.approx(1 + 2 * vae.EDGE_WEIGHT)
    assert vae.unlikeness(flat).item() == pytest.approx(1 + vae.COLOUR_WEIGHT)


def test_two_commands_make_a_base_of_a_folder_of_tiles(tmp_path: Path) -> None:
    """Tiles lie as `training/tiles.py` leaves them; weights are in full precision unless asked otherwise."""
    folder = tmp_path / "tiles"
    folder.mkdir()
    np.save(folder / "tiles-00000.npy", smooth_tiles(4, TILE_PX, seed=0))
    (folder / "tiles-00000.json").write_text(json.dumps([{"germinal_centre": 0.8, "mantle_zone": 0.2}] * 4))
    common = f"--tiles {folder} --size tiny --device cpu --steps 2 --batch-size 2"
    diffusion.main(f"vae --out {tmp_path / 'vae'} {common}".split())
    diffusion.main(f"base --out {tmp_path / 'base'} --vae {tmp_path / 'vae'} {common}".split())
    assert load_backbone(str(tmp_path / "base"), offline=True).downsampling == 8
    published, kept = tmp_path / "base", tmp_path / "base" / "training" / "model"
    assert all((published / name).read_bytes() == content for name, content in contents(kept).items())
    assert str(tmp_path) not in "".join(path.read_text() for path in published.glob("*/config.json"))


def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path: Path) -> None:
    """As every command of the package."""
    with pytest.raises(SystemExit, match=r"error: .*there are no tiles"):
        diffusion.main(["vae", "--tiles", str(tmp_path), "--out", str(tmp_path / "out")])
