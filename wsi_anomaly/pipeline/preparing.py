"""The first steps of every slide, `mask` and `tile`, in as many processes and threads as may be used."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass
from functools import partial
from typing import Literal

from wsi_anomaly.cohort import CohortSlide
from wsi_anomaly.errors import SlideError, WsiAnomalyError
from wsi_anomaly.execution import Progress, Resources, SerialExecutor, in_order, report
from wsi_anomaly.imaging.tissue import TissueOptions
from wsi_anomaly.pipeline.preset import Pipeline
from wsi_anomaly.stages.mask import mask_is_current, mask_slide
from wsi_anomaly.stages.tile import TileOptions, tile_slide, tiles_are_current
from wsi_anomaly.storage.cohort_values import write_cohort_values
from wsi_anomaly.storage.layout import RunFolder, SlideFolder

Step = Literal["mask", "tile"]


@dataclass(frozen=True, slots=True)
class Preparation:
    """What another process needs to know to prepare a slide."""

    slide: CohortSlide
    folder: SlideFolder
    steps: tuple[Step, ...]
    tissue: TissueOptions
    tiles: TileOptions
    threads: int


def process_count(slides: Sequence[CohortSlide], resources: Resources) -> int:
    """One process a slide, up to the cores; a single slide is read by threads of this process."""
    return max(1, min(resources.cores, len(slides)))


def prepare_all(
    executor: Executor,
    slides: Sequence[CohortSlide],
    run: RunFolder,
    pipeline: Pipeline,
    *,
    resources: Resources,
    steps: tuple[Step, ...] = ("mask", "tile"),
) -> Iterator[tuple[CohortSlide, Future[float]]]:
    """The seconds that each slide took, in order, while the next ones are being prepared."""
    count = process_count(slides, resources)
    threads = max(1, resources.cores // count)
    for slide in slides:
        keep_cohort_values(slide, run.slide(slide.slide_id), pipeline)
    preparations = [
        Preparation(slide, run.slide(slide.slide_id), steps, pipeline.tissue, pipeline.tiles, threads)
        for slide in slides
    ]
    # Run serially, a slide is prepared when its turn comes; otherwise the processes stay busy and a little ahead.
    ahead = 0 if isinstance(executor, SerialExecutor) else count + 1
    for preparation, future in in_order(partial(_submit, executor), preparations, ahead=ahead):
        if isinstance(future.exception(), BrokenExecutor):
            # A process died, and took with it the slides that waited: only one of them is to blame.
            yield preparation.slide, _alone(executor, preparation)
        else:
            yield preparation.slide, future


def keep_cohort_values(slide: CohortSlide, folder: SlideFolder, pipeline: Pipeline) -> None:
    """Keep what the cohort's table says of a slide in the columns that the pipeline's detector looks at."""
    write_cohort_values(folder.cohort_values, cohort_values(slide, pipeline))


def cohort_values(slide: CohortSlide, pipeline: Pipeline) -> dict[str, str]:
    """What the cohort's table says of a slide in those columns."""
    return {name: slide.values.get(name, "") for name in pipeline.cohort_columns}


def _alone(executor: Executor, preparation: Preparation) -> Future[float]:
    """A second try, while no other slide is being prepared."""
    future = executor.submit(prepare, preparation)
    if isinstance(future.exception(), BrokenExecutor):
        future = Future()
        future.set_exception(
            SlideError(
                f"{preparation.slide.slide_id}: the process that read it died twice: too little memory, or the file "
                "crashes the slide library. Use fewer --workers, or convert the slide to OME-TIFF."
            )
        )
    return future


def _submit(executor: Executor, preparation: Preparation) -> Future[float]:
    """To another process only if there is something to do: starting one takes longer than finding that out."""
    if is_prepared(preparation):
        return SerialExecutor().submit(prepare, preparation)
    return executor.submit(prepare, preparation)


def is_prepared(preparation: Preparation) -> bool:
    """Whether `prepare` would have nothing to do."""
    slide, folder = preparation.slide, preparation.folder
    try:
        masked = "mask" not in preparation.steps or mask_is_current(slide, folder, preparation.tissue)
        return masked and ("tile" not in preparation.steps or tiles_are_current(folder, preparation.tiles))
    except WsiAnomalyError:
        return False  # what is wrong is told when the slide's turn comes


def prepare(preparation: Preparation) -> float:
    """Mask and tile one slide; the seconds it took."""
    started = time.monotonic()
    slide, folder = preparation.slide, preparation.folder
    if "mask" in preparation.steps:
        mask_slide(slide, folder, preparation.tissue)
        report(Progress("mask", slide.slide_id, finished=True))
    if "tile" in preparation.steps:
        tile_slide(slide, folder, preparation.tiles, threads=preparation.threads)
        report(Progress("tile", slide.slide_id, finished=True))
    return time.monotonic() - started
