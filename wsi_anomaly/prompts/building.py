"""Weighted prompts: from similarities to the nearest keywords and weights. Arrays in, arrays out; no file, no model.

A prompt is stored as keyword indices and weights and handed on as fragments, never as a string that someone parses:
a keyword may hold plus signs, parentheses, commas and quotes.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64, Int16, Int64

from wsi_anomaly.errors import KeywordError

Weighting = Literal["numeric", "quantised"]
"""The weights of the paper, or those of its released code: powers of 1.1 and 0.9."""

PREFIX = "a histopathological photograph of"
JOINER = "and"
MAX_TOKENS = 75
"""What CLIP's text encoder reads of a prompt, without its start and end tokens."""
MAX_WEIGHT = 10.0
"""Far above any weight seen in practice; keeps weights finite where the median is hardly positive."""


@dataclass(frozen=True, slots=True)
class BuiltPrompts:
    """The prompts of some tiles, nearest keyword first, and how many tiles needed special treatment."""

    keywords: Int16[np.ndarray, "tile k"]
    """Positions in the keyword list; -1 where a place is empty. Empty places come last."""
    weights: Float32[np.ndarray, "tile k"]
    """Rounded to two decimals; 0 where a place is empty."""
    over_budget: int
    """Tiles that lost keywords to the token limit."""
    without_agreement: int
    """Tiles whose median is not positive, so that all their weights are 1."""


def build_prompts(
    similarity: Float32[np.ndarray, "tile keyword"],
    *,
    top_k: int,
    weighting: Weighting,
    keyword_tokens: Int64[np.ndarray, " keyword"],
    prefix_tokens: int,
    joiner_tokens: int,
) -> BuiltPrompts:
    """The prompt of each tile: its `top_k` nearest keywords, weighted by how near they are.

    AnoPILaD, section 2.2: with the scores s_1 >= ... >= s_k of a tile, keyword i gets the weight s_i / median(s). Equal
    scores keep the order of the list. Left out is what has a score at or below zero or a weight that rounds to it;
    where the median itself is not positive the ratio says nothing, and all weights are 1. The list is cut before the
    first keyword that no longer fits into `MAX_TOKENS`. A tile with a similarity that is not a number has no prompt.

    Raises:
        KeywordError: there are fewer keywords than `top_k`.
    """
    if not 1 <= top_k <= similarity.shape[1]:
        raise KeywordError(
            f"top_k is {top_k}, but the keyword list has {similarity.shape[1]} keywords. "
            "Give a top_k between 1 and the length of the list, or add keywords to the list."
        )
    nearest = _nearest(similarity, top_k)
    scores = np.take_along_axis(similarity, nearest, axis=1).astype(np.float64)
    median = (scores[:, (top_k - 1) // 2] + scores[:, top_k // 2]) / 2
    known = np.isfinite(similarity).all(axis=1)
    agrees = known & (median > 0)
    weights = np.ones_like(scores)
    np.divide(scores, median[:, None], out=weights, where=agrees[:, None])
    weights = np.clip(weights, 0, MAX_WEIGHT)
    weights = np.round(_quantised(weights) if weighting == "quantised" else weights, 2)
    wanted = known[:, None] & (weights > 0)
    kept = wanted & (_prompt_tokens(keyword_tokens[nearest], prefix_tokens, joiner_tokens) <= MAX_TOKENS)
    return BuiltPrompts(
        np.where(kept, nearest, -1).astype(np.int16),
        np.where(kept, weights, 0).astype(np.float32),
        over_budget=int((wanted & ~kept).any(axis=1).sum()),
        without_agreement=int((known & ~agrees).sum()),
    )


def readable(prompt: tuple[tuple[str, float], ...]) -> str:
    """The fragments as a line for people, with each keyword in parentheses and its weight behind unless that is 1."""
    return " ".join(
        f"({text}){'' if weight == 1 else format(weight, '.2f')}" if i % 2 else text
        for i, (text, weight) in enumerate(prompt)
    )


def _nearest(similarity: Float32[np.ndarray, "tile keyword"], top_k: int) -> Int64[np.ndarray, "tile k"]:
    """The keywords of the highest similarities, highest first; of equals the one with the lower index."""
    left = similarity.copy()
    tiles = np.arange(len(left))
    nearest = np.empty((len(left), top_k), np.int64)
    for place in range(top_k):  # a few passes are several times faster than a stable sort of every row
        nearest[:, place] = left.argmax(axis=1)
        left[tiles, nearest[:, place]] = -np.inf
    return nearest


def _quantised(weights: Float64[np.ndarray, "tile k"]) -> Float64[np.ndarray, "tile k"]:
    """Powers of 1.1 for places before the middle, of 0.9 for those behind it, 1 in the middle.

    AnoPILaD, released code: divide by 1.1 (0.9) as long as the weight is nearer to it than to 1, and count.
    """
    middle = (weights.shape[1] - 1) / 2
    place = np.arange(weights.shape[1])
    logarithm = np.log(np.maximum(weights, _LEAST_WEIGHT))
    ups = np.ceil((logarithm - np.log(1.05)) / np.log(1.1)).clip(min=0)  # 1.05 lies halfway, and counts as 1
    downs = (np.floor((logarithm - np.log(0.95)) / np.log(0.9)) + 1).clip(min=0)  # 0.95 counts as 0.9
    return np.where(place < middle, 1.1**ups, np.where(place > middle, 0.9**downs, 1.0))


def _prompt_tokens(
    keyword_tokens: Int64[np.ndarray, "tile k"], prefix_tokens: int, joiner_tokens: int
) -> Int64[np.ndarray, "tile k"]:
    """How long the prompt is when it ends with the keyword in this place."""
    return prefix_tokens + (keyword_tokens + joiner_tokens).cumsum(axis=1) - joiner_tokens


_LEAST_WEIGHT = 1e-6
"""Counting would never end at zero; powers as small as this are rounded to zero anyway."""
