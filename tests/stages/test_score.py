from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.stages.score import FittedDetector, ScoreOptions, score_slide
from wsi_anomaly.storage.arrays import read_array, read_attributes
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.record import read_record

WriteTiles = Callable[..., SlideFolder]


class Inverter:
    """Scores a tile by its first red value; its reconstruction is the negative; fails where told."""

    facts: Mapping[str, Any] = {"timesteps": [674]}

    def __init__(self, *, fails: Callable[[TileBatch], np.ndarray] = lambda batch: np.zeros(len(batch), bool)) -> None:
        self._fails = fails
        self.rebuilt = 0

    def score(self, batch: TileBatch) -> np.ndarray:
        """One column."""
        scores = batch.pixels[:, 0, 0, :1].astype(np.float32)
        scores[self._fails(batch)] = np.nan
        return scores

    def reconstruct(self, batch: TileBatch) -> np.ndarray:
        """The negative."""
        self.rebuilt += len(batch)
        return 255 - batch.pixels


def scored(folder: SlideFolder, scorer: Inverter, **options: Any) -> None:
    """In batches of five."""
    detector = FittedDetector("inverter", "digest", 32, 0.5, lambda: (scorer, ("red",)))
    score_slide(folder, detector, ScoreOptions(**options), seed=0, batch_size=5)


def pixels_of(folder: SlideFolder) -> np.ndarray:
    """As they were written."""
    return read_array(folder.tiles, "pixels")


def test_only_the_worst_reconstructions_are_kept_where_they_belong(write_tiles: WriteTiles) -> None:
    """In the tile index of everything else; all others are black and take no room."""
    folder, scorer = write_tiles(1100, corrupt=(7,)), Inverter()
    scored(folder, scorer, keep_reconstructions="worst:9")
    pixels, kept = pixels_of(folder), read_array(folder.scores, "reconstructions")
    red = pixels[:, 0, 0, 0].astype(float)
    red[7] = -1
    worst = np.argsort(-red, kind="stable")[:9]
    np.testing.assert_array_equal(kept[worst], 255 - pixels[worst])
    assert not np.delete(kept, worst, axis=0).any()
    assert scorer.rebuilt == 9
    size = sum(path.stat().st_size for path in (folder.scores / "reconstructions").rglob("*") if path.is_file())
    assert size < 9 * pixels[0].size + 2 * 20_000  # two shards, each with an index of 16 kB


def test_fewer_tiles_than_wanted_are_all_kept(write_tiles: WriteTiles) -> None:
    """No error."""
    folder = write_tiles(4)
    scored(folder, Inverter(), keep_reconstructions="worst:200")
    np.testing.assert_array_equal(read_array(folder.scores, "reconstructions"), 255 - pixels_of(folder))


def test_a_tile_without_a_number_is_marked_and_counted(write_tiles: WriteTiles) -> None:
    """The slide goes on."""
    folder = write_tiles(12, corrupt=(3,))
    pixels = pixels_of(folder)
    failing = pixels[5]

    def fails(batch: TileBatch) -> np.ndarray:
        return (batch.pixels == failing).all(axis=(1, 2, 3))

    scored(folder, Inverter(fails=fails))
    status = read_array(folder.scores, "status")
    assert status[3] == 1
    assert status[5] == 2
    assert (np.delete(status, [3, 5]) == 0).all()
    facts = read_record(folder.root, "score").facts
    assert (facts["scored"], facts["failed"]) == (10, 1)


def test_a_slide_without_any_number_fails(write_tiles: WriteTiles) -> None:
    """With what may be wrong."""
    with pytest.raises(ModelError, match=r"no number for any of its 4 tiles.*precision"):
        scored(write_tiles(4), Inverter(fails=lambda batch: np.ones(len(batch), bool)))


def test_what_a_scorer_did_is_recorded(write_tiles: WriteTiles) -> None:
    """Beside the scores."""
    folder = write_tiles(4)
    scored(folder, Inverter())
    assert read_attributes(folder.scores)["timesteps"] == [674]


@pytest.mark.parametrize("wish", ["worst", "worst:0", "worst:-1", "some"])
def test_a_wish_that_makes_no_sense_is_refused(wish: str) -> None:
    """By name."""
    from wsi_anomaly.pipeline import load_pipeline

    with pytest.raises(OptionsError, match=r"none, all, or worst:N"):
        load_pipeline("autoencoder").keeping(maps="none", reconstructions=wish)
