"""Read whole-slide images as RGB at an exact mpp. Knows formats, levels and damage; knows no run folder."""

from wsi_anomaly.slides.identity import fingerprint
from wsi_anomaly.slides.recipe import ReadRecipe
from wsi_anomaly.slides.slide import Slide

__all__ = ["ReadRecipe", "Slide", "fingerprint"]
