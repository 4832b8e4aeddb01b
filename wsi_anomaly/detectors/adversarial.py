"""The training loop for networks that learn against each other, in turns, by steps. Knows no architecture, no loss.

Everything random is a function of the seed and the step. Every so many steps the whole state is written by one rename:
a fit that was killed goes on from there, and ends with the same bytes as one that was left alone.
"""

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt

from wsi_anomaly.detectors.diffusion.learner import TileOrder
from wsi_anomaly.detectors.diffusion.progress import running_loss, window_means
from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.training import HISTORY, UNFINISHED, fit_identity, is_finished, read_unfinished
from wsi_anomaly.detectors.weights import WEIGHTS, write_whole
from wsi_anomaly.devices import reproducible
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.execution import read_ahead
from wsi_anomaly.options import Options

FEWEST_TILES = 2

log = logging.getLogger(__name__)


class AdversarialOptions(Options):
    """How fast to learn, and from how much at once."""

    batch_size: int = Field(16, ge=2)
    """Tiles of a step. At least two: some networks take statistics of a batch."""
    learning_rate: float = Field(1e-4, gt=0)
    save_every: PositiveInt = 500
    """Steps between two savings of the unfinished fit: so much is lost, at most, when it is killed."""
    seed: int = Field(0, ge=0)
    """Decides the first weights, the order of the tiles, and what is drawn in each step. In a pipeline file, the
    pipeline's own where it is not given."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One side's turn to learn, while the other networks stand still."""

    optimizer: torch.optim.Optimizer
    loss: Callable[[TileBatch, torch.Generator], Float[torch.Tensor, ""]]
    """The mean loss of some tiles. All that is random comes from the generator (on the CPU)."""
    is_due: Callable[[int], bool] = lambda _: True
    """Whether it learns in this step; steps count from 1."""
    learning_rate: Callable[[int], float] | None = None
    """That of each step, or else always the optimizer's own."""


@dataclass(frozen=True, slots=True)
class AdversarialLearner:
    """What a detector brings to the loop."""

    network: torch.nn.Module
    """All networks in one."""
    turns: Mapping[str, Turn]
    """Taken in this order in each step, each where it is due."""
    steps: int
    save: Callable[[Path], object]
    """Writes the finished weights into a folder."""
    recipe: Mapping[str, Any]
    """All that decides the weights besides the tiles, as JSON values."""


def train_in_turns(
    learner: AdversarialLearner, tiles: TileSource, options: AdversarialOptions, *, folder: Path
) -> None:
    """Learn for so many steps, and leave weights and history in `folder`.

    Goes on from an unfinished fit of the same recipe and tiles; a finished one is left as it is.

    Raises:
        CohortError: there are fewer than two tiles.
        OptionsError: a batch does not fit into the device's memory.
        ModelError: a loss is no longer a finite number.
    """
    _require_tiles(tiles)
    identity = fit_identity(tiles, learner.recipe)
    if is_finished(folder, identity, weights=WEIGHTS):
        (folder / UNFINISHED).unlink(missing_ok=True)  # it may have been killed just before this
        log.info("%s: has been fitted with these options and tiles", folder)
        return
    fit = _Fit(learner, options, folder / UNFINISHED, identity)
    if not fit.restore():
        fit.begin()
    try:
        with reproducible():
            fit.run(tiles)
            learner.save(folder)
    except torch.OutOfMemoryError as error:
        raise OptionsError(
            f"the device has too little memory to learn from {options.batch_size} tiles at once. Lower batch_size "
            "under [detector.training] of the pipeline file."
        ) from error
    fit.finish(tiles)


