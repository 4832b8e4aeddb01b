import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
import torch
from jaxtyping import Float32, UInt8
from safetensors.torch import load_file, save_file

from wsi_anomaly.detectors.protocol import Based, Scorer, TileBatch
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.options import parse_options
from wsi_anomaly.testing import DetectorContract, TilesInMemory, batch_of, smooth_tiles

TRAINING = {"steps": 6, "batch_size": 8, "learning_rate": 1e-3, "save_every": 1, "picture_every": 100}


class StoppedError(Exception):
    """What stands in for a crash in these tests."""


def detector(base: Path, **options: Any) -> Any:
    """Small and quick."""
    from wsi_anomaly.detectors.anopilad import AnoPilad

    table = {"base": str(base), "timesteps": [300], "sampler": {"name": "ddim", "steps": 20}, "training": TRAINING}
    return parse_options(AnoPilad, table | options, where="test")


class TestContract(DetectorContract):
    """What every detector promises; a random base cannot rank by latents."""

    detector: ClassVar[Any] = None
    tile_px = 64
    fit_tiles = 96  # so that a fit killed half-way is killed in its first epoch: later it reads no tiles
    tells_apart = ("mse_pixel",)

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _on_tiny_base(cls, tiny_base: Path) -> None:
        scores = ["mse_pixel", "mse_latent", "ms_ssim"]
        cls.detector = detector(tiny_base, scores=scores, training=TRAINING | {"steps": 20})


@pytest.fixture(scope="module")
def checkpoint(tiny_base: Path, fitted: Callable[..., Path]) -> Path:
    """A finished fit."""
    return fitted(detector(tiny_base), TilesInMemory(smooth_tiles(12, 64, seed=1)))


def test_a_fit_leaves_an_adapter_that_diffusers_loads(checkpoint: Path, tiny_base: Path) -> None:
    """By its own `load_lora_weights`; pictures and history beside it, and nothing unfinished."""
    from diffusers import StableDiffusionPipeline

    names = {path.name for path in checkpoint.iterdir()}
    assert names == {"pytorch_lora_weights.safetensors", "base.json", "history.json", "loss.png", "samples.png"}
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None, local_files_only=True)
    pipeline.load_lora_weights(checkpoint)
    (adapter,) = pipeline.get_active_adapters()
    down = [p for name, p in pipeline.unet.named_parameters() if f"lora_A.{adapter}" in name]
    weights = load_file(checkpoint / "pytorch_lora_weights.safetensors")
    assert len(down) == len(weights) / 2
    assert all(tensor.abs().sum() > 0 for name, tensor in weights.items() if "up" in name)


def test_the_prompt_of_a_tile_decides_its_score(checkpoint: Path, tiny_base: Path) -> None:
    """Another keyword, another weight: another score; the same prompt: the same."""
    scorer = detector(tiny_base).load(checkpoint, device="cpu")
    pixels = smooth_tiles(1, 64, seed=3).repeat(4, axis=0)
    prompts = ((("lymph node", 1.0),), (("lymph node", 1.0),), (("germinal center", 1.0),), (("lymph node", 1.5),))
    batch = batch_of(pixels, seeds=np.full(4, 7, np.uint64))
    scores = scorer.score(type(batch)(batch.pixels, batch.seeds, prompts))[:, 0]
    assert scores[0] == scores[1]
    assert len(set(scores.tolist())) == 3


@pytest.mark.parametrize(("guidance", "calls"), [(1.0, 7), (7.5, 14)])
def test_guidance_doubles_the_calls_that_are_told(
    guidance: float, calls: int, checkpoint: Path, tiny_base: Path
) -> None:
    """As often as each tile goes through the UNet; from 301 on a grid of 20 steps there are 7."""
    scorer = detector(tiny_base, guidance=guidance).load(checkpoint, device="cpu")
    seen: list[int] = []
    scorer.restorer.network.unet.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    scorer.score(batch_of(smooth_tiles(8, 64, seed=2)))
    assert scorer.facts["network_calls"] == [calls]
    assert sum(seen) == calls * 8


