"""Diffusion detectors need torchvision in order, and a tiny base to stand on."""

from pathlib import Path

import pytest

from wsi_anomaly.torchvision_shim import make_importable

make_importable()  # diffusers and transformers look for torchvision


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Stable Diffusion with random weights."""
    from wsi_anomaly.detectors.diffusion.random_backbone import write_random_backbone

    folder = tmp_path_factory.mktemp("base") / "tiny"
    write_random_backbone(folder, size="tiny", texts=("tissue", "lymph node", "germinal center"))
    return folder
