"""Facts about the embedding detector beyond the contract: its methods, what it remembers, refuses and finds."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from wsi_anomaly.detectors.coreset import coreset
from wsi_anomaly.detectors.embedding import Embedding, EmbeddingTraining, unit_vectors
from wsi_anomaly.detectors.memae import MemAe
from wsi_anomaly.detectors.outlier_methods import METHODS, learnt
from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.detectors.training import TrainingOptions
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.options import parse_options
from wsi_anomaly.synthetic import TileKind, synthetic_tiles
from wsi_anomaly.testing import DetectorContract, TilesInMemory, batch_of, smooth_tiles

SLOW = {"ABOD", "AutoEncoder", "COPOD", "DeepSVDD", "HBOS", "INNE", "LUNAR"}
"""They compile, or train, for many seconds."""


def looks(pixels: np.ndarray) -> np.ndarray:
    """Colour and texture of tiles, in place of what an image-text model sees: 12 numbers each."""
    values = pixels.astype(np.float32) / 255
    steps = [np.abs(np.diff(values, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2)]
    parts = [values.mean(axis=(1, 2)), values.std(axis=(1, 2)), *steps]
    return np.concatenate(parts, axis=1).astype(np.float32)


class TestEmbedding(DetectorContract):
    """The contract, with looks as embeddings, and more tiles than are read at once: something to resume."""

    detector = Embedding(training=EmbeddingTraining(subset="coreset", most_tiles=100))
    fit_tiles = 256

    @staticmethod
    def embed(pixels: np.ndarray) -> np.ndarray:
        """What the detector sees of the tiles."""
        return looks(pixels)


def unit_cloud(count: int, width: int = 24, *, seed: int, centre: float = 1.0) -> np.ndarray:
    """Unit vectors around one direction."""
    return unit_vectors(np.random.default_rng(seed).normal(centre, 1, (count, width)).astype(np.float32))


def described(count: int, *, seed: int = 0, width: int = 24) -> TilesInMemory:
    """Small tiles with embeddings that have nothing to do with them."""
    return TilesInMemory(smooth_tiles(count, 8, seed=seed), embeddings=unit_cloud(count, width, seed=seed))


def batch_with(embeddings: np.ndarray) -> TileBatch:
    """Black tiles with these embeddings."""
    return batch_of(np.zeros((len(embeddings), 8, 8, 3), np.uint8), embeddings=embeddings)


@pytest.fixture(scope="module")
def checkpoint(fitted: Callable[..., Path]) -> Path:
    """The vectors of 150 tiles."""
    return fitted(Embedding(), described(150))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in sorted(METHODS)]
)
def test_every_method_scores_a_vector_for_itself_and_learns_the_same_again(name: str) -> None:
    """Bit for bit: alone, among others, in any order, and when it has learnt anew whatever was drawn meanwhile."""
    vectors, others = unit_cloud(150, seed=0), unit_cloud(70, seed=1, centre=0.5)
    method = learnt(name, {}, vectors, seed=3)
    scores = method.scores(others)
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) > 10
    assert np.array_equal(np.concatenate([method.scores(others[[i]]) for i in range(70)]), scores)
    assert np.array_equal(method.scores(others[::-1])[::-1], scores)
    np.random.seed(9)  # noqa: NPY002 - what some methods draw from
    torch.manual_seed(9)
    again = learnt(name, {}, vectors, seed=3)
    assert np.array_equal(again.scores(others), scores)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AutoEncoder", "LUNAR"])
def test_networks_are_learnt_on_the_cpu_whatever_device_there_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a model calibrated on a GPU would be another network where there is none. Here, all think there is one."""
    to = torch.nn.Module.to
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self if "cuda" in str(device) else to(self, device))
    model = learnt(name, {}, unit_cloud(60, seed=0), seed=3).model
    assert torch.device(model.device) == torch.device("cpu")


@pytest.mark.parametrize("name", ["IForest", pytest.param("DeepSVDD", marks=pytest.mark.slow)])
def test_learning_leaves_the_random_states_of_others_alone(name: str) -> None:
    """Python's, NumPy's and PyTorch's."""
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    learnt(name, {}, unit_cloud(60, seed=0), seed=3)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_knn_measures_the_distance_to_the_fifth_neighbour(checkpoint: Path) -> None:
    """Among those that are remembered, between unit vectors."""
    normal, others = unit_cloud(150, seed=0), unit_cloud(5, seed=4, centre=0)
    distances = np.sort(np.linalg.norm(normal[None] - others[:, None], axis=2), axis=1)
    scores = Embedding().load(checkpoint, device="cpu").score(batch_with(others * 3))
    assert scores[:, 0] == pytest.approx(distances[:, 4], rel=1e-5)


