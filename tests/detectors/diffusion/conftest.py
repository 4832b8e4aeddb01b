"""Fixtures for the diffusion detectors: torchvision in order, a tiny random base in a folder."""

import socket
from pathlib import Path

import pytest

from wsi_anomaly.torchvision_shim import make_importable

make_importable()  # diffusers and transformers look for torchvision

TEXTS = ("lymph node", "germinal center", "small cells")


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny base with random weights; copy it before you change it."""
    from wsi_anomaly.detectors.diffusion.random_backbone import write_random_backbone

    folder = tmp_path_factory.mktemp("base") / "tiny"
    write_random_backbone(folder, size="tiny", texts=TEXTS)
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Touching the network is a failure."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
