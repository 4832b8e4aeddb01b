"""Facts about AnoDDPM beyond the contract: bases, kinds of noise, in-painting, several starts, what it refuses."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wsi_anomaly.torchvision_shim import make_importable

make_importable()  # diffusers looks for torchvision

from diffusers import DDPMPipeline, DDPMScheduler  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from wsi_anomaly.detectors.anoddpm import AnoDdpm, AnoDdpmTraining  # noqa: E402
from wsi_anomaly.detectors.diffusion.backbone import quiet_libraries  # noqa: E402
from wsi_anomaly.detectors.diffusion.noise import simplex_noise, tile_noise  # noqa: E402
from wsi_anomaly.detectors.diffusion.pixel import NetworkSizes, ScheduleOptions, model_from_scratch  # noqa: E402
from wsi_anomaly.detectors.diffusion.samplers import Ancestral, Ddim  # noqa: E402
from wsi_anomaly.detectors.protocol import Accountable, Based, Detector, Localizer, Reconstructor  # noqa: E402
from wsi_anomaly.errors import CohortError, ModelError, OptionsError  # noqa: E402
from wsi_anomaly.options import parse_options  # noqa: E402
from wsi_anomaly.testing import DetectorContract, TilesInMemory, batch_of, odd_tiles, smooth_tiles  # noqa: E402

PX = 16
SIZES = NetworkSizes(channels=(8, 16), layers_per_level=1, attention_levels=(), head_channels=8, norm_groups=4)
TRAINING = AnoDdpmTraining(steps=40, batch_size=8, learning_rate=1e-3, save_every=10)
TINY = AnoDdpm(sizes=SIZES, timesteps=(100,), sampler=Ddim(steps=20, snap=False), training=TRAINING)
QUICK = TINY.model_copy(update={"training": TRAINING.model_copy(update={"steps": 2})})
Change = Callable[..., AnoDdpm]


class TestAnoDdpm(DetectorContract):
    """The contract, with a network of two levels that learns for 40 steps and starts from t = 100."""

    detector = TINY
    tile_px = PX


@pytest.fixture(scope="module")
def checkpoint(fitted: Callable[..., Path]) -> Path:
    """A fitted tiny network."""
    return fitted(TINY, normal_tiles())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base with another schedule than the default one."""
    unet = model_from_scratch(SIZES, ScheduleOptions(), seed=5).unet
    with quiet_libraries():
        DDPMPipeline(unet, DDPMScheduler(beta_end=0.015)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def normal_tiles(count: int = 48) -> TilesInMemory:
    """To learn from."""
    return TilesInMemory(smooth_tiles(count, PX, seed=1))


def changed(detector: AnoDdpm = TINY, **options: Any) -> AnoDdpm:
    """The same detector with other options, checked as those of a file are."""
    return AnoDdpm.model_validate({name: getattr(detector, name) for name in AnoDdpm.model_fields} | options)


def scores(detector: AnoDdpm, checkpoint: Path) -> np.ndarray:
    """Of ten normal tiles, then ten abnormal ones."""
    batch = batch_of(np.concatenate([make(10, PX, seed=2) for make in (smooth_tiles, odd_tiles)]))
    return detector.load(checkpoint, device="cpu").score(batch)


def test_it_is_a_detector_on_a_base_whose_scorer_shows_all_it_can(checkpoint: Path) -> None:
    """By the protocols that the stages ask for."""
    assert isinstance(TINY, Detector)
    assert isinstance(TINY, Based)
    scorer = TINY.load(checkpoint, device="cpu")
    assert all(isinstance(scorer, protocol) for protocol in (Reconstructor, Localizer, Accountable))


def test_the_score_is_the_mean_of_the_map(checkpoint: Path) -> None:
    """Both are the squared error of the same reconstruction, with intensities in [0, 1]."""
    scorer, batch = TINY.load(checkpoint, device="cpu"), batch_of(odd_tiles(3, PX, seed=5))
    assert scorer.score(batch)[:, 0] == pytest.approx(scorer.score_map(batch).mean(axis=(1, 2)), rel=1e-5)
    difference = (batch.pixels.astype(float) - scorer.reconstruct(batch)) / 255
    assert scorer.score(batch)[:, 0] == pytest.approx((difference**2).mean(axis=(1, 2, 3)), rel=0.02)


def test_several_starts_give_several_named_scores(checkpoint: Path) -> None:
    """In one run; each column is that of the start alone."""
    names = ("mse_pixel", "ms_ssim")
    several = changed(timesteps=(250, 50), scores=names)
    assert several.score_names == ("mse_pixel t250", "ms_ssim t250", "mse_pixel t50", "ms_ssim t50")
    table = scores(several, checkpoint)
    alone = [scores(changed(timesteps=(start,), scores=names), checkpoint) for start in (250, 50)]
    assert np.array_equal(table, np.concatenate(alone, axis=1))
    assert changed(scores=names).score_names == names


@pytest.mark.parametrize(("restoration", "calls"), [("noise", 3), ("inpaint", 6)])
def test_the_scorer_tells_how_it_walks(restoration: str, calls: int, checkpoint: Path) -> None:
    """From 100 through a grid of 20 steps: 100, 50, 0; in-painting asks for each half. The network counts the same."""
    scorer = changed(restoration=restoration, cell_px=4).load(checkpoint, device="cpu")
    network, seen = scorer.restorer.network, []
    unet = (network if restoration == "noise" else network._network).unet  # noqa: SLF001 - the one inside
    unet.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    scorer.score(batch_of(smooth_tiles(8, PX, seed=2)))
    assert scorer.facts["timesteps"] == [100]
    assert scorer.facts["network_calls"] == [calls]
    assert sum(seen) == calls * 8


def test_the_signal_to_noise_ratio_is_that_of_the_noise_that_is_added(checkpoint: Path, tmp_path: Path) -> None:
    """Simplex noise has a quarter of the variance that the schedule counts on; halves change nothing."""
    gaussian = TINY.load(checkpoint, device="cpu")
    (share,) = (gaussian.restorer.network.schedule.alpha_cumprod(t) for t in TINY.timesteps)
    assert gaussian.facts["snr"] == [pytest.approx(share / (1 - share))]
    simplex = changed(QUICK, noise="simplex")
    simplex.fit(normal_tiles(8), tmp_path, device="cpu")
    for restoration in ("noise", "inpaint"):
        scorer = changed(simplex, restoration=restoration, cell_px=4).load(tmp_path, device="cpu")
        assert scorer.facts["snr"] == [pytest.approx(4 * share / (1 - share))]
    added = simplex._noise_maker(1000)(np.arange(200, dtype=np.uint64), (3, PX, PX), 100)  # noqa: SLF001
    assert np.mean(added**2) == pytest.approx(0.25, rel=0.1)


# --- noise


def test_simplex_noise_is_what_is_added_and_what_is_learnt(tmp_path: Path) -> None:
    """The noise of a start is a slice of the tile's simplex field at that timestep."""
    seeds, shape = np.arange(2, dtype=np.uint64), (3, PX, PX)
    make_noise = changed(noise="simplex")._noise_maker(1000)  # noqa: SLF001 - what a restorer is given
    assert np.array_equal(make_noise(seeds, shape, 250), simplex_noise(seeds, shape, t=250))
    assert np.array_equal(make_noise(seeds, shape, 1000), tile_noise(seeds, shape, draw=1000))
    weights = []
    for noise in ("simplex", "gaussian"):
        changed(QUICK, noise=noise).fit(normal_tiles(), tmp_path / noise, device="cpu")
        weights.append(load_file(tmp_path / noise / "weights.safetensors")["conv_in.weight"])
    assert not torch.equal(*weights)


def test_ancestral_steps_with_simplex_noise_depend_on_the_seed_alone(tmp_path: Path) -> None:
    """The published form: fresh normal noise on the way back."""
    published = changed(QUICK, noise="simplex", timesteps=(249,), sampler=Ancestral(steps=40))
    published.fit(normal_tiles(8), tmp_path, device="cpu")
    table = scores(published, tmp_path)
    assert np.isfinite(table).all()
    tiles = np.concatenate([make(10, PX, seed=2) for make in (smooth_tiles, odd_tiles)])
    alone = batch_of(tiles[[7]], seeds=np.array([7], np.uint64))
    assert np.array_equal(published.load(tmp_path, device="cpu").score(alone), table[[7]])


def test_a_network_of_another_noise_is_refused(checkpoint: Path) -> None:
    """It would see as a finding what it never learnt to remove."""
    with pytest.raises(ModelError, match="noise is gaussian, not simplex"):
        changed(noise="simplex").load(checkpoint, device="cpu")


# --- in-painting


def test_in_painting_ranks_with_the_same_network(checkpoint: Path) -> None:
    """It is an option of scoring: nothing is learnt anew. A tile's score is the same alone."""
    inpaint = changed(restoration="inpaint", cell_px=4, timesteps=(400,))
    table = scores(inpaint, checkpoint)
    assert (table[10:] > table[:10].T).mean() > 0.9
    batch = batch_of(odd_tiles(10, PX, seed=2)[[3]], seeds=np.array([13], np.uint64))
    assert np.array_equal(inpaint.load(checkpoint, device="cpu").score(batch), table[[13]])
    assert inpaint.load(checkpoint, device="cpu").reconstruct(batch).shape == batch.pixels.shape


def test_in_painting_on_a_snapping_grid_is_refused() -> None:
    """A grid beside the start would take what is known for what it was at another level."""
    with pytest.raises(ValueError, match=r"Set sampler\.snap = false"):
        changed(restoration="inpaint", sampler=Ddim(snap=True))


# --- bases


def test_a_base_is_where_learning_starts_and_its_schedule_is_kept(base: Path, tmp_path: Path) -> None:
    """After two steps the weights are near those of the base, and no longer the same."""
    based = changed(QUICK, base=str(base))
    based.fit(normal_tiles(), tmp_path / "model", device="cpu")
    before = load_file(base / "unet/diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "model/weights.safetensors")
    distances = [float((after[name] - before[name]).abs().max()) for name in before]
    assert 0 < max(distances) < 0.01
    shares = based.load(tmp_path / "model", device="cpu").restorer.network.schedule.alphas_cumprod
    assert shares == pytest.approx(np.cumprod(1 - np.linspace(1e-4, 0.015, 1000)))


def test_scoring_needs_no_base(base: Path, tmp_path: Path) -> None:
    """All the weights are in the model; the options may still name where they began."""
    based = changed(QUICK, base=str(base))
    based.fit(normal_tiles(), tmp_path / "model", device="cpu")
    shutil.rmtree(base)
    assert np.isfinite(scores(based, tmp_path / "model")).all()


def test_the_same_base_at_another_place_is_the_same_fit(base: Path, tmp_path: Path) -> None:
    """A finished fit is left as it is; another base begins anew."""
    based = changed(QUICK, base=str(base))
    based.fit(normal_tiles(), tmp_path / "model", device="cpu")
    moved = shutil.move(base, tmp_path / "elsewhere")
    tiles = normal_tiles()
    based.on_base(str(moved), offline=True).fit(tiles, tmp_path / "model", device="cpu")
    assert tiles.reads == 1  # to tell whether they are the same
    QUICK.fit(tiles, tmp_path / "model", device="cpu")
    assert tiles.reads > 2


def test_a_base_can_be_moved_and_the_network_forbidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is given on the command line goes over what the pipeline file says."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    detector = changed(base="laboratory/ddpm")
    assert detector.on_base("", offline=True).base == "laboratory/ddpm"
    assert detector.on_base("other/ddpm", offline=False).base == "other/ddpm"
    with pytest.raises(ModelError, match=r"other/ddpm: is not on this machine, and --offline forbids"):
        detector.on_base("other/ddpm", offline=True).fit(normal_tiles(), tmp_path / "model", device="cpu")


def test_a_place_for_a_base_that_there_is_not_is_refused() -> None:
    """A model would be learnt that its own pipeline file does not describe."""
    assert TINY.on_base("", offline=True) == TINY.on_base("", offline=True)
    with pytest.raises(OptionsError, match=r"base model at /models/ddpm: this pipeline learns from scratch"):
        TINY.on_base("/models/ddpm", offline=False)


def test_a_base_of_another_family_is_refused(base: Path, tmp_path: Path) -> None:
    """Before anything is learnt."""
    path = base / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ModelError, match="its network is a UNet2DConditionModel, not a UNet2DModel"):
        changed(base=str(base)).fit(normal_tiles(), tmp_path / "model", device="cpu")


# --- bad input


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"scores": ["mse_latent"]}, "there are no latents: this network works on pixels. Use mse_pixel"),
        ({"scores": []}, "scores"),
        ({"timesteps": []}, "timesteps"),
        ({"timesteps": [250, 250]}, "the same twice"),
        ({"sampler": {"name": "ddim", "steps": 0}}, r"sampler\.ddim\.steps.*greater than or equal to 1"),
        ({"sampler": {"name": "euler"}}, "euler"),
        ({"noise": "perlin"}, "noise.*perlin"),
        ({"schedule": {"beta_end": 1.5}}, r"schedule\.beta_end"),
        ({"prompt": "tissue"}, "unknown key 'prompt'"),
    ],
)
def test_wrong_options_are_refused_by_name(table: dict[str, Any], said: str) -> None:
    """As they stand in a pipeline file."""
    with pytest.raises(OptionsError, match=said):
        parse_options(AnoDdpm, table, where="pipeline.toml [detector]")


