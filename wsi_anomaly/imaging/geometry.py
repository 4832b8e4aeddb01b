"""The tile grid of a slide: pure arithmetic between grid cells, level-0 pixels and the pixels of an overview."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, UInt32


@dataclass(frozen=True, slots=True)
class Grid:
    """The cells on which tiles may lie, one `stride` apart."""

    origin_level0_px: tuple[int, int]
    """Top left corner of the cell (0, 0): where the slide's bounds begin."""
    stride_level0_px: tuple[float, float]
    footprint_level0_px: tuple[float, float]
    """Width and height of a tile."""
    shape: tuple[int, int]
    """Rows and columns."""

    @classmethod
    def over(
        cls,
        bounds_level0_px: tuple[int, int, int, int],
        *,
        downsample: tuple[float, float],
        tile_px: int,
        stride_px: int,
    ) -> "Grid":
        """The grid that covers the bounds (x, y, width, height); the last row and column may overhang them.

        `downsample`: level-0 pixels for one pixel of a tile, along x and y.
        """
        x, y, width, height = bounds_level0_px
        stride = (stride_px * downsample[0], stride_px * downsample[1])
        return cls(
            origin_level0_px=(x, y),
            stride_level0_px=stride,
            footprint_level0_px=(tile_px * downsample[0], tile_px * downsample[1]),
            shape=(max(1, int(np.ceil(height / stride[1]))), max(1, int(np.ceil(width / stride[0])))),
        )

    def cells(self) -> Int32[np.ndarray, "cell rowcol"]:
        """Every cell, row by row."""
        return np.indices(self.shape, dtype=np.int32).reshape(2, -1).T.copy()

    def origins(self, cells: Int32[np.ndarray, "cell rowcol"]) -> Int64[np.ndarray, "cell xy"]:
        """The level-0 pixel at the top left of each cell."""
        steps = cells[:, ::-1] * np.array(self.stride_level0_px)
        return np.asarray(np.rint(steps + self.origin_level0_px), np.int64)

    def boxes(self, cells: Int32[np.ndarray, "cell rowcol"]) -> Float64[np.ndarray, "cell corners"]:
        """The part of the slide that each cell stands for, as (x0, y0, x1, y1) in level-0 pixels.

        Neighbouring cells share an edge exactly; where tiles overlap, a cell is smaller than its tile.
        """
        stride, origin = np.array(self.stride_level0_px), np.array(self.origin_level0_px)
        columns_rows = cells[:, ::-1]
        corners = np.hstack([columns_rows * stride + origin, (columns_rows + 1) * stride + origin])
        return np.asarray(np.rint(corners), np.float64)


def area_fraction(
    mask: Bool[np.ndarray, "row column"], boxes: Float64[np.ndarray, "box corners"]
) -> Float64[np.ndarray, " box"]:
    """The share of each box (x0, y0, x1, y1, in mask pixels, any fractions) that the mask covers.

    What lies outside the mask counts as not covered. Exact for pixels as unit squares: the integral image is
    interpolated linearly between its nodes, which is its true value there.
    """
    integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.uint32)  # in place: it is the largest array here
    np.cumsum(mask, axis=0, out=integral[1:, 1:])
    np.cumsum(integral, axis=1, out=integral)
    x0, y0, x1, y1 = boxes.T
    covered = (
        _interpolated(integral, y1, x1)
        - _interpolated(integral, y0, x1)
        - _interpolated(integral, y1, x0)
        + _interpolated(integral, y0, x0)
    )
    return np.asarray(np.clip(covered / ((x1 - x0) * (y1 - y0)), 0.0, 1.0))


def _interpolated(
    nodes: UInt32[np.ndarray, "row column"],
    rows: Float64[np.ndarray, " point"],
    columns: Float64[np.ndarray, " point"],
) -> Float64[np.ndarray, " point"]:
    rows, columns = np.clip(rows, 0, nodes.shape[0] - 1), np.clip(columns, 0, nodes.shape[1] - 1)
    row, column = np.floor(rows).astype(int), np.floor(columns).astype(int)
    next_row, next_column = np.minimum(row + 1, nodes.shape[0] - 1), np.minimum(column + 1, nodes.shape[1] - 1)
    down, right = rows - row, columns - column
    upper = nodes[row, column] * (1 - right) + nodes[row, next_column] * right
    lower = nodes[next_row, column] * (1 - right) + nodes[next_row, next_column] * right
    return np.asarray(upper * (1 - down) + lower * down)
