"""`demo`: make slides, learn from the normal ones, find what was planted in the others."""

from dataclasses import dataclass
from pathlib import Path

from wsi_anomaly.cohort import read_cohort
from wsi_anomaly.execution import Listener, Resources
from wsi_anomaly.pipeline.fitting import fit
from wsi_anomaly.pipeline.preset import load_pipeline
from wsi_anomaly.pipeline.running import RunSummary, run
from wsi_anomaly.stages.evaluate import Evaluation, evaluate
from wsi_anomaly.storage.layout import SlideFolder
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
    slides = write_cohort(out / "slides", seed=0)
    pipeline = load_pipeline("demo")
    normal = read_cohort([slides.normal_slides[0].parent])
    model, _ = fit(normal, pipeline, out / "model", resources=resources, listener=listener)
    tested = read_cohort([slides.test_slides[0].parent])
    summary = run(tested, model, out / "results", resources=resources, listener=listener)
    evaluation = evaluate([summary.folder], labels=slides.labels, annotations=slides.annotations)
    most = max((row for row in summary.rows if row.z_max is not None), key=lambda row: row.z_max or 0.0).slide_id
    paths = {path.stem: path for path in slides.test_slides}
    return Demonstration(
        summary, evaluation, summary.folder.slide(most), paths[most], slides.annotations / f"{most}.geojson"
    )
