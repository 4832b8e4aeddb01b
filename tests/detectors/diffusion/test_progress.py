"""Facts about what a fit shows: means over windows, durations, pictures that can always be drawn."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsi_anomaly.detectors.diffusion.progress import (
    duration,
    running_loss,
    window_means,
    write_loss_picture,
    write_samples,
)
from wsi_anomaly.testing import smooth_tiles

NAN, INF = float("nan"), float("inf")


def test_windows_are_of_equal_length_and_leave_out_what_is_no_number() -> None:
    """The last one may be shorter."""
    steps, means = window_means([1.0, 3.0, NAN, 5.0, INF, -INF, 8.0], most=4)
    assert steps.tolist() == [2, 4, 6, 7]
    assert means == pytest.approx([2, 5, NAN, 8], nan_ok=True)


@pytest.mark.parametrize("count", [1, 7, 400, 401, 1000])
def test_there_are_never_more_windows_than_wanted(count: int) -> None:
    """And every loss is in one."""
    losses = np.random.default_rng(0).random(count).tolist()
    steps, means = window_means(losses, most=400)
    assert len(steps) <= 400
    assert np.sum(means * np.diff(steps, prepend=0)) == pytest.approx(np.sum(losses))


def test_the_running_loss_is_that_of_the_last_hundred_steps() -> None:
    """Not a number where there was none."""
    assert running_loss([7.0] * 50 + [1.0] * 50 + [3.0] * 50) == 2
    assert np.isnan(running_loss([NAN, INF]))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (119.4, "119 s"), (150.0, "2 min"), (7260.0, "2 h 1 min"), (200_000.0, "2 d 8 h")],
)
def test_durations_are_told_in_the_units_that_matter(seconds: float, text: str) -> None:
    """Nobody needs the seconds of a day."""
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "losses",
    [[0.3], [NAN, NAN], [0.1, NAN, 0.2], [0.0, 0.0], np.geomspace(1, 0.001, 5000).tolist()],
    ids=["one", "none", "gap", "zero", "steep"],
)
def test_a_curve_can_be_drawn_of_whatever_losses_there_are(losses: list[float], tmp_path: Path) -> None:
    """And of equal losses the file is equal."""
    for name in ("first.png", "second.png"):
        write_loss_picture(tmp_path / name, losses, steps=5000)
    with Image.open(tmp_path / "first.png") as picture:
        assert picture.size == (1000, 550)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


@pytest.mark.parametrize(("count", "tile_px"), [(1, 4), (8, 24)])
def test_tiles_are_drawn_pixel_by_pixel_above_what_became_of_them(count: int, tile_px: int, tmp_path: Path) -> None:
    """In their order, from left to right."""
    tiles = smooth_tiles(2 * count, tile_px, seed=0)
    write_samples(tmp_path / "samples.png", tiles[:count], tiles[count:], caption="After step 1", label="as rebuilt")
    with Image.open(tmp_path / "samples.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (tile_px, tile_px, 3))[:, :, 0]
    places = [np.argwhere((windows[:, ::4] == tile).all(axis=(2, 3, 4)))[0] for tile in tiles]
    rows, columns = np.array(places).T.reshape(2, 2, count)
    assert len(set(rows[0])) == len(set(rows[1])) == 1
    assert rows[1][0] >= rows[0][0] + tile_px
    assert np.array_equal(columns[0], columns[1])
    assert (np.diff(columns[0]) * 4 > tile_px).all()
