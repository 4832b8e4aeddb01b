"""The training loop of the diffusion detectors: data order, resume, pictures, what a fit leaves. Knows no network.

Everything random is a function of the seed and the step. Every so many steps the whole state is written by one rename:
a fit that was killed goes on from there, and ends with the same bytes as one that was left alone, on one machine with
one number of threads. On a GPU equal only up to rounding: attention sums its gradients in no fixed order.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from wsi_anomaly.detectors.diffusion.learner import DiffusionLearner, DiffusionTrainingOptions, TileOrder, draws
from wsi_anomaly.detectors.diffusion.progress import Pace, window_means, write_loss_picture, write_samples
from wsi_anomaly.detectors.diffusion.stepping import Stepper, accelerated
from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.training import HISTORY, UNFINISHED, fit_identity, is_finished, read_unfinished
from wsi_anomaly.detectors.weights import write_whole
from wsi_anomaly.devices import reproducible, resolve_device
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.execution import read_ahead

LOSS_PICTURE = "loss.png"
SAMPLES_PICTURE = "samples.png"
FORMAT_VERSION = 1

log = logging.getLogger(__name__)


def train_steps(
    learner: DiffusionLearner, tiles: TileSource, options: DiffusionTrainingOptions, *, folder: Path, device: str
) -> None:
    """Learn for so many steps, and leave weights, history and pictures in `folder`.

    Goes on from an unfinished fit with the same options and tiles; a finished one is left as it is.

    Raises:
        CohortError: there are no tiles.
        OptionsError: the device does not exist, or not even one tile fits into its memory.
        ModelError: the loss is no finite number for many steps in a row.
    """
    place = resolve_device(device)
    if not len(tiles):
        raise CohortError(
            "there are no normal tiles to learn from. Add normal slides, or look at the tissue masks of those given."
        )
    identity = fit_identity(tiles, _recipe(learner, options))
    if is_finished(folder, identity, weights=learner.weights):
        (folder / UNFINISHED).unlink(missing_ok=True)  # it may have been killed just before this
        log.info("%s: has been fitted with these options and tiles", folder)
        return
    with _private_randomness(place), reproducible(), accelerated(learner, place, options.precision) as accelerator:
        fit = _Fit(learner, tiles, options, folder, identity)
        try:
            fit.run(Stepper(learner, options, accelerator), place)
        except torch.OutOfMemoryError as error:
            raise OptionsError(_too_little_memory(options, learner.table)) from error


@dataclass(frozen=True, slots=True)
class _Fit:
    """One fit, from wherever it was left to its end."""

    learner: DiffusionLearner
    tiles: TileSource
    options: DiffusionTrainingOptions
    folder: Path
    identity: str

    def run(self, stepper: Stepper, device: torch.device) -> None:
        """Do the steps that are missing, then leave what a finished fit leaves."""
        options = self.options
        losses = self._restore(stepper) or self._begin()
        pace = Pace(options.steps, device, done=len(losses))
        shown = self.tiles.read(_evenly(len(self.tiles), _SHOWN_TILES))
        order = TileOrder(len(self.tiles), seed=options.seed)
        ahead = (order.positions(step, options.batch_size) for step in range(len(losses), options.steps))
        read = self.learner.read or self.tiles.read
        with closing(read_ahead(lambda positions: (positions, read(positions)), ahead)) as batches:
            for positions, batch in batches:
                drawn = draws(len(losses), options.batch_size, timesteps=self.learner.timesteps, seed=options.seed)
                losses.append(stepper.step(batch, positions, drawn))
                _require_finite(losses, options, self.learner.table)
                pace.tell(losses)
                if len(losses) % options.save_every == 0 or len(losses) == options.steps:
                    self._save(stepper, losses)
                if len(losses) % options.picture_every == 0 and len(losses) < options.steps:
                    self._draw(stepper, shown, losses)
        self._finish(stepper, shown, losses)

    def _begin(self) -> list[float]:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Of an earlier fit: nobody shall take them for this one's.
        for name in (self.learner.weights, HISTORY, UNFINISHED, LOSS_PICTURE, SAMPLES_PICTURE):
            (self.folder / name).unlink(missing_ok=True)
        return []

    def _restore(self, stepper: Stepper) -> list[float] | None:
        """The losses of the unfinished fit that the stepper goes on with from now, if there is one."""
        # On the CPU: AdamW counts its steps there, and would wait for the GPU at each count if they came back on it.
        state = read_unfinished(self.folder / UNFINISHED, self.identity, torch.device("cpu"))
        if state is None:
            return None
        stepper.load_state(state["stepper"])
        losses: list[float] = state["losses"].tolist()
        log.info("going on after step %d", len(losses))
        return losses

    def _save(self, stepper: Stepper, losses: list[float]) -> None:
        kept = torch.tensor(losses, dtype=torch.float64)
        state = {"identity": self.identity, "stepper": stepper.state(), "losses": kept}
        write_whole(self.folder / UNFINISHED, lambda file: torch.save(state, file))

    def _draw(self, stepper: Stepper, shown: TileBatch, losses: list[float]) -> None:
        with stepper.averaged(), torch.no_grad():
            rebuilt = self.learner.rebuild(shown)
        write_loss_picture(self.folder / LOSS_PICTURE, losses, steps=self.options.steps)
        caption = f"After step {len(losses):,} of {self.options.steps:,}"
        write_samples(self.folder / SAMPLES_PICTURE, shown.pixels, rebuilt, caption=caption, label=self.learner.label)

    def _finish(self, stepper: Stepper, shown: TileBatch, losses: list[float]) -> None:
        """The history comes last: it says that all else is there."""
        self._draw(stepper, shown, losses)
        with stepper.averaged():
            self.learner.save(self.folder)
        steps, means = window_means(losses, most=_MOST_HISTORY)
        finite = [float(mean) if np.isfinite(mean) else None for mean in means]
        content = {
            "identity": self.identity,
            "tiles": len(self.tiles),
            "steps": len(losses),
            "loss": [{"up_to_step": int(step), "mean": mean} for step, mean in zip(steps, finite, strict=True)],
        }
        write_whole(self.folder / HISTORY, lambda file: file.write(f"{json.dumps(content, indent=1)}\n".encode()))
        (self.folder / UNFINISHED).unlink()


@contextmanager
def _private_randomness(device: torch.device) -> Iterator[None]:
    """Inside, torch may be seeded; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _recipe(learner: DiffusionLearner, options: DiffusionTrainingOptions) -> Mapping[str, Any]:
    return {"format_version": FORMAT_VERSION, "learner": learner.recipe, "training": options.deciding()}


