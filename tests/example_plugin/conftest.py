"""Stands for an installation of the example, here and in the processes that its tests start."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.append(HERE)


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Also elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", HERE)
        yield
