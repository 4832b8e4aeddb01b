"""Mask pictures of what is abnormal -> the share of each tile that they mark. Never holds a large level whole."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import shapely
from jaxtyping import Bool, Float64, Int64, Real

from wsi_anomaly.annotations.frame import Frame, shown_region, whole_downsample
from wsi_anomaly.annotations.outlines import Outline
from wsi_anomaly.annotations.pictures import Box, Level, opened_levels
from wsi_anomaly.errors import AnnotationError
from wsi_anomaly.imaging.geometry import area_fraction

JPEG_THRESHOLD = 127
"""Of a mask stored as JPEG, whose numbers are blurred, what is above this is abnormal."""
_LEVEL_PX_PER_TILE = 16
_BAND_ROWS = 512
"""Read at once where a level is read whole: tiles of masks are as high or half as high."""
_BAND_PX = 2**21  # fits into the cache of a processor: three times faster than larger ones

Numbers: TypeAlias = Real[np.ndarray, "row column"]


@dataclass(frozen=True, slots=True)
class AbnormalMask:
    """A picture of a slide in which some numbers mean abnormal. The file stays where it is until it is asked."""

    path: Path
    origin_level0_px: tuple[int, int]
    """What the top left corner of the picture shows."""
    downsamples: tuple[tuple[float, float] | None, ...]
    """Of each page along x and y; None where a page is no level of the pyramid."""
    abnormal_values: frozenset[int] | None
    """None: the one number besides 0."""
    report: tuple[str, ...]
    """What the user should know of it, each with the name of the file."""

    def fractions(self, boxes: Real[np.ndarray, "tile 4"]) -> Float64[np.ndarray, " tile"]:
        """The share of each box (x0, y0, x1, y1 in level-0 pixels) that is abnormal: exact at the level that is read.

        That is the coarsest on which the smallest box is 16 pixels wide and high, else the finest.

        Raises:
            AnnotationError: the picture is damaged, or holds several numbers besides 0 and nobody said which count.
        """
        shares = np.zeros(len(boxes), np.float64)
        found: set[float] = set()
        if not len(boxes):
            return shares
        with opened_levels(self.path) as levels:
            page, downsample = self._level_of(float((boxes[:, 2:] - boxes[:, :2]).min()) / _LEVEL_PX_PER_TILE)
            level = levels[page]
            in_level = (boxes - np.array(self.origin_level0_px * 2)) / np.array(downsample * 2)
            for band, (x0, y0, x1, y1) in _bands(in_level, level.size_px):
                abnormal = self._abnormal(level.read((x0, y0, x1, y1)), found, lossy=level.lossy)
                if abnormal.any():
                    shares[band] = area_fraction(abnormal, in_level[band] - np.array([x0, y0, x0, y0]))
        self._refuse_several(found)
        return shares

    def outlines(self, pixel_level0_px: float) -> tuple[Outline, ...]:
        """Outlines of what is abnormal, of pixels of about this size and not larger: any abnormal one in it counts.

        They are those of the coarsest level that is not coarser, else of the finest.

        Raises:
            AnnotationError: as `fractions`.
        """
        found: set[float] = set()
        boxes = []
        with opened_levels(self.path) as levels:
            page, downsample = self._level_of(pixel_level0_px)
            level = levels[page]
            whole = max(1, int(pixel_level0_px / max(downsample)))
            width, height = level.size_px
            rows = whole * max(1, _BAND_ROWS // whole)
            for top in range(0, height, rows):
                numbers = level.read((0, top, width, min(height, top + rows)))
                abnormal = _shrunk(self._abnormal(numbers, found, lossy=level.lossy), whole)
                boxes.append(np.minimum(_runs(abnormal) * whole + [0, top, 0, top], [width, height] * 2))
        self._refuse_several(found)
        if not any(map(len, boxes)):
            return ()
        corners = np.concatenate(boxes) * np.tile(downsample, 2) + np.tile(self.origin_level0_px, 2)
        return tuple(Outline(part, "") for part in shapely.get_parts(shapely.union_all(shapely.box(*corners.T))))

    def _level_of(self, pixel_level0_px: float) -> tuple[int, tuple[float, float]]:
        """The coarsest level whose pixels are not larger, else the finest, and its downsample."""
        levels = [(page, downsample) for page, downsample in enumerate(self.downsamples) if downsample]
        fine = [level for level in levels if max(level[1]) <= pixel_level0_px]
        return max(fine, key=lambda level: level[1]) if fine else min(levels, key=lambda level: level[1])

    def _abnormal(self, numbers: Numbers, found: set[float], *, lossy: bool) -> Bool[np.ndarray, "row column"]:
        if lossy:
            return np.asarray((numbers if numbers.dtype == np.uint8 else _brightest(numbers)) > JPEG_THRESHOLD)
        if self.abnormal_values is not None:
            return np.isin(numbers, list(self.abnormal_values))
        found |= _distinct(numbers)
        return np.asarray(numbers > 0)

    def _refuse_several(self, found: set[float]) -> None:
        if len(found) > 1:
            some = ", ".join(f"{number:.12g}" for number in sorted(found)[:5]) + (", ..." if len(found) > 5 else "")  # noqa: PLR2004
            raise AnnotationError(
                f"{self.path.name}: holds the numbers {some} besides 0; say which of them mean abnormal "
                "(such as --mask-values 2), or save it with 0 and 1. Masks of Camelyon hold 1 and 2, in either order"
            )


def read_abnormal_mask(path: Path, *, frame: Frame, abnormal_values: Collection[int] | None = None) -> AbnormalMask:
    """The mask in a PNG, TIFF (of one level or a pyramid) or JPEG of all of level 0 or of the slide's bounds.

    Abnormal are pixels with one of the `abnormal_values` (of a colour picture: 0xRRGGBB); without any, those above 0,
    if there is one number besides 0; of a JPEG those above 127. Pixels are not read yet.

    Raises:
        AnnotationError: the picture cannot be read, or has other proportions than level 0 and bounds.
    """
    with opened_levels(path) as levels:
        first = levels[0]
        region, downsample = _placed(path.name, first, frame)
        report = []
        if first.lossy:
            if abnormal_values is not None:
                raise AnnotationError(
                    f"{path.name}: JPEG blurs numbers; save the mask as PNG, or leave out the numbers"
                )
            report.append(f"{path.name}: stored as JPEG; what is above {JPEG_THRESHOLD} counts as abnormal")
        if region != frame.whole:
            report.append(f"{path.name}: has the proportions of the slide's bounds and is taken to show them")
        return AbnormalMask(
            path=path,
            origin_level0_px=region[:2],
            downsamples=tuple(_downsample(level, first, downsample) for level in levels),
            abnormal_values=None if abnormal_values is None else frozenset(abnormal_values),
            report=tuple(report),
        )


def _placed(name: str, level: Level, frame: Frame) -> tuple[tuple[int, int, int, int], tuple[float, float]]:
    """The region of level 0 that the picture shows, and its downsample."""
    for region in (frame.whole, frame.bounds_level0_px):
        if whole := whole_downsample(level.size_px, region[2:], tile_px=level.tile_px):
            return region, (float(whole), float(whole))
    region = shown_region(name, level.size_px, frame)
    return region, (region[2] / level.size_px[0], region[3] / level.size_px[1])


def _downsample(level: Level, first: Level, downsample: tuple[float, float]) -> tuple[float, float] | None:
    """Of a page against level 0; None where it shows something else than the first page."""
    whole = whole_downsample(level.size_px, first.size_px, tile_px=level.tile_px)
    return (downsample[0] * whole, downsample[1] * whole) if whole else None


def _bands(
    boxes: Float64[np.ndarray, "tile 4"], size_px: tuple[int, int]
) -> Iterator[tuple[Int64[np.ndarray, " some"], Box]]:
    """The boxes row by row, as many at a time as lie in a region of few pixels, and this region."""
    edges = np.hstack([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])]).astype(np.int64)
    edges = np.clip(edges, 0, [*size_px, *size_px])
    order = np.lexsort((edges[:, 0], edges[:, 1]))
    for band in np.split(order, _cuts(edges[order].tolist())):
        (x0, y0), (x1, y1) = edges[band, :2].min(axis=0).tolist(), edges[band, 2:].max(axis=0).tolist()
        if x1 > x0 and y1 > y0:
            yield band, (x0, y0, x1, y1)


def _cuts(edges: Sequence[Sequence[int]]) -> list[int]:
    """Where a new region begins because the next box would make the last one too large."""
    cuts = []
    region = edges[0]
    for position, box in enumerate(edges):
        grown = [*map(min, region[:2], box[:2]), *map(max, region[2:], box[2:])]
        if position and (grown[2] - grown[0]) * (grown[3] - grown[1]) > _BAND_PX:
            cuts.append(position)
            grown = list(box)
        region = grown
    return cuts


def _shrunk(mask: Bool[np.ndarray, "row column"], whole: int) -> Bool[np.ndarray, "y x"]:
    """Blocks of so many pixels across and down, the last ones of fewer: whether any of them is in the mask."""
    starts = (np.arange(0, size, whole) for size in mask.shape)
    for axis, start in enumerate(starts):
        mask = np.logical_or.reduceat(mask, start, axis=axis) if whole > 1 else mask
    return mask


def _runs(mask: Bool[np.ndarray, "row column"]) -> Int64[np.ndarray, "run corners"]:
    """The stretches of each row that are in the mask, as (x0, y0, x1, y1)."""
    edges = np.diff(mask.astype(np.int8), axis=1, prepend=0, append=0)
    (row, start), (_, end) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    return np.column_stack([start, row, end, row + 1])


def _distinct(numbers: Numbers) -> set[float]:
    """The numbers above 0."""
    if not (largest := numbers.max(initial=0)):
        return set()
    if np.array_equal(numbers == largest, numbers > 0):
        return {float(largest)}
    values = np.unique(numbers)  # takes seconds
    return {float(value) for value in values if value > 0}


def _brightest(packed: Numbers) -> Numbers:
    """The largest of red, green and blue."""
    return np.maximum(np.maximum(packed >> 16, packed >> 8 & 255), packed & 255)
