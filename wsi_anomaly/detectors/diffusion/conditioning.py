"""From prompts to the text embeddings that condition a diffusion network. Knows texts and weights, never a tile."""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache, reduce
from itertools import zip_longest
from typing import NamedTuple

import torch
from compel import EmbeddingsProvider  # type: ignore[import-untyped]
from jaxtyping import Float, Float32, Int64
from transformers import CLIPTextModel, CLIPTokenizer

from wsi_anomaly.detectors.protocol import Prompt
from wsi_anomaly.devices import CHUNK_TILES

Embeddings = Float[torch.Tensor, "prompt token d"]


class PromptEncoder:
    """The embeddings that compel gives for the same fragments, but for many prompts at once, and each only once.

    Compel (https://github.com/damian0815/compel) moves the tokens of a fragment of weight w away from the empty prompt:
    empty + w (prompt - empty). For w < 1 it first blends the prompt with itself without that fragment, hidden from
    attention: tan((1 - w) pi / 2) parts to one. So a prompt takes one pass through the text encoder, and one more for
    each fragment that weighs less than 1. Passes do not depend on weights: prompts of the same texts share them.

    Text is never parsed. What exceeds the encoder's context (for CLIP, 75 tokens between two marks) is cut off. The
    text encoder must not change afterwards: what it gave is remembered.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        *,
        cache_prompts: int = 2048,
        batch_size: int = CHUNK_TILES,
    ) -> None:
        """Passes go through `text_encoder` by `batch_size`, repeated where they are fewer.

        The last used passes, `cache_prompts` of them, are kept on the encoder's device. Each takes 237 kB with a text
        encoder of width 768 in float32, so the default takes half a gigabyte at most.
        """
        self._compel = EmbeddingsProvider(
            tokenizer, text_encoder, model_max_length=text_encoder.config.max_position_embeddings
        )
        self._text_encoder = text_encoder
        self._cache_prompts = cache_prompts
        self._batch_size = batch_size
        self._cache: dict[_Pass, Float[torch.Tensor, "token d"]] = {}
        self._token_ids = lru_cache(maxsize=_CACHED_TEXTS)(self._tokenized)

    @property
    def empty(self) -> Float[torch.Tensor, "1 token d"]:
        """The embedding of the empty prompt: where guidance starts from."""
        return self.encode([()])

    def encode(self, prompts: Sequence[Prompt]) -> Embeddings:
        """One embedding for each prompt, whatever other prompts come with it; device and dtype are the encoder's.

        Weights act in float32. Nothing carries gradients, but a network that is being trained may take the embeddings
        as input, even when they were made in inference mode.

        Raises:
            ValueError: a weight is negative or no finite number. The prompt stage makes no such weight.
        """
        if not prompts:
            return self.empty[:0]
        recipes = [self._recipe(prompt) for prompt in prompts]
        nothing, _ = self._recipe(()).parts[0]
        wanted = [one for recipe in recipes for one, _ in recipe.parts]
        with torch.inference_mode(mode=False), torch.no_grad():
            encoded = self._encoded([*wanted, nothing])  # last, so that it stays in the cache longest
            blended = _blended(recipes, encoded)
            weights = torch.stack([recipe.token_weights for recipe in recipes])[..., None].to(blended.device)
            weighted = encoded[nothing] + weights * (blended - encoded[nothing])
            return torch.where(weights == 1, blended, weighted).to(self._text_encoder.dtype)

    def _recipe(self, prompt: Prompt) -> "_Recipe":
        limit = self._compel.max_token_count
        token_ids: list[int] = []
        weights: list[float] = []
        lessened: list[tuple[_Span, float]] = []
        for text, weight in prompt:
            if not 0 <= weight < math.inf:
                raise ValueError(f"the weight of {text!r} in a prompt is {weight}: it must be a number from 0 on")
            tokens, start = self._token_ids(text), len(token_ids) + 1  # behind the mark of the start
            token_ids += tokens
            weights += [weight] * len(tokens)
            if weight < 1 and tokens and start < limit - 1:
                # As in compel, a fragment that is cut takes the mark of the end along.
                lessened.append(((start, min(start + len(tokens), limit)), _share_without(weight)))
        padded, token_weights, _ = self._compel._chunk_and_pad_token_ids(token_ids, weights, device="cpu")  # noqa: SLF001 - compel is pinned
        key, total = tuple(padded.tolist()), 1 + sum(part for _, part in lessened)
        parts = [(_Pass(key, None), 1 / total), *((_Pass(key, span), part / total) for span, part in lessened)]
        return _Recipe(tuple(parts), token_weights)

    def _tokenized(self, text: str) -> list[int]:
        return self._compel.get_token_ids([text], include_start_and_end_markers=False)[0]

    def _encoded(self, wanted: Iterable["_Pass"]) -> "_Encoded":
        """What the text encoder gives for each pass; those it has not seen lately go through it."""
        distinct = dict.fromkeys(wanted)
        missing = [one for one in distinct if one not in self._cache]
        made: _Encoded = {}
        # A mask selects another kernel, which rounds otherwise: passes with and without never share a batch.
        for alike in ([one for one in missing if not one.hidden], [one for one in missing if one.hidden]):
            for start in range(0, len(alike), self._batch_size):
                made |= self._encoded_batch(alike[start : start + self._batch_size])
        encoded = {one: made[one] if one in made else self._cache.pop(one) for one in distinct}
        self._cache |= encoded
        for oldest in list(self._cache)[: max(len(self._cache) - self._cache_prompts, 0)]:
            del self._cache[oldest]
        return encoded

    def _encoded_batch(self, passes: Sequence["_Pass"]) -> "_Encoded":
        full = [*passes, *[passes[-1]] * (self._batch_size - len(passes))]
        device = self._text_encoder.device
        token_ids = torch.tensor([one.token_ids for one in full], device=device)
        spans = [one.hidden for one in full if one.hidden]
        mask = _attention_mask(spans, token_ids.shape[1]).to(device) if spans else None
        rows = self._compel._encode_token_ids_to_embeddings(token_ids, mask)  # noqa: SLF001 - compel is pinned
        return {one: row.clone() for one, row in zip(passes, rows, strict=False)}  # a view would keep the whole batch


_Span = tuple[int, int]
"""The first of some tokens, and the one behind the last."""


class _Pass(NamedTuple):
    """What goes into the text encoder: tokens, and which of them attention must not see."""

    token_ids: tuple[int, ...]
    hidden: _Span | None


class _Recipe(NamedTuple):
    """How a prompt is made: passes with their shares, which sum to one, and the weight of each token."""

    parts: tuple[tuple[_Pass, float], ...]
    token_weights: Float32[torch.Tensor, " token"]


_Encoded = dict[_Pass, Float[torch.Tensor, "token d"]]


def _blended(recipes: Sequence[_Recipe], encoded: _Encoded) -> Float32[torch.Tensor, "prompt token d"]:
    """The weighted means of each prompt's passes.

    Summed one by one: how a reduction rounds may depend on how many prompts there are.
    """
    ranks = zip_longest(*(recipe.parts for recipe in recipes))
    padded = ([part or (recipe.parts[0][0], 0.0) for part, recipe in zip(rank, recipes, strict=True)] for rank in ranks)
    return reduce(torch.add, (_scaled(parts, encoded) for parts in padded))


def _scaled(parts: Sequence[tuple[_Pass, float]], encoded: _Encoded) -> Float32[torch.Tensor, "prompt token d"]:
    rows = torch.stack([encoded[one] for one, _ in parts]).float()
    return rows * torch.tensor([share for _, share in parts], device=rows.device)[:, None, None]


def _share_without(weight: float) -> float:
    """How much of the prompt without a fragment of this weight comes to one part of the prompt with it."""
    return math.tan((1 - max(weight, _LEAST_WEIGHT)) * math.pi / 2)


def _attention_mask(hidden: Sequence[_Span], length: int) -> Int64[torch.Tensor, "pass token"]:
    """One where attention may look, zero where not."""
    mask = torch.ones(len(hidden), length, dtype=torch.int64)
    for row, (start, end) in zip(mask, hidden, strict=True):
        row[start:end] = 0
    return mask


_LEAST_WEIGHT = 1e-5
"""Where compel stops, as the tangent has no value for weight zero."""
_CACHED_TEXTS = 4096
