from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest

from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.stages.score import FittedDetector, ScoreJob, ScoreOptions, score_slide, score_together
from wsi_anomaly.storage.arrays import read_array, read_attributes
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.record import read_record
from wsi_anomaly.storage.scores import has_vectors, read_scores, read_vectors

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


class Judge(Inverter):
    """Judges a tile by the red of its first two pixels, and counts how often it looks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.looks = 0

    def scores_and_vectors(self, batch: TileBatch) -> tuple[np.ndarray, np.ndarray]:
        """One column, and two values."""
        self.looks += 1
        return super().score(batch), batch.pixels[:, 0, :2, 0].astype(np.float32)

    def score(self, batch: TileBatch) -> np.ndarray:
        """The same column."""
        return self.scores_and_vectors(batch)[0]


def test_vectors_are_kept_beside_scores_and_cost_no_second_look(write_tiles: WriteTiles) -> None:
    """One row a tile; NaN where there is no score, also where a batch has no readable tile."""
    folder = write_tiles(12, corrupt=(0, 1, 2, 3, 4, 7))
    pixels = pixels_of(folder)

    def fails(batch: TileBatch) -> np.ndarray:
        return (batch.pixels == pixels[9]).all(axis=(1, 2, 3))

    judge = Judge(fails=fails)
    scored(folder, judge)
    assert judge.looks == 3
    assert has_vectors(folder.scores)
    vectors = read_vectors(folder.scores)
    assert vectors.dtype == np.float32
    wanted = pixels[:, 0, :2, 0].astype(np.float32)
    wanted[[0, 1, 2, 3, 4, 7, 9]] = np.nan
    np.testing.assert_array_equal(vectors, wanted)
    scores, names = read_scores(folder.scores)
    np.testing.assert_array_equal(scores[:, 0], vectors[:, 0])
    assert names == ("red",)


def test_the_same_tiles_leave_the_same_vectors(write_tiles: WriteTiles) -> None:
    """Byte for byte, alone or together with another detector, which leaves none."""
    folders = [write_tiles(12, corrupt=(3,), slide_id=slide_id) for slide_id in ("alone", "one", "other")]
    scored(folders[0], Judge())
    scorers = {"judge": Judge(), "inverter": Inverter()}
    detectors = [FittedDetector(name, "digest", 32, 0.5, partial(_loaded, one)) for name, one in scorers.items()]
    jobs = [ScoreJob(folder, one, ScoreOptions(), seed=0) for folder, one in zip(folders[1:], detectors, strict=True)]
    for done in score_together(jobs, batch_size=5):
        done.result()
    left = [
        {str(path.relative_to(folder.scores)): path.read_bytes() for path in (folder.scores / "vectors").rglob("c/*/*")}
        for folder in folders
    ]
    assert left[0] == left[1] != {}
    assert not has_vectors(folders[2].scores)
    assert scorers["judge"].looks == 3


def _loaded(scorer: Inverter) -> tuple[Inverter, tuple[str, ...]]:
    return scorer, ("red",)


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
