"""The tests that a plug-in inherits, and what they need. The package itself never imports this file: it needs pytest.

class TestMyDetector(DetectorContract):
    detector = MyDetector(width=8, epochs=4)    # settings that learn a few tiles in a second or two
    tile_px = 32
"""
# ruff: noqa: S101 - tests assert

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from jaxtyping import Float32, Int64, UInt8, UInt64

from wsi_anomaly.detectors.protocol import Localizer, Reconstructor, Scorer, TileBatch, Vectorial
from wsi_anomaly.errors import ModelError
from wsi_anomaly.options import Options, parse_options
from wsi_anomaly.synthetic.textures import odd_tiles, smooth_tiles
from wsi_anomaly.torchvision_shim import make_importable

Scores = Float32[np.ndarray, "tile score"]


class TilesInMemory:
    """A `TileSource` of tiles that are at hand. It counts how often it was read, and can kill its reader."""

    def __init__(
        self,
        pixels: UInt8[np.ndarray, "tile y x rgb"],
        groups: Int64[np.ndarray, " tile"] | None = None,
        *,
        embeddings: Float32[np.ndarray, "tile d"] | None = None,
        die_at_read: int | None = None,
    ) -> None:
        self.pixels, self.embeddings = pixels, embeddings
        self.groups: Int64[np.ndarray, " tile"] = np.arange(len(pixels)) // 4 if groups is None else groups
        self.reads = 0
        self._die_at_read = die_at_read

    @property
    def slides(self) -> Int64[np.ndarray, " tile"]:
        """Each group is a slide."""
        return self.groups

    def __len__(self) -> int:
        return len(self.pixels)

    def anew(self) -> "TilesInMemory":
        """The same tiles, not read yet."""
        return TilesInMemory(self.pixels, self.groups, embeddings=self.embeddings)

    def read(self, indices: Int64[np.ndarray, " tile"]) -> TileBatch:
        """The tiles at these positions, in this order."""
        self.reads += 1
        if self.reads == self._die_at_read:
            os.kill(os.getpid(), _KILL)
        embeddings = None if self.embeddings is None else self.embeddings[indices]
        return batch_of(self.pixels[indices], seeds=indices.astype(np.uint64), embeddings=embeddings)


def batch_of(
    pixels: UInt8[np.ndarray, "tile y x rgb"],
    *,
    seeds: UInt64[np.ndarray, " tile"] | None = None,
    embeddings: Float32[np.ndarray, "tile d"] | None = None,
) -> TileBatch:
    """A batch of these tiles under one plain prompt; seeds count from 0 if none are given."""
    seeds = np.arange(len(pixels), dtype=np.uint64) if seeds is None else seeds
    return TileBatch(pixels, seeds, prompts=((("tissue", 1.0),),) * len(pixels), embeddings=embeddings)


