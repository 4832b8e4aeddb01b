"""Which normal tissue a detector learns from, and which it is measured against."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wsi_anomaly.detectors.autoencoder import Autoencoder
from wsi_anomaly.detectors.sampling import even_sample
from wsi_anomaly.errors import CohortError
from wsi_anomaly.stages.fit import (
    Part,
    Split,
    SplitOptions,
    TrainingTiles,
    fit_detector,
    fit_recipe,
    split_tissue,
)
from wsi_anomaly.storage.layout import RunFolder, SlideFolder

WriteTiles = Callable[..., SlideFolder]
SIZES = {"a": 100, "b": 20, "c": 60, "d": 80}


@pytest.fixture
def folders(write_tiles: WriteTiles) -> list[SlideFolder]:
    """Four slides of different size."""
    return [write_tiles(count, slide_id=slide_id, tile_px=8) for slide_id, count in SIZES.items()]


def counts(split: Split) -> dict[str, int]:
    """How many tiles of each slide are learnt from."""
    return {part.folder.slide_id: int(part.tiles.sum()) for part in split.train}


def test_all_tiles_are_learnt_from_unless_told(folders: list[SlideFolder]) -> None:
    """Those of the slide that is held out stand on the other side, all of them."""
    split = split_tissue(folders, {"d": "reference"}, SplitOptions(), seed=0)
    assert counts(split) == {"a": 100, "b": 20, "c": 60}
    assert int(split.reference[0].tiles.sum()) == 80


def test_no_more_tiles_are_learnt_from_than_wanted_as_many_of_each_slide(
    folders: list[SlideFolder], caplog: pytest.LogCaptureFixture
) -> None:
    """A small slide gives all of its tiles, and the log says how many were taken."""
    with caplog.at_level("INFO"):
        split = split_tissue(folders, {"d": "reference"}, SplitOptions(most_tiles=90), seed=0)
    assert counts(split) == {"a": 35, "b": 20, "c": 35}
    assert int(split.reference[0].tiles.sum()) == 80
    assert "using 90 of 180 tiles, taken evenly from 3 slides" in caplog.text


def test_the_same_tiles_are_taken_with_the_same_seed(folders: list[SlideFolder]) -> None:
    """And others with another."""
    options = SplitOptions(most_tiles=90)
    first, again, other = (split_tissue(folders, {}, options, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a.tiles, b.tiles) for a, b in zip(first.train, again.train, strict=True))
    assert counts(first) == counts(again)
    assert any(not np.array_equal(a.tiles, b.tiles) for a, b in zip(first.train, other.train, strict=True))


def test_of_a_single_slide_blocks_are_held_out_before_tiles_are_left_away(write_tiles: WriteTiles) -> None:
    """So the two sides have nothing in common."""
    split = split_tissue([write_tiles(400, tile_px=8)], {}, SplitOptions(most_tiles=50), seed=0)
    assert counts(split) == {"node": 50}
    assert not (split.train[0].tiles & split.reference[0].tiles).any()
    assert split.by == "blocks"


def test_corrupt_tiles_are_on_neither_side(write_tiles: WriteTiles) -> None:
    """Nothing can be learnt from them."""
    split = split_tissue([write_tiles(64, columns=8, tile_px=8, corrupt=(3, 40))], {}, SplitOptions(), seed=0)
    both = split.train[0].tiles | split.reference[0].tiles
    assert np.flatnonzero(~both).tolist() == [3, 40]


def test_a_cohort_with_nothing_to_learn_from_is_refused(folders: list[SlideFolder]) -> None:
    """The message says what to name."""
    with pytest.raises(CohortError, match="name at least one 'train' and one 'reference'"):
        split_tissue(folders, dict.fromkeys(SIZES, "reference"), SplitOptions(), seed=0)


def test_tiles_of_one_colour_are_refused_before_anything_is_learnt(write_tiles: WriteTiles, tmp_path: Path) -> None:
    """A detector would learn for days, and then find that no score differs."""
    folders = [write_tiles(20, slide_id=slide_id, tile_px=8, grey=200 + n) for n, slide_id in enumerate("ab")]
    split = split_tissue(folders, {}, SplitOptions(), seed=0)
    recipe = fit_recipe(split, {"name": "autoencoder"}, seed=0)
    with pytest.raises(CohortError, match=r"each of the 20 looked at is of one colour.*\[tissue\]"):
        fit_detector(RunFolder(tmp_path / "shop"), split, Autoencoder(), recipe, seed=0, device="cpu")


def test_few_slides_are_held_out_in_blocks_and_sampled_by_slide(write_tiles: WriteTiles) -> None:
    """A large slide has many blocks, and still gives no more tiles than another."""
    parts = [
        Part(folder, np.ones(count, bool))
        for count, folder in ((count, write_tiles(count, slide_id=str(count), tile_px=8)) for count in (400, 100))
    ]
    tiles = TrainingTiles(parts, seed=0)
    assert len(np.unique(tiles.groups)) > 10
    assert np.bincount(tiles.slides[even_sample(tiles.slides, 120, seed=0)]).tolist() == [60, 60]
