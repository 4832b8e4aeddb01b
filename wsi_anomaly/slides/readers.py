"""OpenSlide and TiffSlide behind one face: the only file that imports them. Knows levels, no mpp and no retries."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import openslide
import tiffslide
from jaxtyping import Bool, UInt8
from PIL import Image
from tifffile import PHOTOMETRIC, TiffPage, TiffPageSeries

from wsi_anomaly.errors import CorruptSlideError, SlideError
from wsi_anomaly.slides.identity import unreadable_file
from wsi_anomaly.slides.recipe import ReaderName
from wsi_anomaly.slides.resolution import is_ome

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class RegionError(Exception):
    """A region could not be decoded; the reader may fail from now on."""


@runtime_checkable
class Reader(Protocol):
    """An open slide file. Safe to read from many threads at once; closed when the last reference to it goes."""

    name: ReaderName
    properties: Mapping[str, str]
    """Without the prefix `openslide.` or `tiffslide.`."""
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]

    def read(self, level: int, corner_px: tuple[int, int], size_px: tuple[int, int]) -> Image.Image:
        """RGB or RGBA pixels of a level, transparent where there is no image.

        Raises:
            RegionError: the file is damaged there.
        """

    def shift_px(self, level: int, corner_px: tuple[int, int]) -> tuple[float, float]:
        """Level pixels by which what `read` gives for this corner really lies to the right and below of it."""

    def reopened(self) -> "Reader":
        """A new handle of the same file.

        Raises:
            SlideError: it cannot be opened any more.
        """

    def close(self) -> None:
        """Close the file. No thread may be reading."""


class OpenSlideReader:
    """A slide that OpenSlide reads."""

    name: ReaderName = "openslide"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = openslide.OpenSlide(path)
        self.properties: Mapping[str, str] = {
            key.removeprefix("openslide."): value for key, value in self._slide.properties.items()
        }
        self.level_dimensions: tuple[tuple[int, int], ...] = self._slide.level_dimensions
        self.level_downsamples: tuple[float, ...] = self._slide.level_downsamples

    def read(self, level: int, corner_px: tuple[int, int], size_px: tuple[int, int]) -> Image.Image:
        """See `Reader`; always RGBA, not premultiplied."""
        try:
            return self._slide.read_region(self._corner_level0_px(level, corner_px), level, size_px)
        except openslide.OpenSlideError as error:
            raise RegionError(str(error)) from error

    def shift_px(self, level: int, corner_px: tuple[int, int]) -> tuple[float, float]:
        """See `Reader`; zero where the level's downsample is a whole number."""
        # OpenSlide takes whole level-0 pixels and interpolates where they fall between the pixels of the level.
        downsample = self.level_downsamples[level]
        x, y = self._corner_level0_px(level, corner_px)
        return (x / downsample - corner_px[0], y / downsample - corner_px[1])

    def _corner_level0_px(self, level: int, corner_px: tuple[int, int]) -> tuple[int, int]:
        downsample = self.level_downsamples[level]
        return (round(corner_px[0] * downsample), round(corner_px[1] * downsample))

    def reopened(self) -> "Reader":
        """See `Reader`."""
        return _reopen(OpenSlideReader, self._path)

    def close(self) -> None:
        """See `Reader`; OpenSlide itself closes a handle that nobody refers to."""
        self._slide.close()


class TiffSlideReader:
    """A TIFF that TiffSlide reads, of 8-bit grey, RGB or RGBA pixels."""

    name: ReaderName = "tiffslide"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = tiffslide.TiffSlide(path)
        properties = self._slide.properties
        self.properties: Mapping[str, str] = {
            key.removeprefix("tiffslide."): str(value) for key, value in properties.items() if value is not None
        }
        self.level_dimensions: tuple[tuple[int, int], ...] = self._slide.level_dimensions
        self.level_downsamples: tuple[float, ...] = self._slide.level_downsamples
        series = self._slide.ts_tifffile.series[properties["tiffslide.series-index"]]
        _check_pixel_format(series, path.name)
        self._tiles = [_TileTable(level.keyframe) for level in series.levels]

    def __del__(self) -> None:
        if hasattr(self, "_slide"):
            self._slide.close()

    def read(self, level: int, corner_px: tuple[int, int], size_px: tuple[int, int]) -> Image.Image:
        """See `Reader`."""
        width, height = self.level_dimensions[level]
        left, top = (max(0, corner_px[0]), max(0, corner_px[1]))
        right, bottom = (min(width, corner_px[0] + size_px[0]), min(height, corner_px[1] + size_px[1]))
        canvas = np.zeros((size_px[1], size_px[0], 4), np.uint8)
        if left >= right or top >= bottom:
            return Image.fromarray(canvas)
        pixels = self._pixels(level, (left, top), (right - left, bottom - top))
        if pixels.shape == (*canvas.shape[:2], 3):
            return Image.fromarray(pixels)
        inside = canvas[top - corner_px[1] : bottom - corner_px[1], left - corner_px[0] : right - corner_px[0]]
        inside[..., 3] = 255
        inside[..., : pixels.shape[2]] = pixels
        return Image.fromarray(canvas)

    def shift_px(self, level: int, corner_px: tuple[int, int]) -> tuple[float, float]:
        """See `Reader`; always zero."""
        del level, corner_px
        return (0.0, 0.0)

    def _pixels(
        self, level: int, corner_px: tuple[int, int], size_px: tuple[int, int]
    ) -> UInt8[np.ndarray, "y x channel"]:
        """RGB, or RGBA where the file has alpha or lacks tiles, of a region inside the level."""
        downsample = self.level_downsamples[level]
        corner_level0_px = (_to_level0(corner_px[0], downsample), _to_level0(corner_px[1], downsample))
        try:
            pixels = np.asarray(self._slide.read_region(corner_level0_px, level, size_px, as_array=True), np.uint8)
        except MemoryError:
            raise
        except Exception as error:  # tifffile, zarr and every codec of imagecodecs raise classes of their own
            raise RegionError(str(error)) from error
        if pixels.shape[2] == 1:
            pixels = np.repeat(pixels, 3, axis=2)
        present = self._tiles[level].present(corner_px, size_px)
        if present.all():
            return np.ascontiguousarray(pixels)
        alpha = pixels[..., 3] if pixels.shape[2] == 4 else np.uint8(255)  # noqa: PLR2004 - RGBA
        return np.dstack([pixels[..., :3], np.where(present, alpha, np.uint8(0))])

    def reopened(self) -> "Reader":
        """See `Reader`."""
        return _reopen(TiffSlideReader, self._path)

    def close(self) -> None:
        """See `Reader`."""
        self._slide.close()

    def is_cut_short(self) -> bool:
        """Whether the file ends before its pixels do."""
        return any(tiles.end_bytes > self._path.stat().st_size for tiles in self._tiles)


