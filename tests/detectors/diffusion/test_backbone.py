"""Facts about a base model: what is loaded, what is refused, what its digest depends on, how pixels become latents."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from wsi_anomaly.detectors.diffusion.backbone import CHUNK_TILES, Backbone, decode, digest, encode, load_backbone
from wsi_anomaly.detectors.diffusion.base_files import DEFAULT_BASE
from wsi_anomaly.detectors.diffusion.random_backbone import random_backbone, write_random_backbone
from wsi_anomaly.errors import ModelError, OptionsError

pytestmark = pytest.mark.usefixtures("no_network")
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
SD15_FILES = [
    "README.md",
    "model_index.json",
    "v1-inference.yaml",
    *(f"v1-5-{kind}.{suffix}" for kind in ("pruned", "pruned-emaonly") for suffix in ("ckpt", "safetensors")),
    "feature_extractor/preprocessor_config.json",
    "scheduler/scheduler_config.json",
    *(f"tokenizer/{name}" for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")),
    *(f"{part}/config.json" for part in ("safety_checker", "text_encoder", "unet", "vae")),
    *(
        f"{part}/{name}"
        for part in ("safety_checker", "text_encoder")
        for name in ("model.fp16.safetensors", "model.safetensors", "pytorch_model.bin", "pytorch_model.fp16.bin")
    ),
    *(
        f"{part}/diffusion_pytorch_model{variant}{suffix}"
        for part in ("unet", "vae")
        for variant in ("", ".fp16", ".non_ema")
        for suffix in (".bin", ".safetensors")
    ),
]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def backbone(random_base: Path) -> Backbone:
    """The tiny base, loaded."""
    return load_backbone(str(random_base), offline=True)


@pytest.fixture
def base(random_base: Path, tmp_path: Path) -> Path:
    """A tiny base that may be spoilt."""
    return shutil.copytree(random_base, tmp_path / "base")


def change_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply `change` to the tensors of a file."""
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path, {"format": "pt"})


def as_pickles(base: Path) -> None:
    """Turn all weights into PyTorch's own files, as older repositories have them."""
    for path in base.rglob("*.safetensors"):
        name = "pytorch_model.bin" if path.name == "model.safetensors" else "diffusion_pytorch_model.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()


def in_cache(hub: Path, base: Path) -> None:
    """Put a base where an earlier download of the default one would lie."""
    root = hub / f"models--{DEFAULT_BASE.replace('/', '--')}"
    shutil.copytree(base, root / "snapshots" / "abc")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")


def tiles(count: int, size_px: int = 64) -> torch.Tensor:
    """Random pixels in [-1, 1]."""
    return torch.rand(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(3)) * 2 - 1


# --- loading


