"""Slides made from nothing: lymph-node tissue with known structures and known anomalies. No model, no real image."""

from wsi_anomaly.synthetic.anomalies import Anomaly, AnomalyKind, Artefact, ArtefactKind, write_annotations
from wsi_anomaly.synthetic.cohort import Cohort, write_cohort, write_slide, write_virtual_slide
from wsi_anomaly.synthetic.pyramid import write_pyramid, write_pyramid_from_tiles
from wsi_anomaly.synthetic.slide import Truth, VirtualSlide, draw_region, draw_slide, tile_with_truth, truth_of
from wsi_anomaly.synthetic.stream import TileKind, synthetic_tiles
from wsi_anomaly.synthetic.vocabulary import captions, keywords_of

__all__ = [
    "Anomaly",
    "AnomalyKind",
    "Artefact",
    "ArtefactKind",
    "Cohort",
    "TileKind",
    "Truth",
    "VirtualSlide",
    "captions",
    "draw_region",
    "draw_slide",
    "keywords_of",
    "synthetic_tiles",
    "tile_with_truth",
    "truth_of",
    "write_annotations",
    "write_cohort",
    "write_pyramid",
    "write_pyramid_from_tiles",
    "write_slide",
    "write_virtual_slide",
]