class DetectorContract:
    """What every detector promises. Inherit it, set `detector`, and pytest checks the promises.

    Each column of the scores is checked; set `tells_apart` to the names of those that should rank the planted anomalies
    if not all of them can.
    """

    detector: ClassVar[Any]
    """An untrained `Detector` with `Options` as its base, set small."""
    tile_px: ClassVar[int] = 32
    fit_tiles: ClassVar[int] = 48
    device: ClassVar[str] = "cpu"
    tells_apart: ClassVar[tuple[str, ...] | None] = None

    @staticmethod
    def embed(pixels: UInt8[np.ndarray, "tile y x rgb"]) -> Float32[np.ndarray, "tile d"] | None:
        """What stands for the embeddings of tiles, for a detector that needs some; none unless you say how."""
        del pixels
        return None

    @pytest.fixture(scope="class")
    @classmethod
    def tiles(cls) -> TilesInMemory:
        """Normal tiles to learn from."""
        pixels = smooth_tiles(cls.fit_tiles, cls.tile_px, seed=1)
        return TilesInMemory(pixels, embeddings=cls.embed(pixels))

    @pytest.fixture(scope="class")
    @classmethod
    def undisturbed(cls, tiles: TilesInMemory, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
        """The folder of a fit that nobody disturbed, and how often it read tiles."""
        folder, source = tmp_path_factory.mktemp("fit") / "detector", tiles.anew()
        cls.detector.fit(source, folder, device=cls.device)
        return folder, source.reads

    @pytest.fixture(scope="class")
    @classmethod
    def scorer(cls, undisturbed: tuple[Path, int]) -> Scorer:
        """The fitted detector."""
        loaded: Scorer = cls.detector.load(undisturbed[0], device=cls.device)
        return loaded

    @pytest.fixture(scope="class")
    @classmethod
    def batch(cls) -> TileBatch:
        """New tiles, normal and abnormal, more than any detector should take at once."""
        pixels = np.concatenate([f(20, cls.tile_px, seed=2) for f in (smooth_tiles, odd_tiles)])
        return batch_of(pixels, embeddings=cls.embed(pixels))

    @pytest.fixture(scope="class")
    @classmethod
    def scores(cls, scorer: Scorer, batch: TileBatch) -> Scores:
        """Of the new tiles, all at once."""
        return scorer.score(batch)

    def test_options_survive_a_text_file(self) -> None:
        """A model folder carries the options as text, and they build the same detector."""
        assert isinstance(self.detector, Options)
        assert _described(_detector_of(_described(self.detector))) == _described(self.detector)

    def test_there_is_one_finite_score_of_each_name_for_each_tile(self, batch: TileBatch, scores: Scores) -> None:
        """Scores are float32, (tile, score), without NaN and infinity."""
        assert scores.dtype == np.float32
        assert scores.shape == (len(batch), len(self.detector.score_names))
        assert np.isfinite(scores).all()

    def test_no_tiles_have_no_scores(self, scorer: Scorer, batch: TileBatch) -> None:
        """A batch whose tiles could all not be read is no special case."""
        assert scorer.score(_part(batch, np.arange(0))).shape == (0, len(self.detector.score_names))

    def test_scoring_again_gives_the_same_bits(self, scorer: Scorer, batch: TileBatch, scores: Scores) -> None:
        """Nothing is drawn from global state and nothing is remembered."""
        assert np.array_equal(scorer.score(batch), scores)

    def test_scores_do_not_depend_on_the_size_of_the_batch(
        self, scorer: Scorer, batch: TileBatch, scores: Scores
    ) -> None:
        """A tile has the same score, to the bit, alone, among a few and among many."""
        everyone = np.arange(len(batch))
        for some in (*np.split(everyone, everyone[7::7]), *everyone[::8, None]):
            assert np.array_equal(scorer.score(_part(batch, some)), scores[some]), f"tiles {some}"

    def test_scores_do_not_depend_on_the_order_of_the_batch(
        self, scorer: Scorer, batch: TileBatch, scores: Scores
    ) -> None:
        """A tile keeps its score wherever it stands."""
        order = np.random.default_rng(3).permutation(len(batch))
        assert np.array_equal(scorer.score(_part(batch, order)), scores[order])

    def test_scoring_leaves_the_tiles_as_they_are(self, scorer: Scorer, batch: TileBatch) -> None:
        """A scorer that writes into the pixels would spoil what comes after it."""
        before = batch.pixels.copy()
        scorer.score(batch)
        assert np.array_equal(batch.pixels, before)

    def test_anomalies_score_higher_than_normal_tiles(self, scores: Scores) -> None:
        """Of a planted anomaly and a normal tile, the anomaly has the higher score nine times out of ten."""
        half = len(scores) // 2
        for name, column in zip(self.detector.score_names, scores.T, strict=True):
            if name in (self.tells_apart or self.detector.score_names):
                assert (column[half:, None] > column[:half]).mean() >= _MOSTLY, name

    def test_a_fitted_detector_scores_the_same_in_a_new_process(
        self, undisturbed: tuple[Path, int], batch: TileBatch, scores: Scores, tmp_path: Path
    ) -> None:
        """All that scoring needs is in the folder and the options."""
        _leave(batch, tmp_path)
        _elsewhere("score", self.detector, tmp_path, checkpoint=str(undisturbed[0]), device=self.device)
        assert np.array_equal(np.load(tmp_path / "scores.npy"), scores)

    def test_a_killed_fit_goes_on_and_ends_with_the_same_files(
        self, tiles: TilesInMemory, undisturbed: tuple[Path, int], tmp_path: Path
    ) -> None:
        """Killed half-way and called again, a fit reads only what was missing and leaves the same bytes."""
        whole, reads = undisturbed
        _leave(tiles, tmp_path)
        settings = {"checkpoint": str(tmp_path / "killed"), "device": self.device, "die_at_read": reads // 2 + 1}
        assert _elsewhere("fit", self.detector, tmp_path, **settings) != 0
        rest = tiles.anew()
        self.detector.fit(rest, tmp_path / "killed", device=self.device)
        assert rest.reads < reads
        assert _files(tmp_path / "killed") == _files(whole)

    def test_an_empty_folder_is_no_model(self, tmp_path: Path) -> None:
        """Missing weights are an error that the user is told about."""
        with pytest.raises(ModelError):
            self.detector.load(tmp_path, device=self.device)

    def test_vectors_come_with_the_same_scores(self, scorer: Scorer, batch: TileBatch, scores: Scores) -> None:
        """Some finite float32 for each tile, whatever the batch, as many for no tiles; the scores are those alone."""
        if not isinstance(scorer, Vectorial):
            pytest.skip("the detector has no vectors")
        same, vectors = scorer.scores_and_vectors(batch)
        assert np.array_equal(same, scores)
        assert vectors.dtype == np.float32
        assert vectors.shape[:-1] == (len(batch),)
        assert vectors.size
        assert np.isfinite(vectors).all()
        for some in (np.array([5]), np.random.default_rng(3).permutation(len(batch)), np.arange(0)):
            assert np.array_equal(scorer.scores_and_vectors(_part(batch, some))[1], vectors[some])

    def test_score_maps_are_as_large_as_their_tiles(self, scorer: Scorer, batch: TileBatch) -> None:
        """A localizer gives one finite float32 for each pixel, whatever the batch."""
        if not isinstance(scorer, Localizer):
            pytest.skip("the detector makes no maps")
        maps: Float32[np.ndarray, "tile y x"] = scorer.score_map(batch)
        assert maps.dtype == np.float32
        assert maps.shape == batch.pixels.shape[:3]
        assert np.isfinite(maps).all()
        assert np.array_equal(scorer.score_map(_part(batch, np.array([5]))), maps[[5]])

    def test_reconstructions_are_tiles(self, scorer: Scorer, batch: TileBatch) -> None:
        """A reconstructor gives pixels of the same shape, whatever the batch."""
        if not isinstance(scorer, Reconstructor):
            pytest.skip("the detector makes no reconstructions")
        rebuilt = scorer.reconstruct(batch)
        assert rebuilt.dtype == np.uint8
        assert rebuilt.shape == batch.pixels.shape
        assert np.array_equal(scorer.reconstruct(_part(batch, np.array([5]))), rebuilt[[5]])


_MOSTLY = 0.9
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows knows only the latter, and it leaves no time either


def _part(batch: TileBatch, indices: Int64[np.ndarray, " tile"]) -> TileBatch:
    embeddings = None if batch.embeddings is None else batch.embeddings[indices]
    return batch_of(batch.pixels[indices], seeds=batch.seeds[indices], embeddings=embeddings)


def _leave(tiles: TilesInMemory | TileBatch, folder: Path) -> None:
    """Write tiles where the new process finds them."""
    groups = tiles.groups if isinstance(tiles, TilesInMemory) else np.arange(len(tiles))
    np.savez(folder / "tiles.npz", pixels=tiles.pixels, groups=groups)
    if tiles.embeddings is not None:
        np.save(folder / "embeddings.npy", tiles.embeddings)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _described(detector: Options) -> dict[str, Any]:
    kind = type(detector)
    return {"module": kind.__module__, "class": kind.__name__, "options": detector.model_dump(mode="json")}


def _detector_of(description: dict[str, Any]) -> Any:  # noqa: ANN401 - both a Detector and Options
    make_importable()  # as the door does through which plug-ins come
    options_class = getattr(importlib.import_module(description["module"]), description["class"])
    return parse_options(options_class, description["options"], where="test")


def _elsewhere(job: str, detector: Options, folder: Path, **settings: Any) -> int:  # noqa: ANN401 - JSON values
    """The exit status of a new process that does the job with the tiles in `folder`."""
    task = json.dumps(_described(detector) | settings | {"job": job, "folder": str(folder)})
    command = [sys.executable, "-c", "from wsi_anomaly.testing import _work; _work()"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums of another number of parts round otherwise
    return subprocess.run(command, input=task, text=True, check=False, env=os.environ | threads).returncode  # noqa: S603


def _work() -> None:
    """What the new process does."""
    task = json.load(sys.stdin)
    detector, folder, checkpoint = _detector_of(task), Path(task["folder"]), Path(task["checkpoint"])
    tiles, path = np.load(folder / "tiles.npz"), folder / "embeddings.npy"
    embeddings = np.load(path) if path.exists() else None
    if task["job"] == "fit":
        source = TilesInMemory(tiles["pixels"], tiles["groups"], embeddings=embeddings, die_at_read=task["die_at_read"])
        detector.fit(source, checkpoint, device=task["device"])
    else:
        scorer = detector.load(checkpoint, device=task["device"])
        np.save(folder / "scores.npy", scorer.score(batch_of(tiles["pixels"], embeddings=embeddings)))
