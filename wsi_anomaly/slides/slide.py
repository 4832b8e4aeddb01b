"""Slide: RGB pixels of one slide at an exact mpp. Turns (x, y) into (row, column); knows no format and no tissue."""

import math
import threading
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from wsi_anomaly.errors import CorruptSlideError, MissingMppError, SlideError
from wsi_anomaly.slides.overview import Box, assemble
from wsi_anomaly.slides.readers import Reader, RegionError, open_reader
from wsi_anomaly.slides.recipe import ReaderName, ReadRecipe, choose_recipe, true_downsamples
from wsi_anomaly.slides.resolution import MppSource, find_resolution, is_ome

_WHITE = (255, 255, 255)


class Slide:
    """An open slide, a context manager. `read` may be called from many threads at once.

    Attributes:
        name: the file's name without its folder.
        vendor: as OpenSlide calls it, "generic-tiff" or "ome-tiff".
        size_level0_px: (width, height).
        bounds_level0_px: (x, y, width, height) of the scanned part, all of level 0 where the file states none.
        has_bounds: whether the file states them.
        mpp: microns per pixel of level 0, (x, y); `mpp_source` says where they come from.
        background_rgb: what transparent pixels and what lies outside the slide become.
        warnings: for the caller to log; they name no folder.
    """

    def __init__(self, path: Path, reader: Reader, *, mpp: float | None, warnings: tuple[str, ...] = ()) -> None:
        properties = reader.properties
        self._reader = reader
        self._replacing = threading.Lock()
        self._closed = False
        self.name: str = path.name
        self.reader: ReaderName = reader.name
        self.vendor: str = _vendor(reader)
        self.level_dimensions: tuple[tuple[int, int], ...] = reader.level_dimensions
        self.level_downsamples: tuple[float, ...] = true_downsamples(reader.level_dimensions, reader.level_downsamples)
        self.size_level0_px: tuple[int, int] = reader.level_dimensions[0]
        bounds = _bounds_level0_px(reader)
        self.has_bounds: bool = bounds is not None
        self.bounds_level0_px: tuple[int, int, int, int] = bounds or (0, 0, *self.size_level0_px)
        self.background_rgb: tuple[int, int, int] = _background_rgb(properties.get("background-color", ""))
        resolution = find_resolution(properties, vendor=self.vendor, name=path.name, given_mpp=mpp)
        self.mpp: tuple[float, float] = resolution.mpp
        self.mpp_source: MppSource = resolution.source
        self.warnings: tuple[str, ...] = warnings + resolution.warnings

    @classmethod
    def open(cls, path: Path, *, mpp: float | None = None) -> "Slide":
        """The slide in a file; `mpp` is what the user says of its level 0, used where the file says nothing.

        Raises:
            MissingMppError: neither file nor user has a believable mpp.
            CorruptSlideError: the file is damaged or cut short so that it cannot be opened.
            SlideError: the file is missing, may not be read, is no slide, or the given mpp is impossible.
        """
        reader, warnings = open_reader(path)
        try:
            return cls(path, reader, mpp=mpp, warnings=warnings)
        except SlideError as error:
            reader.close()
            if warnings and isinstance(error, MissingMppError):
                # The mpp may be missing because the end of the file is: that is what to mend.
                raise CorruptSlideError(" ".join([*warnings, str(error)])) from error
            raise

    def recipe(self, mpp: float, *, max_upsampling: float = 1.5) -> ReadRecipe:
        """How to read at exactly `mpp`: from the coarsest level that is not coarser, without resampling where equal.

        Raises:
            SlideError: even level 0 is more than `max_upsampling` times coarser.
        """
        return choose_recipe(
            mpp,
            slide_mpp=self.mpp,
            downsamples=self.level_downsamples,
            max_upsampling=max_upsampling,
            reader=self.reader,
            name=self.name,
        )

    def read(
        self, origin_level0_px: tuple[int, int], size_px: tuple[int, int], recipe: ReadRecipe
    ) -> UInt8[np.ndarray, "y x rgb"]:
        """Pixels of the region with this top-left corner (x, y); `size_px` (width, height) is at `recipe.mpp`.

        Where nothing is resampled, the region starts at the level pixel nearest to the origin. What lies outside the
        slide has the background colour.

        Raises:
            CorruptSlideError: the file is damaged in this region; others can still be read.
            SlideError: the file cannot be opened any more.
        """
        return self._read((float(origin_level0_px[0]), float(origin_level0_px[1])), size_px, recipe)

    def overview(self, mpp: float) -> tuple[UInt8[np.ndarray, "row column rgb"], Bool[np.ndarray, "row column"]]:
        """The bounds of the slide at `mpp`, and which pixels could be read; the others have the background colour.

        Raises:
            CorruptSlideError: nothing at all can be read.
        """
        recipe = self.recipe(mpp, max_upsampling=math.inf)
        step_x, step_y = recipe.downsample
        x, y, width, height = self.bounds_level0_px
        size_px = (max(1, round(width / step_x)), max(1, round(height / step_y)))

        def read_box(box: Box) -> UInt8[np.ndarray, "y x rgb"]:
            return self._read((x + box[0] * step_x, y + box[1] * step_y), box[2:], recipe)

        rgb, readable = assemble(size_px, max(recipe.scale), background_rgb=self.background_rgb, read_box=read_box)
        if not readable.any():
            raise CorruptSlideError(f"{self.name}: no part of it can be read. Copy it again.")
        return rgb, readable

    def close(self) -> None:
        """Close the file. No thread may be reading."""
        self._closed = True
        self._reader.close()

    def __enter__(self) -> "Slide":  # noqa: PYI034 - the type checker of the tests cannot check Self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(
        self, origin_level0_px: tuple[float, float], size_px: tuple[int, int], recipe: ReadRecipe
    ) -> UInt8[np.ndarray, "y x rgb"]:
        start = tuple(axis_px / recipe.level_downsample for axis_px in origin_level0_px)
        if recipe.resampling == "none":
            corner = (math.floor(start[0] + 0.5), math.floor(start[1] + 0.5))
            return _pixels(self._level_pixels(recipe.level, corner, size_px))
        extent = [size * scale for size, scale in zip(size_px, recipe.scale, strict=True)]
        corner = (math.floor(start[0]) - recipe.margin_px, math.floor(start[1]) - recipe.margin_px)
        stop = [math.ceil(first + length) + recipe.margin_px for first, length in zip(start, extent, strict=True)]
        image = self._level_pixels(recipe.level, corner, (stop[0] - corner[0], stop[1] - corner[1]))
        shift = self._reader.shift_px(recipe.level, corner)
        left, top = (first - axis - moved for first, axis, moved in zip(start, corner, shift, strict=True))
        # Pillow widens its filter when it shrinks, and takes the pixels around the box into account.
        box = (left, top, left + extent[0], top + extent[1])
        return _pixels(image.convert("RGB").resize(size_px, Image.Resampling.BICUBIC, box=box))

    def _level_pixels(self, level: int, corner_px: tuple[int, int], size_px: tuple[int, int]) -> Image.Image:
        """A region of a level without transparency, tried on a second, private handle where the shared one fails.

        Once OpenSlide has failed, a handle fails for ever: so may the shared one, through the fault of another thread.
        """
        if self._closed:
            raise ValueError(f"{self.name} is closed")
        reader = self._reader
        try:
            return _on_background(reader.read(level, corner_px, size_px), self.background_rgb)
        except RegionError:
            self._replace(reader)
        private = reader.reopened()
        try:
            return _on_background(private.read(level, corner_px, size_px), self.background_rgb)
        except RegionError as error:
            x, y = (round(axis_px * self.level_downsamples[level]) for axis_px in corner_px)
            raise CorruptSlideError(
                f"{self.name} is damaged near x = {max(0, x)}, y = {max(0, y)} (level-0 pixels)."
            ) from error
        finally:
            private.close()

    def _replace(self, failed: Reader) -> None:
        """Put a new handle in the place of a failed one; once, however many threads saw it fail."""
        with self._replacing:
            if self._reader is failed:
                # Not closed here: other threads may be reading with it, and it closes with its last reference.
                self._reader = failed.reopened()


