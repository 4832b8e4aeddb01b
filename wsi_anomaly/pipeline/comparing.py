"""`compare`: several models on the same slides. Each tile is read once for all; results lie side by side."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from wsi_anomaly.cohort import CohortSlide
from wsi_anomaly.detectors.protocol import Based
from wsi_anomaly.errors import ModelError, OptionsError, PluginError
from wsi_anomaly.execution import Listener, Progress, Resources, listening, processes, report
from wsi_anomaly.pipeline.ledger import Ledger
from wsi_anomaly.pipeline.loading import load_for_run, score_job
from wsi_anomaly.pipeline.preparing import Preparation, is_prepared, keep_cohort_values, prepare_all, process_count
from wsi_anomaly.pipeline.preset import Pipeline, build_detector
from wsi_anomaly.pipeline.prompting import prompt
from wsi_anomaly.pipeline.running import (
    RunSummary,
    count_keywords,
    finish,
    fitted_detector,
    model_prompter,
    pipeline_of,
    slides_to_test,
    write_provenance,
)
from wsi_anomaly.stages.export import write_importer
from wsi_anomaly.stages.prompt import Prompter
from wsi_anomaly.stages.score import FittedDetector, ScoreJob, score_together
from wsi_anomaly.storage.layout import ModelFolder, RunFolder, SlideFolder
from wsi_anomaly.storage.lock import locked
from wsi_anomaly.storage.model import Model
from wsi_anomaly.storage.record import current_record, writable
from wsi_anomaly.storage.sharing import share_output


def compare(
    slides: Sequence[CohortSlide], models: Sequence[Model], out: Path, *, resources: Resources, listener: Listener
) -> tuple[RunSummary, ...]:
    """Find what is not normal on slides with each model: in `out`, one folder of results a model, named after it.

    Each folder is what `run` with that model leaves, scores to the byte, but tiles are read from the slides once and
    lie on disk once. Does only what is missing or out of date, and takes tiles and prompts from whichever of the
    folders has them. All models are in memory at the same time. Where one model fails on a slide, the others go on.

    Raises:
        CohortError: no slide is left to work on.
        OptionsError: a model is given twice or has other tiles or tissue than the first, or models lie in `out`.
        ModelError, PluginError, OptionsError: a model cannot be loaded, or does not give what is to be kept.
        LockedOutputError: another process is writing one of the folders.
        OutputError: `out` cannot be written.
    """
    slides = slides_to_test(slides)
    entries = _entries(models, out, resources)
    _require_same_tiles(entries)
    with contextlib.ExitStack() as stack:
        stack.enter_context(writable(out))
        for entry in entries:
            stack.enter_context(locked(entry.folder.lock))
        stack.enter_context(listening(listener))
        started = time.time()
        for entry in entries:
            _load(entry, slides)
        contenders = [_start(entry, slides, len(entries), started) for entry in entries]
        _work(slides, contenders, resources)
        for contender in contenders:
            _leave(contender, started)
    return tuple(RunSummary(one.entry.folder, tuple(one.ledger.rows.values()), one.ledger.failed) for one in contenders)


def result_names(models: Sequence[Path]) -> tuple[str, ...]:
    """What the models' results are called: like their folders, with the folders above where two have the same name.

    Raises:
        OptionsError: a model is given twice.
    """
    roots = [model.resolve() for model in models]
    if twice := next((model for model, root in zip(models, roots, strict=True) if roots.count(root) > 1), None):
        raise OptionsError(f"{twice}: given twice. Name each model once.")
    known = Counter(root.name.casefold() for root in roots)  # some disks take a and A for the same
    for depth in range(1, max(len(root.parts) for root in roots)):
        depths = [depth if known[root.name.casefold()] > 1 else 1 for root in roots]
        names = ["-".join(root.parts[1:][-own:]) for root, own in zip(roots, depths, strict=True)]
        if len({name.casefold() for name in names}) == len(names):
            return tuple(names)
    raise OptionsError("the models' folders cannot be told apart by their names. Rename one of them.")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A model, and where its results go."""

    model: Model
    pipeline: Pipeline
    detector: FittedDetector
    prompter: Prompter | None
    folder: RunFolder


@dataclass(frozen=True, slots=True)
class _Contender:
    """A model at work."""

    entry: _Entry
    ledger: Ledger

    def slide(self, slide_id: str) -> SlideFolder:
        """Its results on a slide."""
        return self.entry.folder.slide(slide_id)

    def job(self, slide_id: str) -> ScoreJob:
        """What its detector has to do."""
        return score_job(self.slide(slide_id), self.entry.detector, self.entry.pipeline)


def _entries(models: Sequence[Model], out: Path, resources: Resources) -> list[_Entry]:
    if not models:
        raise OptionsError("there is no model to compare. Give --models once for each.")
    entries = []
    for name, model in zip(result_names([model.folder.root for model in models]), models, strict=True):
        folder = RunFolder(out / name)
        pipeline = pipeline_of(model)
        if ModelFolder(folder.root).manifest.exists():
            raise OptionsError(f"{folder.root}: is a model, no place for results. Choose another --out.")
        detector = fitted_detector(model, pipeline, _resources_of(pipeline, resources))
        entries.append(_Entry(model, pipeline, detector, model_prompter(model, pipeline, resources), folder))
    return entries


