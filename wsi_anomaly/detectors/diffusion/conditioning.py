"""From prompts to the text embeddings that condition a diffusion network. Knows texts and weights, never a tile."""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from compel import EmbeddingsProvider  # type: ignore[import-untyped]
from jaxtyping import Bool, Float, Float32
from transformers import CLIPTextModel, CLIPTokenizer

from wsi_anomaly.detectors.protocol import Prompt
from wsi_anomaly.devices import CHUNK_TILES

Embeddings = Float[torch.Tensor, "prompt token d"]


class PromptEncoder:
    """The embeddings that compel gives for the same fragments, but for many prompts at once, and each only once.

    Compel (https://github.com/damian0815/compel) moves the tokens of a fragment of weight w away from the empty prompt:
    empty + w (prompt - empty). For w < 1 it first blends the prompt with itself without that fragment, hidden from
    attention: tan((1 - w) pi / 2) parts to one. What the text encoder is asked depends on no weight, so prompts of the
    same texts share it. And it looks back only: without a fragment, nothing changes before it. So a prompt goes through
    in one sequence with its ends from each hidden fragment on, which look at its beginning, but not at each other.

    Text is never parsed. What exceeds the encoder's context (for CLIP, 75 tokens between two marks) is cut off. The
    text encoder must not change afterwards, nor its device: what it gave is remembered.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        *,
        cache_prompts: int = 1024,
        batch_size: int | None = None,
    ) -> None:
        """Texts go through `text_encoder` by `batch_size`, repeated where they are fewer; None is as suits the device.

        The last used texts, `cache_prompts` of them, are kept on the encoder's device. With a text encoder of width 768
        in float32 each takes 237 kB, a typical one with two fragments of weights below 1 half a megabyte: so the
        default takes half a gigabyte.
        """
        self._compel = EmbeddingsProvider(
            tokenizer, text_encoder, model_max_length=text_encoder.config.max_position_embeddings
        )
        self._text_encoder = text_encoder
        self._cache_prompts = cache_prompts
        # A CPU is hardly faster with several at once, and new texts come in ones and twos.
        self._batch_size = batch_size or (1 if text_encoder.device.type == "cpu" else CHUNK_TILES)
        self._cache: _Encoded = {}
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
        nothing = self._recipe(()).text
        with torch.inference_mode(mode=False), torch.no_grad():
            # The empty text comes last, so that it stays in the cache longest.
            encoded = self._encoded([*(recipe.text for recipe in recipes), nothing])
            empty = encoded[nothing].float()
            # One by one: how a reduction rounds may depend on how many prompts there are.
            rows = [_weighted(recipe, encoded[recipe.text], empty) for recipe in recipes]
            return torch.stack(rows).to(self._text_encoder.dtype)

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
        parts = [1.0, *(part for _, part in lessened)]
        whole = _Text(tuple(padded.tolist()), tuple(span for span, _ in lessened))
        return _Recipe(whole, tuple(part / sum(parts) for part in parts), token_weights)

    def _tokenized(self, text: str) -> list[int]:
        return self._compel.get_token_ids([text], include_start_and_end_markers=False)[0]

    def _encoded(self, wanted: Iterable["_Text"]) -> "_Encoded":
        """What the text encoder gives for each text; those it has not seen lately go through it."""
        distinct = dict.fromkeys(wanted)
        missing = [text for text in distinct if text not in self._cache]
        made: _Encoded = {}
        for count in sorted({len(text.hidden) for text in missing}):
            alike = [text for text in missing if len(text.hidden) == count]
            for start in range(0, len(alike), self._batch_size):
                made |= self._encoded_batch(alike[start : start + self._batch_size])
        encoded = {text: made[text] if text in made else self._cache.pop(text) for text in distinct}
        self._cache |= encoded
        for oldest in list(self._cache)[: max(len(self._cache) - self._cache_prompts, 0)]:
            del self._cache[oldest]
        return encoded

    def _encoded_batch(self, texts: Sequence["_Text"]) -> "_Encoded":
        """Of texts with equally many hidden spans."""
        full = [*texts, *[texts[-1]] * (self._batch_size - len(texts))]
        if texts[0].hidden:
            rows = self._in_one_sequence(full)
        else:
            token_ids = torch.tensor([text.token_ids for text in full], device=self._text_encoder.device)
            rows = self._compel._encode_token_ids_to_embeddings(token_ids)  # noqa: SLF001 - compel is pinned
        # A view would keep the whole batch.
        return {text: row[: len(text.places)].clone() for text, row in zip(texts, rows, strict=False)}

    def _in_one_sequence(self, texts: Sequence["_Text"]) -> Embeddings:
        """Each text with its ends behind it."""
        longest = len(texts[0].token_ids) * (1 + len(texts[0].hidden))
        # Kernels are chosen by the shape of their input: it must not depend on which texts come together.
        length = len(texts[0].places) if len(texts) == 1 else longest
        device = self._text_encoder.device
        places = torch.tensor([[*text.places, *[0] * (length - len(text.places))] for text in texts], device=device)
        token_ids = torch.tensor([text.token_ids for text in texts], device=device).gather(1, places)
        network = getattr(self._text_encoder, "text_model", self._text_encoder)  # by version of transformers
        vectors = network.embeddings.token_embedding(token_ids) + network.embeddings.position_embedding(places)
        mask = torch.zeros(len(texts), 1, length, length, dtype=vectors.dtype, device=device)
        seen = torch.stack([_seen(text, length) for text in texts]).to(device)
        mask.masked_fill_(~seen[:, None], torch.finfo(mask.dtype).min)
        encoded = network.encoder(inputs_embeds=vectors, attention_mask=mask, is_causal=False)
        embeddings: torch.Tensor = network.final_layer_norm(encoded.last_hidden_state)
        return embeddings


_Span = tuple[int, int]
"""The first of some tokens, and the one behind the last."""


class _Text(NamedTuple):
    """What goes into the text encoder: tokens, and which of them attention must not see, one span at a time."""

    token_ids: tuple[int, ...]
    hidden: tuple[_Span, ...]

    @property
    def places(self) -> list[int]:
        """Where the tokens of the sequence stand in the text: all of it, then its end from each hidden span on."""
        length = len(self.token_ids)
        return [place for start in (0, *(start for start, _ in self.hidden)) for place in range(start, length)]


class _Recipe(NamedTuple):
    """How a prompt is made: a text, the shares of it and of it without each span (one in all), and token weights."""

    text: _Text
    shares: tuple[float, ...]
    token_weights: Float32[torch.Tensor, " token"]


_Encoded = dict[_Text, Float[torch.Tensor, "place d"]]
"""A row for each of a text's `places`."""


