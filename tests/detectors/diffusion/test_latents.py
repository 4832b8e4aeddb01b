"""Facts about kept latents: they are those of encoding anew, whatever happened to the file."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from jaxtyping import Float32, Int64

from wsi_anomaly.detectors.diffusion.backbone import Backbone
from wsi_anomaly.detectors.diffusion.latents import LatentCache, latent_cache, posterior_moments
from wsi_anomaly.detectors.diffusion.random_backbone import random_backbone
from wsi_anomaly.detectors.protocol import Prompt
from wsi_anomaly.testing import smooth_tiles

SHAPE, TILES = (4, 8, 8), 20
CPU = torch.device("cpu")
ORDERS = [np.array(order) for order in ([3, 0, 19], [0, 7, 3, 7], [19, 18, 7])]


class StoppedError(Exception):
    """What stands in for a crash in these tests."""


class Encoder:
    """The moments of tiles as a VAE might give them, and which were asked for."""

    def __init__(self) -> None:
        self.all = np.random.default_rng(0).standard_normal((TILES, 2, *SHAPE), np.float32)
        self.asked: list[int] = []

    def of(self, positions: Int64[np.ndarray, " tile"]) -> Callable[[np.ndarray], np.ndarray]:
        """Encodes some of the tiles at these positions."""

        def encode(missing: Int64[np.ndarray, " missing"]) -> Float32[np.ndarray, "missing moment latent y x"]:
            self.asked += positions[missing].tolist()
            return self.all[positions[missing]]

        return encode


def prompts(positions: Int64[np.ndarray, " tile"]) -> tuple[Prompt, ...]:
    """Of the tiles at these positions; every third is empty."""
    return tuple((("x" * position, 1.0), ('é "b"', 1 / 3)) if position % 3 else () for position in positions.tolist())


def check(cache: LatentCache, encoder: Encoder) -> list[int]:
    """Ask for tiles in some orders, compare, and tell which were encoded."""
    encoder.asked.clear()
    for order in ORDERS:
        assert np.array_equal(cache.moments(order, prompts(order), encoder.of(order)), encoder.all[order])
    return encoder.asked


def open_cache(folder: Path, **changes: object) -> "object":
    """The cache of the fit of these tests."""
    return latent_cache(folder, SHAPE, **({"tiles": TILES, "identity": "vae"} | changes))


def leave_unfinished(folder: Path, encoder: Encoder) -> Path:
    """Stop a fit that has kept what `ORDERS` ask for; its file."""
    with pytest.raises(StoppedError), open_cache(folder) as cache:
        check(cache, encoder)
        raise StoppedError
    (path,) = folder.iterdir()
    return path


def test_each_tile_is_encoded_once(tmp_path: Path) -> None:
    """When it is first needed; nothing stays in the folder."""
    with open_cache(tmp_path / "new" / "fit") as cache:
        assert check(cache, Encoder()) == [3, 0, 19, 7, 7, 18]
        assert check(cache, Encoder()) == []
    assert not list((tmp_path / "new" / "fit").iterdir())


def test_prompts_are_kept_beside_the_latents(tmp_path: Path) -> None:
    """Exactly; there are none to be had unless all of the tiles are known, also to a fit that goes on."""
    with open_cache(tmp_path) as cache:
        assert cache.prompts(np.array([3])) is None
    leave_unfinished(tmp_path, Encoder())
    with open_cache(tmp_path) as cache:
        known = np.array([19, 0, 3, 7, 3])
        assert cache.prompts(known) == prompts(known)
        assert cache.prompts(np.array([3, 4])) is None


def test_a_tile_whose_prompt_is_too_long_to_be_kept_is_never_known(tmp_path: Path) -> None:
    """Its pixels are read and encoded each time."""
    with open_cache(tmp_path) as cache:
        for _ in range(2):
            encoder = Encoder()
            cache.moments(
                np.array([1, 2]), (prompts(np.array([1]))[0], (("x" * 3000, 1.0),)), encoder.of(np.array([1, 2]))
            )
            assert 2 in encoder.asked
        assert encoder.asked == [2]
        assert cache.prompts(np.array([1])) is not None
        assert cache.prompts(np.array([2])) is None


def test_what_a_stopped_fit_kept_is_there_when_it_goes_on(tmp_path: Path) -> None:
    """Nothing is encoded again."""
    leave_unfinished(tmp_path, Encoder())
    with open_cache(tmp_path) as cache:
        assert check(cache, Encoder()) == []


def test_what_was_half_written_is_encoded_again(tmp_path: Path) -> None:
    """One tile is torn, the file's end is missing."""
    path = leave_unfinished(tmp_path, Encoder())
    row_bytes = 4 + 2048 + 2 * 4 * 8 * 8 * 4
    with path.open("r+b") as file:
        file.seek(3 * row_bytes + 3000)
        file.write(bytes(100))
        file.truncate(19 * row_bytes + 100)
    with open_cache(tmp_path) as cache:
        assert check(cache, Encoder()) == [3, 19]


