"""Write pixels as a pyramidal, tiled TIFF that slide readers open. Knows files and tiles; knows nothing of tissue."""

from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from jaxtyping import UInt8

TILE_PX = 256


def write_pyramid(
    path: Path, pixels: UInt8[np.ndarray, "row column rgb"], *, mpp: float, jpeg_quality: int = 90
) -> None:
    """Write one RGB image as a slide. `mpp`: microns per pixel of `pixels`."""
    rows, columns = pixels.shape[:2]
    tiles = (
        pixels[row : row + TILE_PX, column : column + TILE_PX]
        for row, column in product(range(0, rows, TILE_PX), range(0, columns, TILE_PX))
    )
    write_pyramid_from_tiles(path, tiles, size_px=(columns, rows), mpp=mpp, jpeg_quality=jpeg_quality)


def write_pyramid_from_tiles(
    path: Path,
    tiles: Iterable[UInt8[np.ndarray, "row column rgb"]],
    *,
    size_px: tuple[int, int],
    mpp: float,
    jpeg_quality: int = 90,
) -> None:
    """Write a slide of any size from its tiles, taken one at a time.

    The tiles are 256 px squares (smaller, or padded, at the right and lower edge), row by row. Each level is half the
    one before it, down to one that is a single tile. In memory: one row of tiles for each level, and the lower levels
    compressed, which is a third of what level 0 takes on disk.

    Raises:
        ValueError: there are more or fewer tiles than `size_px` asks for.
    """
    levels = _levels(size_px, jpeg_quality)
    source = iter(tiles)
    base = _encoded_base(source, levels[0])
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for number, level in enumerate(levels):
            tiff.write(
                iter(level.encoded) if number else base,
                shape=(level.size_px[1], level.size_px[0], 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="ycbcr",
                subsampling=(1, 1),
                compression="jpeg",
                resolution=(1e4 / (mpp * 2**number),) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=int(number > 0),
                software=False,
                metadata=None,
            )
    if next(source, None) is not None:
        raise ValueError(f"{path}: more tiles than {size_px[0]} x {size_px[1]} px need")


class _Level:
    """One level of the pyramid while it grows: takes its tiles in order and fills the next level with them."""

    def __init__(self, size_px: tuple[int, int], jpeg_quality: int, smaller: "_Level | None") -> None:
        self.size_px = size_px
        self.columns, self.rows = (-(-side // TILE_PX) for side in size_px)
        self.encoded: list[bytes] = []
        self._quality = jpeg_quality
        self._smaller = smaller
        # The next level's tiles under way: two rows of ours make one row of its.
        self._strip = np.zeros((TILE_PX, (self.columns + 1) // 2 * TILE_PX, 3), np.uint8)

    def take(self, tile: UInt8[np.ndarray, "row column rgb"], row: int, column: int) -> bytes:
        """The tile compressed, after its half-size copy has gone to the next level."""
        if self._smaller is not None:
            half = TILE_PX // 2
            top, left = row % 2 * half, column * half
            self._strip[top : top + half, left : left + half] = _halved(tile)
            if column == self.columns - 1 and (row % 2 or row == self.rows - 1):
                self._pass_on(self._smaller, row // 2)
        return bytes(
            imagecodecs.jpeg8_encode(
                tile, level=self._quality, colorspace="RGB", outcolorspace="YCBCR", subsampling="444"
            )
        )

    def _pass_on(self, smaller: "_Level", row: int) -> None:
        if row >= smaller.rows:
            return
        for column in range(smaller.columns):
            tile = np.ascontiguousarray(self._strip[:, column * TILE_PX : (column + 1) * TILE_PX])
            smaller.encoded.append(smaller.take(tile, row, column))


def _levels(size_px: tuple[int, int], jpeg_quality: int) -> list[_Level]:
    """The levels from large to small, each knowing the next."""
    sizes = [size_px]
    while max(sizes[-1]) > TILE_PX:
        sizes.append((max(1, sizes[-1][0] // 2), max(1, sizes[-1][1] // 2)))
    levels: list[_Level] = []
    for size in reversed(sizes):
        levels.insert(0, _Level(size, jpeg_quality, levels[0] if levels else None))
    return levels


def _encoded_base(tiles: Iterator[UInt8[np.ndarray, "row column rgb"]], base: _Level) -> Iterator[bytes]:
    for row, column in product(range(base.rows), range(base.columns)):
        tile = next(tiles, None)
        if tile is None:
            raise ValueError(f"no tile for row {row}, column {column} of {base.rows} x {base.columns} tiles")
        yield base.take(_full(tile), row, column)


def _full(tile: UInt8[np.ndarray, "row column rgb"]) -> UInt8[np.ndarray, "y x rgb"]:
    # Repeated edge pixels cost JPEG the least and do not ring into the visible part.
    missing = [(0, TILE_PX - side) for side in tile.shape[:2]]
    return np.ascontiguousarray(np.pad(tile, [*missing, (0, 0)], mode="edge"))


def _halved(tile: UInt8[np.ndarray, "row column rgb"]) -> UInt8[np.ndarray, "y x rgb"]:
    wide = tile.astype(np.uint16)
    pairs = wide[0::2] + wide[1::2]
    return ((pairs[:, 0::2] + pairs[:, 1::2] + 2) // 4).astype(np.uint8)
