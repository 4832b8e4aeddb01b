"""Which reference and options the stage `heatmap` uses when it runs alone."""

from dataclasses import dataclass
from pathlib import Path

from wsi_anomaly.errors import OptionsError
from wsi_anomaly.pipeline.preset import load_pipeline
from wsi_anomaly.pipeline.running import ZFrom, pipeline_of
from wsi_anomaly.pipeline.single import having
from wsi_anomaly.stages.calibrate import Selection, calibrate
from wsi_anomaly.stages.heatmap import HeatmapOptions
from wsi_anomaly.storage.layout import RunFolder
from wsi_anomaly.storage.model import Model, read_model
from wsi_anomaly.storage.reference import Reference, read_reference, write_reference


@dataclass(frozen=True, slots=True)
class Choice:
    """What z-scores are measured against, and how heat maps are read."""

    reference: Reference
    options: HeatmapOptions


def choose_reference(
    run: RunFolder, *, model: Path | None, reference: Path | None, z_from: ZFrom, pipeline: str | None
) -> Choice:
    """The user's reference file, the cohort's own statistics, or the model's reference; options of the model if given.

    Raises:
        OptionsError: nothing says what to measure against.
    """
    fitted = read_model(model) if model else None
    options = _options(fitted, pipeline)
    if z_from == "cohort":
        of_cohort = calibrate([Selection(slide) for slide in having(run, "score")], "the cohort under test")
        write_reference(run.reference, of_cohort)
        return Choice(of_cohort, options)
    if reference:
        return Choice(read_reference(reference), options)
    if fitted:
        return Choice(fitted.reference, options)
    raise OptionsError(
        "heatmap: z-scores need something to measure against. Give --model, --reference or --z-from cohort"
    )


def _options(model: Model | None, pipeline: str | None) -> HeatmapOptions:
    """What the user names comes before what the model was fitted with."""
    if pipeline:
        return load_pipeline(pipeline).heatmap
    return pipeline_of(model).heatmap if model else HeatmapOptions()
