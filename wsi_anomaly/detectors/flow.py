"""Normalising flows: how likely a vector is, given another one if there is any. Knows no tiles and no files."""

import logging
from typing import Any

import numpy as np
import torch
import zuko
from jaxtyping import Bool, Float, Float32
from torch import nn

from wsi_anomaly.detectors.weights import copy_of

MOST_STEPS = 3000

log = logging.getLogger(__name__)


class Flow(nn.Module):
    """A neural spline flow (Durkan et al., NeurIPS 2019) of few weights; the vectors should be standardised."""

    def __init__(self, features: int, context: int) -> None:
        super().__init__()
        self.layers: Any = zuko.flows.NSF(
            features, context, bins=_BINS, transforms=_TRANSFORMS, hidden_features=(_WIDTH, _WIDTH)
        )

    def forward(
        self, vectors: Float[torch.Tensor, "item d"], context: Float[torch.Tensor, "item c"] | None = None
    ) -> Float[torch.Tensor, " item"]:
        """-log p of each vector, given its context, in nats."""
        return -self.layers(context).log_prob(vectors)


def fit_flow(
    vectors: Float32[np.ndarray, "item d"],
    context: Float32[np.ndarray, "item c"] | None,
    held_out: Bool[np.ndarray, " item"],
    *,
    seed: int,
    most_steps: int = MOST_STEPS,
) -> Flow:
    """A flow of maximal likelihood, learnt until that of the held-out vectors no longer rises; ready to evaluate.

    It learns on the CPU: it has few weights.

    The caller's random state is neither used nor changed.
    """
    values = torch.from_numpy(vectors)
    given = None if context is None else torch.from_numpy(context)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = Flow(vectors.shape[1], 0 if context is None else context.shape[1])

    def loss(rows: np.ndarray) -> Float[torch.Tensor, ""]:
        return flow(values[rows], None if given is None else given[rows]).mean()

    random, learnt, judged = np.random.default_rng(seed), np.flatnonzero(~held_out), np.flatnonzero(held_out)
    optimizer = torch.optim.Adam(flow.parameters(), _LEARNING_RATE)
    best, best_step, kept, step = np.inf, 0, copy_of(flow), 0
    while step < most_steps and step - best_step < _PATIENCE:
        optimizer.zero_grad()
        loss(random.choice(learnt, _BATCH)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(flow.parameters(), _MOST_GRADIENT)
        optimizer.step()
        step += 1
        if step % _STEPS_A_ROUND and step < most_steps:
            continue
        with torch.no_grad():
            reached = loss(judged).item()
        if reached < best:
            best, best_step, kept = reached, step, copy_of(flow)
    log.info("flow of %d vectors: -log p of those held out %.3f after step %d", len(vectors), best, best_step)
    flow.load_state_dict(kept)
    return flow.eval()


_BINS = 8
_TRANSFORMS = 3
_WIDTH = 64
_LEARNING_RATE = 2e-3
_BATCH = 128
_STEPS_A_ROUND = 50
_PATIENCE = 300
_MOST_GRADIENT = 5.0