def test_guidance_of_one_is_none_and_more_asks_the_empty_prompt_too(tiny_base: Path) -> None:
    """The guided noise is what lies between, stretched."""
    from wsi_anomaly.detectors.diffusion.backbone import load_backbone
    from wsi_anomaly.detectors.diffusion.latent import LatentDiffusion

    def predicted(guidance: float, prompt: Any) -> torch.Tensor:
        network = LatentDiffusion(
            load_backbone(str(tiny_base), offline=True), torch.device("cpu"), precision="fp32", guidance=guidance
        )
        with torch.no_grad():
            return network.noise(torch.ones(1, 4, 8, 8), 500, network.condition([prompt]))

    prompt = (("germinal center", 1.2),)
    plain, prompted, guided = predicted(1.0, ()), predicted(1.0, prompt), predicted(7.5, prompt)
    torch.testing.assert_close(guided, plain + 7.5 * (prompted - plain), rtol=1e-4, atol=1e-5)


def test_without_prompts_the_detector_names_the_stage(checkpoint: Path, tiny_base: Path) -> None:
    """In scoring and in learning."""
    scorer = detector(tiny_base).load(checkpoint, device="cpu")
    batch = batch_of(smooth_tiles(2, 64, seed=3))
    with pytest.raises(OptionsError, match=r"table \[prompt\].*wsi-anomaly prompt"):
        scorer.score(type(batch)(batch.pixels, batch.seeds, ((), ())))


def test_another_base_is_refused(checkpoint: Path, tiny_base: Path, tmp_path: Path) -> None:
    """The same one elsewhere is not another."""
    shutil.copytree(tiny_base, tmp_path / "moved")
    moved = detector(tiny_base).on_base(str(tmp_path / "moved"), offline=True)
    assert isinstance(moved, Based)
    assert isinstance(moved.load(checkpoint, device="cpu"), Scorer)
    from wsi_anomaly.detectors.diffusion.random_backbone import write_random_backbone

    write_random_backbone(tmp_path / "other", size="tiny", seed=1, texts=("tissue",))
    with pytest.raises(ModelError, match=r"not the one that the adapter was taught on.*--base-weights"):
        detector(tmp_path / "other").load(checkpoint, device="cpu")


def test_a_base_that_is_not_here_says_so_at_once_offline(checkpoint: Path) -> None:
    """No time-out."""
    offline = detector(Path("nobody/nothing")).on_base("", offline=True)
    with pytest.raises(ModelError, match=r"nobody/nothing.*--offline"):
        offline.load(checkpoint, device="cpu")


def test_a_damaged_note_of_the_base_is_a_model_error(spoilt: Path, tiny_base: Path) -> None:
    """Not a traceback."""
    (spoilt / "base.json").write_text("{")
    with pytest.raises(ModelError, match=r"base.json: is damaged"):
        detector(tiny_base).load(spoilt, device="cpu")


def test_the_weights_of_lpips_belong_to_the_model(tiny_base: Path, lpips_weights: Path, tmp_path: Path) -> None:
    """Wherever they lie; others are refused, and missing ones before anything is learnt."""
    options = {"scores": ["lpips", "mse_latent"], "training": TRAINING | {"steps": 1}}
    tiles = TilesInMemory(smooth_tiles(8, 64, seed=1))
    with pytest.raises(ModelError, match="no weights are given"):
        detector(tiny_base, **options).fit(tiles, tmp_path / "model", device="cpu")
    assert not (tmp_path / "model").exists()
    detector(tiny_base, **options, lpips_weights=str(lpips_weights)).fit(tiles, tmp_path / "model", device="cpu")
    moved = Path(shutil.copy(lpips_weights, tmp_path / "moved.safetensors"))
    elsewhere = detector(tiny_base, **options, lpips_weights=str(moved))
    noted = json.loads((tmp_path / "model/lpips.json").read_text())["digest"]
    assert elsewhere.load(tmp_path / "model", device="cpu").facts["lpips_digest"] == noted
    save_file(load_file(moved) | {"features.0.bias": torch.ones(64)}, moved)
    with pytest.raises(ModelError, match=rf"these weights of LPIPS are not those.*instead of {noted[:12]}"):
        elsewhere.load(tmp_path / "model", device="cpu")


