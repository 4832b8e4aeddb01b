"""One stage alone over many slides, with the same ledger of what went well and what did not."""

from collections.abc import Callable, Sequence

from wsi_anomaly.cohort import CohortSlide
from wsi_anomaly.errors import MissingOutputError
from wsi_anomaly.execution import Listener, Progress, Resources, listening, processes, report
from wsi_anomaly.options import nearest
from wsi_anomaly.pipeline.ledger import Ledger
from wsi_anomaly.pipeline.preparing import Step, prepare_all, process_count
from wsi_anomaly.pipeline.preset import Pipeline
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.lock import locked
from wsi_anomaly.storage.record import find_record, writable
from wsi_anomaly.storage.slide_table import SlideRow

_MOST_NAMED = 6


def prepare_alone(
    step: Step,
    slides: Sequence[CohortSlide],
    run: RunFolder,
    pipeline: Pipeline,
    *,
    resources: Resources,
    listener: Listener,
) -> tuple[SlideRow, ...]:
    """The stage `mask` or `tile` over slides. The slides that failed."""
    with writable(run.root), locked(run.lock), listening(listener):
        ledger = Ledger(run, tuple(slide.slide_id for slide in slides))
        with processes(process_count(slides, resources)) as executor:
            prepared = prepare_all(executor, slides, run, pipeline, resources=resources, steps=(step,))
            for slide, seconds in prepared:
                with ledger.attempt(slide.slide_id):
                    ledger.add_seconds(slide.slide_id, seconds.result())
    return ledger.failed


def apply_alone(
    stage: str, needs: str, run: RunFolder, apply: Callable[[SlideFolder], object], *, listener: Listener
) -> tuple[SlideRow, ...]:
    """A later stage over all slides of a run folder that have what it needs. The slides that failed.

    Raises:
        MissingOutputError: no slide has what the stage needs.
    """
    slides = having(run, needs)
    with writable(run.root), locked(run.lock), listening(listener):
        ledger = Ledger(run, tuple(slide.slide_id for slide in slides))
        for slide in slides:
            with ledger.attempt(slide.slide_id):
                apply(slide)
                report(Progress(stage, slide.slide_id, finished=True))
    return ledger.failed


def having(run: RunFolder, stage: str) -> tuple[SlideFolder, ...]:
    """The slides of a run folder for which a stage has run.

    Raises:
        MissingOutputError: there is none.
    """
    slides = tuple(folder for folder in run.slides() if find_record(folder.root, stage))
    if not slides:
        raise MissingOutputError(f"{run.root}: the stage '{stage}' has run for no slide. {_elsewhere(run, stage)}")
    return slides


def _elsewhere(run: RunFolder, stage: str) -> str:
    """What to do: take one of the folders in it, as `compare` leaves them, or else run the stage."""
    folders = sorted(path for path in run.root.glob("*/") if path.name != "slides") if run.root.is_dir() else []
    having = [path for path in folders if any(find_record(slide.root, stage) for slide in RunFolder(path).slides())]
    if not having:
        return f"See: wsi-anomaly {stage} -h"
    more = ", ..." if len(having) > _MOST_NAMED else ""
    return f"It has in {', '.join(map(str, having[:_MOST_NAMED]))}{more}: give one of these."


def having_slide(run: RunFolder, stage: str, slide_id: str) -> SlideFolder:
    """One slide of a run folder for which a stage has run.

    Raises:
        MissingOutputError: there is no such slide.
    """
    slides = {slide.slide_id: slide for slide in having(run, stage)}
    if slide_id not in slides:
        raise MissingOutputError(
            f"{run.root}: the stage '{stage}' has run for no slide '{slide_id}' ({nearest(slide_id, slides)})"
        )
    return slides[slide_id]
