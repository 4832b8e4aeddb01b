"""Prompt stores: the embedding of each tile, how near it is to each keyword, and the prompt made of the nearest.

A store is filled shard by shard, and an interrupted one is gone on with: what was computed is never lost.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float32, Int16, Int64

from wsi_anomaly.storage.arrays import COMPRESSOR, open_arrays
from wsi_anomaly.storage.record import write_json

TILES_PER_SHARD = 1024
_PROGRESS = "progress.json"

_Rows = tuple[Float32[np.ndarray, "tile d"], Float32[np.ndarray, "tile keyword"]]

Fragments = tuple[tuple[str, float], ...]
"""Pieces of a prompt with their weights. Joined for people only: a keyword may hold any character."""


class PromptWriter:
    """Fills a store: embeddings and similarities shard by shard, the prompts made of them at the end.

    Opened again on an unfinished store, it goes on at `tiles_done`.
    """

    def __init__(
        self, path: Path, *, tiles: int, embedding_size: int, keywords: Sequence[str], attributes: Mapping[str, Any]
    ) -> None:
        self._path = path
        self._waiting: list[_Rows] = []
        self.tiles_done = _progress(path)
        """Safe on disk; less than what was appended."""
        if self.tiles_done:
            self._group = zarr.open_group(path, mode="r+")
            return
        self._group = zarr.create_group(path, attributes={"keywords": list(keywords), **attributes}, overwrite=True)
        for name, width in (("embedding", embedding_size), ("similarity", len(keywords))):
            shard = (TILES_PER_SHARD, width)
            self._group.create_array(
                name, shape=(tiles, width), chunks=shard, dtype="float32", fill_value=np.nan, compressors=COMPRESSOR
            )

    def append(self, embedding: Float32[np.ndarray, "tile d"], similarity: Float32[np.ndarray, "tile keyword"]) -> None:
        """The next tiles; NaN for those that cannot be read."""
        self._waiting.append((embedding, similarity))
        if sum(len(rows[0]) for rows in self._waiting) >= TILES_PER_SHARD:
            self._flush(whole_shards=True)

    def similarity(self) -> Float32[np.ndarray, "tile keyword"]:
        """Of all tiles, when all have been appended."""
        self._flush(whole_shards=False)
        return np.asarray(self._group["similarity"][...])  # type: ignore[index]

    def finish(
        self, keyword: Int16[np.ndarray, "tile k"], weight: Float32[np.ndarray, "tile k"], text: Sequence[str]
    ) -> None:
        """The prompts of all tiles: positions in the keyword list (-1: none), weights, and how people read them."""
        for name, values in (("keyword", keyword), ("weight", weight)):
            self._group.create_array(name, data=values, compressors=COMPRESSOR, overwrite=True)
        prompt = self._group.create_array(
            "prompt", shape=(len(text),), dtype="str", compressors=COMPRESSOR, overwrite=True
        )
        prompt[:] = np.array(text, object)
        (self._path / _PROGRESS).unlink(missing_ok=True)

    def _flush(self, *, whole_shards: bool) -> None:
        if not self._waiting:
            return
        embedding, similarity = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        count = len(embedding) - (len(embedding) % TILES_PER_SHARD if whole_shards else 0)
        place = slice(self.tiles_done, self.tiles_done + count)
        self._group["embedding"][place] = embedding[:count]  # type: ignore[index]
        self._group["similarity"][place] = similarity[:count]  # type: ignore[index]
        self._waiting = [(embedding[count:], similarity[count:])]
        self.tiles_done += count
        write_json(self._path / _PROGRESS, {"tiles_done": self.tiles_done})


class PromptStore:
    """The prompts of one slide, for reading."""

    def __init__(self, path: Path) -> None:
        self._group = open_arrays(path)
        self.attributes: dict[str, Any] = dict(self._group.attrs)

    def __len__(self) -> int:
        return int(self._array("keyword").shape[0])

    @property
    def keywords(self) -> tuple[str, ...]:
        """The list that `keyword` counts in."""
        return tuple(self.attributes["keywords"])

    @cached_property
    def keyword(self) -> Int16[np.ndarray, "tile k"]:
        """Positions in the keyword list, nearest first; -1 where a prompt has fewer."""
        return np.asarray(self._array("keyword")[...])

    @cached_property
    def weight(self) -> Float32[np.ndarray, "tile k"]:
        """Of those keywords in the prompt; 0 where there is none."""
        return np.asarray(self._array("weight")[...])

    def embedding(self, indices: Int64[np.ndarray, " tile"] | slice) -> Float32[np.ndarray, "tile d"]:
        """Of some tiles."""
        return _rows(self._array("embedding"), indices)

    def similarity(self, indices: Int64[np.ndarray, " tile"] | slice) -> Float32[np.ndarray, "tile keyword"]:
        """Cosine of some tiles and all keywords."""
        return _rows(self._array("similarity"), indices)

    def prompts(self, indices: Int64[np.ndarray, " tile"]) -> tuple[Fragments, ...]:
        """The prompts of some tiles, in the order of `indices`."""
        prefix, joiner = self.attributes["prefix"], self.attributes["joiner"]
        rows = zip(self.keyword[indices].tolist(), self.weight[indices].tolist(), strict=True)
        return tuple(fragments(self.keywords, *row, prefix=prefix, joiner=joiner) for row in rows)

    def read(
        self, indices: Int64[np.ndarray, " tile"]
    ) -> tuple[tuple[Fragments, ...], Float32[np.ndarray, "tile d"], Float32[np.ndarray, "tile keyword"]]:
        """Prompts, embeddings and similarities of some tiles, in the order of `indices`."""
        return self.prompts(indices), self.embedding(indices), self.similarity(indices)

    def _array(self, name: str) -> zarr.Array:  # type: ignore[type-arg]
        array = self._group[name]
        assert isinstance(array, zarr.Array)  # noqa: S101 - for the type checker
        return array


class NoPrompts:
    """Stands for a `PromptStore` where the pipeline has no stage `prompt`."""

    def read(self, indices: Int64[np.ndarray, " tile"]) -> tuple[tuple[Fragments, ...], None, None]:
        """Empty prompts."""
        return ((),) * len(indices), None, None


def fragments(
    keywords: Sequence[str], indices: Sequence[int], weights: Sequence[float], *, prefix: str, joiner: str
) -> Fragments:
    """One tile's prompt in pieces: `prefix`, then the keywords with `joiner` between them; none without keywords."""
    chosen = [(keywords[index], round(weight, 2)) for index, weight in zip(indices, weights, strict=True) if index >= 0]
    return tuple(_pieces(chosen, prefix, joiner))


def _pieces(chosen: list[tuple[str, float]], prefix: str, joiner: str) -> Iterator[tuple[str, float]]:
    for position, keyword in enumerate(chosen):
        yield (joiner if position else prefix), 1.0
        yield keyword


def _progress(path: Path) -> int:
    try:
        return int(json.loads((path / _PROGRESS).read_text(encoding="utf-8"))["tiles_done"])
    except (OSError, ValueError, KeyError):
        return 0


def _rows(
    array: zarr.Array,  # type: ignore[type-arg]
    indices: Int64[np.ndarray, " tile"] | slice,
) -> Float32[np.ndarray, "tile _"]:
    return np.asarray(array[indices] if isinstance(indices, slice) else array.oindex[indices])