def _vendor(reader: Reader) -> str:
    vendor = reader.properties.get("vendor", "generic-tiff")
    return "ome-tiff" if vendor == "generic-tiff" and is_ome(reader.properties) else vendor


def _bounds_level0_px(reader: Reader) -> tuple[int, int, int, int] | None:
    """x, y, width, height where the file states all four."""
    try:
        x, y, width, height = (int(reader.properties[f"bounds-{key}"]) for key in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return None
    return (x, y, width, height)


def _background_rgb(hexadecimal: str) -> tuple[int, int, int]:
    try:
        red, green, blue = bytes.fromhex(hexadecimal)
    except ValueError:
        return _WHITE
    return (red, green, blue)


def _pixels(image: Image.Image) -> UInt8[np.ndarray, "y x rgb"]:
    """RGB of an opaque image. Unpacked by Pillow in one step, since this runs for every tile."""
    pixels = np.frombuffer(image.tobytes("raw", "RGB"), np.uint8)
    return pixels.reshape(image.height, image.width, 3)


def _on_background(image: Image.Image, background_rgb: tuple[int, int, int]) -> Image.Image:
    if image.mode == "RGB":
        return image
    # The quickest look at the alpha channel: this runs for every tile, and nearly all are opaque.
    if np.frombuffer(image.tobytes("raw", "A"), np.uint8).min() == np.iinfo(np.uint8).max:
        return image
    canvas = Image.new("RGB", image.size, background_rgb)
    canvas.paste(image, mask=image)
    return canvas
