"""Fixtures for the tests of detectors: one thread, fitted models, copies that may be spoilt, weights for LPIPS."""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wsi_anomaly.detectors.perceptual import Lpips
from wsi_anomaly.synthetic import TileKind, synthetic_tiles
from wsi_anomaly.testing import TilesInMemory

Fit = Callable[[Any, TilesInMemory], Path]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are fastest on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """Fits a detector and gives the folder: `fitted(detector, tiles)`."""

    def fit(detector: Any, tiles: TilesInMemory) -> Path:
        folder: Path = tmp_path_factory.mktemp("model") / "detector"
        detector.fit(tiles, folder, device="cpu")
        return folder

    return fit


@pytest.fixture(scope="session")
def tissue() -> Callable[[range, int, TileKind], np.ndarray]:
    """Made-up tiles of 64 px, `tissue(slides, number, kind)`: as many of each slide; one slide is one stain."""

    @cache
    def drawn(slides: range, number: int, kind: TileKind) -> np.ndarray:
        tiles = [synthetic_tiles(slide, number, tile_px=64, kinds=(kind,)) for slide in slides]
        return np.stack([pixels for of_slide in tiles for pixels, _ in of_slide])

    return drawn


@pytest.fixture
def spoilt(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the module's fitted detector that may be spoilt."""
    return Path(shutil.copytree(checkpoint, tmp_path / "spoilt"))


@pytest.fixture(scope="session")
def lpips_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with weights for LPIPS that are nearly all the same number."""
    path: Path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Lpips().state_dict().items()}
    weights = {name: torch.full(shape, 0.01, dtype=torch.float16) for name, shape in shapes.items()}
    weights["features.0.weight"] = torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    save_file(weights, path)
    return path
