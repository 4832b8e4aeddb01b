"""Facts about image against reconstruction."""

import numpy as np
import pytest
import torch

from wsi_anomaly.detectors.residuals import squared_error_map, tile_means


def test_the_squared_error_of_a_pixel_is_the_mean_over_its_colours() -> None:
    """A pixel that is off by 0.3 in one of three colours has an error of 0.03."""
    images = torch.zeros(1, 3, 2, 2)
    rebuilt = images.clone()
    rebuilt[0, 1, 0, 1] = 0.3
    assert squared_error_map(images, rebuilt)[0].numpy() == pytest.approx(np.array([[0, 0.03], [0, 0]]))


def test_equal_images_are_not_apart() -> None:
    """The error of a perfect reconstruction is zero."""
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert not squared_error_map(images, images).any()


def test_the_mean_of_a_map_does_not_depend_on_the_other_maps() -> None:
    """Bit for bit: sums of many at once may be taken in another order."""
    maps = np.random.default_rng(0).random((9, 96, 96), np.float32)
    assert [tile_means(one[None])[0] for one in maps] == tile_means(maps).tolist()


def test_the_mean_of_a_large_map_is_not_rounded_away() -> None:
    """Sixteen million small errors still count beside a big one."""
    one = np.full((1, 4096, 4096), 1e-4, np.float32)
    one[0, 0, 0] = 1e4
    assert tile_means(one)[0] == pytest.approx(1e-4 + 1e4 / 4096**2, rel=1e-6)


def test_no_maps_have_no_means() -> None:
    """An empty batch is no special case."""
    assert tile_means(np.zeros((0, 4, 4), np.float32)).shape == (0,)
