"""The network of GNSM, what it learns, and the norms of its scores. Knows categories as numbers, and no keywords.

Mahmood, "Score-based anomaly detection", thesis, chapter 4.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import nn

from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.devices import in_fixed_chunks

Logits = Float[torch.Tensor, "tile outcome"]
Temperatures = Float[torch.Tensor, " tile"]


class GnsmNetwork(nn.Module):
    """From noisy log probabilities of all variables' outcomes to the logits of what the noise was.

    It is told the noisy logits on their own scale and adds to them, reversed, what it believes the clean ones to be:
    then it begins near the answer, and has to learn the tissue only.
    """

    def __init__(self, outcomes: tuple[int, ...], width: int, blocks: int) -> None:
        super().__init__()
        self.outcomes = list(outcomes)
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", torch.randn(_FOURIER // 2))
        self.time = nn.Sequential(nn.Linear(_FOURIER, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.enter = nn.Linear(sum(outcomes), width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.GELU(), nn.Linear(width, sum(outcomes)))

    def forward(self, noisy: Logits, tau: Temperatures) -> Logits:
        """Logits of the noise, one group for each variable; `tau` is the temperature of each tile."""
        turns = 2 * math.pi * tau.log()[:, None] * self.frequencies
        time = self.time(torch.cat([turns.sin(), turns.cos()], dim=1))
        values = noisy * tau[:, None]
        hidden = self.enter(values / _VALUE_SCALE)
        for block in self.blocks:
            hidden = block(hidden, time)
        return self.leave(hidden) * _VALUE_SCALE - values

    def clean(self, codes: Int64[torch.Tensor, "tile variable"]) -> Logits:
        """The log probabilities that stand for the categories: one-hot, with 1e-5 for 0."""
        parts = [nn.functional.one_hot(codes[:, i], count) for i, count in enumerate(self.outcomes)]
        return torch.cat(parts, dim=1).float().clamp_min(_LEAST).log()

    def normalized(self, logits: Logits) -> Logits:
        """Log probabilities of each variable's outcomes."""
        parts = logits.split(self.outcomes, dim=1)  # type: ignore[no-untyped-call]
        return torch.cat([part.log_softmax(dim=1) for part in parts], dim=1)

    def counts(self) -> Float[torch.Tensor, " outcome"]:
        """For each outcome, how many its variable has."""
        counts = torch.tensor(self.outcomes, device=self.frequencies.device)
        return counts.repeat_interleave(counts).float()


class _Block(nn.Module):
    """A residual block that is moved by the temperature (FiLM)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.film = nn.Linear(width, 2 * width)
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(
        self, hidden: Float[torch.Tensor, "tile width"], time: Float[torch.Tensor, "tile width"]
    ) -> Float[torch.Tensor, "tile width"]:
        scale, shift = self.film(time).chunk(2, dim=1)
        return hidden + self.layers(self.norm(hidden) * (1 + scale) + shift)


def noise_loss(
    network: GnsmNetwork, device: torch.device
) -> Callable[[TileBatch, torch.Generator], Float[torch.Tensor, ""]]:
    """KL divergence of the predicted noise from the true one, weighted by tau^2 K^2 (thesis, chapter 4)."""
    temperatures, counts = _TEMPERATURES.to(device), network.counts()

    def loss(batch: TileBatch, generator: torch.Generator) -> Float[torch.Tensor, ""]:
        clean = network.clean(torch.as_tensor(batch.categories, device=device))
        tau = temperatures[torch.randint(len(temperatures), (len(clean),), generator=generator).to(device)]
        waits = torch.empty(clean.shape).exponential_(generator=generator).clamp_min(_LEAST_WAIT).to(device)
        noisy = network.normalized((clean - waits.log()) / tau[:, None])  # -log of an exponential wait is Gumbel's
        true = network.normalized(clean - tau[:, None] * noisy)
        divergence = true.exp() * (true - network.normalized(network(noisy, tau)))
        return (divergence * (tau[:, None] * counts).square()).sum(dim=1).mean()

    return loss


def score_norms(
    network: GnsmNetwork, codes: Int64[np.ndarray, "tile variable"], device: torch.device
) -> Float32[np.ndarray, "tile level"]:
    """The L2 norm of the score of each tile at each temperature, at its clean categories."""
    counts = network.counts()

    def norms(chunk: Int64[torch.Tensor, "chunk variable"]) -> Float32[torch.Tensor, "chunk level"]:
        clean, found = network.clean(chunk), []
        for tau in _TEMPERATURES.to(device):
            logits = network(clean, tau.expand(len(chunk)))
            found.append((tau * counts * network.normalized(logits).exp() - tau).norm(dim=1))
        return torch.stack(found, dim=1)

    return in_fixed_chunks(norms, codes, device, size=_CHUNK_TILES)


_TEMPERATURES = torch.from_numpy(np.geomspace(20, 2, 20).astype(np.float32))
_LEAST = 1e-5
"""Instead of the zeros of a one-hot, as in the thesis."""
_LEAST_WAIT = 1e-10
_FOURIER = 128
_VALUE_SCALE = 4.0
"""Brings logits to the size that a network likes."""
_CHUNK_TILES = 64
