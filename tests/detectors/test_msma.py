"""Facts about MSMA beyond the contract."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from wsi_anomaly.detectors.diffusion.pixel import ScheduleOptions, model_from_scratch
from wsi_anomaly.detectors.diffusion.schedule import NoiseSchedule
from wsi_anomaly.detectors.msma import Msma
from wsi_anomaly.detectors.ncsn import NcsnOptions, NcsnSizes, NcsnTraining, load_ncsn
from wsi_anomaly.detectors.norm_fits import held_out_tiles
from wsi_anomaly.detectors.protocol import TileBatch, Vectorial
from wsi_anomaly.detectors.score_norms import levels_of
from wsi_anomaly.detectors.spatial_msma import SpatialMsma
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.testing import DetectorContract, TilesInMemory, batch_of, smooth_tiles

SIZES = NcsnSizes(channels=(8, 16), head_channels=16)
TRAINING = NcsnTraining(steps=120, batch_size=8, learning_rate=3e-3, save_every=20, picture_every=1000, ema_decay=None)
TINY = Msma(ncsn=NcsnOptions(sizes=SIZES, levels=5, training=TRAINING), held_out_fraction=0.4)
SHORT = TINY.model_copy(
    update={"ncsn": NcsnOptions(sizes=SIZES, levels=3, training=TRAINING.model_copy(update={"steps": 5}))}
)


class TestMsma(DetectorContract):
    """The contract, with a network of two levels."""

    detector = TINY

    def test_the_network_learns_to_tell_the_noise_at_each_level(self, undisturbed: tuple[Path, int]) -> None:
        """Of variance one: telling nothing at all has an error of 1. Measured: 0.11 to 0.17."""
        network = load_ncsn("msma", TINY.ncsn, undisturbed[0], device=torch.device("cpu"))
        clean = network.encode(torch.from_numpy(smooth_tiles(16, 32, seed=2)))
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            for level in range(5):
                told = network.noise(network.schedule.noised(clean, noise, level), level, None)
                assert (told - noise).square().mean() < 0.5, level


@pytest.fixture(scope="module")
def checkpoint(fitted: Callable[..., Path]) -> Path:
    """A fitted tiny detector."""
    return fitted(SHORT, TilesInMemory(smooth_tiles(32, 32, seed=1)))


@pytest.fixture(scope="module")
def pixel_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny DDPM with random weights."""
    folder: Path = tmp_path_factory.mktemp("ddpm")
    model = model_from_scratch(SIZES, ScheduleOptions(), seed=0)
    model.unet.save_pretrained(folder)
    (folder / "scheduler_config.json").write_text(json.dumps(dict(model.schedule_config)))
    return folder


def test_a_vector_is_the_norm_of_the_noise_seen_in_the_clean_tile(checkpoint: Path) -> None:
    """From the strongest level to the weakest; nothing is added to the tile."""
    scorer, batch = SHORT.load(checkpoint, device="cpu"), batch_of(smooth_tiles(3, 32, seed=4))
    assert isinstance(scorer, Vectorial)
    vectors = scorer.scores_and_vectors(batch)[1]
    network = load_ncsn("msma", SHORT.ncsn, checkpoint, device=torch.device("cpu"))
    clean = network.encode(torch.from_numpy(batch.pixels))
    for level, sigma in enumerate((1.0, 0.1, 0.01)):
        with torch.inference_mode():
            seen = network.noise(clean / (1 + (2 * sigma) ** 2) ** 0.5, 2 - level, None)
        assert vectors[:, level] == pytest.approx(seen.flatten(1).norm(dim=1).numpy(), rel=1e-4)


class Watched(TilesInMemory):
    """Tiles that remember in which parts they were read."""

    def __init__(self, pixels: np.ndarray) -> None:
        super().__init__(pixels)
        self.parts: list[list[int]] = []

    def read(self, indices: np.ndarray) -> TileBatch:
        """The tiles at these positions, in this order."""
        self.parts.append(indices.tolist())
        return super().read(indices)


def test_the_network_never_sees_the_tiles_that_the_density_is_made_of(tmp_path: Path) -> None:
    """Nor any of their groups: steps are of 8 tiles, and all that is held out is looked at together, once."""
    tiles = Watched(smooth_tiles(40, 32, seed=1))
    learnt, judged = held_out_tiles(tiles, SHORT.held_out_fraction, most=SHORT.most_tiles, seed=0)
    assert (len(learnt), len(judged)) == (24, 16)
    assert not set(learnt.groups.tolist()) & set(judged.groups.tolist())
    SHORT.fit(tiles, tmp_path, device="cpu")
    steps = {position for part in tiles.parts if len(part) == 8 for position in part}
    assert steps == set(learnt.positions.tolist())
    assert tiles.parts[-1] == judged.positions.tolist()