@pytest.mark.parametrize("start", [0, 1000, -5])
def test_a_start_outside_the_schedule_is_refused_before_anything_is_learnt(
    start: int, checkpoint: Path, tmp_path: Path
) -> None:
    """And by a finished model."""
    outside = changed(timesteps=(100, start))
    with pytest.raises(OptionsError, match=f"start timestep {start} is not within the noise schedule"):
        outside.fit(normal_tiles(), tmp_path / "model", device="cpu")
    assert not (tmp_path / "model").exists()
    with pytest.raises(OptionsError, match=f"start timestep {start}"):
        outside.load(checkpoint, device="cpu")


def test_more_steps_than_timesteps_are_refused(checkpoint: Path) -> None:
    """There is nothing between two timesteps."""
    with pytest.raises(OptionsError, match="1001 steps are more than the 1000 timesteps"):
        changed(sampler=Ddim(steps=1001, snap=False)).load(checkpoint, device="cpu")


def test_missing_weights_for_lpips_are_noticed_before_anything_is_learnt(tmp_path: Path) -> None:
    """Not after days."""
    with pytest.raises(ModelError, match="lpips"):
        changed(scores=("lpips",)).fit(normal_tiles(), tmp_path / "model", device="cpu")
    assert not (tmp_path / "model").exists()


