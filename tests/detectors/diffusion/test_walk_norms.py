"""Facts about the score `msma` of the diffusion detectors: what it costs, what it compares with, what it refuses."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wsi_anomaly.detectors.anoddpm import AnoDdpm
from wsi_anomaly.detectors.anopilad import AnoPilad
from wsi_anomaly.detectors.diffusion.pixel import NetworkSizes
from wsi_anomaly.detectors.protocol import TileBatch, Vectorial
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.options import parse_options
from wsi_anomaly.testing import TilesInMemory, batch_of, odd_tiles, smooth_tiles

PX = 16
SIZES = NetworkSizes(channels=(8, 16), layers_per_level=1, attention_levels=(), head_channels=8, norm_groups=4)
TRAINING = {"steps": 2, "batch_size": 8, "learning_rate": 1e-3, "save_every": 10}


class StoppedError(Exception):
    """What stands in for a crash in these tests."""


class Breaking(TilesInMemory):
    """Tiles that can be read so often, and then no more."""

    left = 1_000_000

    def read(self, indices: np.ndarray) -> TileBatch:
        """The tiles at these positions."""
        self.left -= 1
        if self.left < 0:
            raise StoppedError
        return super().read(indices)


def pixel(*scores: str, **options: Any) -> AnoDdpm:
    """An AnoDDPM that walks from 100 by way of 50 to 0."""
    table = {
        "sizes": SIZES.model_dump(),
        "timesteps": [100],
        "sampler": {"name": "ddim", "steps": 20, "snap": False},
        "training": TRAINING,
        "scores": scores or ("mse_pixel", "msma"),
    }
    return parse_options(AnoDdpm, table | options, where="test")


def latent(base: Path, *scores: str, **options: Any) -> AnoPilad:
    """An AnoPILaD that asks seven times on its way from 301."""
    table = {"base": str(base), "timesteps": [300], "sampler": {"name": "ddim", "steps": 20}, "training": TRAINING}
    return parse_options(AnoPilad, table | {"scores": scores or ("mse_latent", "msma")} | options, where="test")


def normal_tiles(count: int = 40, tile_px: int = PX) -> Breaking:
    """To learn from."""
    return Breaking(smooth_tiles(count, tile_px, seed=1), np.arange(count) // 10)


def files(folder: Path) -> dict[str, bytes]:
    """All that a fit left."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkpoint(fitted: Callable[..., Path]) -> Path:
    """A fitted AnoDDPM."""
    return fitted(pixel(), normal_tiles())


@pytest.fixture(scope="module")
def latent_checkpoint(tiny_base: Path, fitted: Callable[..., Path]) -> Path:
    """A fitted AnoPILaD with guidance."""
    return fitted(latent(tiny_base, guidance=3), normal_tiles(tile_px=64))


def test_planted_anomalies_score_higher_and_alike_in_any_company(tmp_path: Path) -> None:
    """Nine times out of ten; to the bit, in any order, alone or with others."""
    detector = pixel("msma", training=TRAINING | {"steps": 40})
    detector.fit(normal_tiles(), tmp_path, device="cpu")
    scorer = detector.load(tmp_path, device="cpu")
    batch = batch_of(np.concatenate([make(10, PX, seed=2) for make in (smooth_tiles, odd_tiles)]))
    scores = scorer.score(batch)[:, 0]
    assert (scores[10:, None] > scores[:10]).mean() >= 0.9
    for rows in (np.array([13]), np.random.default_rng(3).permutation(20), np.arange(0)):
        some = batch_of(batch.pixels[rows], seeds=batch.seeds[rows])
        assert np.array_equal(scorer.score(some)[:, 0], scores[rows])


def test_the_network_is_asked_no_more_often_than_without(latent_checkpoint: Path, tiny_base: Path) -> None:
    """Seven calls of two passes for each tile, and the other score has the same bits."""
    batch, calls, found = batch_of(smooth_tiles(8, 64, seed=2)), [], []
    for scores in (("mse_latent",), ("mse_latent", "msma")):
        scorer = latent(tiny_base, *scores, guidance=3).load(latent_checkpoint, device="cpu")
        seen: list[int] = []
        scorer.restorer.network.unet.register_forward_hook(lambda _, given, __, seen=seen: seen.append(len(given[0])))
        found.append(scorer.score(batch))
        calls.append(sum(seen))
    assert calls == [7 * 2 * 8] * 2
    assert np.array_equal(found[0], found[1][:, :1])
    assert np.isfinite(found[1]).all()