def calls_of(network: torch.nn.Module, ask: Callable[[TileBatch], object], batch: TileBatch) -> int:
    """How often the network runs."""
    calls: list[int] = []
    handle = network.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    ask(batch)
    handle.remove()
    return len(calls)


@pytest.mark.parametrize("detector", [SHORT, SpatialMsma(ncsn=SHORT.ncsn, flow_steps=3, held_out_fraction=0.4)])
def test_scores_and_vectors_cost_one_pass(detector: Msma | SpatialMsma, fitted: Callable[..., Path]) -> None:
    """The network is asked as often as for the scores: once a level."""
    folder = fitted(detector, TilesInMemory(smooth_tiles(32, 32, seed=1)))
    scorer, batch = detector.load(folder, device="cpu"), batch_of(smooth_tiles(3, 32, seed=4))
    network = scorer.norms.network.unet
    assert calls_of(network, scorer.scores_and_vectors, batch) == calls_of(network, scorer.score, batch) == 3


def test_a_tile_of_one_colour_has_a_score(checkpoint: Path) -> None:
    """Black, white and grey are far from tissue, and still numbers."""
    tiles = np.stack([np.full((32, 32, 3), value, np.uint8) for value in (0, 128, 255)])
    assert np.isfinite(SHORT.load(checkpoint, device="cpu").score(batch_of(tiles))).all()


def test_stable_diffusion_is_used_as_it_is(tiny_base: Path, tmp_path: Path) -> None:
    """Nothing is learnt but the density; the prompt counts, and there need not be one."""
    detector = Msma(network="latent", base=str(tiny_base), ncsn=NcsnOptions(levels=3))
    detector.fit(TilesInMemory(smooth_tiles(10, 32, seed=1)), tmp_path, device="cpu")
    assert not (tmp_path / "weights.safetensors").exists()
    scorer, batch = detector.load(tmp_path, device="cpu"), batch_of(smooth_tiles(3, 32, seed=2))
    plain = replace(batch, prompts=((),) * 3)
    vectors = [scorer.scores_and_vectors(one)[1] for one in (plain, batch)]
    assert vectors[0].shape == (3, 3)
    assert not np.array_equal(*vectors)
    assert np.array_equal(scorer.score(batch), scorer.score(batch))


def test_a_ddpm_is_used_as_it_is(pixel_base: Path, tmp_path: Path) -> None:
    """Its place may be told later, and another one there is refused."""
    detector = Msma(network="pixel", ncsn=NcsnOptions(levels=3), density="knn").on_base(str(pixel_base), offline=True)
    detector.fit(TilesInMemory(smooth_tiles(10, 32, seed=1)), tmp_path, device="cpu")
    assert detector.load(tmp_path, device="cpu").score(batch_of(smooth_tiles(3, 32, seed=2))).shape == (3, 1)
    schedule = pixel_base / "scheduler_config.json"
    schedule.write_text(schedule.read_text().replace("0.02", "0.03"))
    with pytest.raises(ModelError, match="base is"):
        detector.load(tmp_path, device="cpu")


def test_the_timesteps_of_a_base_are_the_nearest_to_each_noise_level() -> None:
    """Of the DDPM's schedule, with deviations in [0, 1]: 396 for noise of deviation 1, as strong as the tissue."""
    schedule = NoiseSchedule.from_betas("linear", 1e-4, 0.02, steps=1000)
    found = levels_of(schedule, 10, most_sigma=1.0, least_sigma=0.01)
    sigmas = np.sqrt(1 / schedule.alphas_cumprod - 1) / 2
    assert found[0] == 396
    assert sigmas[list(found)] == pytest.approx(np.geomspace(1, 0.01, 10), rel=0.1)
    assert levels_of(schedule, 3, most_sigma=0.5, least_sigma=0.3) == tuple(
        int(np.abs(sigmas - sigma).argmin()) for sigma in (0.5, 0.15**0.5, 0.3)
    )


def test_noise_levels_that_a_base_does_not_have_get_timesteps_of_their_own() -> None:
    """Stable Diffusion knows no noise below 0.015: the two weakest levels are its first two timesteps."""
    schedule = NoiseSchedule.from_betas("scaled_linear", 0.00085, 0.012, steps=1000)
    assert levels_of(schedule, 10, most_sigma=1.0, least_sigma=0.01)[-3:] == (3, 1, 0)
    assert levels_of(schedule, 4, most_sigma=1e6, least_sigma=1e5) == (999, 998, 997, 996)
    short = NoiseSchedule.from_betas("linear", 1e-4, 0.02, steps=5)
    assert levels_of(short, 5, most_sigma=1.0, least_sigma=0.01) == (4, 3, 2, 1, 0)
    with pytest.raises(OptionsError, match=r"6 noise levels are more than the 5 timesteps.*Lower levels"):
        levels_of(short, 6, most_sigma=1.0, least_sigma=0.01)


