"""Facts about spatial MSMA beyond the contract."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wsi_anomaly.detectors.density import Density
from wsi_anomaly.detectors.diffusion.pixel import PixelDiffusion
from wsi_anomaly.detectors.diffusion.schedule import NoiseSchedule
from wsi_anomaly.detectors.grad_cam import grad_cams
from wsi_anomaly.detectors.ncsn import NcsnOptions, NcsnSizes, NcsnTraining
from wsi_anomaly.detectors.spatial_flow import cells_of, fit_spatial_flow
from wsi_anomaly.detectors.spatial_msma import SpatialMsma
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.testing import DetectorContract, TilesInMemory, batch_of, odd_tiles, smooth_tiles

SIZES = NcsnSizes(channels=(8, 16), head_channels=16)
TRAINING = NcsnTraining(steps=40, batch_size=8, learning_rate=5e-3, save_every=10, picture_every=1000, ema_decay=None)
NCSN = NcsnOptions(sizes=SIZES, levels=4, training=TRAINING)
TINY = SpatialMsma(ncsn=NCSN, held_out_fraction=0.4, flow_steps=30)


class TestSpatialMsma(DetectorContract):
    """The contract, with a flow for each place."""

    detector = TINY


class TestGradCam(DetectorContract):
    """The contract, with a mixture for whole tiles."""

    detector = TINY.model_copy(update={"map": "gradcam"})


@pytest.fixture(scope="module")
def checkpoint(fitted: Callable[..., Path]) -> Path:
    """A fitted tiny detector with maps from the flow."""
    return fitted(TINY, TilesInMemory(smooth_tiles(32, 32, seed=1)))


@pytest.fixture(scope="module")
def camera(fitted: Callable[..., Path]) -> Path:
    """A fitted tiny detector with maps from Grad-CAM."""
    return fitted(TINY.model_copy(update={"map": "gradcam"}), TilesInMemory(smooth_tiles(32, 32, seed=1)))


def test_the_map_points_at_the_anomaly(checkpoint: Path) -> None:
    """The planted square in the middle stands out of the rim of its tile."""
    maps = TINY.load(checkpoint, device="cpu").score_map(batch_of(odd_tiles(8, 32, seed=7)))
    assert maps[:, 12:20, 12:20].mean() > maps[:, :4].mean() + 5


def test_the_vectors_are_the_same_for_both_kinds_of_map(checkpoint: Path, camera: Path) -> None:
    """Norms of whole tiles, one a level, though the flow judges places; and the score is the mean of these."""
    batch = batch_of(smooth_tiles(3, 32, seed=4))
    flow, cam = TINY.load(checkpoint, device="cpu"), _camera().load(camera, device="cpu")
    scores, vectors = flow.scores_and_vectors(batch)
    assert vectors.shape == (3, 4)
    assert np.array_equal(vectors, cam.scores_and_vectors(batch)[1])
    places = flow.norms.of_maps(lambda maps: flow.flow(cells_of(maps, kernel_px=3, cell_px=8)), batch)
    assert scores[:, 0] == pytest.approx(places.mean(axis=(1, 2)), rel=1e-6)


def test_a_cell_has_the_local_norms_of_all_colours_and_of_what_is_around() -> None:
    """Of ones in three colours, a square of 3 x 3 px has the norm sqrt(27), with zeros beyond the border."""
    cells = cells_of(torch.ones(1, 2, 3, 24, 24), kernel_px=3, cell_px=8).numpy()
    assert cells.shape == (1, 6, 3, 3)
    inside, side = (27**0.5, (56 * 27**0.5 + 8 * 18**0.5) / 64)
    assert cells[0, :2, 1, 1] == pytest.approx([inside] * 2)
    assert cells[0, 0, 0, 1] == pytest.approx(side)
    corner = float(cells[0, 0, 0, 0])
    assert cells[0, 2, 1, 1] == pytest.approx((4 * side + 4 * corner) / 8)
    assert cells[0, 2, 0, 0] == pytest.approx((2 * side + inside) / 3)
    assert cells[0, 4] == pytest.approx((4 * side + 4 * corner + inside) / 9)


def test_what_is_around_decides_how_likely_a_cell_is() -> None:
    """Where cells are as their surroundings, one with the surroundings of another is less likely than in its own."""
    random = np.random.default_rng(0)
    level = random.normal(size=(200, 1, 1))
    values = (level + 0.1 * random.normal(size=(200, 16, 3))).astype(np.float32)
    flow = fit_spatial_flow(values, np.arange(200) // 10, most_steps=150, seed=0)
    own = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])[:, :, None, None]
    strange = torch.tensor([[-1.0, 1.0, 1.0], [1.0, -1.0, -1.0]])[:, :, None, None]
    with torch.inference_mode():
        assert (flow(strange) > flow(own) + 5).all()


class Mirror(torch.nn.Module):
    """In place of a UNet: its middle is its input, and so is the noise that it tells."""

    config, device, dtype = SimpleNamespace(block_out_channels=(1,)), torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = torch.nn.Identity()

    def forward(self, images: torch.Tensor, timesteps: torch.Tensor, *, return_dict: bool) -> tuple[torch.Tensor]:
        """The images."""
        del timesteps, return_dict
        return (self.mid_block(images),)


class Mirrored(PixelDiffusion):
    """A diffusion with that network, and two noise levels with signal 0.9 and 0.5."""

    def __init__(self) -> None:
        self.schedule, self.unet = NoiseSchedule(np.array([0.9, 0.5])), Mirror()  # type: ignore[assignment]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_grad_cam_is_what_raises_the_surprise(sign: int) -> None:
    """With -log p the sum of the norms |x_t|, a channel counts as its mean gradient, mean(x_t) / |x_t|.

    And where -log p falls with the norms, it is those channels that are dark on the whole which raise it.
    """
    density = Density("gmm", {"middle": np.zeros(2), "scale": np.ones(2)}, lambda norms: sign * norms.sum(dim=1))
    pixels = np.full((1, 8, 8, 3), 128, np.uint8)
    pixels[0, 2:4, 2:4] = 255, 200, 0
    clean = pixels[0] / 127.5 - 1
    wanted = np.zeros((8, 8))
    for signal in (0.9, 0.5):
        seen = signal**0.5 * clean
        wanted += np.maximum(0, sign * (seen * seen.mean(axis=(0, 1))).sum(axis=2) / np.linalg.norm(seen))
    assert wanted.max() > (0.01 if sign > 0 else -1)
    assert grad_cams(Mirrored(), (1, 0), density, pixels)[0] == pytest.approx(wanted, abs=1e-6)


def test_a_tile_of_one_colour_has_a_score_and_a_map(checkpoint: Path, camera: Path) -> None:
    """Black, white and grey are far from tissue, and still numbers."""
    tiles = np.stack([np.full((32, 32, 3), value, np.uint8) for value in (0, 128, 255)])
    for scorer in (TINY.load(checkpoint, device="cpu"), _camera().load(camera, device="cpu")):
        assert np.isfinite(scorer.score(batch_of(tiles))).all()
        assert np.isfinite(scorer.score_map(batch_of(tiles))).all()


def test_a_grad_cam_does_not_depend_on_the_batch_and_is_never_negative(camera: Path) -> None:
    """Each tile is looked at by itself; a map of abnormal tiles is not empty."""
    scorer, batch = _camera().load(camera, device="cpu"), batch_of(odd_tiles(5, 32, seed=3))
    maps = scorer.score_map(batch)
    assert np.array_equal(scorer.score_map(batch_of(batch.pixels[[3]])), maps[[3]])
    assert maps.min() >= 0
    assert maps.max() > 0


def test_with_grad_cam_the_score_is_that_of_the_whole_tile(camera: Path) -> None:
    """Odd tiles are further from normal than new normal ones."""
    scorer = _camera().load(camera, device="cpu")
    odd, normal = (scorer.score(batch_of(make(12, 32, seed=5))) for make in (odd_tiles, smooth_tiles))
    assert (odd > normal.T).mean() > 0.9


def test_a_fit_for_the_other_kind_of_map_is_refused(checkpoint: Path) -> None:
    """The message names both."""
    with pytest.raises(ModelError, match="fitted for map = 'flow', not 'gradcam'"):
        _camera().load(checkpoint, device="cpu")


def test_a_cell_larger_than_a_tile_is_refused(tmp_path: Path) -> None:
    """Before anything is learnt."""
    with pytest.raises(OptionsError, match="cell_px = 64 is more than the 32 px"):
        TINY.model_copy(update={"cell_px": 64}).fit(TilesInMemory(smooth_tiles(32, 32, seed=1)), tmp_path, device="cpu")


def test_too_few_tiles_are_refused(tmp_path: Path) -> None:
    """The message says how many there are and how many are needed."""
    with pytest.raises(CohortError, match=r"4 \(held out of 8\), .* until there are about 16 tiles"):
        TINY.fit(TilesInMemory(smooth_tiles(8, 32, seed=1)), tmp_path, device="cpu")


def _camera() -> SpatialMsma:
    return TINY.model_copy(update={"map": "gradcam"})


@pytest.mark.slow
def test_disease_ranks_above_normal_tissue(tissue: Callable[..., np.ndarray], tmp_path: Path) -> None:
    """After half a minute of learning. Measured: fibrosis 0.90, necrosis 0.88, metastases 0.83, mucin 0.89."""
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
    small = SpatialMsma(ncsn=NcsnOptions(sizes=sizes, training=training), flow_steps=200, held_out_fraction=0.5)
    small.fit(TilesInMemory(tissue(range(10), 10, "normal"), np.arange(100) // 10), tmp_path, device="cpu")
    scorer = small.load(tmp_path, device="cpu")
    normal = scorer.score(batch_of(tissue(range(100, 108), 3, "normal")))
    for kind, least in (("fibrosis", 0.8), ("necrosis", 0.8), ("metastasis", 0.7), ("mucin", 0.75)):
        scores = scorer.score(batch_of(tissue(range(100, 108), 3, kind)))
        assert (scores > normal.T).mean() > least, kind
