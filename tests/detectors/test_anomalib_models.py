"""Facts about the models of anomalib beyond the contract. All but those about its absence need the library."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from wsi_anomaly.detectors.anomalib_library import library
from wsi_anomaly.detectors.anomalib_models import MODELS, Anomalib, AnomalibLocalizer
from wsi_anomaly.detectors.protocol import Localizer
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.options import parse_options
from wsi_anomaly.synthetic import synthetic_tiles
from wsi_anomaly.testing import DetectorContract, TilesInMemory, batch_of, smooth_tiles

TINY = Anomalib(model="padim", image_px=64)
RESNET: dict[str, Any] = {"backbone": "resnet18"}
installed = pytest.mark.skipif(
    find_spec("anomalib") is None, reason="needs the extra: pip install wsi-anomaly[anomalib]"
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for an address fails: weights would come from one."""

    def refuse(*arguments: object, **_: object) -> None:
        raise AssertionError(f"went to the network: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@installed
class TestPadim(DetectorContract):
    """The contract, for a model that remembers and makes maps."""

    detector = TINY
    fit_tiles = 140


@installed
class TestPatchcore(DetectorContract):
    """The contract, for a model whose memory grows with the tiles."""

    detector = Anomalib(model="patchcore", image_px=64, parameters=RESNET | {"coreset_sampling_ratio": 0.01})
    fit_tiles = 140


@installed
class TestFastflow(DetectorContract):
    """The contract, for a model that learns."""

    detector = Anomalib(model="fastflow", image_px=64, epochs=1)
    fit_tiles = 140


@installed
class TestDfkde(DetectorContract):
    """The contract, for a model without maps."""

    detector = Anomalib(model="dfkde", image_px=64, parameters=RESNET)
    fit_tiles = 140


@pytest.fixture(scope="module")
def checkpoint(fitted: Callable[..., Path]) -> Path:
    """A fitted PaDiM."""
    if find_spec("anomalib") is None:
        pytest.skip("needs the extra: pip install wsi-anomaly[anomalib]")
    return fitted(TINY, TilesInMemory(smooth_tiles(24, 64, seed=1)))


@pytest.mark.skipif(find_spec("anomalib") is not None, reason="anomalib is installed here")
def test_without_the_library_the_message_says_what_to_install(tmp_path: Path) -> None:
    """Both for fitting and for loading a model that was fitted elsewhere."""
    with pytest.raises(OptionsError, match=r"pip install 'wsi-anomaly\[anomalib\]'"):
        TINY.fit(TilesInMemory(smooth_tiles(4, 64, seed=1)), tmp_path, device="cpu")
    (tmp_path / "anomalib.json").write_text(json.dumps({"format_version": 1}))
    with pytest.raises(OptionsError, match=r"pip install 'wsi-anomaly\[anomalib\]'"):
        TINY.load(tmp_path, device="cpu")


@pytest.mark.parametrize(("name", "hint"), [("patchcor", "did you mean 'patchcore'"), ("zzz", "known: dfkde")])
def test_a_model_that_there_is_not_is_refused(name: str, hint: str) -> None:
    """The message names the nearest one."""
    with pytest.raises(OptionsError, match=hint):
        parse_options(Anomalib, {"model": name}, where="test")


def test_too_few_tiles_are_refused(tmp_path: Path) -> None:
    """The message says how many are needed."""
    with pytest.raises(CohortError, match="learn from: 1, needed: at least 2"):
        TINY.fit(TilesInMemory(smooth_tiles(1, 64, seed=1)), tmp_path, device="cpu")


def test_backbone_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    """The message names the option."""
    lacking = Anomalib(backbone_weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(ModelError, match=r"none\.safetensors: cannot be read .*backbone_weights"):
        lacking.fit(TilesInMemory(smooth_tiles(4, 64, seed=1)), tmp_path, device="cpu")


def test_the_model_of_another_detector_is_refused(tmp_path: Path) -> None:
    """Its folder lacks what this one notes."""
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match="of another detector"):
        TINY.load(tmp_path, device="cpu")


@installed
def test_every_model_is_one_of_the_library() -> None:
    """The names that are offered are those of classes."""
    images = library("anomalib.models.image")
    assert not [name for name in MODELS.values() if not hasattr(images, name)]


@installed
def test_parameters_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    """The message is the library's, with the name."""
    with pytest.raises(OptionsError, match="unheard_of"):
        Anomalib(parameters={"unheard_of": 1}).fit(TilesInMemory(smooth_tiles(4, 64, seed=1)), tmp_path, device="cpu")


@installed
def test_the_backbone_is_that_of_the_file(tmp_path: Path) -> None:
    """Weights of timm's own names are read from the file, and travel with the fitted model."""
    timm = __import__("timm")
    backbone = timm.create_model("resnet18", pretrained=False)
    torch.nn.init.constant_(backbone.conv1.weight, 0.125)
    save_file(backbone.state_dict(), tmp_path / "resnet18.safetensors")
    detector = Anomalib(model="padim", image_px=64, backbone_weights=str(tmp_path / "resnet18.safetensors"))
    detector.fit(TilesInMemory(smooth_tiles(8, 64, seed=1)), tmp_path / "model", device="cpu")
    os.remove(tmp_path / "resnet18.safetensors")  # noqa: PTH107 - as a user would lose it
    weights = load_file(tmp_path / "model" / "weights.safetensors")
    assert (weights["feature_extractor.feature_extractor.conv1.weight"] == 0.125).all()
    scorer = detector.load(tmp_path / "model", device="cpu")
    assert np.isfinite(scorer.score(batch_of(smooth_tiles(2, 64, seed=2)))).all()


@installed
def test_the_score_is_the_highest_value_of_the_map(checkpoint: Path) -> None:
    """Where tiles have the size that the model sees, nothing is resized and nothing normalised."""
    scorer, batch = TINY.load(checkpoint, device="cpu"), batch_of(smooth_tiles(3, 64, seed=2))
    assert isinstance(scorer, AnomalibLocalizer)
    assert isinstance(scorer, Localizer)
    assert scorer.score(batch)[:, 0] == pytest.approx(scorer.score_map(batch).max(axis=(1, 2)), rel=1e-5)


@installed
@pytest.mark.parametrize(("name", "parameters"), [("ganomaly", {"n_features": 16}), ("stfpm", {})])
def test_models_that_take_long_to_learn_survive_their_folder(
    name: str, parameters: dict[str, Any], tmp_path: Path
) -> None:
    """Two optimizers, a teacher and a student: all that scores depend on is saved. Ranking is not asked of them."""
    detector = Anomalib(model=name, image_px=64, epochs=1, parameters=parameters)
    detector.fit(TilesInMemory(smooth_tiles(32, 64, seed=1)), tmp_path, device="cpu")
    batch = batch_of(smooth_tiles(3, 64, seed=2))
    scores = [detector.load(tmp_path, device="cpu").score(batch) for _ in range(2)]
    assert np.isfinite(scores[0]).all()
    assert np.array_equal(*scores)


@installed
def test_tiles_that_the_model_was_not_built_for_are_told_with_the_parameter(tmp_path: Path) -> None:
    """`fre` wants to be told how many features there are, which depends on the size of the tiles."""
    tiles = TilesInMemory(smooth_tiles(4, 64, seed=1))
    detector = Anomalib(model="fre", image_px=64, epochs=1, parameters=RESNET)
    with pytest.raises(OptionsError, match=r"'fre' does not fit tiles of 64 px.*4x1024 and 65536.*input_dim"):
        detector.fit(tiles, tmp_path, device="cpu")
    fitting = detector.model_copy(update={"parameters": RESNET | {"input_dim": 1024}})
    fitting.fit(tiles, tmp_path, device="cpu")


@installed
def test_models_learn_in_full_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all other detectors do, so that a GPU learns what a CPU would."""
    fre, seen = library("anomalib.models.image").Fre, []
    step = fre.training_step

    def watched(*arguments: object) -> object:
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic))
        return step(*arguments)

    monkeypatch.setattr(fre, "training_step", watched)
    detector = Anomalib(model="fre", image_px=64, epochs=1, parameters=RESNET | {"input_dim": 1024})
    detector.fit(TilesInMemory(smooth_tiles(4, 64, seed=1)), tmp_path, device="cpu")
    assert seen == [(False, True)]


@pytest.fixture
def efficient_ad(tmp_path: Path) -> Anomalib:
    """A small one, with a folder of pictures and its teacher in a file."""
    (tmp_path / "pictures" / "clouds").mkdir(parents=True)
    for number, pixels in enumerate(smooth_tiles(2, 32, seed=5)):
        Image.fromarray(pixels).save(tmp_path / "pictures" / "clouds" / f"{number}.png")
    small = library("anomalib.models.image.efficient_ad.torch_model").SmallPatchDescriptionNetwork(out_channels=4)
    torch.nn.init.constant_(small.conv1.bias, 0.125)
    torch.save(small.state_dict(), tmp_path / "teacher.pth")
    parameters = {"teacher_out_channels": 4, "imagenet_dir": str(tmp_path / "pictures")}
    return Anomalib(
        model="efficient_ad", epochs=1, backbone_weights=str(tmp_path / "teacher.pth"), parameters=parameters
    )


@installed
@pytest.mark.slow
def test_efficient_ad_learns_from_files_alone(
    efficient_ad: Anomalib, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The teacher is that of the file, a tile held out gives the scale of the maps, and the library shows nothing."""
    tiles = TilesInMemory(smooth_tiles(3, 256, seed=1))
    efficient_ad.fit(tiles, tmp_path / "model", device="cpu")
    assert not capfd.readouterr().err
    shutil.rmtree(tmp_path / "pictures")
    weights = load_file(tmp_path / "model" / "weights.safetensors")
    assert (weights["teacher.conv1.bias"] == 0.125).all()
    assert (weights["student.conv1.bias"] != 0.125).all()
    assert 0 < weights["quantiles.qa_st"] < weights["quantiles.qb_st"]
    batch = batch_of(smooth_tiles(2, 256, seed=2))
    scorers = [efficient_ad.load(tmp_path / "model", device="cpu") for _ in range(2)]
    scores = [scorer.score(batch) for scorer in scorers]
    assert np.array_equal(*scores)
    assert isinstance(scorers[0], AnomalibLocalizer)
    assert scores[0][:, 0] == pytest.approx(scorers[0].score_map(batch).max(axis=(1, 2)), rel=1e-5)


@installed
def test_efficient_ad_says_what_it_lacks(efficient_ad: Anomalib, tmp_path: Path) -> None:
    """Pictures, tiles that are large enough, and a teacher that is one."""
    tiles = TilesInMemory(smooth_tiles(3, 256, seed=1))

    def refused(error: type[Exception], message: str, **changes: object) -> None:
        with pytest.raises(error, match=message):
            efficient_ad.model_copy(update=changes).fit(tiles, tmp_path / "model", device="cpu")

    refused(OptionsError, "imagenette: holds no folders of pictures.*imagenet_dir under", parameters={})
    (tmp_path / "empty").mkdir()
    refused(OptionsError, "empty: holds no folders", parameters={"imagenet_dir": str(tmp_path / "empty")})
    refused(OptionsError, "image_px is 128: efficient_ad sees tiles of 256 px or more", image_px=128)
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    refused(
        ModelError, "another architecture.*pretrained_teacher_small", backbone_weights=f"{tmp_path}/other.safetensors"
    )


@installed
@pytest.mark.slow
def test_a_damaged_picture_is_told_with_its_folder(efficient_ad: Anomalib, tmp_path: Path) -> None:
    """Not with a traceback in the middle of training."""
    for path in (tmp_path / "pictures" / "clouds").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(OptionsError, match="pictures: one of the pictures cannot be read"):
        efficient_ad.fit(TilesInMemory(smooth_tiles(2, 256, seed=1)), tmp_path / "model", device="cpu")


@installed
def test_one_colour_does_no_harm(checkpoint: Path) -> None:
    """White, black and grey tiles have finite scores and maps."""
    scorer = TINY.load(checkpoint, device="cpu")
    assert isinstance(scorer, AnomalibLocalizer)
    batch = batch_of(np.stack([np.full((64, 64, 3), grey, np.uint8) for grey in (0, 128, 255)]))
    assert np.isfinite(scorer.score(batch)).all()
    assert np.isfinite(scorer.score_map(batch)).all()


@installed
def test_another_model_than_was_fitted_is_refused_by_name(checkpoint: Path) -> None:
    """The message names the option, with both values."""
    with pytest.raises(ModelError, match="model is padim, not stfpm"):
        Anomalib(model="stfpm", image_px=64).load(checkpoint, device="cpu")


@installed
def test_fitting_leaves_global_random_states_as_they_were(tmp_path: Path) -> None:
    """The library draws from them, and nobody else shall notice."""
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    TINY.fit(TilesInMemory(smooth_tiles(8, 64, seed=1)), tmp_path, device="cpu")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]  # noqa: NPY002


@installed
@pytest.mark.slow
def test_made_up_metastases_score_higher_than_made_up_normal_tissue(tmp_path: Path) -> None:
    """Even with a backbone that has learnt nothing."""
    learnt = np.stack([pixels for pixels, _ in synthetic_tiles(1, 48)])
    tested = np.stack([pixels for pixels, _ in synthetic_tiles(2, 32, kinds=("normal", "metastasis"))])
    parameters = RESNET | {"coreset_sampling_ratio": 0.01}
    detector = Anomalib(model="patchcore", image_px=128, parameters=parameters)
    detector.fit(TilesInMemory(learnt), tmp_path, device="cpu")
    scores = detector.load(tmp_path, device="cpu").score(batch_of(tested))[:, 0]
    normal, odd = scores[::2], scores[1::2]
    assert (odd[:, None] > normal).mean() >= 0.8
