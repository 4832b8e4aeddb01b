"""Faults of a whole run, found before its first slide: a detector that cannot be loaded, or does not give enough."""

from collections.abc import Iterable, Sequence

from wsi_anomaly.cohort import CohortSlide
from wsi_anomaly.detectors.abilities import require_abilities
from wsi_anomaly.errors import WsiAnomalyError
from wsi_anomaly.pipeline.preparing import Preparation, cohort_values, is_prepared
from wsi_anomaly.pipeline.preset import Pipeline
from wsi_anomaly.stages.prompt import Prompter
from wsi_anomaly.stages.score import FittedDetector, ScoreJob
from wsi_anomaly.storage.cohort_values import read_cohort_values
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.record import current_record


def score_job(folder: SlideFolder, detector: FittedDetector, pipeline: Pipeline) -> ScoreJob:
    """What the detector of a pipeline has to do on a slide."""
    return ScoreJob(folder, detector, pipeline.score, pipeline.seed, pipeline.prompt is not None)


def load_for_run(
    slides: Iterable[CohortSlide],
    run: RunFolder,
    detector: FittedDetector,
    pipeline: Pipeline,
    prompter: Prompter | None,
) -> None:
    """Load a detector whose scores of any slide are missing or out of date, and make sure that it gives what is kept.

    Raises:
        ModelError: its weights cannot be used.
        PluginError: it needs a package that is not installed.
        OptionsError: maps or reconstructions are to be kept, and it makes none.
    """
    if not all(_is_done(slide, run.slide(slide.slide_id), detector, pipeline, prompter) for slide in slides):
        _load(detector, pipeline)


def load_for_stage(folders: Sequence[SlideFolder], detector: FittedDetector, pipeline: Pipeline) -> None:
    """The same for tiled slides of which nothing but the scores is made.

    Raises:
        ModelError, PluginError, OptionsError: as `load_for_run`.
    """
    if not all(_is_scored(score_job(folder, detector, pipeline)) for folder in folders):
        _load(detector, pipeline)


def _load(detector: FittedDetector, pipeline: Pipeline) -> None:
    scorer, _ = detector.load()
    kept = pipeline.score
    require_abilities(scorer, detector.name, maps=kept.keep_maps, reconstructions=kept.keep_reconstructions)


def _is_done(
    slide: CohortSlide, folder: SlideFolder, detector: FittedDetector, pipeline: Pipeline, prompter: Prompter | None
) -> bool:
    """Whether the slide has scores, and all that they depend on is as they were made from."""
    preparation = Preparation(slide, folder, ("mask", "tile"), pipeline.tissue, pipeline.tiles, threads=1)
    try:
        return (
            is_prepared(preparation)
            and read_cohort_values(folder.cohort_values) == cohort_values(slide, pipeline)
            and (prompter is None or current_record(folder.root, prompter.recipe(folder)) is not None)
            and _is_scored(score_job(folder, detector, pipeline))
        )
    except WsiAnomalyError:
        return False  # what is wrong with the slide is told when its turn comes


def _is_scored(job: ScoreJob) -> bool:
    try:
        return current_record(job.folder.root, job.recipe) is not None
    except WsiAnomalyError:
        return False
