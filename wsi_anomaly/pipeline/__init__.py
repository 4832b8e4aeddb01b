"""The wiring of stages: from a pipeline file and slides to a model, and from a model and slides to results."""

from wsi_anomaly.pipeline.fitting import fit
from wsi_anomaly.pipeline.preset import Pipeline, load_pipeline, preset_names
from wsi_anomaly.pipeline.running import RunSummary, pipeline_of, run

__all__ = ["Pipeline", "RunSummary", "fit", "load_pipeline", "pipeline_of", "preset_names", "run"]
