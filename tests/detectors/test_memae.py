"""Facts about MemAE beyond the contract: its memory, what it refuses, and what it finds in made-up tissue."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from wsi_anomaly.detectors.autoencoder import Autoencoder
from wsi_anomaly.detectors.memae import MemAe, MemAeNetwork, Memory, entropy, shrunken
from wsi_anomaly.detectors.training import TrainingOptions
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.synthetic import TileKind, synthetic_tiles
from wsi_anomaly.testing import DetectorContract, TilesInMemory, batch_of, odd_tiles, smooth_tiles

TINY = MemAe(channels=(8, 8), items=20, training=TrainingOptions(learning_rate=1e-2, batch_size=8, max_epochs=5))


class TestMemAe(DetectorContract):
    """The contract, with a network of two layers and twenty items."""

    detector = TINY


@pytest.fixture(scope="module")
def checkpoint(fitted: Callable[..., Path]) -> Path:
    """A fitted tiny MemAE."""
    return fitted(TINY, TilesInMemory(smooth_tiles(24, 32, seed=1)))


def test_shares_below_the_threshold_are_left_out_and_the_rest_has_a_sum_of_one() -> None:
    """The others keep their proportions."""
    shares = torch.tensor([0.6, 0.3, 0.1]).reshape(1, 1, 1, 3)
    assert shrunken(shares, 0.2).flatten().tolist() == pytest.approx([2 / 3, 1 / 3, 0])


def test_nothing_is_left_where_all_shares_are_below_the_threshold() -> None:
    """Zeros, not NaN, and gradients that are numbers too."""
    shares = torch.full((1, 1, 1, 4), 0.25, requires_grad=True)
    kept = shrunken(shares, 0.3)
    assert kept.flatten().tolist() == [0, 0, 0, 0]
    kept.sum().backward()
    assert torch.isfinite(shares.grad).all()


def test_without_a_threshold_all_take_part() -> None:
    """`shrinkage = 0` leaves the shares as they are."""
    shares = torch.tensor([0.6, 0.3, 0.1]).reshape(1, 1, 1, 3)
    assert shrunken(shares, 0.0).flatten().tolist() == pytest.approx([0.6, 0.3, 0.1])


@pytest.mark.parametrize("items", [10, 1000])
def test_the_threshold_is_relative_to_the_even_share(items: int) -> None:
    """A memory of any size leaves out what is asked for less than evenly."""
    memory = Memory(items, 4, 1.5, generator=torch.Generator().manual_seed(0))
    assert memory.threshold == pytest.approx(1.5 / items)


def test_entropy_is_zero_for_one_item_and_highest_for_all() -> None:
    """The logarithm of how many items there are, where all have the same share."""
    one, all_items = torch.eye(8)[:1].reshape(1, 1, 1, 8), torch.full((1, 1, 1, 8), 1 / 8)
    assert entropy(one).item() == pytest.approx(0, abs=1e-6)
    assert entropy(all_items).item() == pytest.approx(np.log(8), rel=1e-5)


def test_the_weight_of_the_entropy_makes_places_of_few_items(tmp_path: Path) -> None:
    """Where nothing else counts, the mean entropy falls while learning."""
    training = TINY.training.model_copy(update={"max_epochs": 20})
    detector = TINY.model_copy(update={"entropy_weight": 100.0, "training": training})
    detector.fit(TilesInMemory(smooth_tiles(24, 32, seed=1)), tmp_path, device="cpu")
    first = MemAeNetwork((8, 8), 20, 1.0, generator=torch.Generator().manual_seed(0)).eval()
    images = torch.from_numpy(smooth_tiles(8, 32, seed=2)).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        before, after = (
            entropy(network.recall(images)[1]).item()
            for network in (first, detector.load(tmp_path, device="cpu").network)
        )
    assert after < 0.7 * before


def test_every_place_becomes_a_mixture_of_remembered_vectors() -> None:
    """What goes on to the decoder is computed from the memory alone."""
    memory = Memory(5, 3, 1.0, generator=torch.Generator().manual_seed(0))
    mixed, addresses = memory(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)))
    assert addresses.shape == (2, 4, 4, 5)
    expected = torch.einsum("tyxi,ic->tcyx", addresses, memory.items)
    assert torch.allclose(mixed, expected, atol=1e-6)
    assert torch.allclose(addresses.sum(dim=3), torch.ones(2, 4, 4), atol=1e-5)


def test_the_network_of_default_size_is_the_one_of_the_method() -> None:
    """Two million weights beside a memory of 2000 x 256, and a middle of 256 x 16 x 16 for a tile of 256 px."""
    options = MemAe()
    network = MemAeNetwork(options.channels, options.items, options.shrinkage, generator=torch.Generator()).eval()
    assert network.memory.items.shape == (2000, 256)
    weights = sum(weights.numel() for name, weights in network.named_parameters() if name != "memory.items")
    assert weights == pytest.approx(2.0e6, rel=0.01)
    with torch.inference_mode():
        assert network.encoder(torch.zeros(1, 3, 256, 256)).shape == (1, 256, 16, 16)


def test_the_memory_is_learnt(checkpoint: Path) -> None:
    """Gradients reach it through the threshold: its vectors are not the first ones any more."""
    first = MemAeNetwork((8, 8), 20, 1.0, generator=torch.Generator().manual_seed(0)).memory.items
    assert (load_file(checkpoint / "weights.safetensors")["memory.items"] - first).abs().mean() > 1e-3


def test_first_weights_depend_on_the_seed_alone() -> None:
    """The caller's random state neither decides the weights nor is used up."""
    state = torch.get_rng_state()
    one = MemAeNetwork((4,), 6, 1.0, generator=torch.Generator().manual_seed(1)).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    again = MemAeNetwork((4,), 6, 1.0, generator=torch.Generator().manual_seed(1)).state_dict()
    assert all(torch.equal(again[name], one[name]) for name in one)