def test_the_weakest_noise_counts_for_a_base_too(pixel_base: Path, tmp_path: Path) -> None:
    """Another least_sigma asks at other timesteps; a fit from when it did not is refused."""
    tiles, batch = TilesInMemory(smooth_tiles(10, 32, seed=1)), batch_of(smooth_tiles(3, 32, seed=2))
    vectors = []
    for least_sigma in (0.01, 0.1):
        ncsn = NcsnOptions(levels=3, least_sigma=least_sigma)
        detector = Msma(network="pixel", base=str(pixel_base), ncsn=ncsn)
        detector.fit(tiles, tmp_path, device="cpu")
        scorer = detector.load(tmp_path, device="cpu")
        vectors.append(scorer.scores_and_vectors(batch)[1])
    same = vectors[0] == vectors[1]
    assert same[:, 0].all()
    assert not same[:, 1:].any()
    note = json.loads((tmp_path / "fit.json").read_text())
    del note["noise_levels"]
    (tmp_path / "fit.json").write_text(json.dumps(note))
    with pytest.raises(ModelError, match="noise_levels is None, not 'nearest timesteps'"):
        detector.load(tmp_path, device="cpu")


def test_a_network_of_its_own_has_no_base() -> None:
    """Neither as an option nor on the command line."""
    with pytest.raises(OptionsError, match="has no base"):
        SHORT.on_base("somewhere", offline=True)
    with pytest.raises(ValidationError, match="has no base"):
        Msma(base="somewhere")
    assert SHORT.on_base("", offline=True).model_dump() == SHORT.model_dump()


def test_another_density_is_refused(checkpoint: Path) -> None:
    """The message names both."""
    with pytest.raises(ModelError, match="density 'gmm', and the options ask for 'knn'"):
        SHORT.model_copy(update={"density": "knn"}).load(checkpoint, device="cpu")


def test_the_fit_of_another_detector_is_refused(checkpoint: Path) -> None:
    """Though the networks are equal."""
    with pytest.raises(ModelError, match="detector 'msma', not 1 and 'spatial_msma'"):
        SpatialMsma(ncsn=SHORT.ncsn).load(checkpoint, device="cpu")


def test_noise_levels_of_another_fit_are_refused(checkpoint: Path) -> None:
    """The weights have the same shapes, but would be asked about other noise."""
    with pytest.raises(ModelError, match=r"most_sigma is 1.0, not 2.0"):
        Msma(ncsn=SHORT.ncsn.model_copy(update={"most_sigma": 2.0})).load(checkpoint, device="cpu")


@pytest.mark.parametrize(("count", "held_out"), [(0, "0"), (1, r"0 \(held out of 1\)"), (8, r"4 \(held out of 8\)")])
def test_too_few_tiles_are_refused(count: int, held_out: str, tmp_path: Path) -> None:
    """Before anything is learnt; the message says how many are needed."""
    with pytest.raises(CohortError, match=f"from: {held_out}, needed: at least 8"):
        SHORT.fit(TilesInMemory(smooth_tiles(count, 32, seed=1)), tmp_path, device="cpu")


def test_a_finished_fit_is_left_as_it_is(checkpoint: Path) -> None:
    """Only the ends of the tiles are looked at again."""
    tiles = TilesInMemory(smooth_tiles(32, 32, seed=1))
    SHORT.fit(tiles, checkpoint, device="cpu")
    assert tiles.reads == 1


@pytest.mark.slow
def test_disease_ranks_above_normal_tissue(tissue: Callable[..., np.ndarray], tmp_path: Path) -> None:
    """After half a minute of learning. Measured: fibrosis 0.90, necrosis 0.95, metastases 0.84, mucin 0.84."""
    training = TRAINING.model_copy(
        update={
            "steps": 100,
            "batch_size": 4,
            "learning_rate": 2e-3,
            "learning_rate_decay": "cosine",
            "save_every": 1000,
        }
    )
    sizes = NcsnSizes(channels=(16, 32, 32), head_channels=32)
    small = Msma(ncsn=NcsnOptions(sizes=sizes, training=training), held_out_fraction=0.5)
    small.fit(TilesInMemory(tissue(range(10), 10, "normal"), np.arange(100) // 10), tmp_path, device="cpu")
    scorer = small.load(tmp_path, device="cpu")
    normal = scorer.score(batch_of(tissue(range(100, 108), 3, "normal")))
    for kind, least in (("fibrosis", 0.8), ("necrosis", 0.8), ("metastasis", 0.7), ("mucin", 0.75)):
        scores = scorer.score(batch_of(tissue(range(100, 108), 3, kind)))
        assert (scores > normal.T).mean() > least, kind