def test_the_weights_of_lpips_belong_to_the_model(lpips_weights: Path, tmp_path: Path) -> None:
    """Wherever they lie; others are refused, and the digest is told."""
    detector = changed(QUICK, scores=("lpips",), lpips_weights=str(lpips_weights))
    detector.fit(normal_tiles(8), tmp_path / "model", device="cpu")
    moved = Path(shutil.copy(lpips_weights, tmp_path / "moved.safetensors"))
    scorer = changed(detector, lpips_weights=str(moved)).load(tmp_path / "model", device="cpu")
    noted = json.loads((tmp_path / "model/lpips.json").read_text())["digest"]
    assert scorer.facts["lpips_digest"] == noted
    save_file(load_file(moved) | {"lin4.model.1.weight": torch.ones(1, 512, 1, 1)}, moved)
    with pytest.raises(ModelError, match=rf"moved.safetensors: these weights .* are not.*instead of {noted[:12]}"):
        changed(detector, lpips_weights=str(moved)).load(tmp_path / "model", device="cpu")


def test_a_model_without_lpips_notes_none(lpips_weights: Path, tmp_path: Path) -> None:
    """Nor keeps the note of an earlier fit; with the score it cannot be loaded, as it was never measured so."""
    detector = changed(QUICK, scores=("lpips",), lpips_weights=str(lpips_weights))
    detector.fit(normal_tiles(8), tmp_path, device="cpu")
    QUICK.fit(normal_tiles(8), tmp_path, device="cpu")
    assert "lpips_digest" not in QUICK.load(tmp_path, device="cpu").facts
    with pytest.raises(ModelError, match=r"lpips.json: is missing"):
        detector.load(tmp_path, device="cpu")


