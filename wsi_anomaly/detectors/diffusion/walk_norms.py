"""How unlikely the amounts of noise are that a network sees while it restores a tile. Runs no walk but to fit.

Mahmood, Oliva and Styner, "Multiscale Score Matching for Out-of-Distribution Detection" (ICLR 2021), of predictions
that a walk asks for anyway: they are of tiles on their way back, where the detector `msma` asks of clean ones.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from pydantic import Field

from wsi_anomaly.detectors.density import Density, DensityName, fit_density, load_density, require_items, save_density
from wsi_anomaly.detectors.diffusion.restoring import Restorer
from wsi_anomaly.detectors.norm_fits import NOTE, SomeTiles, gathered, is_noted, read_note, write_note
from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.sampling import even_sample
from wsi_anomaly.detectors.training import fit_identity
from wsi_anomaly.errors import ModelError
from wsi_anomaly.options import Options

FOLDER = "msma"
"""Beside the weights: the density of each walk, and a note of what they belong to."""

log = logging.getLogger(__name__)


class WalkNormOptions(Options):
    """Of the score `msma`: how normal amounts of noise are learnt."""

    density: DensityName = "gmm"
    """How unlikely the amounts of a tile are: mixture of Gaussians, spline flow, or distance to the 5th neighbour."""
    most_tiles: int = Field(1000, ge=32)
    """How many tiles the density is fitted on, at most, taken evenly from the slides; each costs whole walks."""


@dataclass(frozen=True, slots=True)
class WalkNorms:
    """The score `msma` of a diffusion detector: a density for each walk, fitted once the network has learnt.

    The network has learnt from the same tiles, and may see a little less noise in them than in new ones: raw scores are
    high by that, and z-scores, whose reference is of other tissue, are not.
    """

    detector: str
    wanted: bool
    options: WalkNormOptions
    walk: Mapping[str, str]
    """All that decides what is seen on the way but weights and starts, by the names of the options."""
    starts: tuple[int, ...]
    weights: str
    """The file that the detector's fit leaves."""
    seed: int

    def require(self, tiles: TileSource) -> None:
        """Refuse too few tiles before anything is learnt.

        Raises:
            CohortError: says how many are needed.
        """
        if self.wanted:
            most = min(len(tiles), self.options.most_tiles)
            require_items(self.options.density, most, total=most)

    def fit(self, tiles: TileSource, checkpoint: Path, restorer: Callable[[], Restorer]) -> None:
        """Fit the densities to normal tiles, going on where an earlier call was interrupted; leave none if not wanted.

        Raises:
            CohortError: the network sees no numbers in too many of the tiles.
        """
        folder = checkpoint / FOLDER
        if not self.wanted:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier fit
            return
        facts = self._facts(checkpoint)
        identity = fit_identity(tiles, {**facts, "most_tiles": self.options.most_tiles, "seed": self.seed})
        if is_noted(folder, identity):
            return
        chosen = SomeTiles(tiles, even_sample(tiles.slides, self.options.most_tiles, seed=self.seed))
        walks = restorer()

        def seen(batch: TileBatch) -> Float32[np.ndarray, "tile walk_call"]:
            return vectors(walks, batch)

        table = gathered(chosen, seen, folder=folder, identity=identity, at_least=walks.portion)
        known = np.isfinite(table).all(axis=1)
        if not known.all():
            log.warning("%d tiles could not be restored: no density is fitted to them", int((~known).sum()))
        ends = np.cumsum([trajectory.calls for trajectory in walks.trajectories])
        for start, norms in zip(self.starts, np.split(table[known], ends[:-1], axis=1), strict=True):
            save_density(fit_density(self.options.density, norms, seed=self.seed), _place(folder, start))
        write_note(folder, self.detector, identity=identity, **facts)

    def load(self, checkpoint: Path) -> tuple[Density, ...]:
        """The density of each walk; none if not wanted.

        Raises:
            ModelError: the fit was without this score, with other options or of other weights, or is damaged.
        """
        folder = checkpoint / FOLDER
        if not self.wanted:
            return ()
        if not (folder / NOTE).exists():
            raise ModelError(
                f"{folder}: is missing or unfinished: the score 'msma' needs to know what the network sees in normal "
                "tiles, and the model was fitted without it. Fit it again, or leave 'msma' out of its scores."
            )
        note, here = read_note(folder, self.detector), self._facts(checkpoint)
        if faults := [
            f"{name} is {note.get(name)}, not {value}" for name, value in here.items() if note.get(name) != value
        ]:
            raise ModelError(
                f"{folder}: what the score 'msma' compares with was fitted otherwise: {'; '.join(faults)}. Use the "
                "options of the fit, or fit the model again."
            )
        return tuple(load_density(_place(folder, start)) for start in self.starts)

    def _facts(self, checkpoint: Path) -> dict[str, str]:
        """What a density belongs to."""
        with (checkpoint / self.weights).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        own = {"density": self.options.density, "timesteps": json.dumps(self.starts), "weights": digest}
        return {**self.walk, **own}


def vectors(restorer: Restorer, batch: TileBatch) -> Float32[np.ndarray, "tile walk_call"]:
    """The norm of the noise that the network sees at each call of each walk; no number where it fails."""
    return torch.cat(restorer.restore(batch).norms, dim=1).numpy()


def surprise(density: Density, norms: Float32[np.ndarray, "tile call"]) -> Float32[np.ndarray, " tile"]:
    """How unlikely the norms of each tile are; NaN where one of them is no number."""
    known = np.isfinite(norms).all(axis=1)
    values = density.anomaly(np.where(known[:, None], norms, np.float32(0)))
    values[~known] = np.nan
    return values


def _place(folder: Path, start: int) -> Path:
    return folder / f"t{start}"