def _weighted(
    recipe: _Recipe, encoded: Float[torch.Tensor, "place d"], empty: Float32[torch.Tensor, "token d"]
) -> Float32[torch.Tensor, "token d"]:
    blended = _blended(recipe, encoded.float())
    weights = recipe.token_weights[:, None].to(blended.device)
    return torch.where(weights == 1, blended, empty + weights * (blended - empty))


def _blended(recipe: _Recipe, encoded: Float32[torch.Tensor, "place d"]) -> Float32[torch.Tensor, "token d"]:
    """The weighted mean of the text and of what it is without each of its hidden spans."""
    length = len(recipe.text.token_ids)
    whole, *ends = torch.split(encoded, [length, *(length - start for start, _ in recipe.text.hidden)])
    blended = recipe.shares[0] * whole
    for share, end in zip(recipe.shares[1:], ends, strict=True):
        start = length - len(end)
        blended[:start] += share * whole[:start]
        blended[start:] += share * end
    return blended


def _seen(text: _Text, length: int) -> Bool[torch.Tensor, "{length} {length}"]:
    """Which places of the sequence (columns) each place (row) looks at; what fills it up looks at the first."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    seen[:, 0] = True
    size = len(text.token_ids)
    backwards = torch.ones(size, size, dtype=torch.bool).tril()
    seen[:size, :size] = backwards
    at = size
    for start, end in text.hidden:
        rows = slice(at, at + size - start)
        seen[rows, :start] = True
        seen[rows, at + end - start : rows.stop] = backwards[start:, end:]
        at = rows.stop
    return seen


def _share_without(weight: float) -> float:
    """How much of the prompt without a fragment of this weight comes to one part of the prompt with it."""
    return math.tan((1 - max(weight, _LEAST_WEIGHT)) * math.pi / 2)


_LEAST_WEIGHT = 1e-5
"""Where compel stops, as the tangent has no value for weight zero."""
_CACHED_TEXTS = 4096
