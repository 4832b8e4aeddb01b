"""Facts about the VAE detector beyond the contract: its likelihoods, its four scores, its crops, what it refuses."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import torch
from torch.nn import functional

from wsi_anomaly.detectors import vae_readout, vae_scores
from wsi_anomaly.detectors.autoencoder import Autoencoder
from wsi_anomaly.detectors.diffusion.noise import tile_noise
from wsi_anomaly.detectors.training import TrainingOptions
from wsi_anomaly.detectors.vae import Vae, VaeScorer, VaeTraining, random_crops, whole_crops
from wsi_anomaly.detectors.vae_network import (
    LOGITS_AT_ONCE_BYTES,
    VaeNetwork,
    evidence,
    with_replaced_values,
)
from wsi_anomaly.detectors.vae_readout import Readout
from wsi_anomaly.detectors.vae_scores import RegretOptions, adapted, compressed_bits, unlikeliness
from wsi_anomaly.devices import intensities
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.options import parse_options
from wsi_anomaly.testing import DetectorContract, TilesInMemory, batch_of, odd_tiles, smooth_tiles

TINY = Vae(
    scores=("nll", "regret", "llr", "complexity"),
    crop_px=8,
    width=8,
    latents=4,
    samples=2,
    regret=RegretOptions(steps=2, learning_rate=1e-3),
    training=VaeTraining(learning_rate=1e-2, batch_size=8, crops_per_tile=4, max_epochs=5),
)


class TestVae(DetectorContract):
    """The contract, with all scores of networks of one layer and a head."""

    detector = TINY
    tile_px = 16
    fit_tiles = 24
    tells_apart = ("nll",)  # noise does not compress; so little learning and so few draws rank nothing by the others


@pytest.fixture(scope="module")
def checkpoint(fitted: Callable[..., Path]) -> Path:
    """A fitted tiny VAE, and its background model."""
    return fitted(TINY, TilesInMemory(smooth_tiles(24, 16, seed=1)))


@pytest.fixture(scope="module")
def scorer(checkpoint: Path) -> VaeScorer:
    """The same, loaded."""
    return TINY.load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def crops() -> torch.Tensor:
    """Five crops, some of them normal."""
    return torch.from_numpy(np.concatenate([smooth_tiles(3, 8, seed=3), odd_tiles(2, 8, seed=4)]))


def column(name: str) -> int:
    """Where a score stands."""
    return TINY.scores.index(name)


def draws_of(crops: torch.Tensor, count: int, latents: int = 4) -> torch.Tensor:
    """Noise for each crop."""
    return torch.from_numpy(tile_noise(np.arange(len(crops)).astype(np.uint64), (count, latents)))


def test_one_draw_gives_the_densities_of_the_book(scorer: VaeScorer, crops: torch.Tensor) -> None:
    """-(log p(x|z) + log p(z) - log q(z|x)), with each density as PyTorch's distributions have it."""
    network, normal = scorer.network, torch.distributions.Normal
    mean, log_variance = posterior = network.posterior(crops)
    noise = draws_of(crops, 1)
    z = mean + (log_variance / 2).exp() * noise[:, 0]
    logits = network.values(network.decoder(z[:, :, None, None])).permute(0, 2, 3, 1).unflatten(3, (3, 256))
    log_p = torch.distributions.Categorical(logits=logits).log_prob(crops).sum(dim=(1, 2, 3))
    log_prior = normal(0, 1).log_prob(z).sum(1)
    log_q = normal(mean, (log_variance / 2).exp()).log_prob(z).sum(1)
    expected = -(log_p + log_prior - log_q)
    assert unlikeliness(network, posterior, noise, crops).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_the_bound_is_the_log_of_a_mean_and_survives_its_size(scorer: VaeScorer, crops: torch.Tensor) -> None:
    """Probabilities of e**-1000 are no float64; their mean is taken all the same, for each crop alone."""
    posterior, draws = scorer.network.posterior(crops), draws_of(crops, 5)
    single = [unlikeliness(scorer.network, posterior, draws[:, [i]], crops) for i in range(5)]
    together = unlikeliness(scorer.network, posterior, draws, crops)
    for crop, value in enumerate(together.tolist()):
        each = [-draw[crop].item() for draw in single]
        assert max(each) < -800
        expected = max(each) + math.log(sum(math.exp(one - max(each)) for one in each) / 5)
        assert value == pytest.approx(-expected, rel=1e-9)


