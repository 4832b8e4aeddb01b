"""One slide of a cohort, as the user states it. Looks nothing up."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Split = Literal["train", "reference", "test"]
_MPP_RANGE = (0.01, 100.0)
PIXEL_SIZES = "microns per pixel from 0.01 to 100, such as 0.25"


@dataclass(frozen=True, slots=True)
class CohortSlide:
    """One slide of a run and what the user says about it."""

    slide_id: str
    """Its name in the cohort: unique whatever the case of letters, and safe as the name of a folder."""
    path: Path
    mpp: float | None = None
    """Microns per pixel at level 0 that the user states; None leaves it to the file."""
    split: Split | None = None
    annotation: Path | None = None
    mask: Path | None = None
    values: Mapping[str, str] = field(default_factory=dict)
    """What the table says in the columns that a detector looks at; "" where the cell is empty."""


def is_pixel_size(mpp: float) -> bool:
    """Whether a slide may have so many microns per pixel."""
    low, high = _MPP_RANGE
    return math.isfinite(mpp) and low <= mpp <= high