def _evenly(count: int, most: int) -> Int64[np.ndarray, " tile"]:
    """Positions of at most so many of the tiles, spread over all of them."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(np.int64))


def _require_finite(losses: list[float], options: DiffusionTrainingOptions, table: str) -> None:
    last = losses[-min(_MOST_FAILED_STEPS, options.steps) :]
    if len(last) < min(_MOST_FAILED_STEPS, options.steps) or np.isfinite(last).any():
        return
    remedy = "Lower learning_rate" if options.precision == "fp32" else 'Set precision = "fp32", or lower learning_rate'
    raise ModelError(
        f"training failed: the loss has been {losses[-1]} for {len(last)} steps, up to step {len(losses)}. "
        f"{remedy} (now {options.learning_rate:g}), under {table} of the pipeline file."
    )


def _too_little_memory(options: DiffusionTrainingOptions, table: str) -> str:
    memory = "Use smaller tiles (tile_px under [tiles]) or a GPU with more memory"
    if not options.gradient_checkpointing:
        memory = f"Set gradient_checkpointing = true under {table} of the pipeline file. Or: {memory}"
    return f"the device has too little memory to learn from even one tile at once. {memory}, or give device 'cpu'."


_SHOWN_TILES = 8
_MOST_FAILED_STEPS = 20
_MOST_HISTORY = 1000
