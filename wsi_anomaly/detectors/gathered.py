"""Read once what a detector needs of many tiles, and keep it until the fit is done. Knows no detector and no network.

Every part is a file as soon as it is read: a fit that was killed reads only what is missing.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped

from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.weights import write_whole


def gathered(
    tiles: TileSource,
    chosen: Int64[np.ndarray, " tile"],
    seen_in: Callable[[TileBatch], Shaped[np.ndarray, "_ ..."]],
    *,
    folder: Path,
    identity: str,
) -> Shaped[np.ndarray, "tile ..."]:
    """What `seen_in` tells of each chosen tile, in their order; `identity` names the tiles and what is seen in them."""
    place = folder / _PARTS / identity
    place.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, len(chosen), _PART_TILES):
        path = place / f"{start}.npy"
        if not path.exists():
            part = seen_in(tiles.read(chosen[start : start + _PART_TILES]))
            write_whole(path, partial(np.save, arr=part, allow_pickle=False))
        parts.append(np.load(path, allow_pickle=False))
    return np.concatenate(parts)


def forget(folder: Path) -> None:
    """Remove what `gathered` kept in `folder`, of whatever identity."""
    shutil.rmtree(folder / _PARTS, ignore_errors=True)


_PARTS = "gathered"
_PART_TILES = 64
