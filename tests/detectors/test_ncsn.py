"""The small network of MSMA: what a user is told of its training."""

from pathlib import Path

import pytest

from wsi_anomaly.detectors.msma import Msma
from wsi_anomaly.detectors.ncsn import NcsnOptions, NcsnSizes, NcsnTraining
from wsi_anomaly.errors import ModelError
from wsi_anomaly.testing import TilesInMemory, smooth_tiles


def test_a_diverged_training_names_the_table_that_the_user_can_change(tmp_path: Path) -> None:
    """It is not the one that other detectors have."""
    training = NcsnTraining(steps=24, batch_size=2, learning_rate=1e30)
    sizes = NcsnSizes(channels=(8,), head_channels=8)
    wild = Msma(ncsn=NcsnOptions(levels=3, sizes=sizes, training=training), held_out_fraction=0.5)
    with pytest.raises(ModelError, match=r"lower learning_rate \(now 1e\+30\), under \[detector\.ncsn\.training\] of"):
        wild.fit(TilesInMemory(smooth_tiles(16, 16, seed=1)), tmp_path, device="cpu")