def _resources_of(pipeline: Pipeline, resources: Resources) -> Resources:
    """The place of a base model is no business of detectors that have none."""
    if not resources.base_weights or isinstance(build_detector(pipeline), Based):
        return resources
    return replace(resources, base_weights="")


def _require_same_tiles(entries: Sequence[_Entry]) -> None:
    """Only what was found on the same tiles can be compared tile by tile."""
    first, *others = (entry.pipeline.as_table() for entry in entries)
    for entry, table in zip(entries[1:], others, strict=True):
        faults = list(chain(*(_differences(name, table[name], first[name]) for name in ("tissue", "tiles"))))
        if faults:
            raise OptionsError(
                f"{entry.folder.root.name}: its tiles are not those of {entries[0].folder.root.name}: "
                f"{'; '.join(faults)}. Compare models that were fitted with the same [tissue] and [tiles]."
            )


def _differences(table: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for key, value in found.items():
        if value != wanted[key]:
            yield f"[{table}] {key} is {value} instead of {wanted[key]}"


def _load(entry: _Entry, slides: Sequence[CohortSlide]) -> None:
    """Before anything is done with any model: one that cannot take part is named."""
    try:
        load_for_run(slides, entry.folder, entry.detector, entry.pipeline, entry.prompter)
    except (ModelError, PluginError, OptionsError) as error:
        raise type(error)(f"{entry.folder.root.name}: {error}") from error


def _start(entry: _Entry, slides: Sequence[CohortSlide], count: int, started: float) -> _Contender:
    write_provenance(entry.folder, entry.model, entry.pipeline, z_from="model", started=started)
    called = entry.folder.root.name if count > 1 else ""
    ledger = Ledger(entry.folder, tuple(slide.slide_id for slide in slides), called=called)
    ledger.write()
    return _Contender(entry, ledger)


def _leave(contender: _Contender, started: float) -> None:
    entry = contender.entry
    write_importer(entry.folder)
    if entry.prompter:
        count_keywords(entry.folder, contender.ledger, entry.prompter, entry.model)
    write_provenance(entry.folder, entry.model, entry.pipeline, z_from="model", started=started, finished=time.time())


def _work(slides: Sequence[CohortSlide], contenders: Sequence[_Contender], resources: Resources) -> None:
    """Slide by slide. The first model's folder is where slides are read to."""
    first = contenders[0]
    for slide in slides:
        for contender in contenders:
            keep_cohort_values(slide, contender.slide(slide.slide_id), contender.entry.pipeline)
        with first.ledger.attempt(slide.slide_id, last=False):
            _take_tiles_of_others(slide, contenders)
    with processes(process_count(slides, resources)) as executor:
        prepared_slides = prepare_all(executor, slides, first.entry.folder, first.entry.pipeline, resources=resources)
        for slide, prepared in prepared_slides:
            for contender in contenders:
                with contender.ledger.attempt(slide.slide_id, last=False):
                    contender.ledger.add_seconds(slide.slide_id, prepared.result())
                    _get_ready(contender, contenders, slide.slide_id, resources)
            _score(slide.slide_id, contenders, resources)


def _take_tiles_of_others(slide: CohortSlide, contenders: Sequence[_Contender]) -> None:
    """From an earlier comparison in another order, or from a `run` of one of the models."""

    def has_tiles(contender: _Contender) -> bool:
        pipeline = contender.entry.pipeline
        folder = contender.slide(slide.slide_id)
        return is_prepared(Preparation(slide, folder, ("mask", "tile"), pipeline.tissue, pipeline.tiles, threads=1))

    having = next((contender for contender in contenders if has_tiles(contender)), None)
    if having is not None:
        _share(("mask", "tile"), having.slide(slide.slide_id), contenders[0].slide(slide.slide_id))


def _get_ready(contender: _Contender, contenders: Sequence[_Contender], slide_id: str, resources: Resources) -> None:
    """Tiles, and prompts where the model uses them: those of another model where it asks for the same."""
    folder = contender.slide(slide_id)
    _share(("mask", "tile"), contenders[0].slide(slide_id), folder)
    prompter = contender.entry.prompter
    if prompter is None:
        return
    recipe = prompter.recipe(folder)
    folders = (one.slide(slide_id) for one in contenders)
    described = next((one for one in folders if current_record(one.root, recipe)), None)
    if described is None:
        prompt(folder, prompter, resources)
    else:
        _share(("prompt",), described, folder)


def _share(stages: tuple[str, ...], source: SlideFolder, target: SlideFolder) -> None:
    if source != target:
        for stage in stages:
            share_output(stage, source.root, target.root)


def _score(slide_id: str, contenders: Sequence[_Contender], resources: Resources) -> None:
    """With all models at once; what is left, one model after another."""
    ready = [contender for contender in contenders if contender.ledger.is_well(slide_id)]
    jobs = [contender.job(slide_id) for contender in ready]
    scored: tuple[Future[float], ...] = score_together(jobs, batch_size=resources.batch_size)
    report(Progress("score", slide_id, finished=True))
    for contender, done in zip(ready, scored, strict=True):
        with contender.ledger.attempt(slide_id):
            contender.ledger.add_seconds(slide_id, done.result())
            finish(contender.slide(slide_id), contender.entry.model.reference, contender.entry.pipeline)
