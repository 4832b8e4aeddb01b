"""Facts about the autoencoder beyond the contract: its score, its network, what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wsi_anomaly.detectors.autoencoder import Autoencoder, AutoencoderNetwork, AutoencoderScorer
from wsi_anomaly.detectors.training import TrainingOptions
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.testing import DetectorContract, TilesInMemory, batch_of, odd_tiles, smooth_tiles

TINY = Autoencoder(channels=(8, 8), training=TrainingOptions(learning_rate=1e-2, batch_size=8, max_epochs=5))


class TestAutoencoder(DetectorContract):
    """The contract, with a network of two layers."""

    detector = TINY


@pytest.fixture(scope="module")
def checkpoint(fitted: Callable[..., Path]) -> Path:
    """A fitted tiny autoencoder."""
    return fitted(TINY, TilesInMemory(smooth_tiles(24, 32, seed=1)))


def test_the_score_is_the_mean_of_the_map(checkpoint: Path) -> None:
    """Exactly, not nearly: both come from the same numbers."""
    scorer, batch = TINY.load(checkpoint, device="cpu"), batch_of(odd_tiles(3, 32, seed=5))
    means = [one.mean(dtype=np.float64) for one in scorer.score_map(batch)]
    assert scorer.score(batch)[:, 0].tolist() == np.array(means, np.float32).tolist()


def test_the_score_is_a_squared_error_on_intensities_from_zero_to_one(checkpoint: Path) -> None:
    """Score and reconstruction belong together, up to the rounding and clipping of pixels."""
    scorer, batch = TINY.load(checkpoint, device="cpu"), batch_of(smooth_tiles(4, 32, seed=6))
    difference = (batch.pixels.astype(float) - scorer.reconstruct(batch)) / 255
    assert scorer.score(batch)[:, 0] == pytest.approx((difference**2).mean(axis=(1, 2, 3)), abs=2e-4, rel=0.02)


def test_the_map_points_at_the_anomaly(checkpoint: Path) -> None:
    """The planted square in the middle stands out of the rim of its tile."""
    errors = TINY.load(checkpoint, device="cpu").score_map(batch_of(odd_tiles(4, 32, seed=7)))
    assert errors[:, 10:22, 10:22].mean() > 5 * errors[:, :4].mean()


def test_the_network_of_default_width_is_the_one_of_the_method() -> None:
    """Two million weights, and a middle of 256 x 16 x 16 for a tile of 256 px."""
    network = AutoencoderNetwork(Autoencoder().channels, torch.Generator())
    assert sum(weights.numel() for weights in network.parameters()) == pytest.approx(2.0e6, rel=0.01)
    with torch.inference_mode():
        assert network.eval().layers[:12](torch.zeros(1, 3, 256, 256)).shape == (1, 256, 16, 16)


def test_scores_of_the_network_of_default_width_do_not_depend_on_the_batch() -> None:
    """Bit for bit, with the kernels that full-sized layers get."""
    network = AutoencoderNetwork(Autoencoder().channels, torch.Generator().manual_seed(0)).eval()
    scorer = AutoencoderScorer(network, torch.device("cpu"))
    tiles = np.concatenate([smooth_tiles(7, 64, seed=1), odd_tiles(6, 64, seed=2)])
    alone = [scorer.score(batch_of(tiles[[i]]))[0] for i in range(len(tiles))]
    assert np.array_equal(scorer.score(batch_of(tiles[::-1].copy())), np.array(alone)[::-1])


def test_first_weights_depend_on_the_seed_alone() -> None:
    """The caller's random state neither decides the weights nor is used up."""
    state = torch.get_rng_state()
    one = AutoencoderNetwork((4,), torch.Generator().manual_seed(1)).layers[0].weight
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(AutoencoderNetwork((4,), torch.Generator().manual_seed(1)).layers[0].weight, one)
    assert not torch.equal(AutoencoderNetwork((4,), torch.Generator().manual_seed(2)).layers[0].weight, one)


@pytest.mark.parametrize("tile_px", [30, 4])
def test_tiles_that_the_layers_cannot_halve_are_refused(tile_px: int, tmp_path: Path) -> None:
    """The message says which sizes are possible."""
    with pytest.raises(OptionsError, match=f"{tile_px} x {tile_px} px.* multiple of 4 px, at least 8"):
        TINY.fit(TilesInMemory(smooth_tiles(8, tile_px, seed=1)), tmp_path, device="cpu")


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_tiles_are_refused(count: int, tmp_path: Path) -> None:
    """The message says how many there are and how many are needed."""
    with pytest.raises(CohortError, match=f"learn from: {count}, needed: at least 2"):
        TINY.fit(TilesInMemory(smooth_tiles(count, 32, seed=1)), tmp_path, device="cpu")


def test_two_tiles_are_enough(tmp_path: Path) -> None:
    """One to learn from, one held out: batch statistics of a single tile do no harm."""
    TINY.fit(TilesInMemory(smooth_tiles(2, 32, seed=1)), tmp_path, device="cpu")
    assert json.loads((tmp_path / "history.json").read_text())["tiles"] == {"train": 1, "held_out": 1}


def test_weights_of_another_width_are_refused_by_name(checkpoint: Path) -> None:
    """The message names the option that differs, with both values."""
    with pytest.raises(ModelError, match=r"channels is \[8, 8\], not \[8, 16\]"):
        Autoencoder(channels=(8, 16)).load(checkpoint, device="cpu")


def test_weights_of_another_shape_are_refused_by_name(spoilt: Path) -> None:
    """Even where the label is right, each tensor must be."""
    label = {
        "wsi_anomaly": json.dumps(
            {"format_version": 1, "architecture": {"detector": "autoencoder", "channels": [8, 8]}}
        )
    }
    weights = load_file(spoilt / "weights.safetensors")
    weights["layers.0.weight"] = weights["layers.0.weight"][:, :1].contiguous()
    del weights["layers.1.bias"]
    save_file(weights, spoilt / "weights.safetensors", label)
    with pytest.raises(
        ModelError, match=r"layers.0.weight is \[8, 1, 3, 3\], not \[8, 3, 3, 3\]; layers.1.bias is missing"
    ):
        TINY.load(spoilt, device="cpu")


def test_weights_of_another_format_are_refused(spoilt: Path) -> None:
    """A file of a later version is not guessed at."""
    weights = load_file(spoilt / "weights.safetensors")
    save_file(weights, spoilt / "weights.safetensors", {"wsi_anomaly": json.dumps({"format_version": 2})})
    with pytest.raises(ModelError, match=r"format version is 2.* reads 1"):
        TINY.load(spoilt, device="cpu")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights_are_refused(size: int, spoilt: Path) -> None:
    """Wherever the file was cut off."""
    path = spoilt / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match="damaged"):
        TINY.load(spoilt, device="cpu")


def test_a_loss_that_is_no_number_ends_the_fit(tmp_path: Path) -> None:
    """The message says what to lower, and no weights are left that could be taken for good ones."""
    wild = Autoencoder(channels=(4,), training=TrainingOptions(learning_rate=1e30, max_epochs=9))
    with pytest.raises(ModelError, match=r"Lower learning_rate \(now 1e\+30\)"):
        wild.fit(TilesInMemory(smooth_tiles(24, 32, seed=1)), tmp_path, device="cpu")
    assert not (tmp_path / "weights.safetensors").exists()