def test_the_score_is_the_mean_of_the_map(checkpoint: Path) -> None:
    """Exactly, not nearly: both come from the same numbers."""
    scorer, batch = TINY.load(checkpoint, device="cpu"), batch_of(odd_tiles(3, 32, seed=5))
    means = [one.mean(dtype=np.float64) for one in scorer.score_map(batch)]
    assert scorer.score(batch)[:, 0].tolist() == np.array(means, np.float32).tolist()


@pytest.mark.parametrize("value", [0, 128, 255])
def test_tiles_of_one_colour_have_scores(value: int, checkpoint: Path) -> None:
    """Glass, or nothing at all."""
    flat = np.full((2, 32, 32, 3), value, np.uint8)
    assert np.isfinite(TINY.load(checkpoint, device="cpu").score(batch_of(flat))).all()


def test_tiles_of_one_colour_can_be_learnt(tmp_path: Path) -> None:
    """Nothing to learn is no reason to fail."""
    flat = np.full((8, 32, 32, 3), 255, np.uint8)
    TINY.fit(TilesInMemory(flat), tmp_path, device="cpu")
    assert np.isfinite(TINY.load(tmp_path, device="cpu").score(batch_of(flat))).all()


def test_too_few_tiles_are_refused(tmp_path: Path) -> None:
    """The message says how many there are and how many are needed."""
    with pytest.raises(CohortError, match="learn from: 1, needed: at least 2"):
        TINY.fit(TilesInMemory(smooth_tiles(1, 32, seed=1)), tmp_path, device="cpu")


def test_tiles_that_the_layers_cannot_halve_are_refused(tmp_path: Path) -> None:
    """The message says which sizes are possible."""
    with pytest.raises(OptionsError, match=r"30 x 30 px.* multiple of 4 px, at least 8"):
        TINY.fit(TilesInMemory(smooth_tiles(8, 30, seed=1)), tmp_path, device="cpu")


def test_a_memory_of_another_size_is_refused_by_name(checkpoint: Path) -> None:
    """The message names the option that differs, with both values."""
    with pytest.raises(ModelError, match="items is 20, not 30"):
        MemAe(channels=(8, 8), items=30).load(checkpoint, device="cpu")


def test_the_weights_of_a_plain_autoencoder_are_refused(fitted: Callable[..., Path]) -> None:
    """And theirs, by it."""
    training = TrainingOptions(max_epochs=1)
    plain = Autoencoder(channels=(8, 8), training=training)
    folder = fitted(plain, TilesInMemory(smooth_tiles(8, 32, seed=1)))
    with pytest.raises(ModelError, match="detector is autoencoder, not memae"):
        TINY.load(folder, device="cpu")


def test_the_history_tells_how_it_went(checkpoint: Path) -> None:
    """Losses of each epoch, as for every detector that is trained."""
    history = json.loads((checkpoint / "history.json").read_text())
    assert history["tiles"] == {"train": 20, "held_out": 4}
    assert len(history["loss"]) == 5


@pytest.mark.slow
def test_of_made_up_tissue_necrosis_ranks_above_normal_and_metastasis_below(tmp_path: Path) -> None:
    """Debris has more detail than a memory of normal tissue can rebuild, and sheets of equal cells have less.

    Measured: 0.97 and 0.12 (the plain autoencoder: 0.82 and 0.13).
    """
    training = TrainingOptions(learning_rate=1e-3, batch_size=8, max_epochs=10)
    detector = MemAe(channels=(16, 24, 32), items=200, shrinkage=2.0, training=training)
    detector.fit(TilesInMemory(made_up(1, 128, "normal")), tmp_path, device="cpu")
    scorer = detector.load(tmp_path, device="cpu")
    normal = scorer.score(batch_of(made_up(2, 48, "normal")))
    rank = {
        kind: (scorer.score(batch_of(made_up(seed, 48, kind))) > normal.T).mean()
        for seed, kind in ((3, "metastasis"), (4, "necrosis"))
    }
    assert rank["necrosis"] >= 0.8
    assert rank["metastasis"] <= 0.3


def made_up(seed: int, count: int, kind: TileKind) -> np.ndarray:
    """Tiles of 128 px from slides of any stain."""
    return np.stack([pixels for pixels, _ in synthetic_tiles(seed, count, tile_px=128, kinds=(kind,))])
