"""Put the picture of a whole slide together from blocks, around what is damaged. Knows no file and no mpp."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, UInt8

from wsi_anomaly.errors import CorruptSlideError

Box = tuple[int, int, int, int]
"""Left, top, width, height in overview pixels."""
ReadBox = Callable[[Box], UInt8[np.ndarray, "y x rgb"]]

# Source pixels along the side of a block: what is in memory at once, and the smallest piece to give up.
_BLOCK_PX = 2048
_SMALLEST_PX = 256


def assemble(
    size_px: tuple[int, int], scale: float, *, background_rgb: tuple[int, int, int], read_box: ReadBox
) -> tuple[UInt8[np.ndarray, "row column rgb"], Bool[np.ndarray, "row column"]]:
    """The picture, and which of its pixels could be read; the others have the background colour.

    `scale` is the number of source pixels along one overview pixel. `read_box` raises CorruptSlideError where the
    source is damaged; such a block is read again in quarters.
    """
    width, height = size_px
    rgb = np.empty((height, width, 3), np.uint8)
    rgb[:] = background_rgb
    readable = np.zeros((height, width), bool)
    block = max(1, int(_BLOCK_PX / scale))
    todo = [
        (left, top, min(block, width - left), min(block, height - top))
        for top in range(0, height, block)
        for left in range(0, width, block)
    ]
    while todo:
        box = todo.pop()
        left, top, box_width, box_height = box
        window = (slice(top, top + box_height), slice(left, left + box_width))
        try:
            rgb[window] = read_box(box)
        except CorruptSlideError:
            todo += _quarters(box, scale)
        else:
            readable[window] = True
    return rgb, readable


def _quarters(box: Box, scale: float) -> list[Box]:
    """The box cut in two along each side that is worth it; none where it is too small."""
    left, top, width, height = box
    if max(width, height) * scale <= _SMALLEST_PX or width == height == 1:
        return []
    columns, rows = _halves(left, width), _halves(top, height)
    return [(x, y, box_width, box_height) for x, box_width in columns for y, box_height in rows]


def _halves(start: int, length: int) -> list[tuple[int, int]]:
    half = length // 2
    return [(start, half), (start + half, length - half)] if half else [(start, length)]
