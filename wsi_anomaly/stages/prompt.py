"""Stage `prompt`: which keywords describe each tile? Reads `tiles.zarr`; writes `prompts.zarr`."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped, UInt8
from pydantic import Field

from wsi_anomaly.detectors.protocol import Prompt
from wsi_anomaly.execution import Progress, read_ahead, report
from wsi_anomaly.options import Options
from wsi_anomaly.prompts.building import JOINER, PREFIX, BuiltPrompts, Weighting, build_prompts, readable
from wsi_anomaly.prompts.keywords import Keyword
from wsi_anomaly.prompts.matching import TextSide, similarities
from wsi_anomaly.prompts.protocol import Embedder
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.prompts import PromptWriter, fragments
from wsi_anomaly.storage.record import Recipe, Record, current_record, read_record, writing
from wsi_anomaly.storage.tiles import TileStore

FORMAT_VERSION = 1
_AT_HAND_TILES = 64

log = logging.getLogger(__name__)


class PromptOptions(Options):
    """Which keywords may describe a tile, and how they become its prompt."""

    keywords: str = "lymph_node"
    """A list of 'wsi-anomaly keywords', or the path of a keyword file; relative paths start at the pipeline file."""
    include_abnormal: bool = False
    """Whether the list's keywords of abnormal tissue may be chosen too; the paper describes every tile as normal."""
    top_k: int = Field(5, ge=1, le=32)
    """How many keywords a prompt has."""
    weighting: Weighting = "numeric"
    """`numeric`, the paper: cosine divided by the median of the chosen ones; `quantised`, the released code."""
    templates: bool = True
    """Whether a keyword's vector is the mean over 22 phrases that it stands in, or that of the bare keyword."""
    model: dict[str, Any] = Field(default_factory=lambda: {"name": "conch"})
    """`name`, an installed image-text model, and that model's own options."""

    @property
    def matching(self) -> dict[str, Any]:
        """What decides prompts beside the texts and the model."""
        return self.model_dump(include={"top_k", "weighting"})


@dataclass(frozen=True, slots=True)
class Prompter:
    """Keywords and an image-text model that is loaded only when there is something to describe."""

    model_name: str
    digest: str
    """Of all that decides an embedding."""
    vocabulary: tuple[Keyword, ...]
    templates: tuple[str, ...]
    options: PromptOptions
    load: Callable[[], tuple[Embedder, TextSide]]
    """Slow the first time; the same objects ever after."""
    threads: int = 1
    """For reading and resizing while the model computes."""

    @property
    def keywords(self) -> tuple[str, ...]:
        """The texts of the vocabulary, in the order that prompt stores count in."""
        return tuple(keyword.text for keyword in self.vocabulary)

    def recipe(self, folder: SlideFolder) -> Recipe:
        """What decides the prompts of a slide.

        Raises:
            MissingOutputError: the stage `tile` has not run.
        """
        options = self.options.matching | {"keywords": list(self.keywords), "templates": list(self.templates)}
        inputs = {"tiles": read_record(folder.root, "tile").digest, "image_text_model": self.digest}
        return Recipe("prompt", FORMAT_VERSION, options, inputs)


class TileDescriptions(NamedTuple):
    """Of some tiles, in the order in which a `TileBatch` takes them."""

    prompts: tuple[Prompt, ...]
    embeddings: Float32[np.ndarray, "tile d"]
    keyword_scores: Float32[np.ndarray, "tile keyword"]


def prompt_slide(folder: SlideFolder, prompter: Prompter, *, batch_size: int) -> Record:
    """Describe the tiles of a slide, unless that has been done with the same keywords, model and options.

    What an interrupted attempt left is gone on with.

    Raises:
        MissingOutputError: the stage `tile` has not run.
        ModelError: the image-text model cannot be loaded.
    """
    recipe = prompter.recipe(folder)
    if done := current_record(folder.root, recipe):
        return done
    store = TileStore(folder.tiles)
    embedder, texts = prompter.load()
    with writing(folder.root, recipe, resume=True) as work:
        writer = PromptWriter(
            work.folder / folder.prompts.name,
            tiles=len(store),
            embedding_size=texts.vectors.shape[1],
            keywords=prompter.keywords,
            attributes=_attributes(prompter),
        )
        _embed(
            store,
            writer,
            embedder,
            texts,
            _Pace(folder.slide_id, batch_size, 1 if embedder.on_cpu else prompter.threads),
        )
        built = _build(writer.similarity(), texts, prompter.options)
        writer.finish(built.keywords, built.weights, _texts(built, prompter.keywords))
        _tell(folder.slide_id, built, prompter.options)
        work.facts.update(
            {"tiles": len(store), "shortened": built.over_budget, "without_agreement": built.without_agreement}
        )
    return read_record(folder.root, "prompt")


