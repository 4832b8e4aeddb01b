"""`demo`: make three slides, and let the model that comes with the package find what was planted in two of them."""

from dataclasses import dataclass
from pathlib import Path

from wsi_anomaly.cohort import read_cohort
from wsi_anomaly.execution import Listener, Resources
from wsi_anomaly.pipeline.describing import explain_prompts
from wsi_anomaly.pipeline.explaining import explain_scores
from wsi_anomaly.pipeline.running import RunSummary, fitted_detector, pipeline_of, run
from wsi_anomaly.shipped import model_place
from wsi_anomaly.stages.evaluate import Evaluation, evaluate
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.model import read_model
from wsi_anomaly.storage.reference import read_reference
from wsi_anomaly.synthetic import write_cohort


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What the demo found, and where to look."""

    summary: RunSummary
    evaluation: Evaluation
    most_abnormal: SlideFolder
    slide: Path
    truth: Path


def demonstrate(out: Path, *, resources: Resources, listener: Listener) -> Demonstration:
    """The whole way on made-up slides, in the folder `out`. A second call does only what is missing."""
    slides = write_cohort(
        out / "slides", size_px=_SIZE_PX, normal_slides=0, normal_test_slides=1, abnormal_test_slides=2, varied=True
    )
    model = read_model(model_place(None))
    tested = read_cohort([slides.test_slides[0].parent])
    # Against these very slides, which are mostly normal: made-up tissue varies less than the real one of the reference.
    summary = run(tested, model, out / "results", resources=resources, listener=listener, z_from="cohort")
    evaluation = evaluate([summary.folder], labels=slides.labels, annotations=slides.annotations)
    pipeline, reference = pipeline_of(model), read_reference(summary.folder.reference)
    detector = fitted_detector(model, pipeline, resources)
    for row in summary.rows:
        slide = summary.folder.slide(row.slide_id)
        explain_prompts(slide)
        explain_scores(slide, detector, reference, pipeline)
    most = max((row for row in summary.rows if row.z_max is not None), key=lambda row: row.z_max or 0.0).slide_id
    paths = {path.stem: path for path in slides.test_slides}
    return Demonstration(
        summary, evaluation, summary.folder.slide(most), paths[most], slides.annotations / f"{most}.geojson"
    )


_SIZE_PX = 3072, 3072
"""Seventy tiles of tissue a slide: a few minutes on two cores for all three."""
