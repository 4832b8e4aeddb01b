"""Stage `fit`: learn normal tissue. Reads the tiles of normal slides; writes the fitted detector."""

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int64, Shaped
from pydantic import Field

from wsi_anomaly.detectors.protocol import Detector, TileBatch
from wsi_anomaly.detectors.sampling import even_sample
from wsi_anomaly.errors import CohortError
from wsi_anomaly.execution import Progress, report
from wsi_anomaly.options import Options
from wsi_anomaly.storage.descriptions import Descriptions, description_digests
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.record import Recipe, Record, current_record, read_record, write_json, writing
from wsi_anomaly.storage.tiles import TileStore

FORMAT_VERSION = 1

Side = Literal["train", "reference", "blocks"]

log = logging.getLogger(__name__)


class SplitOptions(Options):
    """Which normal tissue is held out to measure what scores are normal."""

    reference_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the slides (of the blocks, where there is one slide) that the detector does not learn from."""
    block_tiles: int = Field(4, ge=1)
    """Side of the blocks, in grid cells, that a single slide is split into; smaller where the slide is."""
    most_tiles: int | None = Field(None, ge=2)
    """How many tiles a detector learns from, at most, as many of each slide; all that are left without it."""


@dataclass(frozen=True, slots=True)
class Part:
    """The tiles of one slide that one side of the split gets."""

    folder: SlideFolder
    tiles: Bool[np.ndarray, " tile"]


@dataclass(frozen=True, slots=True)
class Split:
    """Normal tissue to learn from, and normal tissue to measure against. No slide is on both sides if there are two."""

    train: tuple[Part, ...]
    reference: tuple[Part, ...]
    by: Literal["slides", "blocks"]

    def as_dict(self) -> dict[str, Any]:
        """Slides and tile counts of both sides."""
        return {
            "by": self.by,
            "train": {part.folder.slide_id: int(part.tiles.sum()) for part in self.train},
            "reference": {part.folder.slide_id: int(part.tiles.sum()) for part in self.reference},
        }


def split_tissue(
    folders: Sequence[SlideFolder], wishes: Mapping[str, str | None], options: SplitOptions, *, seed: int
) -> Split:
    """Divide the tiles of normal slides into those to learn from and those to measure against.

    Whole slides are held out; `wishes` (slide_id to "train" or "reference") come first. A single slide is divided into
    spatial blocks instead. Depends on the seed and the slides' names, not on their order.

    Raises:
        CohortError: one side would be empty.
    """
    split = (
        _split_blocks(folders[0], options, seed) if len(folders) == 1 else _split_slides(folders, wishes, options, seed)
    )
    return replace(split, train=_thinned(split.train, options.most_tiles, seed))


def _split_slides(
    folders: Sequence[SlideFolder], wishes: Mapping[str, str | None], options: SplitOptions, seed: int
) -> Split:
    free = sorted((f for f in folders if wishes.get(f.slide_id) is None), key=lambda f: _lot(seed, f.slide_id))
    chosen = [f for f in folders if wishes.get(f.slide_id) == "reference"]
    missing = max(1, round(options.reference_fraction * len(folders))) - len(chosen)
    chosen += free[: max(0, missing)]
    taken = {f.slide_id for f in chosen}
    train = [f for f in folders if f.slide_id not in taken]
    if not train or not chosen:
        raise CohortError("every slide is on one side of the split: name at least one 'train' and one 'reference'")
    return Split(tuple(map(_whole, train)), tuple(map(_whole, sorted(chosen, key=lambda f: f.slide_id))), by="slides")


def fit_recipe(split: Split, detector: Mapping[str, Any], *, seed: int, prompted: bool = False) -> Recipe:
    """What decides the fitted weights: the detector with its options, the seed, the pixels and prompts to learn from.

    Raises:
        MissingOutputError: the stage `prompt` has not run where its outputs are needed.
    """
    tiles = {part.folder.slide_id: _digest(part, prompted=prompted) for part in split.train}
    return Recipe("fit", FORMAT_VERSION, {"detector": dict(detector), "seed": seed}, tiles)


def fit_detector(
    run: RunFolder,
    split: Split,
    detector: Detector,
    recipe: Recipe,
    *,
    seed: int,
    device: str,
    prompted: bool = False,
) -> Record:
    """Fit the detector on the training side, unless that has been done; an interrupted fit goes on where it was."""
    if done := current_record(run.root, recipe):
        return done
    source = TrainingTiles(split.train, seed=seed, prompted=prompted)
    _require_structure(TrainingTiles(split.train, seed=seed))
    log.info("fitting on %d tiles of %d slides", len(source), len(split.train))
    with writing(run.root, recipe, resume=True) as work:
        detector.fit(source, work.folder / run.detector.name, device=device)
        write_json(work.folder / run.split.name, split.as_dict())
        work.facts.update({"tiles": len(source), "slides": len(split.train)})
    return read_record(run.root, "fit")


class TrainingTiles:
    """The readable tiles of the training side as a `TileSource`: reads from disk only what is asked for."""

    def __init__(self, parts: Sequence[Part], *, seed: int, prompted: bool = False) -> None:
        self._stores = [TileStore(part.folder.tiles) for part in parts]
        self._known = [Descriptions(part.folder, prompted=prompted) for part in parts]
        self._tiles = [
            np.flatnonzero(part.tiles & store.readable) for part, store in zip(parts, self._stores, strict=True)
        ]
        self._starts = np.cumsum([0, *map(len, self._tiles)])
        self._seed = seed
        self._read = 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def groups(self) -> Int64[np.ndarray, " tile"]:
        """Slides, or blocks of slides where there are too few slides to hold whole ones out."""
        blocks = [_blocks(store, 4)[tiles] for store, tiles in zip(self._stores, self._tiles, strict=True)]
        if len(blocks) >= _ENOUGH_SLIDES:
            return self.slides
        return np.unique(np.column_stack([self.slides, np.concatenate(blocks)]), axis=0, return_inverse=True)[1]

    @property
    def slides(self) -> Int64[np.ndarray, " tile"]:
        """By number, in the order of the parts."""
        return np.repeat(np.arange(len(self._stores)), np.diff(self._starts))

    def read(self, indices: Int64[np.ndarray, " tile"]) -> TileBatch:
        """The tiles at these positions, in this order."""
        slides = np.searchsorted(self._starts, indices, side="right") - 1
        order = np.argsort(indices, kind="stable")  # neighbours on disk are read together
        parts = [self._read_from(int(slide), indices[order][slides[order] == slide]) for slide in np.unique(slides)]
        back = np.argsort(order)
        self._read += len(indices)
        report(Progress("fit", "normal tissue", self._read))
        prompts = [prompt for part in parts for prompt in part.prompts]
        return TileBatch(
            pixels=np.concatenate([part.pixels for part in parts])[back],
            seeds=np.concatenate([part.seeds for part in parts])[back],
            prompts=tuple(prompts[position] for position in back),
            embeddings=_joined([part.embeddings for part in parts], back),
            keyword_scores=_joined([part.keyword_scores for part in parts], back),
            categories=_joined([part.categories for part in parts], back),
        )

    def _read_from(self, slide: int, indices: Int64[np.ndarray, " tile"]) -> TileBatch:
        store, tiles = self._stores[slide], self._tiles[slide][indices - self._starts[slide]]
        return TileBatch(store.read(tiles), store.seeds(tiles, self._seed), *self._known[slide].read(tiles))


def _joined(
    parts: Sequence[Shaped[np.ndarray, "_ d"] | None], order: Int64[np.ndarray, " tile"]
) -> Shaped[np.ndarray, "tile d"] | None:
    """The rows of all parts in a new order; nothing where there is nothing."""
    present = [part for part in parts if part is not None]
    return np.concatenate(present)[order] if present else None


_ENOUGH_SLIDES = 5
_LOOKED_AT = 64
_LEAST_RANGE = 3  # of 256 intensities


def _require_structure(tiles: TrainingTiles) -> None:
    """Refuse tiles of one colour before a detector learns from them for days; looks at some of all slides.

    Raises:
        CohortError: not one of those looked at shows anything.
    """
    if not len(tiles):
        return  # the detector says how many it needs
    seen = tiles.read(np.unique(np.linspace(0, len(tiles) - 1, _LOOKED_AT).astype(np.int64))).pixels
    if np.ptp(seen.reshape(len(seen), -1, 3), axis=1).max() < _LEAST_RANGE:
        raise CohortError(
            f"the normal tiles show nothing: each of the {len(seen)} looked at is of one colour. Look at overview.png "
            "of the slides, at their masks and at the [tissue] options."
        )


def _whole(folder: SlideFolder) -> Part:
    return Part(folder, TileStore(folder.tiles).readable)


def _thinned(parts: tuple[Part, ...], most: int | None, seed: int) -> tuple[Part, ...]:
    """The parts with at most so many tiles in all."""
    if most is None:
        return parts
    ends = np.cumsum([int(part.tiles.sum()) for part in parts])
    kept = np.zeros(ends[-1], bool)
    kept[even_sample(np.searchsorted(ends, np.arange(ends[-1]), side="right"), most, seed=seed)] = True
    return tuple(map(_only, parts, np.split(kept, ends[:-1])))


def _only(part: Part, kept: Bool[np.ndarray, " of_part"]) -> Part:
    tiles = part.tiles.copy()
    tiles[tiles] = kept
    return Part(part.folder, tiles)


def _split_blocks(folder: SlideFolder, options: SplitOptions, seed: int) -> Split:
    store = TileStore(folder.tiles)
    blocks = _enough_blocks(store, options)
    lots = sorted(np.unique(blocks), key=lambda block: _lot(seed, f"{folder.slide_id}|{block}"))
    if len(lots) < 2:  # noqa: PLR2004 - one to learn from and one to hold out
        raise CohortError(
            f"{folder.slide_id}: the only slide has {len(store)} tile: too little to learn from and to hold some out. "
            "Add slides."
        )
    held_out = np.isin(blocks, lots[: max(1, round(options.reference_fraction * len(lots)))])
    readable = store.readable
    return Split((Part(folder, readable & ~held_out),), (Part(folder, readable & held_out),), by="blocks")


def _enough_blocks(store: TileStore, options: SplitOptions) -> Int64[np.ndarray, " tile"]:
    """Blocks so small that the fraction to hold out is at least one of them."""
    side = options.block_tiles
    while side > 1 and len(np.unique(_blocks(store, side))) < 1 / options.reference_fraction:
        side //= 2
    return _blocks(store, side)


def _blocks(store: TileStore, block_tiles: int) -> Int64[np.ndarray, " tile"]:
    """The number of the square block of grid cells that each tile lies in."""
    rows, columns = (store.places.cells // block_tiles).T.astype(np.int64)
    return np.asarray(rows * (columns.max() + 1) + columns)


def _lot(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed}|{name}".encode())


def _digest(part: Part, *, prompted: bool) -> str:
    """Which pixels a part holds, and what is known of them: records, and the choice among the tiles."""
    known = description_digests(part.folder, prompted=prompted)
    tiles = known.pop("prompts", None) or read_record(part.folder.root, "tile").digest
    return ":".join([tiles, f"{zlib.crc32(np.packbits(part.tiles).tobytes()):08x}", *known.values()])