class Colours:
    """Sees of a tile its mean colour, and takes red for abnormal."""

    def embed(self, pixels: UInt8[np.ndarray, "tile y x rgb"]) -> Float32[np.ndarray, "tile d"]:
        """Unit vectors."""
        means = np.array([tile.mean(axis=(0, 1)) for tile in pixels])
        return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True), np.float32)

    def abnormality(self, embeddings: Float32[np.ndarray, "tile d"]) -> Float32[np.ndarray, " tile"]:
        """The share of red."""
        return embeddings[:, 0]


def test_tile_and_reconstruction_are_compared_as_the_image_text_model_sees_them(
    checkpoint: Path, tiny_base: Path
) -> None:
    """By their angle, and by how near the tile is to what is abnormal, less half for the other; alike in any batch."""
    detecting = detector(tiny_base, scores=["embedding", "keyword_shift"]).perceiving(Colours)
    scorer = detecting.load(checkpoint, device="cpu")
    batch = batch_of(smooth_tiles(5, 64, seed=3))
    before, after = (Colours().embed(pixels) for pixels in (batch.pixels, scorer.reconstruct(batch)))
    scores = scorer.score(batch)
    np.testing.assert_allclose(scores[:, 0], 1 - (before * after).sum(axis=1), atol=1e-6)
    np.testing.assert_allclose(scores[:, 1], before[:, 0] - after[:, 0] / 2, atol=1e-6)
    assert scores[:, 0].min() > 0
    alone = batch_of(batch.pixels[3:4], seeds=batch.seeds[3:4])
    assert np.array_equal(scorer.score(alone), scores[3:4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": [1000]}, "not within the noise schedule"),
        ({"timesteps": []}, "timesteps"),
        ({"sampler": {"name": "plms", "steps": 0}}, "steps"),
        ({"sampler": {"name": "euler"}}, "sampler"),
        ({"guidance": 0.5}, "guidance"),
        ({"scores": ["lpips"]}, "VGG16"),
        ({"scores": ["msee"]}, "scores"),
        ({"scores": ["keyword_shift"]}, r"Add a table \[prompt\]"),
    ],
)
def test_options_that_make_no_sense_are_named(
    checkpoint: Path, tiny_base: Path, options: dict[str, Any], message: str
) -> None:
    """Before hours are spent."""
    with pytest.raises((OptionsError, ModelError), match=message):
        detector(tiny_base, **options).load(checkpoint, device="cpu")


def test_caption_dropout_and_input_perturbation_change_what_is_learnt(tiny_base: Path, tmp_path: Path) -> None:
    """As the released code has them."""
    tiles = TilesInMemory(smooth_tiles(12, 64, seed=1))
    found = []
    for number, extra in enumerate(({}, {"caption_dropout": 0.4}, {"input_perturbation": 0.1})):
        detector(tiny_base, training=TRAINING | extra).fit(tiles, tmp_path / str(number), device="cpu")
        found.append((tmp_path / str(number) / "pytorch_lora_weights.safetensors").read_bytes())
    assert len(set(found)) == 3


class Counting(TilesInMemory):
    """Remembers which tiles were read."""

    def __init__(self, count: int) -> None:
        super().__init__(smooth_tiles(count, 64, seed=1))
        self.asked: list[int] = []

    def read(self, indices: np.ndarray) -> TileBatch:
        """The tiles at these positions, each under a prompt of its own."""
        self.asked += indices.tolist()
        prompts = tuple((("lymph node", 1.0), ("tissue", 1 + position / 7)) for position in indices.tolist())
        return replace(super().read(indices), prompts=prompts)


