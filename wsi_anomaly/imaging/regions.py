"""Regions: connected cells over a threshold, as polygons in level-0 pixels."""

from dataclasses import dataclass

import numpy as np
import shapely
from jaxtyping import Bool, Float32
from scipy import ndimage

from wsi_anomaly.imaging.geometry import Grid


@dataclass(frozen=True, slots=True)
class Region:
    """One connected area over the threshold."""

    polygon: shapely.Polygon
    """In level-0 pixels, with holes."""
    cells: int
    z_max: float
    z_mean: float


def regions_over(z: Float32[np.ndarray, "row column"], threshold_z: float, grid: Grid) -> tuple[Region, ...]:
    """The areas of `z` > `threshold_z`, highest z first. Cells that share an edge belong together."""
    labels, _ = ndimage.label(np.nan_to_num(z, nan=-np.inf) > threshold_z)
    found = [
        _region(labels[window] == label, z[window], grid, first_cell=(window[0].start, window[1].start))
        for label, window in enumerate(ndimage.find_objects(labels), start=1)
    ]
    return tuple(sorted(found, key=lambda region: -region.z_max))


def _region(
    inside: Bool[np.ndarray, "row column"],
    z: Float32[np.ndarray, "row column"],
    grid: Grid,
    *,
    first_cell: tuple[int, int],
) -> Region:
    cells = (np.argwhere(inside) + first_cell).astype(np.int32)
    values = z[inside].astype(np.float64)
    polygon = shapely.union_all(shapely.box(*grid.boxes(cells).T))
    return Region(polygon, cells=len(cells), z_max=float(values.max()), z_mean=float(values.mean()))
