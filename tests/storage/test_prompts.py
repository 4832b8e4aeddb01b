from pathlib import Path

import numpy as np
import pytest

from wsi_anomaly.storage.arrays import read_array
from wsi_anomaly.storage.prompts import TILES_PER_SHARD, NoPrompts, PromptStore, PromptWriter, fragments

KEYWORDS = ("lymphocytes", 'HER2+ (3+), "strong"', "capsule")


def writer(path: Path, tiles: int) -> PromptWriter:
    """For embeddings of size 4."""
    return PromptWriter(
        path,
        tiles=tiles,
        embedding_size=4,
        keywords=KEYWORDS,
        attributes={"prefix": "a photograph of", "joiner": "and"},
    )


def rows(tiles: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and similarities that count up."""
    return (
        np.arange(4 * tiles, dtype=np.float32).reshape(-1, 4),
        np.arange(3 * tiles, dtype=np.float32).reshape(-1, 3),
    )


def filled(path: Path, tiles: int) -> PromptStore:
    """A finished store where every prompt is the third and the second keyword."""
    store = writer(path, tiles)
    embedding, similarity = rows(tiles)
    for start in range(0, tiles, 100):
        store.append(embedding[start : start + 100], similarity[start : start + 100])
    np.testing.assert_array_equal(store.similarity(), similarity)
    keyword = np.tile(np.array([2, 1, -1], np.int16), (tiles, 1))
    store.finish(keyword, np.tile(np.array([1.07, 1, 0], np.float32), (tiles, 1)), ["text"] * tiles)
    return PromptStore(path)


def test_what_is_appended_in_any_portions_comes_back(tmp_path: Path) -> None:
    """Portions need not divide a shard."""
    tiles = 2 * TILES_PER_SHARD + 77
    store = filled(tmp_path / "prompts.zarr", tiles)
    embedding, similarity = rows(tiles)
    chosen = np.array([tiles - 1, 0, TILES_PER_SHARD])
    np.testing.assert_array_equal(store.embedding(slice(None)), embedding)
    np.testing.assert_array_equal(store.embedding(chosen), embedding[chosen])
    np.testing.assert_array_equal(store.similarity(chosen), similarity[chosen])
    assert len(store) == tiles


def test_a_prompt_comes_back_in_pieces_that_nobody_parses(tmp_path: Path) -> None:
    """A keyword keeps its plus, brackets, commas and quotes; weights have two decimals."""
    store = filled(tmp_path / "prompts.zarr", 3)
    prompts, embeddings, similarities = store.read(np.array([1]))
    assert prompts == ((("a photograph of", 1.0), ("capsule", 1.07), ("and", 1.0), (KEYWORDS[1], 1.0)),)
    assert embeddings.shape == (1, 4)
    assert similarities.shape == (1, 3)


def test_an_unfinished_store_goes_on_after_its_last_whole_shard(tmp_path: Path) -> None:
    """And ends as one that was never interrupted."""
    tiles = TILES_PER_SHARD + 300
    embedding, similarity = rows(tiles)
    first = writer(tmp_path / "prompts.zarr", tiles)
    first.append(embedding[: TILES_PER_SHARD + 50], similarity[: TILES_PER_SHARD + 50])
    second = writer(tmp_path / "prompts.zarr", tiles)
    assert second.tiles_done == TILES_PER_SHARD
    second.append(embedding[TILES_PER_SHARD:], similarity[TILES_PER_SHARD:])
    np.testing.assert_array_equal(second.similarity(), similarity)
    second.finish(np.zeros((tiles, 1), np.int16), np.ones((tiles, 1), np.float32), [""] * tiles)
    np.testing.assert_array_equal(PromptStore(tmp_path / "prompts.zarr").embedding(slice(None)), embedding)
    assert not (tmp_path / "prompts.zarr" / "progress.json").exists()


def test_damaged_progress_means_to_start_anew(tmp_path: Path) -> None:
    """Rather than to trust it."""
    first = writer(tmp_path / "prompts.zarr", 2 * TILES_PER_SHARD)
    first.append(*rows(TILES_PER_SHARD))
    (tmp_path / "prompts.zarr" / "progress.json").write_text("{")
    assert writer(tmp_path / "prompts.zarr", 2 * TILES_PER_SHARD).tiles_done == 0


def test_the_text_is_stored_beside(tmp_path: Path) -> None:
    """For people and for other tools."""
    filled(tmp_path / "prompts.zarr", 2)
    assert read_array(tmp_path / "prompts.zarr", "prompt").tolist() == ["text", "text"]


@pytest.mark.parametrize(("indices", "pieces"), [([-1, -1], 0), ([0, -1], 2), ([0, 2], 4)])
def test_places_without_a_keyword_take_no_part(indices: list[int], pieces: int) -> None:
    """A prompt without keywords is empty: it has no prefix either."""
    assert len(fragments(KEYWORDS, indices, [1.0, 0.5], prefix="of", joiner="and")) == pieces


def test_without_the_stage_prompts_are_empty() -> None:
    """One for each tile."""
    assert NoPrompts().read(np.arange(2)) == (((), ()), None, None)