def describe_tiles(prompter: Prompter, pixels: UInt8[np.ndarray, "tile y x rgb"]) -> TileDescriptions:
    """What the stage finds for tiles that are at hand and lie in no store."""
    embedder, texts = prompter.load()
    parts = np.array_split(pixels, max(1, -(-len(pixels) // _AT_HAND_TILES)))
    embeddings = np.concatenate([embedder.embed_tiles(embedder.prepare(part)) for part in parts])
    similarity = similarities(embeddings, texts.vectors)
    built = _build(similarity, texts, prompter.options)
    return TileDescriptions(tuple(_fragments(built, prompter.keywords)), embeddings, similarity)


@dataclass(frozen=True, slots=True)
class _Pace:
    """How the tiles of a slide are gone through."""

    slide_id: str
    batch_size: int
    threads: int


def _embed(store: TileStore, writer: PromptWriter, embedder: Embedder, texts: TextSide, pace: _Pace) -> None:
    """Embed the tiles that are still missing; the next batches are read and resized meanwhile."""

    def prepare(indices: Int64[np.ndarray, " tile"]) -> tuple[Bool[np.ndarray, " tile"], Shaped[np.ndarray, "..."]]:
        present = store.readable[indices]
        return present, embedder.prepare(store.read(indices[present]))

    start = writer.tiles_done
    if start == len(store):
        return
    if start:
        log.info("%s: going on after %d tiles", pace.slide_id, start)
    batches = np.split(np.arange(start, len(store)), range(pace.batch_size, len(store) - start, pace.batch_size))
    seen = start
    for present, prepared in read_ahead(prepare, batches, threads=pace.threads):
        embedding = np.full((len(present), texts.vectors.shape[1]), np.nan, np.float32)
        if present.any():
            embedding[present] = embedder.embed_tiles(prepared)
        writer.append(embedding, similarities(embedding, texts.vectors))
        seen += len(present)
        report(Progress("prompt", pace.slide_id, seen, len(store)))


def _build(similarity: Float32[np.ndarray, "tile keyword"], texts: TextSide, options: PromptOptions) -> BuiltPrompts:
    return build_prompts(
        similarity,
        top_k=options.top_k,
        weighting=options.weighting,
        keyword_tokens=texts.tokens,
        prefix_tokens=texts.prefix_tokens,
        joiner_tokens=texts.joiner_tokens,
    )


def _texts(built: BuiltPrompts, keywords: tuple[str, ...]) -> list[str]:
    return [readable(prompt) for prompt in _fragments(built, keywords)]


def _fragments(built: BuiltPrompts, keywords: tuple[str, ...]) -> list[Prompt]:
    rows = zip(built.keywords.tolist(), built.weights.tolist(), strict=True)
    return [fragments(keywords, *row, prefix=PREFIX, joiner=JOINER) for row in rows]


def _tell(slide_id: str, built: BuiltPrompts, options: PromptOptions) -> None:
    if built.over_budget:
        log.warning(
            "%s: the prompts of %d tiles were longer than the text encoder reads: their last keywords are left out. "
            "Shorten the longest keywords of '%s'.",
            slide_id,
            built.over_budget,
            Path(options.keywords).stem,
        )
    if built.without_agreement:
        log.warning(
            "%s: %d tiles agree with no keyword (the median cosine is not above 0): their keywords weigh the same. Is "
            "'%s' the right list for this tissue?",
            slide_id,
            built.without_agreement,
            Path(options.keywords).stem,
        )


def _attributes(prompter: Prompter) -> dict[str, Any]:
    return {
        "image_text_model": prompter.model_name,
        "image_text_model_digest": prompter.digest,
        "templates": list(prompter.templates),
        "prefix": PREFIX,
        "joiner": JOINER,
        **prompter.options.matching,
    }
