"""Facts about the adapter: what it adds, what others can read of it, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wsi_anomaly.detectors.diffusion.lora import LORA_WEIGHTS, LoraOptions, add_lora, load_lora, save_lora
from wsi_anomaly.detectors.diffusion.random_backbone import random_backbone
from wsi_anomaly.errors import ModelError, OptionsError

STRONGER = LoraOptions(rank=3, alpha=7.5)


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    """The UNet of the tiny base, without an adapter."""
    return random_backbone("tiny", seed=seed).unet


def trained(options: LoraOptions) -> UNet2DConditionModel:
    """A UNet whose adapter changes something."""
    unet, generator = tiny_unet(), torch.Generator().manual_seed(9)
    for parameter in add_lora(unet, options, seed=1):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return unet


def predicted(unet: UNet2DConditionModel) -> torch.Tensor:
    """What the UNet says of some noise."""
    generator = torch.Generator().manual_seed(5)
    noise, texts = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)
    with torch.no_grad():
        return unet(noise, torch.tensor(674), texts).sample


@pytest.fixture(scope="module", params=[LoraOptions(), STRONGER], ids=["default", "stronger"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A folder with an adapter, and what the UNet predicted with it."""
    folder = tmp_path_factory.mktemp("lora")
    unet = trained(request.param)
    save_lora(unet, folder)
    return folder, predicted(unet)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a default adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    save_lora(trained(LoraOptions()), folder)
    return folder


# --- added


def test_on_sd_1_5_the_default_adapter_has_797184_weights() -> None:
    """Four projections of 32 attentions; all else is frozen."""
    with torch.device("meta"):
        unet = random_backbone("sd15").unet
        learnt = add_lora(unet, LoraOptions(), seed=0)
    assert (len(learnt), sum(parameter.numel() for parameter in learnt)) == (256, 797_184)
    assert sum(parameter.requires_grad for parameter in unet.parameters()) == 256


def test_a_new_adapter_changes_nothing_and_one_step_changes_the_prediction() -> None:
    """So a fit begins at the base."""
    unet, before = tiny_unet(), predicted(tiny_unet())
    learnt = add_lora(unet, LoraOptions(), seed=0)
    assert torch.equal(predicted(unet), before)
    unet(torch.ones(1, 4, 8, 8), torch.tensor(5), torch.ones(1, 77, 32)).sample.square().mean().backward()
    torch.optim.SGD(learnt, 1.0).step()
    assert not torch.equal(predicted(unet), before)


