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
from wsi_anomaly.detectors.msma import Msma
from wsi_anomaly.detectors.ncsn import NcsnOptions, NcsnSizes, NcsnTraining, load_ncsn
from wsi_anomaly.detectors.score_norms import Vectorial
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
    network = load_ncsn("msma", SHORT.ncsn, checkpoint, device=torch.device("cpu"))
    clean = network.encode(torch.from_numpy(batch.pixels))
    for level, sigma in enumerate((1.0, 0.1, 0.01)):
        with torch.inference_mode():
            seen = network.noise(clean / (1 + (2 * sigma) ** 2) ** 0.5, 2 - level, None)
        assert scorer.vectors(batch)[:, level] == pytest.approx(seen.flatten(1).norm(dim=1).numpy(), rel=1e-4)


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
    assert scorer.vectors(plain).shape == (3, 3)
    assert not np.array_equal(scorer.vectors(plain), scorer.vectors(batch))
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


@pytest.mark.parametrize(("count", "held_out"), [(0, 0), (1, 0), (8, 4)])
def test_too_few_tiles_are_refused(count: int, held_out: int, tmp_path: Path) -> None:
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
    """After a minute of learning. Measured: fibrosis 0.87, necrosis 0.81, metastases 0.70, mucin 0.95."""
    training = TRAINING.model_copy(
        update={
            "steps": 200,
            "batch_size": 4,
            "learning_rate": 2e-3,
            "learning_rate_decay": "cosine",
            "save_every": 1000,
        }
    )
    sizes = NcsnSizes(channels=(16, 32, 32), head_channels=32)
    small = Msma(ncsn=NcsnOptions(sizes=sizes, training=training), held_out_fraction=0.5)
    small.fit(TilesInMemory(tissue(range(16), 10, "normal"), np.arange(160) // 10), tmp_path, device="cpu")
    scorer = small.load(tmp_path, device="cpu")
    normal = scorer.score(batch_of(tissue(range(100, 108), 5, "normal")))
    for kind, least in (("fibrosis", 0.7), ("necrosis", 0.65), ("metastasis", 0.55), ("mucin", 0.75)):
        scores = scorer.score(batch_of(tissue(range(100, 108), 5, kind)))
        assert (scores > normal.T).mean() > least, kind