def test_no_tiles_are_refused(tmp_path: Path) -> None:
    """The message says where to look."""
    with pytest.raises(CohortError, match="no normal tiles to learn from"):
        TINY.fit(normal_tiles(0), tmp_path, device="cpu")


def test_tiles_that_the_network_cannot_halve_are_refused(tmp_path: Path) -> None:
    """By learning; by scoring only if they changed since."""
    with pytest.raises(OptionsError, match=r"15 x 15 px: the network needs a multiple of 2 px"):
        TINY.fit(TilesInMemory(smooth_tiles(8, 15, seed=1)), tmp_path, device="cpu")


def test_a_reconstruction_without_numbers_has_no_score(spoilt: Path, caplog: pytest.LogCaptureFixture) -> None:
    """NaN for the stages to leave out, a warning, and still a picture."""
    weights = load_file(spoilt / "weights.safetensors")
    label = label_of(spoilt)
    save_file(weights | {"conv_out.bias": torch.full((3,), torch.nan)}, spoilt / "weights.safetensors", label)
    scorer, batch = TINY.load(spoilt, device="cpu"), batch_of(smooth_tiles(3, PX, seed=2))
    with caplog.at_level(logging.WARNING):
        assert np.isnan(scorer.score(batch)).all()
    assert "3 tiles could not be restored" in caplog.text
    assert scorer.reconstruct(batch).dtype == np.uint8


