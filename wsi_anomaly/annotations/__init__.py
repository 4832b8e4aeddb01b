"""What people say of slides: masks, outlines and labels, matched to the slides of a run. Opens no slide.

The caller, who has the slide open, says how large it is and where its bounds lie. Messages name the file alone.
"""

from wsi_anomaly.annotations.abnormal_mask import AbnormalMask
from wsi_anomaly.annotations.annotation import Annotation, abnormal_fraction, read_annotation
from wsi_anomaly.annotations.coverage import area_fractions
from wsi_anomaly.annotations.frame import Frame
from wsi_anomaly.annotations.geojson import read_outlines
from wsi_anomaly.annotations.groups import GROUPS, Meaning, parse_groups
from wsi_anomaly.annotations.labels import LABELS, SlideLabel, read_slide_groups, read_slide_labels
from wsi_anomaly.annotations.lesions import Lesions, lesions_of
from wsi_anomaly.annotations.masks import read_mask
from wsi_anomaly.annotations.matching import Matched, find_annotations
from wsi_anomaly.annotations.outlines import Outline, rasterise

__all__ = [
    "GROUPS",
    "LABELS",
    "AbnormalMask",
    "Annotation",
    "Frame",
    "Lesions",
    "Matched",
    "Meaning",
    "Outline",
    "SlideLabel",
    "abnormal_fraction",
    "area_fractions",
    "find_annotations",
    "lesions_of",
    "parse_groups",
    "rasterise",
    "read_annotation",
    "read_mask",
    "read_outlines",
    "read_slide_groups",
    "read_slide_labels",
]