@dataclass(frozen=True, slots=True)
class _Fit:
    """One fit, from wherever it was left to its end."""

    learner: AdversarialLearner
    options: AdversarialOptions
    unfinished: Path
    identity: str
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Of each turn in each step; not a number where it was not due."""

    @property
    def done(self) -> int:
        """How many steps."""
        return min(map(len, self.losses.values()), default=0)

    def begin(self) -> None:
        self.unfinished.parent.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, HISTORY, UNFINISHED):  # of an earlier fit: nobody shall take them for this one's
            (self.unfinished.parent / name).unlink(missing_ok=True)
        self.losses.update({name: [] for name in self.learner.turns})

    def restore(self) -> bool:
        """Take up what an unfinished fit left, if there is one."""
        # On the CPU: Adam counts its steps there, and would wait for the GPU at each count if they came back on it.
        state = read_unfinished(self.unfinished, self.identity, torch.device("cpu"))
        if state is None:
            return False
        self.learner.network.load_state_dict(state["network"])
        for name, turn in self.learner.turns.items():
            turn.optimizer.load_state_dict(state["optimizers"][name])
        self.losses.update({name: values.tolist() for name, values in state["losses"].items()})
        log.info("going on after step %d", self.done)
        return True

    def run(self, tiles: TileSource) -> None:
        """Do the steps that are missing."""
        first, last, size = self.done + 1, self.learner.steps, self.options.batch_size
        order = TileOrder(len(tiles), seed=self.options.seed)
        ahead = (order.positions(step - 1, size) for step in range(first, last + 1))
        with closing(read_ahead(tiles.read, ahead)) as batches:
            for step, batch in enumerate(batches, start=first):
                generator = _generator(self.options.seed, step)
                for name, turn in self.learner.turns.items():
                    loss = self._take(turn, batch, generator, step) if turn.is_due(step) else None
                    self._note(name, loss, step)
                if step % self.options.save_every == 0 or step == last:
                    self._save()

    def finish(self, tiles: TileSource) -> None:
        """The history comes last: it says that all else is there."""
        content = {
            "identity": self.identity,
            "tiles": len(tiles),
            "steps": self.learner.steps,
            "loss": _summary(self.losses),
        }
        path = self.unfinished.with_name(HISTORY)
        write_whole(path, lambda file: file.write(f"{json.dumps(content, indent=1)}\n".encode()))
        self.unfinished.unlink()

    def _take(self, turn: Turn, batch: TileBatch, generator: torch.Generator, step: int) -> float:
        """Let one side learn. Its loss."""
        network, groups = self.learner.network.train(), turn.optimizer.param_groups
        learning = {id(parameter) for group in groups for parameter in group["params"]}
        for parameter in network.parameters():  # the others need no gradients, and must not gather any
            parameter.requires_grad_(id(parameter) in learning)
        if turn.learning_rate:
            for group in groups:
                group["lr"] = turn.learning_rate(step)
        turn.optimizer.zero_grad()
        loss = turn.loss(batch, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        turn.optimizer.step()
        return loss.item()

    def _note(self, name: str, loss: float | None, step: int) -> None:
        if loss is not None and not isfinite(loss):
            raise ModelError(
                f"training failed in step {step}: the loss of the {name} is {loss}. Lower learning_rate (now "
                f"{self.options.learning_rate:g}) under [detector.training] of the pipeline file."
            )
        self.losses[name].append(nan if loss is None else loss)

    def _save(self) -> None:
        state = {
            "identity": self.identity,
            "network": self.learner.network.state_dict(),
            "optimizers": {name: turn.optimizer.state_dict() for name, turn in self.learner.turns.items()},
            "losses": {name: torch.tensor(values, dtype=torch.float64) for name, values in self.losses.items()},
        }
        write_whole(self.unfinished, lambda file: torch.save(state, file))
        recent = {name: running_loss(values) for name, values in self.losses.items()}
        told = ", ".join(f"{name} {loss:.4f}" for name, loss in recent.items() if isfinite(loss))
        log.info("step %d of %d: loss of %s", self.done, self.learner.steps, told)


_MOST_HISTORY = 200
"""Entries of the history: each is a mean over equally many steps."""


def _require_tiles(tiles: TileSource) -> None:
    if len(tiles) < FEWEST_TILES:
        raise CohortError(
            f"normal tiles to learn from: {len(tiles)}, needed: at least {FEWEST_TILES}, better some thousands. "
            "Add normal slides, or look at the tissue masks of those given."
        )


def _summary(losses: Mapping[str, list[float]]) -> list[dict[str, int | float]]:
    """Means of each turn's losses over windows of steps, without turns that were not due in a window."""
    windows = {name: window_means(values, most=_MOST_HISTORY) for name, values in losses.items()}
    ends = next(iter(windows.values()))[0]
    return [
        {"up_to_step": int(end)}
        | {name: float(means[i]) for name, (_, means) in windows.items() if np.isfinite(means[i])}
        for i, end in enumerate(ends)
    ]


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]))