ENDS_AND_SAMPLES = sorted([*[0] * 4, *[23] * 3, *np.linspace(0, 23, 8).round().astype(int).tolist()])
"""What a fit on 24 tiles looks at besides the tiles of its steps."""


def test_tiles_are_read_until_their_latents_are_kept(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ten epochs hardly more than once, as one batch is read ahead; what is learnt is what reading always gives."""
    training = TRAINING | {"steps": 30, "save_every": 100}
    kept, plain = Counting(24), Counting(24)
    detector(tiny_base, training=training).fit(kept, tmp_path / "kept", device="cpu")
    assert set(range(24)) <= set(kept.asked)
    assert len(kept.asked) <= len(ENDS_AND_SAMPLES) + 24 + 8
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    detector(tiny_base, training=training).fit(plain, tmp_path / "plain", device="cpu")
    assert len(plain.asked) == len(ENDS_AND_SAMPLES) + 240
    learnt = [tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("kept", "plain")]
    assert learnt[0].read_bytes() == learnt[1].read_bytes()


class Stopping(logging.Handler):
    """Stops a fit when it tells how long it will take: after twenty steps."""

    def emit(self, record: logging.LogRecord) -> None:
        """Fail at that line."""
        if "steps/s" in record.getMessage():
            raise StoppedError


def test_no_pixels_are_read_once_all_latents_are_kept(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A fit that stopped after its first epoch goes on with the ends of the tiles, and the samples of the picture."""
    training = TRAINING | {"steps": 30, "save_every": 1}
    detector(tiny_base, training=training).fit(Counting(24), tmp_path / "whole", device="cpu")
    rest = Counting(24)
    log, stopping = logging.getLogger("wsi_anomaly"), Stopping()
    log.addHandler(stopping)
    with caplog.at_level(logging.INFO, "wsi_anomaly"), pytest.raises(StoppedError):
        detector(tiny_base, training=training).fit(Counting(24), tmp_path / "rest", device="cpu")
    log.removeHandler(stopping)
    detector(tiny_base, training=training).fit(rest, tmp_path / "rest", device="cpu")
    assert sorted(rest.asked) == ENDS_AND_SAMPLES
    learnt = [tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("whole", "rest")]
    assert learnt[0].read_bytes() == learnt[1].read_bytes()


def test_the_loss_falls(tiny_base: Path, tmp_path: Path) -> None:
    """The adapter learns something even on a random base."""
    training = TRAINING | {"steps": 120, "learning_rate": 1e-2, "save_every": 500}
    detector(tiny_base, training=training).fit(
        TilesInMemory(smooth_tiles(8, 64, seed=1)), tmp_path / "fit", device="cpu"
    )
    losses = [window["mean"] for window in json.loads((tmp_path / "fit" / "history.json").read_text())["loss"]]
    assert len(losses) >= 40
    assert np.mean(losses[-20:]) < np.mean(losses[:20])


@pytest.mark.full_size
@pytest.mark.skipif(psutil.virtual_memory().available < 12 * 2**30, reason="needs 12 GiB of free memory")
def test_stable_diffusion_of_full_size_learns_two_steps_and_scores_two_tiles(tmp_path: Path) -> None:
    """860 million weights, random, on the CPU."""
    from wsi_anomaly.detectors.diffusion.random_backbone import write_random_backbone

    write_random_backbone(tmp_path / "base", size="sd15", texts=("tissue",))
    full = detector(
        tmp_path / "base", training=TRAINING | {"steps": 2, "batch_size": 1}, sampler={"name": "unipc", "steps": 2}
    )
    full.fit(TilesInMemory(smooth_tiles(2, 64, seed=1)), tmp_path / "fit", device="cpu")
    scores = full.load(tmp_path / "fit", device="cpu").score(batch_of(smooth_tiles(2, 64, seed=2)))
    assert np.isfinite(scores).all()
