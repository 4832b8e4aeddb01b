"""Whether each slide has its say where a detector takes some tiles of many."""

import logging

import numpy as np
import pytest

from wsi_anomaly.detectors.sampling import even_sample


def test_large_slides_give_no_more_than_others() -> None:
    """Of 3 + 100 + 1,000 tiles, sixty are all of the first, and as many of the two others."""
    groups = np.repeat([7, 2, 5], [3, 100, 1000])
    chosen = even_sample(groups, 60, seed=0)
    counts = {int(group): int((groups[chosen] == group).sum()) for group in (7, 2, 5)}
    assert counts[7] == 3
    assert sorted((counts[2], counts[5])) == [28, 29]
    assert len(np.unique(chosen)) == 60


def test_a_choice_is_a_function_of_its_seed() -> None:
    """Equal seeds give equal tiles, others give others."""
    groups = np.arange(1000) // 100
    assert np.array_equal(even_sample(groups, 50, seed=1), even_sample(groups, 50, seed=1))
    assert not np.array_equal(even_sample(groups, 50, seed=1), even_sample(groups, 50, seed=2))


def test_it_says_how_many_it_took(caplog: pytest.LogCaptureFixture) -> None:
    """Both where some are left out and where none are."""
    caplog.set_level(logging.INFO)
    even_sample(np.arange(10), 4, seed=0)
    even_sample(np.arange(10), 10, seed=0)
    assert "4 of 10 tiles" in caplog.text
    assert "all 10 tiles" in caplog.text