def test_what_is_kept_is_in_the_file_at_once(tmp_path: Path) -> None:
    """A process that is killed loses nothing of it."""
    with open_cache(tmp_path / "running") as cache:
        check(cache, Encoder())
        shutil.copytree(tmp_path / "running", tmp_path / "killed")
    with open_cache(tmp_path / "killed") as cache:
        assert check(cache, Encoder()) == []


@pytest.mark.parametrize("change", [{"identity": "another"}, {"tiles": TILES + 1}])
def test_what_was_kept_for_other_tiles_or_another_vae_is_removed(change: dict[str, object], tmp_path: Path) -> None:
    """It would be wrong for these."""
    path = leave_unfinished(tmp_path, Encoder())
    with open_cache(tmp_path, **change) as cache:
        assert not path.exists()
        assert len(check(cache, Encoder())) == 6


class Usage(NamedTuple):
    """As `shutil.disk_usage` tells it."""

    total: int
    used: int
    free: int


def test_without_room_on_the_disk_every_tile_is_encoded_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line in the log says so, and the disk is left alone."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(50_000, 9_000, 41_000))
    with open_cache(tmp_path) as cache:
        assert len(check(cache, Encoder())) == 10
        assert not list(tmp_path.iterdir())
    assert len([record for record in caplog.records if "too little to keep the latents" in record.getMessage()]) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_is_no_obstacle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From then on every tile is encoded each time; one line in the log says so."""
    path = leave_unfinished(tmp_path, Encoder())
    path.unlink()
    path.symlink_to("/dev/full")
    with caplog.at_level(logging.INFO, "wsi_anomaly"), open_cache(tmp_path) as cache:
        assert len(check(cache, Encoder())) == 10
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    assert Path("/dev/full").exists()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """A tiny base."""
    return random_backbone("tiny")


def test_moments_of_a_tile_do_not_depend_on_the_others(backbone: Backbone) -> None:
    """To the bit: what is kept equals what encoding anew would give."""
    tiles = smooth_tiles(11, 64, seed=0)
    together = posterior_moments(backbone.vae, tiles, CPU)
    assert together.shape == (11, 2, 4, 8, 8)
    assert np.array_equal(posterior_moments(backbone.vae, tiles[[10, 2]], CPU), together[[10, 2]])


def test_moments_and_noise_give_the_samples_of_the_vae(backbone: Backbone) -> None:
    """Times its scaling factor."""
    tiles = smooth_tiles(3, 64, seed=0)
    mean, deviation = torch.from_numpy(posterior_moments(backbone.vae, tiles, CPU)).unbind(1)
    images = torch.from_numpy(tiles).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = backbone.vae.encode(images).latent_dist
    sample = posterior.sample(torch.Generator().manual_seed(1)) * backbone.vae.config.scaling_factor
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(mean + deviation * noise, sample, atol=1e-5)
    assert deviation.min() > 0
