"""Tiles of any number of made-up slides, each with what it shows: for models to learn from. Draws nothing itself."""

from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int64, UInt8

from wsi_anomaly.synthetic.anomalies import AnomalyKind, ArtefactKind
from wsi_anomaly.synthetic.disease import filled
from wsi_anomaly.synthetic.looks import compressed
from wsi_anomaly.synthetic.slide import Truth, VirtualSlide, draw_slide, tile_with_truth
from wsi_anomaly.synthetic.structures import MAP_STEP_PX, Structure

TileKind = Literal["normal"] | AnomalyKind | ArtefactKind
Tile = tuple[UInt8[np.ndarray, "row column rgb"], Truth]

_SIDE_PX = 3072
_TILES_PER_SLIDE = 48
"""To decide on a slide takes as long as to draw several tiles."""


def synthetic_tiles(
    seed: int, number: int, *, tile_px: int = 256, kinds: Sequence[TileKind] = ("normal",)
) -> Iterator[tuple[UInt8[np.ndarray, "row column rgb"], Truth]]:
    """As many tiles, and what each shows, the kinds in turn, from slides of any stain and scanner, as JPEG leaves them.

    Structures are drawn evenly: a germinal centre is the middle of a tile as often as the paracortex. A normal tile is
    one of a normal slide; any other has its kind in its middle, on a slide with no other.
    """
    return islice(chain.from_iterable(_round(seed, turn, tile_px, kinds) for turn in count()), number)


def _round(seed: int, turn: int, tile_px: int, kinds: Sequence[TileKind]) -> Iterator[Tile]:
    """Tiles of one slide for each kind."""
    streams = [_tiles_of(np.random.default_rng((seed, turn, i)), kind, tile_px) for i, kind in enumerate(kinds)]
    for tiles in zip(*streams, strict=True):
        yield from tiles


def _tiles_of(rng: np.random.Generator, kind: TileKind, tile_px: int) -> Iterator[Tile]:
    slide = draw_slide(
        int(rng.integers(2**31)),
        size_px=(_SIDE_PX, _SIDE_PX),
        anomalies=[known for known in get_args(AnomalyKind) if known == kind],
        artefacts=[known for known in get_args(ArtefactKind) if known == kind],
        varied=True,
    )
    for x, y in _centres(rng, slide).tolist():
        pixels, truth = tile_with_truth(slide, (x - tile_px // 2, y - tile_px // 2), tile_px=tile_px)
        yield compressed(pixels, slide.look.jpeg_quality), truth


def _centres(rng: np.random.Generator, slide: VirtualSlide) -> Int64[np.ndarray, "tile xy"]:
    """Middles of tiles, x and y, that fall on each of the structures in question equally often."""
    structures = slide.anatomy.structures.astype(np.int64)
    structures[structures == Structure.GLASS] = -1
    for line in [planted.outline_level0_px for planted in slide.anomalies + slide.artefacts]:
        structures[~filled(line, structures.shape)] = -1
    frequency = np.bincount(structures[structures >= 0], minlength=len(Structure))
    chance = np.where(structures >= 0, 1 / np.maximum(frequency, 1)[structures], 0).ravel()
    places = rng.choice(chance.size, size=_TILES_PER_SLIDE, p=chance / chance.sum())
    rows, columns = np.divmod(places, structures.shape[1])
    within_px = rng.integers(MAP_STEP_PX, size=(_TILES_PER_SLIDE, 2))
    return np.column_stack([columns, rows]) * MAP_STEP_PX + within_px
