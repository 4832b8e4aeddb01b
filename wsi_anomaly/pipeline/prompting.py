"""The stage `prompt` in a pipeline: from its options to a prompter, and one slide after another."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from jaxtyping import Float32, UInt8

from wsi_anomaly.detectors.protocol import Categorical, Detector, Perceiving, Perception
from wsi_anomaly.errors import KeywordError, ModelError, OptionsError
from wsi_anomaly.execution import Progress, Resources, report
from wsi_anomaly.options import parse_options
from wsi_anomaly.plugins import IMAGE_TEXT_MODELS, load_plugin
from wsi_anomaly.prompts.keywords import load_keywords, load_templates
from wsi_anomaly.prompts.matching import TextSide, similarities, text_side
from wsi_anomaly.prompts.protocol import Embedder, ImageTextModel
from wsi_anomaly.stages.prompt import Prompter, PromptOptions, prompt_slide
from wsi_anomaly.storage.layout import SlideFolder

_MOST_THREADS = 4


def build_prompter(options: PromptOptions, resources: Resources, *, fitted_with: str | None = None) -> Prompter:
    """Keywords and image-text model of a pipeline; the model is loaded when the first tile is described.

    `fitted_with` is the digest of the image-text model that a detector was fitted with: only that one will do.

    Raises:
        KeywordError: the keyword list cannot be used, or has too few keywords.
        UnknownPluginError: the image-text model is not installed.
        OptionsError: one of its options is wrong.
        ModelError: its weights are missing, gated or cannot be fetched, or not those of `fitted_with`.
    """
    vocabulary = load_keywords(options.keywords).chosen(include_abnormal=options.include_abnormal)
    if len(vocabulary) < options.top_k:
        raise KeywordError(
            f"keyword list '{options.keywords}': it has {len(vocabulary)} keywords, but top_k = {options.top_k} of "
            "them make a prompt. Add keywords, or lower top_k under [prompt] of the pipeline file."
        )
    templates = load_templates() if options.templates else ("{}",)
    name, model = _image_text_model(options, resources)
    digest = model.digest(offline=resources.offline)
    if fitted_with is not None:
        _check_same(digest, fitted_with, name)

    @cache
    def load() -> tuple[Embedder, TextSide]:
        embedder = model.load(device=resources.device, offline=resources.offline)
        texts = [keyword.text for keyword in vocabulary]
        return embedder, text_side(embedder, texts, templates, model_digest=digest)

    threads = min(resources.cores, _MOST_THREADS)
    return Prompter(name, digest, vocabulary, templates, options, load=load, threads=threads)


def informed(detector: Detector, prompter: Callable[[], Prompter | None]) -> Detector:
    """The same detector with what it wants to know of the prompts, if anything.

    Raises:
        OptionsError: it compares tiles with keywords of abnormal tissue, and the list has none (at loading).
    """
    if isinstance(detector, Perceiving) and (known := prompter()):
        return detector.perceiving(partial(_seen_by, known))
    if isinstance(detector, Categorical) and (known := prompter()):
        return detector.on_categories(_columns(known))
    return detector


def _columns(prompter: Prompter) -> dict[str, tuple[int, ...]]:
    """Of each category, where its keywords stand in the vocabulary."""
    columns: dict[str, list[int]] = {}
    for column, keyword in enumerate(prompter.vocabulary):
        columns.setdefault(keyword.category, []).append(column)
    return {category: tuple(found) for category, found in columns.items()}


def prompt(folder: SlideFolder, prompter: Prompter, resources: Resources) -> None:
    """The stage `prompt` of one slide, with progress."""
    prompt_slide(folder, prompter, batch_size=resources.batch_size)
    report(Progress("prompt", folder.slide_id, finished=True))


@dataclass(frozen=True, slots=True)
class _Seen:
    """Tiles as the image-text model of a pipeline sees them."""

    embedder: Embedder
    abnormal: Float32[np.ndarray, "keyword d"]
    nearest: int

    def embed(self, pixels: UInt8[np.ndarray, "tile y x rgb"]) -> Float32[np.ndarray, "tile d"]:
        return self.embedder.embed_tiles(self.embedder.prepare(pixels))

    def abnormality(self, embeddings: Float32[np.ndarray, "tile d"]) -> Float32[np.ndarray, " tile"]:
        ordered = np.sort(similarities(embeddings, self.abnormal), axis=1)
        return np.asarray(ordered[:, -self.nearest :].mean(axis=1, dtype=np.float64), np.float32)


def _seen_by(prompter: Prompter) -> Perception:
    embedder, _ = prompter.load()
    keywords = load_keywords(prompter.options.keywords).abnormal
    if not keywords:
        raise OptionsError(
            f"keyword list '{prompter.options.keywords}': it has no keywords of abnormal tissue, which the detector's "
            "scores compare tiles with. Add a table of them, or choose other scores under [detector]."
        )
    texts = [keyword.text for keyword in keywords]
    vectors = text_side(embedder, texts, prompter.templates, model_digest=prompter.digest).vectors
    return _Seen(embedder, vectors, prompter.options.top_k)


def _image_text_model(options: PromptOptions, resources: Resources) -> tuple[str, ImageTextModel]:
    if "name" not in options.model:
        raise OptionsError("[prompt.model] has no name. Give an image-text model: conch or open_clip")
    name = str(options.model["name"])
    model_class = load_plugin(IMAGE_TEXT_MODELS, name)
    table = {key: value for key, value in options.model.items() if key != "name"}
    model: ImageTextModel = parse_options(model_class, table, where=f"[prompt.model] {name}")
    return name, model.at(resources.image_text_weights) if resources.image_text_weights else model


def _check_same(found: str, wanted: str, name: str) -> None:
    if found != wanted:
        raise ModelError(
            f"image-text model '{name}': its weights are not those that the model was fitted with (sha256 {found[:12]} "
            f"instead of {wanted[:12]}). Give the place of the right ones with --image-text-weights, or fit again."
        )