def test_more_draws_tighten_the_bound(scorer: VaeScorer, crops: torch.Tensor) -> None:
    """On average, as the theorem of importance-weighted autoencoders has it."""
    posterior = scorer.network.posterior(crops)
    few = [unlikeliness(scorer.network, posterior, draws_of(crops, 60)[:, [i]], crops).mean().item() for i in range(60)]
    assert unlikeliness(scorer.network, posterior, draws_of(crops, 60), crops).mean().item() < np.mean(few)


def test_no_more_logits_are_held_than_allowed_and_the_gradient_is_the_same() -> None:
    """Twenty-four crops of 32 px would be 75 MB; in pieces they have the likelihoods and gradients of single ones."""
    network = VaeNetwork(32, 1, 2, generator=torch.Generator().manual_seed(0)).eval()
    crops, one_crop = torch.from_numpy(smooth_tiles(24, 32, seed=1)), 4 * 32 * 32 * 3 * 256
    latents = torch.randn(24, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    held: list[int] = []
    network.values.register_forward_hook(lambda *arguments: held.append(4 * arguments[2].numel()))
    together = network.log_likelihoods(latents, crops)
    (gradient,) = torch.autograd.grad(together.sum(), latents)
    assert max(held) <= max(one_crop, LOGITS_AT_ONCE_BYTES["cpu"]) < 24 * one_crop
    alone = latents[[23]].detach().requires_grad_()
    single = network.log_likelihoods(alone, crops[[23]])
    assert together[23].item() == pytest.approx(single.item(), rel=1e-6)
    assert gradient[23].tolist() == pytest.approx(torch.autograd.grad(single.sum(), alone)[0][0].tolist(), rel=1e-3)


def test_slopes_without_logits_are_those_of_the_likelihood() -> None:
    """By the latents, through a last layer of any weights and a crop of more places than one in each direction."""
    generator = torch.Generator().manual_seed(0)
    network = VaeNetwork(16, 2, 3, generator=generator).eval().requires_grad_(requires_grad=False)
    for weights in network.values.parameters():
        weights.normal_(generator=generator)
    crops = torch.from_numpy(odd_tiles(3, 16, seed=1))
    latents = torch.randn(3, 3, generator=generator).requires_grad_()
    (expected,) = torch.autograd.grad(-network.log_likelihoods(latents, crops).sum(), latents)
    hidden, readout = network.hidden(latents), Readout(network.values)
    slopes = readout.slopes(hidden.detach()) - readout.seen(crops)
    (found,) = torch.autograd.grad(hidden, latents, slopes)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    likelihoods = readout.log_likelihoods(hidden.detach(), crops)
    assert likelihoods.tolist() == pytest.approx(network.log_likelihoods(latents, crops).tolist(), rel=1e-6)


def test_crops_are_read_out_in_parts_and_encoders_fitted_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few of them fit: each crop finds its own result again."""
    network = VaeNetwork(8, 2, 3, generator=torch.Generator().manual_seed(0)).eval().requires_grad_(requires_grad=False)
    crops, options = torch.from_numpy(odd_tiles(5, 8, seed=1)), RegretOptions(steps=2)
    draws = draws_of(crops, 2, latents=3)

    def found() -> tuple[torch.Tensor, ...]:
        after = adapted(network, crops, draws, options)
        return *after, unlikeliness(network, after, draws, crops)

    together, logits = found(), 4 * 256 * 4 * 4
    monkeypatch.setitem(vae_readout.LOGITS_AT_ONCE_BYTES, "cpu", 2 * logits)
    monkeypatch.setitem(vae_scores.COPIES_AT_ONCE_BYTES, "cpu", 3 * sum(w.nbytes for w in network.encoder.parameters()))
    held, cross_entropy = set(), functional.cross_entropy

    def watched(values: torch.Tensor, *others: torch.Tensor, **options: str) -> torch.Tensor:
        held.add(values.nbytes)
        return cross_entropy(values, *others, **options)

    monkeypatch.setattr(functional, "cross_entropy", watched)
    groups: list[int] = []
    monkeypatch.setattr(vae_scores, "intensities", lambda crops: (groups.append(len(crops)), intensities(crops))[1])
    for before, after in zip(together, found(), strict=True):
        assert after.flatten().tolist() == pytest.approx(before.flatten().tolist(), rel=1e-4, abs=1e-6)
    assert held == {logits, 2 * logits}
    assert groups == [2, 2, 1]


def test_encoders_fitted_together_are_those_fitted_one_by_one(scorer: VaeScorer, crops: torch.Tensor) -> None:
    """Each of them as a copy with an Adam of its own would be."""
    options, draws = RegretOptions(steps=20, learning_rate=2e-3), draws_of(crops, 20)
    before = copy.deepcopy(scorer.network.state_dict())
    together = adapted(scorer.network, crops, draws, options)
    for crop in range(len(crops)):
        network = copy.deepcopy(scorer.network)
        network.encoder.requires_grad_()
        optimizer = torch.optim.Adam(network.encoder.parameters(), 2e-3, weight_decay=5e-5)
        for step in range(20):
            optimizer.zero_grad()
            mean, log_variance = network.posterior(crops[[crop]])
            z = mean + (log_variance / 2).exp() * draws[[crop], step]
            prior, own = torch.distributions.Normal(0, 1), torch.distributions.Normal(mean, (log_variance / 2).exp())
            divergence = torch.distributions.kl_divergence(own, prior).sum()
            (divergence - network.log_likelihoods(z, crops[[crop]]).sum()).backward()
            optimizer.step()
        alone = network.posterior(crops[[crop]])
        assert together.mean[crop].tolist() == pytest.approx(alone.mean[0].tolist(), abs=1e-4)
        assert together.log_variance[crop].tolist() == pytest.approx(alone.log_variance[0].tolist(), abs=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in scorer.network.state_dict().items())


def test_fitting_the_encoder_makes_a_crop_likelier(scorer: VaeScorer, crops: torch.Tensor) -> None:
    """By draws that it was not fitted with: regret is positive but for noise."""
    after = adapted(scorer.network, crops, draws_of(crops, 60), RegretOptions(steps=60, learning_rate=1e-3))
    fresh = torch.from_numpy(tile_noise(np.arange(5).astype(np.uint64), (30, 4), draw=1))
    before = scorer.network.posterior(crops)
    regret = unlikeliness(scorer.network, before, fresh, crops) - unlikeliness(scorer.network, after, fresh, crops)
    assert (regret > 0).all()


def test_regret_is_what_fitting_gains(checkpoint: Path) -> None:
    """So it is above zero for any tile, once there are steps and draws enough: 9 nats and more here."""
    options = TINY.model_copy(update={"samples": 8, "regret": RegretOptions(steps=60, learning_rate=1e-3)})
    tiles = np.concatenate([smooth_tiles(3, 16, seed=3), odd_tiles(3, 16, seed=4)])
    assert options.load(checkpoint, device="cpu").score(batch_of(tiles))[:, column("regret")].min() > 0


def test_what_training_raises_is_the_likelihood_less_the_divergence_from_the_prior(
    scorer: VaeScorer, crops: torch.Tensor
) -> None:
    """The evidence lower bound, with both parts as PyTorch's distributions have them."""
    network, normal = scorer.network, torch.distributions.Normal
    mean, log_variance = posterior = network.posterior(crops)
    own, noise = normal(mean, (log_variance / 2).exp()), draws_of(crops, 1)[:, 0]
    logits = network.values(network.decoder((mean + own.scale * noise)[:, :, None, None]))
    values = torch.distributions.Categorical(logits=logits.permute(0, 2, 3, 1).unflatten(3, (3, 256)))
    likelihood = values.log_prob(crops).sum(dim=(1, 2, 3))
    divergence = torch.distributions.kl_divergence(own, normal(0, 1)).sum(1)
    assert divergence.min() > 0.1
    wanted = (likelihood - divergence).tolist()
    assert evidence(network, posterior, noise, crops).tolist() == pytest.approx(wanted, abs=0.01)


def test_the_background_model_learns_something_else(scorer: VaeScorer) -> None:
    """From the same first weights: its crops are perturbed, so the ratio of the two is not zero."""
    assert scorer.background is not None
    own, background = scorer.network.state_dict(), scorer.background.state_dict()
    assert not torch.equal(own["values.weight"], background["values.weight"])
    assert (scorer.score(batch_of(smooth_tiles(3, 16, seed=3)))[:, column("llr")] != 0).all()


def test_all_scores_share_one_look(checkpoint: Path) -> None:
    """The encoder sees each crop once, but for regret, which fits copies of it; no score decodes what another has."""
    options = TINY.model_copy(update={"scores": ("nll", "llr", "complexity")})
    scorer = options.load(checkpoint, device="cpu")
    calls: list[str] = []
    for part in ("encoder", "decoder"):
        getattr(scorer.network, part).register_forward_hook(lambda *_, part=part: calls.append(part))
    scorer.score(batch_of(smooth_tiles(4, 16, seed=1)))  # 16 crops: one portion
    assert calls == ["encoder", *["decoder"] * TINY.samples]


def test_complexity_is_counted_in_bits(scorer: VaeScorer) -> None:
    """The likelihood's nats are turned into bits before the bits of the compressed crops are subtracted."""
    pixels = odd_tiles(3, 16, seed=5)
    scores = scorer.score(batch_of(pixels))
    bits = [
        8 * np.mean([len(imagecodecs.png_encode(crop, level=9)) for crop in crops]) for crops in whole_crops(pixels, 8)
    ]
    assert scores[:, column("complexity")] == pytest.approx(scores[:, 0] / math.log(2) - bits, rel=1e-5)


@pytest.mark.parametrize("compression", ["png", "jpeg2000"])
def test_plain_crops_compress_better_than_noisy_ones(compression: str) -> None:
    """By a lot, with either compressor; 24576 bits are what a crop has uncompressed."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    plain, noisy = compressed_bits(np.concatenate([np.full_like(noise, 200), noise]), compression)  # type: ignore[arg-type]
    assert plain < 2500
    assert 24000 < noisy < 30000


def test_the_ratio_is_against_the_background_model(scorer: VaeScorer) -> None:
    """Unlikely for normal tissue beyond what is unlikely for its perturbed likeness."""
    assert scorer.background is not None
    other = replace(
        scorer, network=scorer.background, background=None, options=Vae(**TINY.model_dump() | {"scores": ("nll",)})
    )
    batch = batch_of(odd_tiles(3, 16, seed=5))
    scores = scorer.score(batch)
    assert scores[:, column("llr")] == pytest.approx(scores[:, 0] - other.score(batch)[:, 0], abs=1e-3)


def test_a_tile_has_the_mean_score_of_its_crops(scorer: VaeScorer) -> None:
    """Four times the same crop in a tile, and its own noise each time: nearly the score of one of them."""
    crop = smooth_tiles(1, 8, seed=7)
    one, four = scorer.score(batch_of(crop))[0], scorer.score(batch_of(np.tile(crop, (1, 2, 2, 1))))[0]
    assert four[0] == pytest.approx(one[0], rel=0.02)
    assert four[0] != one[0]


def test_noise_is_a_tiles_own(scorer: VaeScorer) -> None:
    """Equal tiles with equal seeds have equal scores; another seed is other noise, of no great weight."""
    tile = smooth_tiles(1, 16, seed=7)
    same = scorer.score(batch_of(np.tile(tile, (3, 1, 1, 1)), seeds=np.array([4, 5, 4], np.uint64)))
    assert np.array_equal(same[0], same[2])
    assert same[0, 0] != same[1, 0]
    assert same[0, 0] == pytest.approx(same[1, 0], rel=0.02)


@pytest.mark.parametrize("value", [0, 255])
def test_tiles_of_one_colour_have_finite_scores(scorer: VaeScorer, value: int) -> None:
    """Black and white glass is far from anything that was learnt."""
    assert np.isfinite(scorer.score(batch_of(np.full((2, 16, 16, 3), value, np.uint8)))).all()


def test_crops_are_cut_row_by_row_from_the_middle() -> None:
    """A tile of 7 x 5 px holds three by two crops of 2 px; the odd pixel is left at the far sides."""
    tile = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(1, 5, 7, 3)
    crops = whole_crops(tile, 2)
    assert crops.shape == (1, 6, 2, 2, 3)
    assert np.array_equal(crops[0, 4], tile[0, 2:4, 2:4])
    wide = whole_crops(np.arange(2 * 9 * 3, dtype=np.uint8).reshape(1, 2, 9, 3), 2)
    assert wide[0, :, 0, 0, 0].tolist() == [0, 6, 12, 18]
    assert whole_crops(np.arange(6 * 6 * 3, dtype=np.uint8).reshape(1, 6, 6, 3), 4)[0, 0, 0, 0, 0] == 3 * 7


def test_crops_to_learn_from_lie_anywhere_in_their_tiles() -> None:
    """Given the generator they are the same again; all offsets occur, and none crosses the border."""
    tiles = np.stack([np.arange(100, dtype=np.uint8).reshape(10, 10)] * 3)[..., None].repeat(3, 3)
    crops = random_crops(tiles, 8, 40, torch.Generator().manual_seed(0))
    assert crops.shape == (120, 8, 8, 3)
    assert set(crops[:, 0, 0, 0].tolist()) == {0, 1, 2, 10, 11, 12, 20, 21, 22}
    assert torch.equal(crops, random_crops(tiles, 8, 40, torch.Generator().manual_seed(0)))


def test_a_fifth_of_the_values_is_replaced_for_the_background_model() -> None:
    """By values from the whole range, so that one in 256 stays what it was."""
    crops = torch.full((20, 32, 32, 3), 100, dtype=torch.uint8)
    perturbed = with_replaced_values(crops, 0.2, torch.Generator().manual_seed(0))
    changed = perturbed[perturbed != 100].double()
    assert len(changed) / crops.numel() == pytest.approx(0.2, abs=0.01)
    assert (changed.min(), changed.max()) == (0, 255)
    assert changed.mean().item() == pytest.approx(127.5, abs=3)


def test_the_network_of_default_size_is_the_one_of_the_method() -> None:
    """One and a half million weights on the way in and on the way out, and an encoder that ends at 4 px."""
    options = Vae()
    network = VaeNetwork(options.crop_px, options.width, options.latents, generator=torch.Generator())
    assert sum(weights.numel() for weights in network.encoder.parameters()) == pytest.approx(1.51e6, rel=0.01)
    rest = [*network.decoder.parameters(), *network.values.parameters()]
    assert sum(weights.numel() for weights in rest) == pytest.approx(1.49e6, rel=0.01)
    with torch.inference_mode():
        assert network.eval().encoder[:-1](torch.zeros(1, 3, 64, 64)).shape == (1, 256, 4, 4)


def test_first_weights_depend_on_the_seed_alone() -> None:
    """The caller's random state neither decides the weights nor is used up."""
    state = torch.get_rng_state()
    one, same, other = (VaeNetwork(8, 4, 2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.values.weight, same.values.weight)
    assert not torch.equal(one.values.weight, other.values.weight)


def test_another_score_needs_no_other_network(tmp_path: Path) -> None:
    """A fit for one score is a fit for all that have no background model, which alone is learnt when it is needed."""
    tiles = TilesInMemory(smooth_tiles(12, 16, seed=1))
    TINY.model_copy(update={"scores": ("nll",)}).fit(tiles, tmp_path, device="cpu")
    assert not (tmp_path / "background").exists()
    before = (tmp_path / "weights.safetensors").stat().st_mtime_ns
    TINY.fit(tiles, tmp_path, device="cpu")
    assert (tmp_path / "weights.safetensors").stat().st_mtime_ns == before
    assert (tmp_path / "background" / "weights.safetensors").exists()


def test_a_missing_background_model_is_named(spoilt: Path) -> None:
    """It is only needed for the ratio."""
    (spoilt / "background" / "weights.safetensors").unlink()
    TINY.model_copy(update={"scores": ("nll", "regret")}).load(spoilt, device="cpu")
    with pytest.raises(ModelError, match=r"background.weights.safetensors: the weights are missing"):
        TINY.load(spoilt, device="cpu")


def test_weights_of_another_detector_or_size_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    """The message names what differs, with both values."""
    with pytest.raises(ModelError, match="latents is 4, not 5"):
        TINY.model_copy(update={"latents": 5}).load(checkpoint, device="cpu")
    other = Autoencoder(channels=(4,), training=TrainingOptions(max_epochs=1))
    other.fit(TilesInMemory(smooth_tiles(4, 16, seed=1)), tmp_path, device="cpu")
    with pytest.raises(ModelError, match="detector is autoencoder, not vae"):
        TINY.load(tmp_path, device="cpu")


@pytest.mark.parametrize("crop_px", [4, 48, 0])
def test_crops_that_do_not_halve_down_to_four_pixels_are_refused(crop_px: int) -> None:
    """By name, when the options are read."""
    with pytest.raises(OptionsError, match=f"'crop_px' = {crop_px}.*no power of two of at least 8"):
        parse_options(Vae, {"crop_px": crop_px}, where="test")


def test_the_same_score_twice_is_refused() -> None:
    """Columns are told apart by name."""
    with pytest.raises(OptionsError, match="the same twice"):
        parse_options(Vae, {"scores": ["nll", "nll"]}, where="test")


def test_tiles_smaller_than_a_crop_are_refused(scorer: VaeScorer, tmp_path: Path) -> None:
    """When learning and when scoring."""
    small = smooth_tiles(8, 7, seed=1)
    with pytest.raises(OptionsError, match=r"7 x 7 px: too small for a crop of 8 px.*Lower crop_px"):
        TINY.fit(TilesInMemory(small), tmp_path, device="cpu")
    with pytest.raises(OptionsError, match="too small for a crop"):
        scorer.score(batch_of(small))


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_tiles_are_refused(count: int, tmp_path: Path) -> None:
    """The message says how many there are and how many are needed."""
    with pytest.raises(CohortError, match=f"learn from: {count}, needed: at least 2"):
        TINY.fit(TilesInMemory(smooth_tiles(count, 16, seed=1)), tmp_path, device="cpu")


@pytest.mark.slow
def test_of_made_up_tissue_mucin_and_metastases_are_too_complex_and_fibrosis_is_likely(
    tissue: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    """Likelihood alone finds fibres likelier than normal tissue; what a compressor says puts mucin right.

    AUROC measured with two seeds: 0.99 for mucin and 0.77 for metastases by complexity, 0.15 and 0.11 for fibrosis by
    likelihood. Necrosis (0.5) goes neither way.
    """
    training = VaeTraining(learning_rate=3e-3, batch_size=8, crops_per_tile=4, max_epochs=5)
    detector = Vae(scores=("complexity", "nll"), crop_px=16, width=8, latents=16, samples=4, training=training)
    detector.fit(TilesInMemory(tissue(range(1, 25), 8, "normal")), tmp_path, device="cpu")
    scorer = detector.load(tmp_path, device="cpu")
    normal = scorer.score(batch_of(tissue(range(500, 516), 2, "normal")))
    rank = {
        kind: (scorer.score(batch_of(tissue(range(500, 516), 2, kind)))[:, None] > normal).mean(axis=(0, 1))
        for kind in ("mucin", "metastasis", "fibrosis")
    }
    assert rank["mucin"][0] >= 0.85
    assert rank["metastasis"][0] >= 0.6
    assert rank["fibrosis"][1] <= 0.45
