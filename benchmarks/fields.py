"""Slides of any size for the benchmarks: one field of made-up tissue, repeated."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openslide

from wsi_anomaly.synthetic import write_slide

FIELD_PX = 2048
TILE_PX = 256


def tissue_field(scratch: Path) -> np.ndarray:
    """A square of made-up lymph node without glass."""
    write_slide(scratch / "field.tif", seed=1, size_px=(2 * FIELD_PX, 2 * FIELD_PX))
    with openslide.OpenSlide(scratch / "field.tif") as slide:
        region = slide.read_region((FIELD_PX // 2, FIELD_PX // 2), 0, (FIELD_PX, FIELD_PX))
    return np.asarray(region.convert("RGB"))


def repeated(field: np.ndarray, side_px: int) -> Iterator[np.ndarray]:
    """The tiles of a slide that repeats one field."""
    for row in range(0, side_px, TILE_PX):
        for column in range(0, side_px, TILE_PX):
            y, x = row % FIELD_PX, column % FIELD_PX
            yield field[y : y + min(TILE_PX, side_px - row), x : x + min(TILE_PX, side_px - column)]
