"""The one training loop: batches, early stopping, resume, and the files a fit leaves. Knows no architecture, no loss.

After each epoch the whole state is written by one rename, and everything random is drawn from (seed, epoch): a fit that
was killed goes on where it was and ends with the same bytes as one that was left alone.
"""

import hashlib
import json
import logging
import pickle
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field

from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.weights import WEIGHTS, Weights, copy_of, save_weights, write_whole
from wsi_anomaly.devices import reproducible
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.execution import read_ahead
from wsi_anomaly.options import Options

HISTORY = "history.json"
UNFINISHED = "training.pt"
FORMAT_VERSION = 1

Indices = Int64[np.ndarray, " _"]  # positions in a source: several of them in one signature need not be as many
EpochLosses = dict[str, float]

log = logging.getLogger(__name__)


class TrainingOptions(Options):
    """How long and how fast to learn."""

    learning_rate: float = Field(1e-4, gt=0)
    batch_size: int = Field(14, ge=1)
    max_epochs: int = Field(100, ge=1)
    patience: int = Field(10, ge=1)
    """Stop when the loss on held-out tiles has not fallen for so many epochs. The best epoch's weights are kept."""
    held_out_fraction: float = Field(0.1, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    """Decides the first weights, which tiles are held out, and the order of the others. In a pipeline file, the
    pipeline's own where it is not given."""


@dataclass(frozen=True, slots=True)
class Learner:
    """What a detector brings to the loop."""

    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[TileBatch, torch.Generator], Float[torch.Tensor, ""]]
    """The mean loss of some tiles. Noise, if any, comes from the generator (on the CPU)."""
    architecture: Mapping[str, Any]
    """All that decides the names and shapes of the weights, as JSON values."""


def train(
    learner: Learner, tiles: TileSource, options: TrainingOptions, *, folder: Path, recipe: Mapping[str, Any]
) -> None:
    """Learn until it gets no better, and leave weights and history in `folder`.

    Goes on from an unfinished fit of the same `recipe` (the detector's options, as JSON values) and the same tiles; a
    finished one is left as it is.

    Raises:
        CohortError: there are fewer than two tiles.
        OptionsError: a batch does not fit into the device's memory.
        ModelError: the loss is no longer a finite number.
    """
    _require_tiles(tiles)
    identity = fit_identity(tiles, recipe)
    if is_finished(folder, identity, weights=WEIGHTS):
        log.info("%s: has been fitted with these options and tiles", folder)
        return
    sides = split_tiles(tiles.groups, options.held_out_fraction, seed=options.seed)
    state = _Unfinished(folder / UNFINISHED, identity)
    history, best = state.restore(learner) or _begin(folder, learner)
    while not (reason := _why_stop(history, options)):
        history.append(_run_epoch(learner, tiles, sides, options, epoch=len(history) + 1))
        if _best_epoch(history) == len(history):
            best = copy_of(learner.network)
        state.save(learner, history, best)
    log.info("stopped: %s; keeping the weights of epoch %d", reason, _best_epoch(history))
    learner.network.load_state_dict(best)
    save_weights(learner.network, folder, learner.architecture)
    _save_history(folder, history, sides, {"stopped": reason, "identity": identity})
    state.path.unlink()


def split_tiles(groups: Int64[np.ndarray, " tile"], fraction: float, *, seed: int) -> tuple[Indices, Indices]:
    """Positions of the tiles to learn from, and of those held out: about `fraction` of them, at least one.

    Groups stay whole if there are several: those drawn are held out as long as they fit, and where that is less than
    half of what is wanted, the smallest of the others too, if any is left to learn from.
    """
    random = np.random.default_rng(seed)
    wanted = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    names, sizes = np.unique(groups, return_counts=True)
    if len(names) == 1:
        order = random.permutation(len(groups))
        return np.sort(order[wanted:]), np.sort(order[:wanted])
    chosen, room = [], wanted
    for group in random.permutation(len(names)):
        if sizes[group] <= room:
            chosen.append(group)
            room -= sizes[group]
    others = [group for group in np.argsort(sizes, kind="stable") if group not in chosen]
    if room > wanted / 2 and len(others) > 1:
        chosen.append(others[0])
    out = np.isin(groups, names[chosen])
    return np.flatnonzero(~out), np.flatnonzero(out)