def test_without_unit_length_the_length_counts(checkpoint: Path) -> None:
    """The stored vectors serve both: they are kept as they came."""
    others = unit_cloud(5, seed=4)
    plain = Embedding(unit_length=False).load(checkpoint, device="cpu")
    assert (plain.score(batch_with(others * 3)) > plain.score(batch_with(others)) + 1).all()


def test_methods_are_known_in_any_case_and_with_their_parameters() -> None:
    """As PyOD spells them from then on."""
    detector = parse_options(Embedding, {"method": "knn", "parameters": {"n_neighbors": 3}}, where="test")
    assert detector.method == "KNN"
    assert detector.parameters == {"n_neighbors": 3}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"method": "iforst"}, "no such method.*did you mean 'IForest'"),
        ({"method": "xyz"}, "known: ABOD, AutoEncoder"),
        ({"method": "knn", "parameters": {"neighbours": 3}}, "no parameter neighbours .it has: .*n_neighbors"),
        ({"method": "iforest", "parameters": {"random_state": 3}}, "no parameter random_state"),
    ],
)
def test_unknown_methods_and_parameters_are_refused_by_name(table: dict[str, object], message: str) -> None:
    """Before anything is read; the message lists what there is."""
    with pytest.raises(OptionsError, match=message):
        parse_options(Embedding, table, where="test")


def test_a_pipeline_without_embeddings_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    """The message says what to add to the pipeline file, whether it fits or scores."""
    with pytest.raises(OptionsError, match=r"Add a table \[prompt\]"):
        Embedding().fit(TilesInMemory(smooth_tiles(20, 8, seed=1)), tmp_path, device="cpu")
    with pytest.raises(OptionsError, match=r"Add a table \[prompt\]"):
        Embedding().load(checkpoint, device="cpu").score(batch_of(smooth_tiles(2, 8, seed=1)))


def test_embeddings_of_another_model_are_refused(checkpoint: Path) -> None:
    """By how many numbers they have."""
    with pytest.raises(OptionsError, match=r"have 16 numbers.* fitted on 24"):
        Embedding().load(checkpoint, device="cpu").score(batch_with(unit_cloud(2, 16, seed=1)))


@pytest.mark.parametrize(("count", "needed"), [(0, 2), (1, 2), (5, 6)])
def test_too_few_tiles_are_refused(count: int, needed: int, tmp_path: Path) -> None:
    """The message says how many there are and how many this method needs."""
    with pytest.raises(CohortError, match=f"learn from: {count}, needed.*at least {needed}"):
        Embedding().fit(described(count), tmp_path, device="cpu")


def test_as_few_tiles_as_needed_are_enough(tmp_path: Path) -> None:
    """One more than the neighbours that are asked for."""
    Embedding().fit(described(6), tmp_path, device="cpu")
    assert Embedding().load(tmp_path, device="cpu").score(batch_with(unit_cloud(2, seed=1))).shape == (2, 1)


@pytest.mark.parametrize("name", ["knn", "lof", "iforest", "ecod", "gmm"])
def test_tiles_that_all_look_the_same_can_be_learnt(name: str, tmp_path: Path) -> None:
    """Scores are numbers all the same, also of an embedding of zeros."""
    same = TilesInMemory(np.full((40, 8, 8, 3), 255, np.uint8), embeddings=np.ones((40, 12), np.float32))
    detector = Embedding(method=name, unit_length=False)
    detector.fit(same, tmp_path, device="cpu")
    rows = np.concatenate([np.ones((1, 12)), np.zeros((1, 12)), -np.ones((1, 12))]).astype(np.float32)
    assert np.isfinite(detector.load(tmp_path, device="cpu").score(batch_with(rows))).all()


@pytest.mark.parametrize("name", ["pca", "mcd"])
def test_a_method_that_cannot_learn_says_so(name: str, tmp_path: Path) -> None:
    """Where all vectors are equal there is no covariance; the user reads which method, and what to do."""
    same = TilesInMemory(smooth_tiles(40, 8, seed=1), embeddings=np.ones((40, 12), np.float32))
    with pytest.raises(OptionsError, match=f"PyOD's {name.upper()} cannot learn from 40 embeddings of 12 numbers"):
        Embedding(method=name).fit(same, tmp_path, device="cpu")
    assert not (tmp_path / "weights.safetensors").exists()