def test_the_seed_alone_decides_what_is_drawn() -> None:
    """Not the caller's random state, which stays as it is; deviation one by rank."""
    first = [parameter.clone() for parameter in add_lora(tiny_unet(), LoraOptions(rank=2), seed=7)]
    torch.rand(3)
    before = torch.random.get_rng_state()
    again = add_lora(tiny_unet(), LoraOptions(rank=2), seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    other = add_lora(tiny_unet(), LoraOptions(rank=2), seed=8)
    assert not torch.equal(first[0], other[0])
    down = torch.cat([parameter.detach().flatten() for parameter in first[::2]])
    assert float(down.std()) == pytest.approx(0.5, rel=0.1)


def test_the_adapter_is_float32_on_a_unet_in_half_precision() -> None:
    """Small steps would be lost in sixteen bits; predictions stay in the type of the UNet."""
    unet = tiny_unet().to(torch.bfloat16)
    learnt = add_lora(unet, LoraOptions(), seed=0)
    assert {parameter.dtype for parameter in learnt} == {torch.float32}
    sample = torch.ones(1, 4, 8, 8, dtype=torch.bfloat16)
    output = unet(sample, torch.tensor(5), torch.ones(1, 77, 32, dtype=torch.bfloat16)).sample
    assert output.dtype == torch.bfloat16


def test_other_layers_may_be_adapted() -> None:
    """Queries only: a fourth of the matrices, or the one that is named in full."""
    everything = len(add_lora(tiny_unet(), LoraOptions(), seed=0))
    assert len(add_lora(tiny_unet(), LoraOptions(targets=("to_q",)), seed=0)) == everything / 4
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
    assert len(add_lora(tiny_unet(), LoraOptions(targets=(name,)), seed=0)) == 2


@pytest.mark.parametrize(
    ("target", "said"), [("to_qq", "no layer 'to_qq'.*did you mean 'to_q'"), ("conv_norm_out", "GroupNorm")]
)
def test_a_target_that_cannot_be_adapted_is_refused(target: str, said: str) -> None:
    """Also where the other targets can."""
    with pytest.raises(OptionsError, match=f"(?s)lora.targets.*{said}"):
        add_lora(tiny_unet(), LoraOptions(targets=("to_k", target)), seed=0)


# --- saved and loaded


@pytest.mark.parametrize(("fuse", "tolerance"), [(False, 0), (True, 1e-5)])
def test_a_saved_adapter_gives_the_same_predictions(
    saved: tuple[Path, torch.Tensor], tolerance: float, *, fuse: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Beside the weights exactly, fused into them nearly; nothing is printed, nothing can be trained."""
    folder, expected = saved
    unet = tiny_unet()
    before = torch.random.get_rng_state()
    load_lora(unet, folder, fuse=fuse)
    torch.testing.assert_close(predicted(unet), expected, atol=tolerance, rtol=0)
    assert (predicted(tiny_unet()) - expected).abs().max() > 1e-2
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


def test_a_fused_adapter_leaves_no_layers_of_its_own(saved: tuple[Path, torch.Tensor]) -> None:
    """The UNet has the names and the classes of the base, and can be fused further or compiled."""
    unet = tiny_unet()
    load_lora(unet, saved[0], fuse=True)
    assert [(name, type(layer)) for name, layer in unet.named_modules()] == [
        (name, type(layer)) for name, layer in tiny_unet().named_modules()
    ]
    unet.fuse_qkv_projections()
    torch.testing.assert_close(predicted(unet), saved[1], atol=1e-5, rtol=0)


def test_plain_diffusers_reads_the_adapter(saved: tuple[Path, torch.Tensor], random_base: Path) -> None:
    """With its strength, and without a warning."""
    pipeline = StableDiffusionPipeline.from_pretrained(random_base, local_files_only=True)
    pipeline.load_lora_weights(saved[0])
    torch.testing.assert_close(predicted(pipeline.unet), saved[1], atol=1e-6, rtol=0)


def test_the_keys_are_those_of_diffusers(saved: tuple[Path, torch.Tensor]) -> None:
    """`unet.<layer>.lora.down|up.weight`, in float32."""
    weights = load_file(saved[0] / LORA_WEIGHTS)
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora.{}.weight"
    assert weights[key.format("down")].shape[1] == weights[key.format("up")].shape[0] == 32
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("options", [LoraOptions(), STRONGER])
def test_an_adapter_that_diffusers_saved_is_read(options: LoraOptions, tmp_path: Path) -> None:
    """As its own training script saves it, without and with what it tells of the strength."""
    unet = trained(options)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    told = {} if options.alpha is None else _collate_lora_metadata({"unet": unet})
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **told)
    loaded = tiny_unet()
    load_lora(loaded, tmp_path, fuse=False)
    torch.testing.assert_close(predicted(loaded), predicted(unet), atol=1e-6, rtol=0)


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    """Also after a round trip; a difference shows."""
    for name in ("one", "two", "again"):
        (tmp_path / name).mkdir()
    save_lora(trained(LoraOptions()), tmp_path / "one")
    save_lora(trained(LoraOptions()), tmp_path / "two")
    loaded = tiny_unet()
    load_lora(loaded, tmp_path / "one", fuse=False)
    save_lora(loaded, tmp_path / "again")
    contents = {name: (tmp_path / name / LORA_WEIGHTS).read_bytes() for name in ("one", "two", "again")}
    assert contents["one"] == contents["two"] == contents["again"]
    save_lora(trained(LoraOptions(alpha=1.5)), tmp_path / "two")
    assert (tmp_path / "two" / LORA_WEIGHTS).read_bytes() != contents["one"]


# --- bad input


def spoilt(adapter: Path, folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, object]], object]) -> Path:
    """A copy of an adapter with other tensors or another label."""
    path = adapter / LORA_WEIGHTS
    with safe_open(path, framework="pt") as file:
        label = json.loads(file.metadata()["lora_adapter_metadata"])
    weights = load_file(path)
    change(weights, label)
    save_file(weights, folder / LORA_WEIGHTS, {"lora_adapter_metadata": json.dumps(label)})
    return folder


def test_a_missing_adapter_is_named(tmp_path: Path) -> None:
    """And how it may have come to that."""
    with pytest.raises(ModelError, match=f"{LORA_WEIGHTS}: the adapter is missing.*interrupted"):
        load_lora(tiny_unet(), tmp_path, fuse=True)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_adapter_is_refused(size: int, adapter: Path, tmp_path: Path) -> None:
    """Wherever the file was cut off."""
    (tmp_path / LORA_WEIGHTS).write_bytes((adapter / LORA_WEIGHTS).read_bytes()[:size])
    with pytest.raises(ModelError, match="damaged"):
        load_lora(tiny_unet(), tmp_path, fuse=True)


def test_an_adapter_of_a_newer_format_is_refused(adapter: Path, tmp_path: Path) -> None:
    """It is not guessed at."""
    spoilt(adapter, tmp_path, lambda _, label: label.update({"wsi_anomaly.format_version": 2}))
    with pytest.raises(ModelError, match=r"format version is 2.* reads 1"):
        load_lora(tiny_unet(), tmp_path, fuse=True)


def test_an_adapter_of_another_base_is_refused(adapter: Path) -> None:
    """Of another width, none fits; the message counts them, and the UNet is left alone."""
    with torch.device("meta"):
        unet = random_backbone("sd15").unet
    names = [name for name, _ in unet.named_modules()]
    with pytest.raises(
        ModelError, match=r"64 of its 64 keys \(unet\.[^ ]*, unet\.[^ ]*, unet\.[^ ]*, \.\.\.\) do not fit"
    ):
        load_lora(unet, adapter, fuse=True)
    assert [name for name, _ in unet.named_modules()] == names


KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.{}.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights, _: weights.pop(KEY.format("up")), "1 of its 63 keys"),
        (lambda weights, _: weights.update({KEY.format("up"): torch.zeros(32, 9)}), "2 of its 64 keys"),
        (lambda weights, _: weights.update({KEY.format("down"): torch.zeros(4, 9)}), "2 of its 64 keys"),
        (lambda weights, _: weights.update({"text_encoder.a.lora.up.weight": torch.zeros(3, 3)}), "1 of its 65 keys"),
        (lambda weights, _: weights.update({"unet.conv_norm_out.lora.up.weight": torch.zeros(3)}), "1 of its 65 keys"),
        (lambda weights, _: [weights.pop(KEY.format(side)) for side in ("up", "down")], "for 1 of the 32 layers"),
        (lambda weights, _: weights.clear(), "holds no weights"),
        (lambda _, label: label.update({"unet.unheard_of": 1}), "cannot be loaded"),
        (lambda _, label: label.update({"unet.r": 9}), "cannot be loaded"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused(
    change: Callable[..., object],
    said: str,
    adapter: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Half of a pair, another width, keys of no layer, fewer layers than it says, a label of other things."""
    with pytest.raises(ModelError, match=f"{LORA_WEIGHTS}: .*{said}"):
        load_lora(tiny_unet(), spoilt(adapter, tmp_path, change), fuse=True)
    assert capfd.readouterr() == ("", "")
