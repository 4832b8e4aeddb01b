"""One step of learning, in as many parts as memory asks for. Reads no tiles, writes no files, knows no end."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState, GradientState, PartialState  # type: ignore[import-untyped]
from accelerate.utils import GradientAccumulationPlugin  # type: ignore[import-untyped]
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler

from wsi_anomaly.detectors.diffusion.learner import (
    DiffusionLearner,
    DiffusionTrainingOptions,
    Draws,
    Positions,
    Precision,
)
from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.errors import OptionsError

log = logging.getLogger(__name__)


class Stepper:
    """The network and all that changes while it learns."""

    def __init__(self, learner: DiffusionLearner, options: DiffusionTrainingOptions, accelerator: Accelerator) -> None:
        self._learner, self._accelerator, self._max_grad_norm = learner, accelerator, options.max_grad_norm
        if options.gradient_checkpointing:
            _remember_less(learner.network, learner.table)
        network = accelerator.prepare_model(learner.network)
        self._named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        # A list: the norm of gradients is taken anew at each step, and a generator would be used up by the first.
        self._parameters = list(self._named.values())
        self._optimizer = accelerator.prepare_optimizer(
            torch.optim.AdamW(self._parameters, options.learning_rate, weight_decay=options.weight_decay)
        )
        self._rate = _learning_rate(self._optimizer, options)
        self._average = EMAModel(self._parameters, options.ema_decay) if options.ema_decay else None
        self._at_once = options.batch_size

    def step(self, batch: TileBatch, positions: Positions, draws: Draws) -> float:
        """Learn from a batch. The mean loss of its tiles.

        A step whose gradient is no finite number changes nothing; in float16 the first ones often are such.

        Raises:
            torch.OutOfMemoryError: not even one tile fits into memory.
        """
        while (loss := self._gradients(batch, positions, draws)) is None:
            self._halve()
        norm = self._accelerator.clip_grad_norm_(self._parameters, self._max_grad_norm)
        if self._accelerator.scaler is not None or norm.isfinite():  # the scaler looks itself, and must be told
            self._optimizer.step()
            self._rate.step()
        if self._average:
            self._average.step(self._parameters)
        return loss

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the network has the averaged weights, if there are such; after it, those it learns with."""
        if not self._average:
            yield
            return
        self._average.store(self._parameters)
        self._average.copy_to(self._parameters)
        try:
            yield
        finally:
            self._average.restore(self._parameters)

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, besides tiles and options."""
        scaler = self._accelerator.scaler
        return {
            "parameters": {name: parameter.detach() for name, parameter in self._named.items()},
            "optimizer": self._optimizer.state_dict(),
            "rate": self._rate.state_dict(),
            "average": self._average.state_dict() if self._average else None,
            "scaler": scaler.state_dict() if scaler else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` told."""
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(state["parameters"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rate.load_state_dict(state["rate"])
        if self._average:
            self._average.load_state_dict(state["average"])
            self._average.to(self._parameters[0].device)
        if self._accelerator.scaler and state["scaler"]:
            self._accelerator.scaler.load_state_dict(state["scaler"])

    def _gradients(self, batch: TileBatch, positions: Positions, draws: Draws) -> float | None:
        """Leave the gradient of the mean loss; nothing comes back if memory is too small for it."""
        torch.manual_seed(int(draws.seeds[0]))  # a network that draws, against advice, goes on as it would have
        self._optimizer.zero_grad()
        losses = []
        try:
            for start in range(0, len(batch), self._at_once):
                part = slice(start, start + self._at_once)
                loss = self._learner.loss(_part(batch, part), positions[part], draws.part(part))
                self._accelerator.backward(loss.sum() / len(batch))
                losses.append(loss.detach().double())
        except torch.OutOfMemoryError:
            if self._at_once == 1:
                raise
            return None
        return float(torch.cat(losses).mean())

    def _halve(self) -> None:
        """Go on with half as many tiles at once. The frames that held the failed part are gone by now."""
        before, self._at_once = self._at_once, -(-self._at_once // 2)
        self._optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        log.warning("%d tiles at once need more memory than there is: going on with %d", before, self._at_once)


@contextmanager
def accelerated(learner: DiffusionLearner, device: torch.device, precision: Precision) -> Iterator[Accelerator]:
    """An accelerator for one fit, and no trace of it afterwards, in the process or in the network."""
    on_cpu = device.type == "cpu"
    attributes = vars(learner.network)
    before = {name: attributes[name] for name in _PREPARED if name in attributes}
    with _undecided():
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="no" if on_cpu or precision == "fp32" else precision,
            # Else the environment could set another number of steps, and so divide gradients once more.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        try:
            yield accelerator
        finally:
            for name in _PREPARED:
                attributes.pop(name, None)
            attributes.update(before)


@contextmanager
def _undecided() -> Iterator[None]:
    """Accelerate decides once for a whole process; inside, it has decided nothing yet, and afterwards what it had."""
    kept = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]  # noqa: SLF001
    before = [dict(state) for state in kept]
    for state in kept:
        state.clear()
    try:
        yield
    finally:
        for state, content in zip(kept, before, strict=True):
            state.clear()
            state.update(content)


def _learning_rate(optimizer: torch.optim.Optimizer, options: DiffusionTrainingOptions) -> LRScheduler:
    if options.learning_rate_decay == "cosine":
        return CosineAnnealingLR(optimizer, options.steps)
    return ConstantLR(optimizer, factor=1)


def _remember_less(network: torch.nn.Module, table: str) -> None:
    if not isinstance(network, ModelMixin) or not network._supports_gradient_checkpointing:  # noqa: SLF001
        raise OptionsError(
            f"gradient_checkpointing: a {type(network).__name__} cannot do without what it remembers. Leave the option "
            f"out under {table} of the pipeline file."
        )
    network.enable_gradient_checkpointing()


def _part(batch: TileBatch, tiles: slice) -> TileBatch:
    return replace(
        batch,
        pixels=batch.pixels[tiles],
        seeds=batch.seeds[tiles],
        prompts=batch.prompts[tiles],
        embeddings=_rows(batch.embeddings, tiles),
        keyword_scores=_rows(batch.keyword_scores, tiles),
        categories=_rows(batch.categories, tiles),
    )


def _rows(values: np.ndarray | None, tiles: slice) -> np.ndarray | None:
    return None if values is None else values[tiles]


_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")
"""What accelerate hangs on a network. Its own `unwrap_model` would strip decorators that were there before."""
