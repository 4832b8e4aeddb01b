"""`run`: from a model and slides to heat maps, slide scores and QuPath overlays."""

import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from wsi_anomaly import __version__
from wsi_anomaly.cohort import CohortSlide
from wsi_anomaly.detectors.protocol import Scorer
from wsi_anomaly.errors import CohortError
from wsi_anomaly.execution import Listener, Progress, Resources, listening, processes, report
from wsi_anomaly.options import parse_options
from wsi_anomaly.pipeline.keyword_frequency import frequency_of, read_keyword_frequency, write_keyword_frequency
from wsi_anomaly.pipeline.ledger import Ledger
from wsi_anomaly.pipeline.loading import load_for_run
from wsi_anomaly.pipeline.preparing import prepare_all, process_count
from wsi_anomaly.pipeline.preset import Pipeline, build_detector_here, write_pipeline
from wsi_anomaly.pipeline.prompting import build_prompter, informed, prompt
from wsi_anomaly.stages.calibrate import Selection, calibrate
from wsi_anomaly.stages.export import export_slide, write_importer
from wsi_anomaly.stages.heatmap import map_slide
from wsi_anomaly.stages.prompt import Prompter
from wsi_anomaly.stages.score import FittedDetector, score_slide
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.lock import locked
from wsi_anomaly.storage.model import Model
from wsi_anomaly.storage.record import writable, write_json
from wsi_anomaly.storage.reference import Reference, write_reference
from wsi_anomaly.storage.slide_table import SlideRow

