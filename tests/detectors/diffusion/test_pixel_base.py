"""Facts about a base that works on pixels: what is loaded, what is refused, what its digest depends on."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file

from wsi_anomaly.detectors.diffusion.backbone import quiet_libraries
from wsi_anomaly.detectors.diffusion.pixel import NetworkSizes, PixelModel, ScheduleOptions, model_from_scratch
from wsi_anomaly.detectors.diffusion.pixel_base import load_pixel_base
from wsi_anomaly.errors import ModelError

pytestmark = pytest.mark.usefixtures("no_network")
REPOSITORY = "laboratory/ddpm"
SIZES = NetworkSizes(channels=(8, 16), layers_per_level=1, attention_levels=(1,), head_channels=8, norm_groups=4)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def model() -> PixelModel:
    """What the bases hold."""
    return model_from_scratch(SIZES, ScheduleOptions(), seed=0)


@pytest.fixture
def nested(model: PixelModel, tmp_path: Path) -> Path:
    """A folder as diffusers saves a pipeline."""
    with quiet_libraries():
        DDPMPipeline(model.unet, DDPMScheduler(beta_end=0.015)).save_pretrained(tmp_path / "nested")
    return tmp_path / "nested"


@pytest.fixture
def flat(nested: Path, tmp_path: Path) -> Path:
    """A folder as the repositories of google/ddpm-* are."""
    folder = tmp_path / "flat"
    shutil.copytree(nested / "unet", folder)
    shutil.copy(nested / "scheduler/scheduler_config.json", folder)
    shutil.copy(nested / "model_index.json", folder)
    return folder


def change_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; those set to None are taken away."""
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in table.items() if value is not None}))


def assert_same_weights(found: PixelModel, wanted: PixelModel) -> None:
    """To the bit, in float32."""
    ours, theirs = found.unet.state_dict(), wanted.unet.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_both_layouts_are_read(
    layout: str, model: PixelModel, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    """Weights, sizes and schedule; without dropout, ready to learn, and without a word from the library."""
    state = torch.get_rng_state()
    loaded, _ = load_pixel_base(str(request.getfixturevalue(layout)), offline=True)
    assert_same_weights(loaded, model)
    assert loaded.description["unet"] == model.description["unet"]
    assert loaded.schedule_config["beta_end"] == 0.015
    assert not loaded.unet.training
    assert all(weights.requires_grad for weights in loaded.unet.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


def test_attention_under_its_older_names_is_read(flat: Path, model: PixelModel) -> None:
    """As the checkpoints of 2022 have it."""
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(flat / WEIGHTS)
    for name in [*weights]:
        for new, old in older.items():
            if f".{new}." in name:
                weights[name.replace(f".{new}.", f".{old}.")] = weights.pop(name)
    assert any("proj_attn" in name for name in weights)
    save_file(weights, flat / WEIGHTS, {"format": "pt"})
    assert_same_weights(load_pixel_base(str(flat), offline=True)[0], model)


def test_a_pickle_is_read_where_there_are_no_safetensors(flat: Path, model: PixelModel) -> None:
    """And only tensors of it."""
    torch.save(load_file(flat / WEIGHTS), flat / "diffusion_pytorch_model.bin")
    (flat / WEIGHTS).unlink()
    assert_same_weights(load_pixel_base(str(flat), offline=True)[0], model)
    torch.save({"weight": Trap(flat / "sprung")}, flat / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.bin: cannot be loaded"):
        load_pixel_base(str(flat), offline=True)
    assert not (flat / "sprung").exists()


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.mkdir, (self.folder,))


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel, not a UNet2DModel"),
        ("unet/config.json", {"_class_name": "DiTTransformer2DModel"}, "is a DiTTransformer2DModel"),
        ("unet/config.json", {"_class_name": None}, "not that of a network of diffusers"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "score model of continuous noise levels"),
        ("unet/config.json", {"num_class_embeds": 10}, "wants to be told the class"),
        ("unet/config.json", {"in_channels": 1, "out_channels": 1}, "has in_channels 1, not 3"),
        ("unet/config.json", {"out_channels": 6}, "has out_channels 6, not 3"),
        ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "is a DDPMPipeline, which works on the latents"),
        ("model_index.json", {"transformer": ["diffusers", "DiT"]}, "a diffusion transformer"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "ScoreSdeVeScheduler", "beta_schedule": None},
            "noise levels are those of a ScoreSdeVeScheduler",
        ),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type 'sample'"),
    ],
)
def test_another_family_is_refused_by_its_name(file: str, changes: dict[str, object], said: str, nested: Path) -> None:
    """Before any weights are opened: there are none."""
    change_json(nested / file, **changes)
    (nested / "unet" / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=said) as raised:
        load_pixel_base(str(nested), offline=True)
    assert str(nested) in str(raised.value)
    assert "google/ddpm-celebahq-256" in str(raised.value)


