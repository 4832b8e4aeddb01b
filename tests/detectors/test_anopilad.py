import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from wsi_anomaly.detectors.protocol import Based, Scorer
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.options import parse_options
from wsi_anomaly.testing import DetectorContract, TilesInMemory, batch_of, smooth_tiles

TRAINING = {"steps": 6, "batch_size": 8, "learning_rate": 1e-3, "save_every": 1, "picture_every": 100}


def detector(base: Path, **options: Any) -> Any:
    """Small and quick."""
    from wsi_anomaly.detectors.anopilad import AnoPilad

    table = {"base": str(base), "timesteps": [300], "sampler": {"name": "ddim", "steps": 20}, "training": TRAINING}
    return parse_options(AnoPilad, table | options, where="test")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """Networks this small are fastest on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestContract(DetectorContract):
    """What every detector promises; a random base cannot rank by latents."""

    detector: ClassVar[Any] = None
    tile_px = 64
    fit_tiles = 16
    tells_apart = ("mse_pixel",)

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _on_tiny_base(cls, tiny_base: Path) -> None:
        scores = ["mse_pixel", "mse_latent", "ms_ssim"]
        cls.detector = detector(tiny_base, scores=scores, training=TRAINING | {"steps": 20})


@pytest.fixture(scope="module")
def checkpoint(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fit."""
    folder: Path = tmp_path_factory.mktemp("fit") / "detector"
    detector(tiny_base).fit(TilesInMemory(smooth_tiles(12, 64, seed=1)), folder, device="cpu")
    return folder


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


def test_a_damaged_note_of_the_base_is_a_model_error(checkpoint: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Not a traceback."""
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "base.json").write_text("{")
    with pytest.raises(ModelError, match=r"base.json: is damaged"):
        detector(tiny_base).load(tmp_path / "copy", device="cpu")


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


def test_the_loss_falls(tiny_base: Path, tmp_path: Path) -> None:
    """The adapter learns something even on a random base."""
    training = TRAINING | {"steps": 120, "learning_rate": 1e-2, "save_every": 500}
    detector(tiny_base, training=training).fit(
        TilesInMemory(smooth_tiles(8, 64, seed=1)), tmp_path / "fit", device="cpu"
    )
    losses = [window["mean"] for window in json.loads((tmp_path / "fit" / "history.json").read_text())["loss"]]
    assert len(losses) >= 40
    assert np.mean(losses[-20:]) < np.mean(losses[:20])


@pytest.mark.slow
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