def test_a_fit_without_it_leaves_the_same_files_but_its_own(latent_checkpoint: Path, tiny_base: Path) -> None:
    """What the network learns does not depend on the scores; an earlier fit's density goes."""
    folder = Path(shutil.copytree(latent_checkpoint, latent_checkpoint.with_name("again")))
    latent(tiny_base, "mse_latent", guidance=3).fit(normal_tiles(tile_px=64), folder, device="cpu")
    whole = files(latent_checkpoint)
    own = {"msma/fit.json", "msma/t300/density.safetensors"}
    assert own < set(whole)
    assert files(folder) == {name: content for name, content in whole.items() if name not in own}


def test_a_vector_is_the_norm_of_the_noise_that_each_call_sees(latent_checkpoint: Path, tiny_base: Path) -> None:
    """Of the guided one, asked for once with scores and vectors together; a tile has the same alone."""
    scorer = latent(tiny_base, guidance=3).load(latent_checkpoint, device="cpu")
    assert isinstance(scorer, Vectorial)
    network, seen = scorer.restorer.network, []
    inner = network.noise

    def noise(latents: torch.Tensor, t: int, condition: Any) -> torch.Tensor:
        seen.append(inner(latents, t, condition))
        return seen[-1]

    network.noise = noise
    batch = batch_of(smooth_tiles(8, 64, seed=2))
    scores, vectors = scorer.scores_and_vectors(batch)
    assert len(seen) == 7
    assert np.array_equal(scores, scorer.score(batch))
    assert vectors.shape == (8, 7)
    wanted = torch.stack([given.flatten(1).norm(dim=1) for given in seen], dim=1)
    np.testing.assert_allclose(vectors, wanted.numpy(), rtol=1e-5)
    alone = batch_of(batch.pixels[3:4], seeds=batch.seeds[3:4])
    assert np.array_equal(scorer.scores_and_vectors(alone)[1], vectors[3:4])


def test_without_it_there_are_no_vectors(latent_checkpoint: Path, tiny_base: Path) -> None:
    """No score comes from them."""
    assert not isinstance(latent(tiny_base, "mse_latent", guidance=3).load(latent_checkpoint, device="cpu"), Vectorial)


def test_several_starts_have_a_density_each(tmp_path: Path) -> None:
    """So a column is that of the start alone; the vector holds both walks."""
    several = pixel(timesteps=[150, 50])
    assert several.score_names == ("mse_pixel t150", "msma t150", "mse_pixel t50", "msma t50")
    batch, columns = batch_of(odd_tiles(4, PX, seed=2)), []
    for start in (150, 50):
        alone = pixel(timesteps=[start])
        alone.fit(normal_tiles(), tmp_path / str(start), device="cpu")
        columns.append(alone.load(tmp_path / str(start), device="cpu").score(batch))
    several.fit(normal_tiles(), tmp_path / "both", device="cpu")
    scorer = several.load(tmp_path / "both", device="cpu")
    assert scorer.scores_and_vectors(batch)[1].shape == (4, 4 + 2)
    assert np.array_equal(scorer.score(batch), np.concatenate(columns, axis=1))


def test_gathering_goes_on_where_it_was(checkpoint: Path, tmp_path: Path) -> None:
    """A fit that stopped after two of five portions walks the other three, and ends with the same bytes."""
    pixel("mse_pixel").fit(normal_tiles(), tmp_path, device="cpu")
    broken, rest = normal_tiles(), normal_tiles()
    broken.left = 4  # the ends of the tiles twice, to tell whether they are the same, and two portions
    with pytest.raises(StoppedError):
        pixel().fit(broken, tmp_path, device="cpu")
    assert (tmp_path / "msma/vectors.pt").exists()
    with pytest.raises(ModelError, match="missing or unfinished"):
        pixel().load(tmp_path, device="cpu")
    pixel().fit(rest, tmp_path, device="cpu")
    assert rest.reads == 2 + 3
    assert files(tmp_path) == files(checkpoint)


def test_a_finished_fit_is_left_as_it_is(checkpoint: Path) -> None:
    """Only the ends of the tiles are looked at again, by learning and by gathering."""
    tiles = normal_tiles()
    pixel().fit(tiles, checkpoint, device="cpu")
    assert tiles.reads == 2


def test_no_more_tiles_are_walked_than_wanted(tmp_path: Path) -> None:
    """One column for each of the three calls."""
    pixel("mse_pixel").fit(normal_tiles(), tmp_path, device="cpu")
    few = pixel(msma={"density": "knn", "most_tiles": 32})
    few.fit(normal_tiles(), tmp_path, device="cpu")
    with safe_open(tmp_path / "msma/t100/density.safetensors", framework="np") as file:
        assert file.get_tensor("vectors").shape == (32, 3)


