"""`fit`: from normal slides to a model."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from wsi_anomaly.cohort import CohortSlide
from wsi_anomaly.detectors.protocol import Scorer
from wsi_anomaly.errors import CohortError, OutputError
from wsi_anomaly.execution import Listener, Progress, Resources, listening, processes, report
from wsi_anomaly.pipeline.keyword_frequency import frequency_of_training, write_keyword_frequency
from wsi_anomaly.pipeline.ledger import Ledger
from wsi_anomaly.pipeline.preparing import prepare_all, process_count
from wsi_anomaly.pipeline.preset import Pipeline, build_detector_here, require_ready, write_pipeline
from wsi_anomaly.pipeline.prompting import build_prompter, informed, prompt
from wsi_anomaly.pipeline.running import score
from wsi_anomaly.stages.calibrate import Selection, calibrate
from wsi_anomaly.stages.fit import Split, fit_detector, fit_recipe, split_tissue
from wsi_anomaly.stages.prompt import Prompter
from wsi_anomaly.stages.score import FittedDetector
from wsi_anomaly.storage.layout import ModelFolder, RunFolder
from wsi_anomaly.storage.lock import locked
from wsi_anomaly.storage.model import Model, read_manifest, read_model, write_manifest
from wsi_anomaly.storage.record import Recipe, writable
from wsi_anomaly.storage.reference import Reference, Source, write_reference
from wsi_anomaly.storage.slide_table import SlideRow


def fit(
    slides: Sequence[CohortSlide], pipeline: Pipeline, out: Path, *, resources: Resources, listener: Listener
) -> tuple[Model, tuple[SlideRow, ...]]:
    """Learn normal tissue, and measure what scores are normal on tissue held out. The model, and the failed slides.

    Tiles and unfinished weights lie beside the model in `<out>.fit`, from where an interrupted fit goes on.

    Raises:
        CohortError: no slide can be used, or none is left on one side of the split.
        OutputError: `out` holds something else, or cannot be written.
        OptionsError: the detector needs what the pipeline does not make, or what is not installed.
    """
    slides = tuple(slide for slide in slides if slide.split != "test")
    if not slides:
        raise CohortError("every slide of the cohort is marked 'test': there is none to learn from")
    pipeline = pipeline.with_defaults()
    require_ready(pipeline)
    model = ModelFolder(out)
    _check_vacant(model)
    prompter = build_prompter(pipeline.prompt, resources) if pipeline.prompt else None
    shop = model.workshop
    with writable(shop.root), locked(shop.lock), listening(listener):
        ledger = _prepare(slides, shop, pipeline, resources, prompter)
        usable = [shop.slide(slide.slide_id) for slide in slides if ledger.is_well(slide.slide_id)]
        if not usable:
            raise CohortError(f"none of the {len(slides)} slides can be used; the reasons are in {shop.slide_table}")
        wishes = {slide.slide_id: slide.split for slide in slides}
        split = split_tissue(usable, wishes, pipeline.split, seed=pipeline.seed)
        learning = fit_recipe(split, pipeline.detector, seed=pipeline.seed, prompted=prompter is not None)
        recipe = _model_recipe(pipeline, split, learning)
        if not _is_there(model, recipe):
            if prompter:
                write_keyword_frequency(shop, prompter.vocabulary, {"train": frequency_of_training(split)})
            detector = _fit(shop, split, learning, pipeline, prompter=prompter, resources=resources)
            reference = _reference(split, detector, pipeline, resources)
            with writable(out):
                contents = _Contents(pipeline, split, reference, prompter)
                _publish(model, shop, recipe, contents)
    return read_model(out), ledger.failed


def _check_vacant(model: ModelFolder) -> None:
    """Refuse a folder of something else before hours are spent.

    Raises:
        OutputError: there is a folder with files that are no model, or a file.
    """
    root = model.root
    if root.is_file() or (root.is_dir() and any(root.iterdir()) and not model.manifest.exists()):
        raise OutputError(f"{root}: exists and is no model. Choose another name for the model.")


def _is_there(model: ModelFolder, recipe: Recipe) -> bool:
    """Whether this very model has been fitted before.

    Raises:
        OutputError: another model lies there: it may have taken days, so it is not overwritten.
    """
    if not model.manifest.exists():
        return False
    if read_manifest(model).get("recipe_digest") == recipe.digest:
        return True
    raise OutputError(
        f"{model.root}: holds a model of other slides or options. Choose another name, or delete that folder first."
    )


def _prepare(
    slides: Sequence[CohortSlide],
    shop: RunFolder,
    pipeline: Pipeline,
    resources: Resources,
    prompter: Prompter | None,
) -> Ledger:
    ledger = Ledger(shop, tuple(slide.slide_id for slide in slides))
    with processes(process_count(slides, resources)) as executor:
        for slide, prepared in prepare_all(executor, slides, shop, pipeline, resources=resources):
            with ledger.attempt(slide.slide_id):
                ledger.add_seconds(slide.slide_id, prepared.result())
                if prompter:
                    prompt(shop.slide(slide.slide_id), prompter, resources)
    return ledger


def _model_recipe(pipeline: Pipeline, split: Split, learning: Recipe) -> Recipe:
    # What `prompt` holds beside places on this machine is in the digests of the prompts learnt from.
    apart = ("name", "description", "prompt")
    table = {key: value for key, value in pipeline.as_table().items() if key not in apart}
    return Recipe("model", 1, {"pipeline": table, "split": split.as_dict()}, {"fit": learning.digest})


def _fit(
    shop: RunFolder,
    split: Split,
    learning: Recipe,
    pipeline: Pipeline,
    *,
    prompter: Prompter | None,
    resources: Resources,
) -> FittedDetector:
    detector = informed(build_detector_here(pipeline, resources), lambda: prompter)
    record = fit_detector(
        shop,
        split,
        detector,
        learning,
        seed=pipeline.seed,
        device=resources.device,
        prompted=pipeline.prompt is not None,
    )
    report(Progress("fit", "normal tissue", finished=True))

    @cache
    def load() -> tuple[Scorer, tuple[str, ...]]:
        return detector.load(shop.detector, device=resources.device), detector.score_names

    return FittedDetector(pipeline.detector_name, record.digest, pipeline.tiles.tile_px, pipeline.tiles.mpp, load)


def _reference(split: Split, detector: FittedDetector, pipeline: Pipeline, resources: Resources) -> Reference:
    """What the held-out normal tissue scores; nobody looks at maps of it."""
    plain = pipeline.keeping(maps="none", reconstructions="none")
    for part in split.reference:
        score(part.folder, detector, plain, resources)
    source: Source = "held-out normal slides" if split.by == "slides" else "held-out blocks of one normal slide"
    return calibrate([Selection(part.folder, part.tiles) for part in split.reference], source)


@dataclass(frozen=True, slots=True)
class _Contents:
    """What a model holds beside weights."""

    pipeline: Pipeline
    split: Split
    reference: Reference
    prompter: Prompter | None

    @property
    def image_text_model(self) -> dict[str, str] | None:
        """Name and digest."""
        return {"name": self.prompter.model_name, "digest": self.prompter.digest} if self.prompter else None


def _publish(model: ModelFolder, shop: RunFolder, recipe: Recipe, contents: _Contents) -> None:
    """Put the model together under another name and give it its own in one step."""
    partial_model = ModelFolder(model.root.with_name(f"{model.root.name}.partial"))
    shutil.rmtree(partial_model.root, ignore_errors=True)
    shutil.copytree(shop.detector, partial_model.detector)
    write_pipeline(partial_model, contents.pipeline)
    if contents.prompter:
        shutil.copyfile(shop.keyword_table, partial_model.keyword_table)
    write_reference(partial_model.reference, contents.reference)
    partial_model.card.write_text(_card(model.root.name, contents), encoding="utf-8")
    write_manifest(partial_model.root, recipe_digest=recipe.digest, image_text_model=contents.image_text_model)
    if model.root.is_dir():
        model.root.rmdir()  # it is empty: see _check_vacant
    partial_model.root.rename(model.root)


def _card(name: str, contents: _Contents) -> str:
    """The model card: what it is, what it learnt from, what is normal to it."""
    pipeline, reference, tables = contents.pipeline, contents.reference, contents.split.as_dict()
    lines = [
        f"# {name}",
        "",
        f"A model of normal tissue for wsi-anomaly. Detector: `{pipeline.detector_name}`. Pipeline: `{pipeline.name}`.",
        f"Tiles: {pipeline.tiles.tile_px} px at {pipeline.tiles.mpp} µm/px.",
        *_prompt_lines(contents.prompter),
        "",
        "For research. Not a medical device; not for diagnosis.",
        "",
        "## Learnt from",
        "",
        *(f"- {slide_id}: {count} tiles" for slide_id, count in tables["train"].items()),
        *_choice_lines(pipeline.detector, sum(tables["train"].values())),
        "",
        f"## Measured against ({reference.source})",
        "",
        *(f"- {slide_id}: {count} tiles" for slide_id, count in tables["reference"].items()),
        "",
        "| score | mean | deviation | tiles |",
        "|---|---:|---:|---:|",
        *(
            f"| {key} | {value.mean:.6g} | {value.deviation:.6g} | {value.count} |"
            for key, value in reference.scores.items()
        ),
        "",
    ]
    return "\n".join(lines)


def _prompt_lines(prompter: Prompter | None) -> list[str]:
    if prompter is None:
        return []
    options = prompter.options
    line = (
        f"Prompts: {options.top_k} of {len(prompter.vocabulary)} keywords (`keywords.toml`), chosen by "
        f"`{prompter.model_name}` (sha256 {prompter.digest[:12]}), {options.weighting} weights."
    )
    return [line]


def _choice_lines(detector: Mapping[str, Any], count: int) -> list[str]:
    """What a detector leaves out that keeps only so many tiles."""
    most = detector.get("most_tiles") or detector.get("training", {}).get("most_tiles") or count
    return ["", f"Of these {count} the detector keeps {most}, taken evenly from the slides."] if most < count else []