ZFrom = Literal["model", "cohort"]
_VERSIONS = (
    *("numpy", "scipy", "torch", "diffusers", "transformers", "scikit-learn", "pyod", "zuko"),
    *("zarr", "openslide-python", "tiffslide"),
)


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What became of the slides."""

    folder: RunFolder
    rows: tuple[SlideRow, ...]
    failed: tuple[SlideRow, ...]
    """Those of them that could not be finished."""


def run(
    slides: Sequence[CohortSlide],
    model: Model,
    out: Path,
    *,
    resources: Resources,
    listener: Listener,
    z_from: ZFrom = "model",
    pipeline: Pipeline | None = None,
) -> RunSummary:
    """Find what is not normal on slides. Does only what is missing or out of date.

    Slides of a cohort that are meant for fitting (split `train` or `reference`) are left out. With `z_from` "cohort"
    z-scores are measured against all tiles of these very slides, as in the paper, and heat maps come after the last
    slide is scored. `pipeline` takes the place of the model's own where the user keeps more beside the scores.

    Raises:
        CohortError: no slide is left to work on.
        LockedOutputError: another run is writing to `out`.
        OutputError: `out` cannot be written.
        ModelError, PluginError: something is to be scored, and the detector cannot be loaded.
        OptionsError: maps or reconstructions are to be kept, and the detector makes none.
    """
    slides = slides_to_test(slides)
    folder, pipeline = RunFolder(out), pipeline or pipeline_of(model)
    detector = fitted_detector(model, pipeline, resources)
    prompter = model_prompter(model, pipeline, resources)
    with writable(out), locked(folder.lock), listening(listener):
        started = time.time()
        load_for_run(slides, folder, detector, pipeline, prompter)
        write_provenance(folder, model, pipeline, z_from=z_from, started=started)
        ledger = Ledger(folder, tuple(slide.slide_id for slide in slides))
        ledger.write()
        with processes(process_count(slides, resources)) as executor:
            for slide, prepared in prepare_all(executor, slides, folder, pipeline, resources=resources):
                with ledger.attempt(slide.slide_id, last=z_from == "model"):
                    ledger.add_seconds(slide.slide_id, prepared.result())
                    if prompter:
                        prompt(folder.slide(slide.slide_id), prompter, resources)
                    score(folder.slide(slide.slide_id), detector, pipeline, resources)
                    if z_from == "model":
                        finish(folder.slide(slide.slide_id), model.reference, pipeline)
        if z_from == "cohort":
            _finish_against_cohort(folder, ledger, pipeline)
        write_importer(folder)
        if prompter:
            count_keywords(folder, ledger, prompter, model)
        write_provenance(folder, model, pipeline, z_from=z_from, started=started, finished=time.time())
    return RunSummary(folder, tuple(ledger.rows.values()), ledger.failed)


def slides_to_test(slides: Sequence[CohortSlide]) -> tuple[CohortSlide, ...]:
    """Those of a cohort that are not meant for fitting.

    Raises:
        CohortError: there is none.
    """
    tested = tuple(slide for slide in slides if slide.split in (None, "test"))
    if not tested:
        raise CohortError("every slide of the cohort is marked 'train' or 'reference': there is none to test")
    return tested


def pipeline_of(model: Model) -> Pipeline:
    """The pipeline that a model was fitted with."""
    return parse_options(Pipeline, model.pipeline, where=str(model.folder.pipeline)).located(model.folder.root)


def fitted_detector(model: Model, pipeline: Pipeline, resources: Resources) -> FittedDetector:
    """The detector of a model. Its weights are loaded when there is something to score."""

    @cache
    def load() -> tuple[Scorer, tuple[str, ...]]:
        built = build_detector_here(pipeline, resources)
        detector = informed(built, lambda: model_prompter(model, pipeline, resources))
        return detector.load(model.folder.detector, device=resources.device), detector.score_names

    return FittedDetector(
        pipeline.detector_name, model.detector_digest, pipeline.tiles.tile_px, pipeline.tiles.mpp, load
    )


def model_prompter(model: Model, pipeline: Pipeline, resources: Resources) -> Prompter | None:
    """What describes tiles as they were described when the model was fitted; None for a model without prompts."""
    if pipeline.prompt is None:
        return None
    return build_prompter(pipeline.prompt, resources, fitted_with=model.image_text_digest)


def score(folder: SlideFolder, detector: FittedDetector, pipeline: Pipeline, resources: Resources) -> None:
    """The stage `score` of one slide, with progress."""
    score_slide(
        folder,
        detector,
        pipeline.score,
        seed=pipeline.seed,
        batch_size=resources.batch_size,
        prompted=pipeline.prompt is not None,
    )
    report(Progress("score", folder.slide_id, finished=True))


def finish(folder: SlideFolder, reference: Reference, pipeline: Pipeline) -> None:
    """The stages `heatmap` and `export` of one slide."""
    map_slide(folder, reference, pipeline.heatmap)
    report(Progress("heatmap", folder.slide_id, finished=True))
    export_slide(folder)
    report(Progress("export", folder.slide_id, finished=True))


def count_keywords(folder: RunFolder, ledger: Ledger, prompter: Prompter, model: Model) -> None:
    """Write how many tiles have each keyword in their prompt, in training and in the slides that went well."""
    well = [folder.slide(slide_id) for slide_id in ledger.rows if ledger.is_well(slide_id)]
    trained = read_keyword_frequency(model.folder.keyword_table)
    write_keyword_frequency(folder, prompter.vocabulary, trained | {"test": frequency_of(well)})


def _finish_against_cohort(folder: RunFolder, ledger: Ledger, pipeline: Pipeline) -> None:
    scored = [folder.slide(slide_id) for slide_id in ledger.rows if ledger.is_well(slide_id)]
    if not scored:
        return
    reference = calibrate([Selection(slide) for slide in scored], "the cohort under test")
    write_reference(folder.reference, reference)
    for slide in scored:
        with ledger.attempt(slide.slide_id):
            finish(slide, reference, pipeline)


def write_provenance(
    folder: RunFolder, model: Model, pipeline: Pipeline, *, z_from: ZFrom, started: float, finished: float | None = None
) -> None:
    """Write what made the results: `run.json` and `pipeline.toml`; `started` and `finished` in seconds since 1970."""
    write_pipeline(folder, pipeline)
    write_json(
        folder.run,
        {
            "package_version": __version__,
            "model": {"name": model.folder.root.name, "digest": model.digest},
            "z_from": z_from,
            "reference": "the cohort under test" if z_from == "cohort" else model.reference.source,
            "options": pipeline.as_table(),
            "command": [Path(argument).name for argument in sys.argv],  # folders may be named after patients
            "host": platform.node(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in _VERSIONS},
            "started": _iso(started),
            "finished": _iso(finished) if finished else None,
            "seconds": round(finished - started, 3) if finished else None,
        },
    )


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
