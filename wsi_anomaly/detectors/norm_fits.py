"""What detectors that judge score norms do alike when they fit: hold tiles out, gather values, note that it is done."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64

from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.sampling import even_sample
from wsi_anomaly.detectors.training import read_unfinished, split_tiles
from wsi_anomaly.detectors.weights import write_whole
from wsi_anomaly.errors import ModelError

GATHERED = "vectors.pt"
NOTE = "fit.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class SomeTiles:
    """A `TileSource` of some of another's tiles."""

    tiles: TileSource
    positions: Int64[np.ndarray, " _"]

    @property
    def groups(self) -> Int64[np.ndarray, " tile"]:
        """Those of the other."""
        return self.tiles.groups[self.positions]

    @property
    def slides(self) -> Int64[np.ndarray, " tile"]:
        """Those of the other."""
        return self.tiles.slides[self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, indices: Int64[np.ndarray, " tile"]) -> TileBatch:
        """The tiles at these positions, in this order."""
        return self.tiles.read(self.positions[indices])


def gathered(
    tiles: TileSource,
    function: Callable[[TileBatch], Float32[np.ndarray, "tile ..."]],
    *,
    folder: Path,
    identity: str,
    at_least: int = 16,
) -> Float32[np.ndarray, "tile ..."]:
    """The function's values for all of the tiles, going on where an earlier call of this identity was interrupted.

    The function is given `at_least` tiles at once, where there are as many. What is known so far lies in `folder` under
    `GATHERED`; remove it when the values have been used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = read_unfinished(folder / GATHERED, identity, torch.device("cpu"))
    values = [state["values"].numpy()] if state else []
    done = len(values[0]) if state else 0
    at_once = max(at_least, -(-len(tiles) // _SAVINGS))
    for start in range(done, len(tiles), at_once):
        values.append(function(tiles.read(np.arange(start, min(start + at_once, len(tiles))))))
        kept = {"identity": identity, "values": torch.from_numpy(np.concatenate(values))}
        write_whole(folder / GATHERED, lambda file, kept=kept: torch.save(kept, file))  # type: ignore[misc]
    return np.concatenate(values)


def held_out_tiles(tiles: TileSource, fraction: float, *, most: int, seed: int) -> tuple[SomeTiles, SomeTiles]:
    """Tiles for a network to learn from, and others for what judges its output: at most so many, none if there is one.

    What a network sees in tiles that it learnt from tells nothing about new ones.
    """
    if len(tiles) <= 1:
        return SomeTiles(tiles, np.arange(len(tiles))), SomeTiles(tiles, np.arange(0))
    learnt, held_out = split_tiles(tiles.groups, fraction, seed=seed)
    return SomeTiles(tiles, learnt), SomeTiles(tiles, held_out[even_sample(tiles.slides[held_out], most, seed=seed)])


def write_note(folder: Path, detector: str, **facts: str) -> None:
    """Note that a fit is whole, as its last file, and remove what it gathered on the way."""
    note = {"format_version": FORMAT_VERSION, "detector": detector, **facts}
    write_whole(folder / NOTE, lambda file: file.write(f"{json.dumps(note, indent=1)}\n".encode()))
    (folder / GATHERED).unlink(missing_ok=True)


def is_noted(folder: Path, identity: str) -> bool:
    """Whether the fit of this identity is whole; the note of any other one is removed."""
    try:
        if json.loads((folder / NOTE).read_bytes())["identity"] == identity:
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or a damaged one: the fit begins, or goes on
    (folder / NOTE).unlink(missing_ok=True)
    return False


def read_note(folder: Path, detector: str) -> dict[str, Any]:
    """The note of a whole fit of this detector.

    Raises:
        ModelError: it is missing, damaged, of another version or another detector's.
    """
    path = folder / NOTE
    try:
        note = dict(json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: is missing: the fit was not finished, or not all of the model copied.") from error
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: is damaged ({error}). Copy the model again, or fit it anew.") from error
    found = note.get("format_version"), note.get("detector")
    if found != (FORMAT_VERSION, detector):
        raise ModelError(
            f"{path}: is of format version {found[0]} and the detector '{found[1]}', not {FORMAT_VERSION} and "
            f"'{detector}'. Use the detector and the version that made the model, or fit it again."
        )
    return note


_SAVINGS = 32
