"""Choose the level to read for a wanted mpp. Pure arithmetic: knows levels and mpp, opens nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from wsi_anomaly.errors import SlideError

ReaderName = Literal["openslide", "tiffslide"]

# Scanners write mpp with three or four digits, and level sizes are rounded: closer than this is equal.
_MPP_TOLERANCE = 1e-3
# Pixels that the bicubic filter needs on each side, in units of the coarser of its two grids.
_BICUBIC_SUPPORT = 2.0


@dataclass(frozen=True, slots=True)
class ReadRecipe:
    """How pixels at a wanted mpp are made from a level: recorded beside them."""

    mpp: float
    level: int
    level_mpp: tuple[float, float]
    level_downsample: float
    resampling: Literal["none", "bicubic antialiased"]
    reader: ReaderName

    @property
    def scale(self) -> tuple[float, float]:
        """Level pixels that one pixel read covers, (x, y): exactly 1 where nothing is resampled."""
        if self.resampling == "none":
            return (1.0, 1.0)
        return (self.mpp / self.level_mpp[0], self.mpp / self.level_mpp[1])

    @property
    def downsample(self) -> tuple[float, float]:
        """Level-0 pixels that one pixel read covers, (x, y): tiles that touch lie their size times this apart."""
        return (self.scale[0] * self.level_downsample, self.scale[1] * self.level_downsample)

    @property
    def margin_px(self) -> int:
        """Level pixels to read around a region, so that the filter sees the same neighbours on both sides of a seam."""
        if self.resampling == "none":
            return 0
        # One pixel more because OpenSlide reads start up to half a pixel beside the wanted level pixel.
        return math.ceil(_BICUBIC_SUPPORT * max(1.0, *self.scale)) + 1


def true_downsamples(dimensions: Sequence[tuple[int, int]], stated_downsamples: Sequence[float]) -> tuple[float, ...]:
    """The downsample of each level: a whole number where its size fits one to within a pixel, else what is stated.

    Scanners shrink by whole numbers and then round the size. Readers divide the rounded sizes, which puts what lies at
    the far end of a level up to a pixel beside its place.
    """
    width, height = dimensions[0]
    found = []
    for (level_width, level_height), stated in zip(dimensions, stated_downsamples, strict=True):
        whole = max(1, round(stated))
        fits = abs(width - whole * level_width) < whole and abs(height - whole * level_height) < whole
        found.append(float(whole) if fits else stated)
    return tuple(found)


def choose_recipe(
    mpp: float,
    *,
    slide_mpp: tuple[float, float],
    downsamples: Sequence[float],
    max_upsampling: float,
    reader: ReaderName,
    name: str,
) -> ReadRecipe:
    """The recipe that reads the coarsest level which is not coarser than `mpp`.

    Raises:
        SlideError: `mpp` is not a positive number, or even level 0 of the slide called `name` is more than
            `max_upsampling` times coarser.
    """
    if not (math.isfinite(mpp) and mpp > 0):
        raise SlideError(f"{name}: cannot be read at {mpp} µm/px. Ask for a positive number.")
    limit = mpp * (1 + _MPP_TOLERANCE)
    fine = [level for level, downsample in enumerate(downsamples) if max(slide_mpp) * downsample <= limit]
    level = max(fine, key=lambda candidate: downsamples[candidate], default=0)
    level_mpp = (slide_mpp[0] * downsamples[level], slide_mpp[1] * downsamples[level])
    if max(level_mpp) > mpp * max_upsampling:
        raise SlideError(
            f"{name}: its finest level has {max(level_mpp):.4g} µm/px, too coarse for the {mpp:.4g} µm/px asked for. "
            "Leave the slide out, work at a coarser mpp, or allow it: max_upsampling in [tiles] of the pipeline file."
        )
    equal = all(math.isclose(axis_mpp, mpp, rel_tol=_MPP_TOLERANCE) for axis_mpp in level_mpp)
    return ReadRecipe(
        mpp=mpp,
        level=level,
        level_mpp=level_mpp,
        level_downsample=downsamples[level],
        resampling="none" if equal else "bicubic antialiased",
        reader=reader,
    )