def test_a_failed_tile_has_no_score_and_spoils_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """NaN also where neighbours are asked for, which know no such numbers."""
    detector = pixel("msma", msma={"density": "knn"})
    detector.fit(normal_tiles(), tmp_path, device="cpu")
    batch, scorer = batch_of(smooth_tiles(4, PX, seed=2)), detector.load(tmp_path, device="cpu")
    well, inner = scorer.score(batch), scorer.restorer.network.noise

    def noise(latents: torch.Tensor, t: int, condition: None) -> torch.Tensor:
        seen = inner(latents, t, condition)
        seen[2] = torch.nan
        return seen

    scorer.restorer.network.noise = noise
    with caplog.at_level(logging.WARNING):
        found = scorer.score(batch_of(batch.pixels, seeds=batch.seeds))
    assert np.isnan(found[2]).all()
    assert np.array_equal(np.delete(found, 2, axis=0), np.delete(well, 2, axis=0))
    assert "1 tiles could not be restored" in caplog.text


def test_a_model_fitted_without_it_has_to_be_fitted_again(tmp_path: Path) -> None:
    """Which then learns nothing anew."""
    pixel("mse_pixel").fit(normal_tiles(), tmp_path, device="cpu")
    learnt = files(tmp_path)
    with pytest.raises(ModelError, match=r"fitted without it\. Fit it again, or leave 'msma' out"):
        pixel().load(tmp_path, device="cpu")
    pixel().fit(normal_tiles(), tmp_path, device="cpu")
    assert np.isfinite(pixel().load(tmp_path, device="cpu").score(batch_of(smooth_tiles(2, PX, seed=2)))).all()
    assert learnt.items() < files(tmp_path).items()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampler": {"name": "plms", "steps": 20}}, r'sampler is {"name":"ddim".*, not {"name":"plms"'),
        ({"timesteps": [150]}, r"timesteps is \[100\], not \[150\]"),
        ({"msma": {"density": "knn"}}, "density is gmm, not knn"),
    ],
)
def test_other_walks_than_those_of_the_fit_are_refused(options: dict[str, Any], said: str, checkpoint: Path) -> None:
    """Their norms are of something else."""
    with pytest.raises(ModelError, match=f"{said}.*or fit the model again"):
        pixel(**options).load(checkpoint, device="cpu")


def test_other_guidance_than_that_of_the_fit_is_refused(latent_checkpoint: Path, tiny_base: Path) -> None:
    """It is the guided noise that is measured."""
    with pytest.raises(ModelError, match="guidance is 3, not 1"):
        latent(tiny_base).load(latent_checkpoint, device="cpu")


def test_a_density_of_other_weights_is_refused(spoilt: Path) -> None:
    """As after copying half of a model over another one."""
    with safe_open(spoilt / "weights.safetensors", framework="pt") as file:
        label = dict(file.metadata())
    weights = load_file(spoilt / "weights.safetensors")
    save_file(weights | {"conv_out.bias": torch.ones(3)}, spoilt / "weights.safetensors", label)
    with pytest.raises(ModelError, match=r"weights is \w{64}, not \w{64}"):
        pixel().load(spoilt, device="cpu")


def test_the_density_of_another_detector_is_refused(spoilt: Path) -> None:
    """By its note."""
    note = json.loads((spoilt / "msma/fit.json").read_text())
    (spoilt / "msma/fit.json").write_text(json.dumps(note | {"detector": "anopilad"}))
    with pytest.raises(ModelError, match="detector 'anopilad', not 1 and 'anoddpm'"):
        pixel().load(spoilt, device="cpu")


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_few_tiles_are_refused_before_anything_is_learnt(count: int, tiny_base: Path, tmp_path: Path) -> None:
    """With how many are needed."""
    for detector, px in ((pixel(), PX), (latent(tiny_base), 64)):
        with pytest.raises(CohortError, match=f"from: {count}, needed: at least 8. Add normal slides: better"):
            detector.fit(normal_tiles(count, px), tmp_path / "model", device="cpu")
    assert not (tmp_path / "model").exists()


def test_in_painting_is_refused() -> None:
    """In known cells it asks no network."""
    with pytest.raises(OptionsError, match=r"For msma, set restoration = \"noise\""):
        pixel(restoration="inpaint")


def test_tiles_of_one_colour_have_a_score(checkpoint: Path) -> None:
    """Black, white and grey are no tissue, and still numbers."""
    tiles = np.stack([np.full((PX, PX, 3), value, np.uint8) for value in (0, 128, 255)])
    assert np.isfinite(pixel().load(checkpoint, device="cpu").score(batch_of(tiles))).all()
