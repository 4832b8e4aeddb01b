"""Slides made from nothing: lymph-node tissue with known structures and known anomalies. No model, no real image."""

from wsi_anomaly.synthetic.anomalies import Anomaly, AnomalyKind, write_annotations
from wsi_anomaly.synthetic.cohort import Cohort, write_cohort, write_slide
from wsi_anomaly.synthetic.pyramid import write_pyramid, write_pyramid_from_tiles

__all__ = [
    "Anomaly",
    "AnomalyKind",
    "Cohort",
    "write_annotations",
    "write_cohort",
    "write_pyramid",
    "write_pyramid_from_tiles",
    "write_slide",
]