def test_a_base_for_latents_is_refused(random_base: Path) -> None:
    """Stable Diffusion is a base of another detector."""
    with pytest.raises(ModelError, match="is a StableDiffusionPipeline, which works on the latents of a VAE"):
        load_pixel_base(str(random_base), offline=True)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("unet/config.json", r"lacks config\.json of a UNet2DModel"),
        ("scheduler/scheduler_config.json", r"lacks scheduler_config\.json"),
        (f"unet/{WEIGHTS}", r"lacks diffusion_pytorch_model\.safetensors or diffusion_pytorch_model\.bin"),
    ],
)
def test_a_missing_file_is_named(lost: str, said: str, nested: Path) -> None:
    """With the folder it should be in."""
    (nested / lost).unlink()
    with pytest.raises(ModelError, match=said) as raised:
        load_pixel_base(str(nested), offline=True)
    assert str(nested) in str(raised.value)


def test_a_single_file_is_refused(nested: Path) -> None:
    """A checkpoint alone does not say what it is of."""
    with pytest.raises(ModelError, match="is a single file, not a folder"):
        load_pixel_base(str(nested / "unet" / WEIGHTS), offline=True)


@pytest.mark.parametrize("file", [f"unet/{WEIGHTS}", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("size", [0, 30])
def test_a_damaged_file_is_named(file: str, size: int, nested: Path) -> None:
    """Wherever it was cut off."""
    (nested / file).write_bytes((nested / file).read_bytes()[:size])
    with pytest.raises(ModelError, match=rf"{file}: (is damaged|cannot be loaded)"):
        load_pixel_base(str(nested), offline=True)


def test_weights_that_lack_a_tensor_are_refused(nested: Path) -> None:
    """The library would put random numbers there."""
    path = nested / "unet" / WEIGHTS
    weights = load_file(path)
    del weights["conv_in.bias"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing keys, such as conv_in\.bias"):
        load_pixel_base(str(nested), offline=True)


def test_the_digest_is_of_the_files_that_count_not_of_their_place(nested: Path, flat: Path) -> None:
    """Any of the three changes it."""
    found = {load_pixel_base(str(folder), offline=True)[1] for folder in (nested, flat)}
    (nested / "README.md").write_text("Read me.")
    found.add(load_pixel_base(str(nested), offline=True)[1])
    assert len(found) == 1
    change_json(nested / "scheduler/scheduler_config.json", beta_end=0.016)
    found.add(load_pixel_base(str(nested), offline=True)[1])
    change_json(nested / "unet/config.json", dropout=0.1)
    found.add(load_pixel_base(str(nested), offline=True)[1])
    weights = load_file(nested / "unet" / WEIGHTS)
    save_file(weights | {"conv_in.bias": weights["conv_in.bias"] + 1}, nested / "unet" / WEIGHTS, {"format": "pt"})
    found.add(load_pixel_base(str(nested), offline=True)[1])
    assert len(found) == 4


# --- from the hub


@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_a_copy_in_the_cache_of_the_hub_is_used_offline(
    layout: str, model: PixelModel, hub_cache: Path, request: pytest.FixtureRequest
) -> None:
    """Nothing is asked of the network."""
    root = hub_cache / f"models--{REPOSITORY.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("1234")
    shutil.copytree(request.getfixturevalue(layout), root / "snapshots/1234")
    assert_same_weights(load_pixel_base(REPOSITORY, offline=True)[0], model)


def test_offline_without_a_copy_says_what_to_do() -> None:
    """Nothing is asked of the network."""
    with pytest.raises(ModelError, match=rf"{REPOSITORY}.*--offline.*copy the repository's files into a folder"):
        load_pixel_base(REPOSITORY, offline=True)


def test_of_a_repository_only_the_needed_files_are_fetched(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of another family not even its weights."""
    names = ["README.md", "model_index.json", "config.json", "scheduler_config.json", "images/grid.png"]
    names += [WEIGHTS, "diffusion_pytorch_model.bin"]
    patterns: set[str] = set()

    def fetch(_: str, *, allow_patterns: list[str] | None = None, local_files_only: bool = False) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("none")
        patterns.update(allow_patterns or ["*"])
        return str(flat)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    load_pixel_base(REPOSITORY, offline=False)
    tables = {"model_index.json", "config.json", "scheduler_config.json"}
    assert patterns & set(names) == tables | {WEIGHTS}
    patterns.clear()
    change_json(flat / "config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(ModelError, match=f"{REPOSITORY}: its network is a UNet2DConditionModel"):
        load_pixel_base(REPOSITORY, offline=False)
    assert patterns & set(names) == tables


def test_a_base_that_comes_with_the_package_is_looked_at_and_said_to_be_no_pixel_base() -> None:
    """It is found where it lies, and not looked for on the hub."""
    with pytest.raises(ModelError, match=r"shipped:lymph-node-small/base: is a StableDiff.*Needed is a DDPM"):
        load_pixel_base("shipped:lymph-node-small/base", offline=True)
