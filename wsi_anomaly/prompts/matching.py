"""How near tiles and keywords are: one unit vector for each keyword, computed once and kept. Knows no tile store."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64
from platformdirs import user_cache_path

from wsi_anomaly.prompts.building import JOINER, PREFIX
from wsi_anomaly.prompts.protocol import Embedder

FORMAT_VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TextSide:
    """What is computed of the keywords alone."""

    vectors: Float32[np.ndarray, "keyword d"]
    tokens: Int64[np.ndarray, " keyword"]
    """How much of a prompt each keyword takes, in tokens of CLIP."""
    prefix_tokens: int
    joiner_tokens: int


def text_side(embedder: Embedder, keywords: Sequence[str], templates: Sequence[str], *, model_digest: str) -> TextSide:
    """The vectors of keywords, from a cache of the user's where they have been computed before.

    A keyword's vector is the mean of the unit vectors of its templates ("{}" stands for the keyword), made a unit
    vector again (Lu et al., "A visual-language foundation model for computational pathology", 2024).
    """
    folder = user_cache_path("wsi-anomaly") / "keywords"
    content = json.dumps([FORMAT_VERSION, model_digest, list(keywords), list(templates)])
    path = folder / f"{hashlib.sha256(content.encode()).hexdigest()}.npz"
    if kept := _kept(path):
        return kept
    log.info("embedding %d keywords in %d templates", len(keywords), len(templates))
    prefix, joiner, *tokens = clip_tokens([PREFIX, JOINER, *keywords]).tolist()
    side = TextSide(_vectors(embedder, keywords, templates), np.array(tokens, np.int64), prefix, joiner)
    _keep(path, side)
    return side


def similarities(
    embeddings: Float32[np.ndarray, "tile d"], vectors: Float32[np.ndarray, "keyword d"]
) -> Float32[np.ndarray, "tile keyword"]:
    """Cosine of each tile and each keyword; both sides are unit vectors."""
    # Tile by tile: a product of whole matrices is rounded otherwise for another number of tiles.
    out = np.empty((len(embeddings), len(vectors)), np.float32)
    for row, embedding in zip(out, embeddings, strict=True):
        np.dot(vectors, embedding, out=row)
    return out


def clip_tokens(texts: Sequence[str]) -> Int64[np.ndarray, " text"]:
    """How many tokens CLIP's text encoder, that of Stable Diffusion 1, takes for each; without start and end."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    return np.array([len(tokenizer.encode(text)) for text in texts], np.int64)


def _vectors(embedder: Embedder, keywords: Sequence[str], templates: Sequence[str]) -> Float32[np.ndarray, "keyword d"]:
    total = sum(
        embedder.embed_texts([template.replace("{}", keyword) for keyword in keywords]).astype(np.float64)
        for template in templates
    )
    return np.asarray(total / np.linalg.norm(total, axis=1, keepdims=True), np.float32)


def _kept(path: Path) -> TextSide | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return TextSide(arrays["vectors"], arrays["tokens"], *arrays["frame"].tolist())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, side: TextSide) -> None:
    """Of use to later runs only: where it cannot be written, they compute it again."""
    unfinished = path.with_suffix(".partial.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(unfinished, vectors=side.vectors, tokens=side.tokens, frame=[side.prefix_tokens, side.joiner_tokens])
        unfinished.replace(path)
    except OSError as error:
        log.info("%s: cannot be written (%s): keywords will be embedded again next time", path.parent, error.strerror)