def test_the_checkpoint_of_another_detector_is_refused(fitted: Callable[..., Path]) -> None:
    """By its name."""
    other = MemAe(channels=(4,), items=4, training=TrainingOptions(max_epochs=1))
    folder = fitted(other, TilesInMemory(smooth_tiles(4, 8, seed=1)))
    with pytest.raises(ModelError, match="detector is memae, not embedding"):
        Embedding().load(folder, device="cpu")


def test_truncated_vectors_are_refused(spoilt: Path) -> None:
    """A damaged file is not guessed at."""
    path = spoilt / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ModelError, match="damaged"):
        Embedding().load(spoilt, device="cpu")


def test_only_sampled_tiles_are_read(tmp_path: Path) -> None:
    """Of 2,000 tiles, 100: the two ends, and the sample in parts of 64."""
    tiles, detector = described(2000), Embedding(training=EmbeddingTraining(most_tiles=100))
    detector.fit(tiles, tmp_path, device="cpu")
    assert tiles.reads == 4
    assert json.loads((tmp_path / "history.json").read_text())["tiles"] == {"train": 100, "offered": 2000}
    assert {path.name for path in tmp_path.iterdir()} == {"weights.safetensors", "history.json"}


def test_a_finished_fit_is_left_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the same options and tiles; other embeddings of the same tiles are other tiles."""
    caplog.set_level(logging.INFO)
    tiles = described(100)
    Embedding().fit(tiles, tmp_path, device="cpu")
    before, reads = (tmp_path / "weights.safetensors").stat().st_mtime_ns, tiles.reads
    Embedding().fit(tiles, tmp_path, device="cpu")
    assert tiles.reads == reads + 2
    assert (tmp_path / "weights.safetensors").stat().st_mtime_ns == before
    Embedding().fit(TilesInMemory(tiles.pixels, embeddings=unit_cloud(100, seed=5)), tmp_path, device="cpu")
    assert (tmp_path / "weights.safetensors").stat().st_mtime_ns > before


def test_a_coreset_keeps_what_is_rare() -> None:
    """Of a thousand vectors in a heap and three far off, ten hold all three; ten taken evenly would not."""
    heap = np.random.default_rng(0).normal(0, 0.1, (1000, 200)).astype(np.float32)
    vectors = np.concatenate([heap, 5 * np.eye(3, 200, dtype=np.float32)])
    chosen = coreset(vectors, 10, seed=1)
    assert len(np.unique(chosen)) == 10
    assert {1000, 1001, 1002} <= set(chosen.tolist())


def test_a_coreset_lies_nearer_to_all_vectors_than_as_many_by_chance() -> None:
    """Its farthest vector is nearer, by seed alone, and all are taken where there is room."""
    vectors = unit_cloud(600, 16, seed=2, centre=0.3)
    chosen = coreset(vectors, 60, seed=0)

    def farthest(kept: np.ndarray) -> float:
        return float(np.linalg.norm(vectors[:, None] - vectors[kept], axis=2).min(axis=1).max())

    by_chance = [farthest(np.random.default_rng(seed).permutation(600)[:60]) for seed in range(5)]
    assert farthest(chosen) < min(by_chance)
    assert np.array_equal(coreset(vectors, 60, seed=0), chosen)
    assert np.array_equal(coreset(vectors, 600, seed=0), np.arange(600))


def test_a_coreset_of_equal_vectors_is_as_large_as_asked() -> None:
    """No vector is taken twice."""
    assert len(np.unique(coreset(np.ones((50, 4), np.float32), 20, seed=0))) == 20


@pytest.mark.slow
def test_planted_anomalies_rank_above_normal_made_up_tissue(tmp_path: Path) -> None:
    """With the default options, even where twelve numbers of colour and texture are all that is seen of a tile.

    Measured by kind: metastasis 0.79, necrosis 0.89, fibrosis 0.95, mucin 0.89.
    """
    detector = Embedding()
    normal, new = made_up(1, 192, "normal"), made_up(2, 64, "normal")
    odd = made_up(3, 64, "metastasis", "necrosis", "fibrosis", "mucin")
    detector.fit(TilesInMemory(normal, embeddings=looks(normal)), tmp_path, device="cpu")
    scorer = detector.load(tmp_path, device="cpu")
    scores = [scorer.score(batch_of(tiles, embeddings=looks(tiles)))[:, 0] for tiles in (odd, new)]
    assert (scores[0][:, None] > scores[1]).mean() >= 0.8


def made_up(seed: int, count: int, *kinds: TileKind) -> np.ndarray:
    """Tiles of 128 px from slides of any stain, the kinds in turn."""
    return np.stack([pixels for pixels, _ in synthetic_tiles(seed, count, tile_px=128, kinds=kinds)])
