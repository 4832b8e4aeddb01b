"""A folder, files or a CSV -> the slides to work on. Opens no slide."""

from wsi_anomaly.cohort.files import SLIDE_SUFFIXES
from wsi_anomaly.cohort.reading import read_cohort
from wsi_anomaly.cohort.slide import CohortSlide, Split
from wsi_anomaly.cohort.table import COLUMNS

__all__ = ["COLUMNS", "SLIDE_SUFFIXES", "CohortSlide", "Split", "read_cohort"]
