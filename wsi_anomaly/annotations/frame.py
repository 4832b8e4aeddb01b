"""The frame of a slide and what part of it a picture shows. Pure arithmetic: opens no file."""

from dataclasses import dataclass

from wsi_anomaly.errors import AnnotationError

_ASPECT_TOLERANCE = 0.02
_MAX_HALVINGS = 10

Region = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Frame:
    """How large a slide is and which part of it was scanned, in level-0 pixels."""

    size_level0_px: tuple[int, int]
    """(width, height) of level 0 of the file."""
    bounds_level0_px: Region
    """(x, y, width, height), all of level 0 where the file states none. QuPath counts from their corner."""

    @property
    def whole(self) -> Region:
        """All of level 0."""
        return (0, 0, *self.size_level0_px)


def shown_region(name: str, size_px: tuple[int, int], frame: Frame) -> Region:
    """What the picture `name` of this size shows: all of level 0 or the bounds, as (x, y, width, height).

    Raises:
        AnnotationError: it has the proportions of neither.
    """
    width, height = size_px
    regions = [(region, width * region[3] / region[2]) for region in (frame.whole, frame.bounds_level0_px)]
    # To a pixel first: frame and bounds may differ by less than the tolerance.
    for tolerance_px in (max(1, height / width), _ASPECT_TOLERANCE * height):
        for region, expected_height in regions:
            if abs(height - expected_height) < tolerance_px:
                return region
    raise AnnotationError(
        f"{name}: {width} x {height} px; neither the slide ({frame.size_level0_px[0]} x {frame.size_level0_px[1]}) nor "
        f"its bounds ({frame.bounds_level0_px[2]} x {frame.bounds_level0_px[3]}) have these proportions; export a mask "
        "of all of it"
    )


def same_view(size_px: tuple[int, int], other_px: tuple[int, int]) -> bool:
    """Whether two pictures have the same proportions, as levels of one pyramid have."""
    return abs(size_px[0] / other_px[0] * other_px[1] / size_px[1] - 1) <= _ASPECT_TOLERANCE


def whole_downsample(size_px: tuple[int, int], of_px: tuple[int, int], *, tile_px: tuple[int, int]) -> int | None:
    """The whole number by which a picture of the size `of_px` was shrunk to `size_px`; None where none fits.

    Sizes are rounded. ASAP halves, and fills the last tiles of a level up: `tile_px` is (0, 0) where there are none.
    """
    for whole in (2**halvings for halvings in range(_MAX_HALVINGS + 1)):
        if all(map(_fits, size_px, of_px, (whole, whole), tile_px)):
            return whole
    whole = max(1, round(of_px[0] / size_px[0]))
    return whole if all(map(_fits, size_px, of_px, (whole, whole), (0, 0))) else None


def _fits(size: int, of: int, whole: int, tile: int) -> bool:
    surplus = size - -(-of // whole)
    return surplus in (-1, 0) or (0 < surplus < tile and size % tile == 0)