def fit_identity(tiles: TileSource, recipe: Mapping[str, Any]) -> str:
    """Equal for the same options and tiles. Looks at the pixels of the first and the last tile only."""
    ends = tiles.read(np.array([0, len(tiles) - 1])).pixels
    seen = {"count": len(tiles), "groups": zlib.crc32(tiles.groups.tobytes()), "ends": zlib.crc32(ends.tobytes())}
    content = json.dumps({"format_version": FORMAT_VERSION, "recipe": recipe, "tiles": seen}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def is_finished(folder: Path, identity: str, *, weights: str) -> bool:
    """Whether a fit of this identity is whole: its history is the last file to be written."""
    try:
        history = json.loads((folder / HISTORY).read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return bool(history.get("identity") == identity and (folder / weights).exists())


def read_unfinished(path: Path, identity: str, device: torch.device) -> dict[str, Any] | None:
    """The state of the unfinished fit in `path`, if there is one, it is whole, and its "identity" is this one."""
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        found = state["identity"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        log.warning("%s: the unfinished fit is damaged, starting anew (%s)", path, error)
        return None
    if found != identity:
        log.info("the unfinished fit had other options or tiles, starting anew")
        return None
    return state


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """The state of a fit between two epochs, on disk."""

    path: Path
    identity: str

    def save(self, learner: Learner, history: list[EpochLosses], best: Weights) -> None:
        state = {
            "identity": self.identity,
            "network": learner.network.state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "history": history,
            "best": best,
        }
        write_whole(self.path, lambda file: torch.save(state, file))

    def restore(self, learner: Learner) -> tuple[list[EpochLosses], Weights] | None:
        """History and best weights of the fit that the learner goes on with from now, if there is one."""
        state = read_unfinished(self.path, self.identity, _CPU)
        if state is None:
            return None
        learner.network.load_state_dict(state["network"])
        learner.optimizer.load_state_dict(state["optimizer"])
        log.info("going on after epoch %d", len(state["history"]))
        return state["history"], state["best"]


_CPU = torch.device("cpu")  # where Adam counts its steps: on a GPU each step would wait for the count
_FEWEST_TILES = 2


def _require_tiles(tiles: TileSource) -> None:
    if len(tiles) < _FEWEST_TILES:
        raise CohortError(
            f"normal tiles to learn from: {len(tiles)}, needed: at least {_FEWEST_TILES} (one to learn from, one to "
            "hold out), better some hundreds. Add normal slides, or look at the tissue masks of those given."
        )


def _begin(folder: Path, learner: Learner) -> tuple[list[EpochLosses], Weights]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, HISTORY, UNFINISHED):  # of an earlier fit: nobody shall take them for this one's
        (folder / name).unlink(missing_ok=True)
    return [], copy_of(learner.network)


def _run_epoch(
    learner: Learner, tiles: TileSource, sides: tuple[Indices, Indices], options: TrainingOptions, *, epoch: int
) -> EpochLosses:
    start = time.perf_counter()
    order = np.random.default_rng((options.seed, epoch)).permutation(sides[0])
    try:
        losses = {
            "train": _learn(learner, tiles, _batches(order, options.batch_size), seed=(options.seed, epoch)),
            "held_out": _measure(learner, tiles, _batches(sides[1], options.batch_size), seed=(options.seed,)),
        }
    except torch.OutOfMemoryError as error:
        raise OptionsError(
            f"the device has too little memory for {options.batch_size} tiles at once. Lower batch_size under "
            "[detector.training] of the pipeline file."
        ) from error
    _require_finite(losses, epoch, options)
    speed = len(tiles) / (time.perf_counter() - start)
    values = (*losses.values(), speed)
    log.info("epoch %d of %d: loss %.6f, held out %.6f, %.0f tiles/s", epoch, options.max_epochs, *values)
    return losses


def _learn(learner: Learner, tiles: TileSource, batches: Sequence[Indices], *, seed: tuple[int, ...]) -> float:
    """Go once over the tiles. The mean loss on the way."""
    learner.network.train()
    generator, total = _generator(seed), 0.0
    with reproducible():
        for batch in read_ahead(tiles.read, batches):
            learner.optimizer.zero_grad()
            loss = learner.loss(batch, generator)
            loss.backward()  # type: ignore[no-untyped-call]
            learner.optimizer.step()
            total += len(batch) * loss.item()
    return total / sum(map(len, batches))


def _measure(learner: Learner, tiles: TileSource, batches: Sequence[Indices], *, seed: tuple[int, ...]) -> float:
    """The mean loss without learning from it."""
    learner.network.eval()
    generator, total = _generator(seed), 0.0
    with torch.inference_mode(), reproducible():
        for batch in read_ahead(tiles.read, batches):
            total += len(batch) * learner.loss(batch, generator).item()
    return total / sum(map(len, batches))


def _batches(order: Indices, batch_size: int) -> list[Indices]:
    """Nearly equal parts: a last batch of one tile would upset batch statistics."""
    return np.array_split(order, -(-len(order) // batch_size))


def _why_stop(history: list[EpochLosses], options: TrainingOptions) -> str:
    """The reason to end, or nothing."""
    if history and len(history) - _best_epoch(history) >= options.patience:
        return f"the loss on held-out tiles has not fallen for {options.patience} epochs"
    if len(history) >= options.max_epochs:
        return f"{options.max_epochs} epochs are done"
    return ""


def _best_epoch(history: list[EpochLosses]) -> int:
    """Counted from 1; the first one among equals."""
    return 1 + int(np.argmin([losses["held_out"] for losses in history]))


def _require_finite(losses: EpochLosses, epoch: int, options: TrainingOptions) -> None:
    if not np.isfinite(list(losses.values())).all():
        raise ModelError(
            f"training failed in epoch {epoch}: the loss is {losses['train']} (held out: {losses['held_out']}). "
            f"Lower learning_rate (now {options.learning_rate:g}) under [detector.training] of the pipeline file."
        )


def _generator(seed: tuple[int, ...]) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))


def _save_history(
    folder: Path, history: list[EpochLosses], sides: tuple[Indices, Indices], facts: Mapping[str, str]
) -> None:
    counts = {"train": len(sides[0]), "held_out": len(sides[1])}
    content = {**facts, "tiles": counts, "best_epoch": _best_epoch(history), "loss": history}
    write_whole(folder / HISTORY, lambda file: file.write(f"{json.dumps(content, indent=1)}\n".encode()))