def test_the_parts_are_those_that_the_pipeline_of_diffusers_loads(random_base: Path, backbone: Backbone) -> None:
    """Tensor by tensor, token by token."""
    pipeline = StableDiffusionPipeline.from_pretrained(random_base, local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(backbone, part).state_dict(), getattr(pipeline, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    text = "germinal center, Ki-67+, µm"
    assert backbone.tokenizer(text)["input_ids"] == pipeline.tokenizer(text)["input_ids"]
    assert dict(pipeline.scheduler.config).items() >= dict(backbone.schedule_config).items()


def test_the_parts_are_frozen_in_float32_and_without_dropout(backbone: Backbone) -> None:
    """Nobody trains a base by accident."""
    for network in (backbone.unet, backbone.vae, backbone.text_encoder):
        assert not network.training
        assert all(
            weights.dtype == torch.float32 and not weights.requires_grad and weights.device.type == "cpu"
            for weights in network.parameters()
        )


def test_what_others_need_to_know_of_a_base_is_at_hand(backbone: Backbone) -> None:
    """Of the scheduler, SD 1.5's values."""
    assert (backbone.latent_scale, backbone.downsampling, backbone.prediction_type) == (4.0, 8, "epsilon")
    schedule = backbone.schedule_config
    assert (schedule["beta_start"], schedule["beta_end"], schedule["steps_offset"]) == (0.00085, 0.012, 1)


def test_loading_prints_nothing_and_leaves_the_libraries_as_they_were(
    random_base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither progress nor advice; random numbers of the caller stay the same too."""
    from transformers.utils import logging

    before = torch.random.get_rng_state(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_backbone(str(random_base), offline=True)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before[1:]


def test_half_precision_files_are_taken_where_there_are_no_others(base: Path) -> None:
    """The numbers are those of the file, the type is float32."""
    for path in [*base.rglob("*.safetensors")]:
        save_file({name: t.half() for name, t in load_file(path).items()}, path.with_suffix(".fp16.safetensors"))
        path.unlink()
    loaded = load_backbone(str(base), offline=True)
    found = loaded.text_encoder.state_dict()
    assert all(
        torch.equal(found[name], t.float())
        for name, t in load_file(base / TEXT_ENCODER.replace("el.s", "el.fp16.s")).items()
    )
    assert loaded.unet.dtype == loaded.vae.dtype == torch.float32


def test_older_pickles_and_older_names_of_tensors_are_read(base: Path, backbone: Backbone) -> None:
    """Text encoders saved before transformers 5 have longer names and count their positions."""
    change_weights(base / TEXT_ENCODER, older_names)
    as_pickles(base)
    loaded = load_backbone(str(base), offline=True)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(loaded, part).state_dict(), getattr(backbone, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def older_names(weights: dict[str, torch.Tensor]) -> None:
    """As transformers 4 wrote them."""
    for name in [*weights]:
        weights[f"text_model.{name.removeprefix('text_model.')}"] = weights.pop(name)
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_pickle_that_carries_code_is_refused_and_not_run(part: str, base: Path) -> None:
    """By both libraries."""
    as_pickles(base)
    path = next((base / part).glob("*.bin"))
    torch.save({"weight": Trap(base / "sprung")}, path)
    with pytest.raises(ModelError, match=path.name):
        load_backbone(str(base), offline=True)
    assert not (base / "sprung").exists()


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.mkdir, (self.folder,))


# --- from the hub


def test_a_copy_in_the_cache_of_the_hub_is_used_offline(random_base: Path, hub_cache: Path) -> None:
    """And has the digest of the same files in a folder."""
    in_cache(hub_cache, random_base)
    assert load_backbone(DEFAULT_BASE, offline=True).downsampling == 8
    assert digest(DEFAULT_BASE, offline=True) == digest(str(random_base), offline=True)


def test_offline_without_a_copy_says_what_to_do() -> None:
    """Nothing is asked of the network."""
    with pytest.raises(ModelError, match=rf"{DEFAULT_BASE}.*--offline.*copy the repository's files into a folder"):
        load_backbone(DEFAULT_BASE, offline=True)


@pytest.mark.parametrize("lost", [UNET, TEXT_ENCODER, "vae/config.json", "tokenizer/tokenizer.json"])
def test_an_unfinished_copy_does_not_count(lost: str, base: Path, hub_cache: Path) -> None:
    """Whichever file an interrupted download did not bring."""
    (base / lost).unlink()
    in_cache(hub_cache, base)
    with pytest.raises(ModelError, match="is not on this machine"):
        load_backbone(DEFAULT_BASE, offline=True)


def test_of_a_repository_only_the_needed_files_are_fetched(random_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 37 files of SD 1.5: no single-file checkpoint, no safety checker, no pickle, nothing twice."""
    fetched = hub_of(monkeypatch, SD15_FILES, random_base)
    load_backbone(DEFAULT_BASE, offline=False)
    weights = [name for name in fetched() if name.endswith((".safetensors", ".bin", ".ckpt"))]
    assert weights == [TEXT_ENCODER, UNET, UNET.replace("unet", "vae")]
    assert {name for name in SD15_FILES if name.startswith("tokenizer/")} < set(fetched())
    assert not [name for name in fetched() if name.startswith(("safety", "feature", "v1"))]


def test_another_family_is_refused_before_its_weights_are_fetched(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes tell it, not ten gigabytes."""
    change_json(base / "model_index.json", _class_name="StableDiffusionXLPipeline")
    fetched = hub_of(monkeypatch, SD15_FILES, base)
    with pytest.raises(ModelError, match=f"{DEFAULT_BASE}: is Stable Diffusion XL"):
        load_backbone(DEFAULT_BASE, offline=False)
    assert {name.rpartition(".")[2] for name in fetched()} == {"json"}


def hub_of(monkeypatch: pytest.MonkeyPatch, names: list[str], base: Path) -> Callable[[], list[str]]:
    """A hub whose repository has these files and sends `base`; tells which of them were asked for."""
    patterns: set[str] = set()

    def fetch(_: str, *, allow_patterns: list[str] | None = None, local_files_only: bool = False) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("none")
        patterns.update(allow_patterns or ["*"])
        return str(base)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return lambda: sorted(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=[*patterns]))


# --- bad input


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "is Stable Diffusion XL"),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "is Stable Diffusion 3"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is FLUX"),
        ("model_index.json", {"_class_name": "KandinskyV22Pipeline"}, "is Kandinsky"),
        ("model_index.json", {"_class_name": "New", "transformer": ["diffusers", "New"]}, "diffusion transformer"),
        (
            "model_index.json",
            {"_class_name": "Alt", "text_encoder": ["a", "Roberta"]},
            "text_encoder is Roberta, not CL",
        ),
        ("model_index.json", {"_class_name": "Alt", "vae": [None, None]}, "vae is missing, not AutoencoderKL"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "is Stable Diffusion XL: its UNet"),
        ("unet/config.json", {"in_channels": 9}, "is an inpainting model: its UNet has in_channels 9, not 4"),
        ("unet/config.json", {"in_channels": 6}, "its UNet has in_channels 6, not 4"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "its UNet has time_cond_proj_dim 256, not None"),
        ("vae/config.json", {"latent_channels": 16}, "its VAE has latent_channels 16, not 4"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type 'sample'"),
        ("text_encoder/config.json", {"hidden_size": 64}, "vectors of 32, the text encoder makes vectors of 64"),
    ],
)
def test_another_family_is_refused_by_its_name(file: str, changes: dict[str, object], said: str, base: Path) -> None:
    """Before any weights are opened: there are none."""
    change_json(base / file, **changes)
    for path in base.rglob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(ModelError, match=said) as raised:
        load_backbone(str(base), offline=True)
    assert str(base) in str(raised.value)


def test_a_base_without_an_index_is_judged_by_its_parts(base: Path) -> None:
    """Copied by hand, as many are."""
    (base / "model_index.json").unlink()
    assert load_backbone(str(base), offline=True).prediction_type == "epsilon"
    change_json(base / "unet/config.json", in_channels=9)
    with pytest.raises(ModelError, match="inpainting"):
        load_backbone(str(base), offline=True)


def test_a_scheduler_that_predicts_velocity_is_of_the_family(base: Path) -> None:
    """SD 2.1 for 768 px has one."""
    change_json(base / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert load_backbone(str(base), offline=True).prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("unet", r"lacks unet/config.json; the weights unet/diffusion_pytorch_model.safetensors or .*fp16"),
        ("vae/diffusion_pytorch_model.safetensors", "lacks the weights vae/"),
        ("tokenizer", "lacks tokenizer/tokenizer.json or tokenizer/vocab.json"),
        ("scheduler", "lacks scheduler/scheduler_config.json"),
        (TEXT_ENCODER, "lacks the weights text_encoder/model.safetensors"),
    ],
)
def test_a_missing_part_is_named(lost: str, said: str, base: Path) -> None:
    """With the folder it should be in."""
    path = base / lost
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(ModelError, match=said) as raised:
        load_backbone(str(base), offline=True)
    assert str(base) in str(raised.value)


def test_a_checkpoint_in_one_file_is_refused_with_a_way_to_convert_it(tmp_path: Path) -> None:
    """As a file, and as the only file of a folder."""
    path = tmp_path / "v1-5-pruned-emaonly.safetensors"
    path.touch()
    for given in (path, tmp_path):
        with pytest.raises(ModelError, match=r"from_single_file\(FILE\)\.save_pretrained"):
            load_backbone(str(given), offline=True)


@pytest.mark.parametrize("file", [UNET, TEXT_ENCODER, "unet/config.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("size", [0, 100])
def test_a_damaged_file_is_named(file: str, size: int, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And the libraries print nothing of their own."""
    (base / file).write_bytes((base / file).read_bytes()[:size])
    with pytest.raises(ModelError, match=rf"{file.rpartition('/')[0]}.*(damaged|cannot be loaded)"):
        load_backbone(str(base), offline=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("file", [UNET, TEXT_ENCODER])
def test_weights_that_lack_a_tensor_are_refused(file: str, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both libraries would put random numbers there."""
    name = sorted(load_file(base / file))[3]
    change_weights(base / file, lambda weights: weights.pop(name))
    with pytest.raises(ModelError, match=f"1 missing keys, such as {name}"):
        load_backbone(str(base), offline=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("file", [UNET, TEXT_ENCODER])
def test_weights_of_another_width_are_refused(file: str, base: Path) -> None:
    """The config beside them says another."""
    name = next(name for name, tensor in sorted(load_file(base / file).items()) if tensor.ndim > 1)
    change_weights(base / file, lambda weights: weights.update({name: weights[name][:-1].clone()}))
    with pytest.raises(ModelError, match=file):
        load_backbone(str(base), offline=True)


def test_tiles_that_do_not_fit_the_latents_are_refused(backbone: Backbone) -> None:
    """The rebuilt tile would have another size."""
    with pytest.raises(OptionsError, match=r"60 x 60 px.*multiple of 8 px.*tile_px"):
        encode(backbone.vae, tiles(1, 60))


# --- digest


def test_the_digest_does_not_depend_on_the_place_or_on_files_of_no_use(base: Path, random_base: Path) -> None:
    """A model travels, and so does its base."""
    (base / "README.md").write_text("Read me.")
    (base / "safety_checker").mkdir()
    assert digest(str(base), offline=True) == digest(str(random_base), offline=True)


@pytest.mark.parametrize("file", [UNET, TEXT_ENCODER])
def test_the_digest_changes_with_any_trained_tensor(file: str, base: Path) -> None:
    """One after the other, moved a little as training does it."""
    before = digest(str(base), offline=True)
    original = load_file(base / file)
    for name in [*original][::3]:
        save_file(original | {name: original[name] * 1.001 + 1e-6}, base / file, {"format": "pt"})
        assert digest(str(base), offline=True) != before, name


def test_the_digest_changes_with_configs_tokenizer_and_pickles(base: Path) -> None:
    """Whatever changes a result."""
    found = {digest(str(base), offline=True)}
    change_json(base / "scheduler/scheduler_config.json", beta_end=0.013)
    found.add(digest(str(base), offline=True))
    change_json(base / "tokenizer/tokenizer_config.json", model_max_length=76)
    found.add(digest(str(base), offline=True))
    as_pickles(base)
    found.add(digest(str(base), offline=True))
    weights = torch.load(base / "unet/diffusion_pytorch_model.bin", weights_only=True)
    torch.save(weights | {"conv_in.bias": weights["conv_in.bias"] + 1}, base / "unet/diffusion_pytorch_model.bin")
    found.add(digest(str(base), offline=True))
    assert len(found) == 5


@pytest.mark.parametrize(
    "content", [b"", b"\x09", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]", b"version https://git-lfs..."]
)
def test_the_digest_of_a_damaged_file_is_refused(content: bytes, base: Path) -> None:
    """Without a traceback."""
    (base / UNET).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{UNET}: is damaged.*git-lfs"):
        digest(str(base), offline=True)


# --- pixels and latents


def test_latents_are_the_scaled_mode_that_diffusers_gives(backbone: Backbone) -> None:
    """Bit for bit, and twice the same: the mode is not drawn."""
    pixels = tiles(3)
    with torch.no_grad():
        expected = backbone.vae.encode(pixels).latent_dist.mode() * backbone.vae.config.scaling_factor
    assert torch.equal(encode(backbone.vae, pixels), expected)
    assert torch.equal(encode(backbone.vae, pixels), expected)
    assert expected.shape == (3, 4, 8, 8)


def test_decoded_latents_are_those_of_diffusers_and_not_clipped(backbone: Backbone) -> None:
    """Who wants pixels clips them."""
    latents = 30 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = backbone.vae.decode(latents / backbone.vae.config.scaling_factor).sample
    assert torch.equal(decode(backbone.vae, latents), expected)
    assert expected.abs().max() > 1


def test_tiles_beyond_a_chunk_are_encoded_and_decoded_alike(backbone: Backbone) -> None:
    """In order, and near to what each gives alone."""
    pixels = tiles(CHUNK_TILES + 2)
    latents = encode(backbone.vae, pixels)
    rebuilt = decode(backbone.vae, latents)
    for index in (0, CHUNK_TILES - 1, CHUNK_TILES, CHUNK_TILES + 1):
        one = slice(index, index + 1)
        torch.testing.assert_close(latents[one], encode(backbone.vae, pixels[one]), atol=1e-5, rtol=0)
        torch.testing.assert_close(rebuilt[one], decode(backbone.vae, latents[one]), atol=1e-5, rtol=0)


def test_latents_may_enter_training(backbone: Backbone) -> None:
    """They carry no gradients, but others may pass by."""
    weight = torch.ones(1, requires_grad=True)
    (encode(backbone.vae, tiles(1)) * weight).sum().backward()
    assert weight.grad is not None


def test_a_vae_in_half_precision_takes_float32(backbone: Backbone) -> None:
    """As on a GPU; the latents are close."""
    half = random_backbone("tiny").vae.to(torch.bfloat16)
    latents = encode(half, tiles(2))
    assert latents.dtype == torch.bfloat16
    assert (latents.float() - encode(backbone.vae, tiles(2))).abs().max() < 0.1
    assert decode(half, latents.float()).dtype == torch.bfloat16


# --- random models


def test_equal_seeds_make_equal_files(random_base: Path, tmp_path: Path) -> None:
    """And another seed other weights."""
    write_random_backbone(tmp_path / "same", size="tiny", texts=("lymph node", "germinal center", "small cells"))
    names = sorted(path.relative_to(random_base) for path in random_base.rglob("*.*"))
    assert all((tmp_path / "same" / name).read_bytes() == (random_base / name).read_bytes() for name in names)
    write_random_backbone(tmp_path / "other", size="tiny", seed=1)
    assert (tmp_path / "other" / UNET).read_bytes() != (random_base / UNET).read_bytes()


def test_the_tokenizer_knows_the_words_it_was_made_from_and_takes_any_other(backbone: Backbone) -> None:
    """One token for a known word, never an unknown one."""
    start, *tokens, end = backbone.tokenizer("Germinal center")["input_ids"]
    assert len(tokens) == 2
    assert (start, end) == (backbone.tokenizer.bos_token_id, backbone.tokenizer.eos_token_id)
    strange = backbone.tokenizer("Ki-67+ (µm) клетка")["input_ids"][1:-1]
    assert end not in strange


def test_latents_of_a_random_base_are_about_as_large_as_noise(backbone: Backbone) -> None:
    """Otherwise a test would see noise only."""
    gradient = np.linspace(-1, 1, 64, dtype=np.float32)
    waves = np.stack([np.sin(3 * gradient + phase)[:, None] * gradient for phase in range(3)])
    assert 0.2 < encode(backbone.vae, torch.from_numpy(waves)[None]).std() < 2


def test_the_full_size_is_the_architecture_of_sd_1_5() -> None:
    """Its published numbers of weights, and tensors; nothing is allocated."""
    with torch.device("meta"):
        full = random_backbone("sd15")
    parts = {part: getattr(full, part) for part in ("unet", "vae", "text_encoder")}
    counts = {part: sum(tensor.numel() for tensor in network.parameters()) for part, network in parts.items()}
    assert counts == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert {part: len(network.state_dict()) for part, network in parts.items()} == {
        "unet": 686, "vae": 248, "text_encoder": 196,
    }  # fmt: skip
    assert (full.latent_scale, full.downsampling, full.unet.config.cross_attention_dim) == (0.18215, 8, 768)


@pytest.mark.slow
def test_the_full_size_runs() -> None:
    """One small tile, from pixels to pixels."""
    full = random_backbone("sd15")
    latents = encode(full.vae, tiles(1))
    with torch.no_grad():
        tokens = full.tokenizer("lymph node", padding="max_length", return_tensors="pt")["input_ids"]
        predicted = full.unet(latents, torch.tensor(674), full.text_encoder(tokens)[0]).sample
    assert torch.isfinite(decode(full.vae, predicted)).all()