class _TileTable:
    """Which tiles of a TIFF level the file holds. TiffSlide paints the others black."""

    def __init__(self, page: TiffPage) -> None:
        self._tile_px = (page.tilewidth, page.tilelength)
        self._present: Bool[np.ndarray, "row column"] | None = None
        byte_counts = np.array(page.databytecounts, np.int64)
        self.end_bytes = int((np.array(page.dataoffsets, np.int64) + byte_counts).max(initial=0))
        if page.is_tiled and not byte_counts.all():
            columns = math.ceil(page.imagewidth / page.tilewidth)
            rows = math.ceil(page.imagelength / page.tilelength)
            self._present = byte_counts[: rows * columns].reshape(rows, columns) > 0

    def present(self, corner_px: tuple[int, int], size_px: tuple[int, int]) -> Bool[np.ndarray, "y x"]:
        """For each pixel of a region inside the level, whether the file has it."""
        if self._present is None:
            return np.ones((1, 1), bool)
        columns, rows = (
            np.arange(corner, corner + size) // tile
            for corner, size, tile in zip(corner_px, size_px, self._tile_px, strict=True)
        )
        return self._present[np.ix_(rows, columns)]


def open_reader(path: Path) -> tuple[Reader, tuple[str, ...]]:
    """The reader that serves this file best, and what there is to warn about.

    Raises:
        CorruptSlideError: the file is of a known format, but damaged or cut short.
        SlideError: it is missing, may not be read, or is no slide.
    """
    _check_file(path)
    damaged = False
    try:
        reader = OpenSlideReader(path)
    except openslide.OpenSlideUnsupportedFormatError:
        pass
    except openslide.OpenSlideError:
        damaged = True
    else:
        return (_pyramidal(reader, path), ())
    tiff_reader = _open_tiff(path, damaged=damaged)
    if damaged or tiff_reader.is_cut_short():
        return (tiff_reader, (f"{path.name} is damaged: what can be read of it is read. Copy or scan it again.",))
    return (tiff_reader, ())


def _pyramidal(reader: OpenSlideReader, path: Path) -> Reader:
    """`reader`, or TiffSlide's for an OME-TIFF, whose pyramid in SubIFDs OpenSlide does not see."""
    if reader.properties.get("vendor") != "generic-tiff" or not is_ome(reader.properties):
        return reader
    try:
        tiff_reader = TiffSlideReader(path)
    except Exception:  # noqa: BLE001 - whatever TiffSlide dislikes, OpenSlide has opened the file
        return reader
    reader.close()
    return tiff_reader


def _reopen(kind: Callable[[Path], Reader], path: Path) -> Reader:
    try:
        return kind(path)
    except Exception as error:  # what went well once may fail in any way when a drive goes away
        raise SlideError(f"{path.name} cannot be opened any more. Is the drive that holds it still there?") from error


def _open_tiff(path: Path, *, damaged: bool) -> TiffSlideReader:
    try:
        return TiffSlideReader(path)
    except SlideError:
        raise
    except Exception as error:  # tifffile raises whatever foreign bytes lead it to
        if damaged or (_is_tiff(path) and not isinstance(error, NotImplementedError)):
            raise CorruptSlideError(f"{path.name} is damaged or cut short. Copy it again.") from error
        raise SlideError(
            f"{path.name} is not a slide that OpenSlide or TiffSlide can open. Leave it out, or convert it to OME-TIFF."
        ) from error


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise unreadable_file(path, error) from error
    if empty:
        raise CorruptSlideError(f"{path.name} is empty. Copy it again.")


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in _TIFF_MAGIC


def _check_pixel_format(series: TiffPageSeries, name: str) -> None:
    channels = {"YX": 1, "YXS": series.shape[-1], "CYX": series.shape[0]}.get(series.axes, 0)
    colours = series.keyframe.photometric in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR)
    if series.dtype != np.uint8 or not colours or channels not in (1, 3, 4):
        raise SlideError(f"{name} does not hold 8-bit grey, RGB or RGBA pixels. Convert it to 8-bit RGB.")


def _to_level0(level_px: int, downsample: float) -> int:
    """The level-0 coordinate that TiffSlide, which divides and cuts off, takes to exactly this level pixel."""
    level0_px = math.ceil(level_px * downsample)
    return level0_px if int(level0_px / downsample) >= level_px else level0_px + 1