def test_other_sizes_than_those_learnt_are_refused_by_name(checkpoint: Path) -> None:
    """The message names what differs, with both values."""
    other = changed(sizes=SIZES.model_copy(update={"channels": (8, 24)}))
    with pytest.raises(ModelError, match=r"unet\.block_out_channels is \[8, 16\], not \[8, 24\]"):
        other.load(checkpoint, device="cpu")
    with pytest.raises(ModelError, match=r"schedule\.beta_end is 0\.02, not 0\.015"):
        changed(schedule=ScheduleOptions(beta_end=0.015)).load(checkpoint, device="cpu")


@pytest.mark.parametrize("detector", [TINY, changed(base="laboratory/ddpm")], ids=["scratch", "base"])
def test_weights_of_a_newer_format_are_refused(detector: AnoDdpm, spoilt: Path) -> None:
    """A file of a later version is not guessed at."""
    weights = load_file(spoilt / "weights.safetensors")
    save_file(weights, spoilt / "weights.safetensors", {"wsi_anomaly": json.dumps({"format_version": 2})})
    with pytest.raises(ModelError, match=r"weights\.safetensors: its format version is 2.* reads 1"):
        detector.load(spoilt, device="cpu")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"format_version": 2}', r"format version is 2.* reads 1"),
        ('{"format_version": 1}', "describes no network"),
        ('{"format', "is damaged"),
        ("[]", "is damaged"),
        (None, "is missing"),
    ],
)
def test_a_wrong_description_of_the_network_is_refused(content: str | None, said: str, spoilt: Path) -> None:
    """Where a base was named, sizes come from the model."""
    path = spoilt / "network.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(ModelError, match=rf"network\.json: .*{said}"):
        changed(base="laboratory/ddpm").load(spoilt, device="cpu")


def test_truncated_weights_are_refused(spoilt: Path) -> None:
    """As after a copy that broke off."""
    path = spoilt / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="damaged"):
        TINY.load(spoilt, device="cpu")


def label_of(folder: Path) -> dict[str, str]:
    """What the weights say of themselves."""
    from safetensors import safe_open

    with safe_open(folder / "weights.safetensors", framework="pt") as file:
        return dict(file.metadata())
