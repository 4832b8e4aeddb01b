"""Pictures of numbers, read by regions from one level of them: TIFF tile by tile, PNG and JPEG whole.

Gives the numbers no meaning and knows no slide.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from jaxtyping import Real, Shaped, UInt32

from wsi_anomaly.annotations.masks import opened_picture
from wsi_anomaly.errors import AnnotationError

_MAX_WHOLE_PX = 2**30
"""Of pictures that can be read only whole: a GiB for each byte of a pixel."""

Box = tuple[int, int, int, int]
Read = Callable[[Box], Real[np.ndarray, "row column"]]


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of a picture. Only valid while `opened_levels` is."""

    size_px: tuple[int, int]
    tile_px: tuple[int, int]
    """(0, 0) where the picture is not tiled."""
    lossy: bool
    """Stored as JPEG: the numbers are not quite those that were drawn."""
    read: Read
    """The numbers in (x0, y0, x1, y1), pixels of this level, as (row, column). A colour is 0xRRGGBB, a transparent
    pixel 0."""


@contextmanager
def opened_levels(path: Path) -> Iterator[tuple[Level, ...]]:
    """Every page of the picture, the full one first; pages of a TIFF may also be other things than its levels.

    Raises:
        AnnotationError: no PNG, TIFF or JPEG; too large to be read whole; or damaged where the caller reads it.
    """
    if path.suffix.lower() not in (".tif", ".tiff"):
        yield (_whole_level(path),)
        return
    with ExitStack() as stack:
        with _told(path):
            file = stack.enter_context(tifffile.TiffFile(path))
            levels = tuple(_tiff_level(path, page) for page in _pages(file))
        if not levels:
            raise AnnotationError(f"{path.name}: a TIFF without a picture in it")
        yield levels


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a TIFF is decoded names the file."""
    try:
        yield
    except AnnotationError:
        raise
    except Exception as error:  # tifffile and every codec of imagecodecs raise classes of their own
        raise AnnotationError(f"{path.name}: damaged, or no TIFF that can be read ({error})") from error


def _whole_level(path: Path) -> Level:
    with opened_picture(path, ("PNG", "JPEG")) as picture:
        _refuse_huge(path, picture.size)
        size_px, lossy = picture.size, picture.format == "JPEG"
        numbers = _numbers(np.asarray(picture))
    return Level(size_px, (0, 0), lossy, lambda box: _crop(numbers, box))


def _pages(file: tifffile.TiffFile) -> Iterator[tifffile.TiffPage]:
    file.pages.useframes = False
    for page in file.pages:
        for one in (page, *(page.pages or ())):
            if isinstance(one, tifffile.TiffPage) and len(one.shape) in (2, 3):
                yield one


def _tiff_level(path: Path, page: tifffile.TiffPage) -> Level:
    piece_px = _piece_px(page)
    _refuse_huge(path, piece_px)
    white_is_0 = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE

    def read(box: Box) -> Real[np.ndarray, "row column"]:
        with _told(path):
            raw = _read_pieces(page, piece_px, box)
        return _numbers(_largest(raw.dtype, page.bitspersample) - raw if white_is_0 else raw)

    size_px = (page.imagewidth, page.imagelength)
    jpeg = (tifffile.COMPRESSION.JPEG, tifffile.COMPRESSION.OJPEG)
    return Level(size_px, piece_px if page.is_tiled else (0, 0), page.compression in jpeg, read)


def _piece_px(page: tifffile.TiffPage) -> tuple[int, int]:
    """Width and height of a tile or strip."""
    if page.is_tiled:
        return (page.tilewidth, page.tilelength)
    return (page.imagewidth, min(page.rowsperstrip, page.imagelength))


def _read_pieces(
    page: tifffile.TiffPage, piece_px: tuple[int, int], box: Box
) -> Shaped[np.ndarray, "row column sample"]:
    """The pixels in the box as (row, column, sample); tiles that the file leaves out are 0."""
    x0, y0, x1, y1 = box
    width, height = piece_px
    across, down = -(-page.imagewidth // width), -(-page.imagelength // height)
    planes = page.samplesperpixel if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE else 1
    wanted = [
        (plane * down + row) * across + column
        for plane, row, column in product(
            range(planes), range(y0 // height, -(-y1 // height)), range(x0 // width, -(-x1 // width))
        )
    ]
    out = np.zeros((y1 - y0, x1 - x0, page.samplesperpixel), page.dtype)
    offsets, counts = [page.dataoffsets[i] for i in wanted], [page.databytecounts[i] for i in wanted]
    for data, index in page.parent.filehandle.read_segments(offsets, counts, indices=wanted):
        piece, (plane, _, top, left, _), (_, rows, columns, samples) = page.decode(
            data, index, jpegtables=page.jpegtables
        )
        if piece is None:
            continue
        upper, lower = max(y0, top), min(y1, top + rows)
        start, end = max(x0, left), min(x1, left + columns)
        out[upper - y0 : lower - y0, start - x0 : end - x0, plane : plane + samples] = piece[
            0, upper - top : lower - top, start - left : end - left
        ]
    return out


def _largest(dtype: np.dtype[Any], bits: int) -> int:
    return 2**bits - 1 if dtype.kind in "ub" else 1


def _numbers(pixels: Shaped[np.ndarray, "*shape"]) -> Real[np.ndarray, "row column"]:
    """One number a pixel: grey as it is, colours packed; 0 where transparent."""
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8)
    if pixels.ndim == 2:  # noqa: PLR2004
        return pixels
    samples = pixels.shape[2]
    if samples == 1:
        return pixels[..., 0]
    colours = pixels[..., 0] if samples == 2 else _packed(pixels[..., :3])  # noqa: PLR2004
    return np.where(pixels[..., -1] > 0, colours, 0) if samples in (2, 4) else colours


def _packed(rgb: Real[np.ndarray, "row column 3"]) -> UInt32[np.ndarray, "row column"]:
    red, green, blue = np.moveaxis(rgb.astype(np.uint32), -1, 0)
    return np.asarray(red << 16 | green << 8 | blue)


def _crop(numbers: Real[np.ndarray, "row column"], box: Box) -> Real[np.ndarray, "y x"]:
    x0, y0, x1, y1 = box
    return numbers[y0:y1, x0:x1]


def _refuse_huge(path: Path, size_px: tuple[int, int]) -> None:
    if size_px[0] * size_px[1] > _MAX_WHOLE_PX:
        raise AnnotationError(
            f"{path.name}: {size_px[0]} x {size_px[1]} px that can be read only at once; save it as a tiled TIFF with "
            "a pyramid, or smaller"
        )
