"""How unlikely the noise is that a network sees at a place of a tile, given what it sees around. Knows no network.

After Mahmood, "Spatial-MSMA" (thesis, chapter 5), without its embedding of position: in tissue no place is special.
"""

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt64
from torch import nn
from torch.nn.functional import avg_pool2d

from wsi_anomaly.detectors.flow import Flow, fit_flow
from wsi_anomaly.detectors.score_norms import Maps
from wsi_anomaly.detectors.training import split_tiles

CELLS_A_TILE = 64
"""How many places of a tile the flow learns from, at most."""

Cells = Float32[torch.Tensor, "tile value row column"]


def cells_of(maps: Maps, *, kernel_px: int, cell_px: int) -> Cells:
    """For each cell of a tile the local norms at each level, their means around it, and their means over the tile.

    A local norm is that of a square of `kernel_px` around a pixel, of all colours; a cell has the mean of its own.
    """
    squares = maps.square().sum(dim=2)
    sums = avg_pool2d(squares, kernel_px, stride=1, padding=kernel_px // 2) * kernel_px**2
    norms = avg_pool2d(sums.sqrt(), cell_px)
    ones = torch.ones_like(norms)
    around, count = (9 * avg_pool2d(values, 3, stride=1, padding=1) - values for values in (norms, ones))
    tile = norms.mean(dim=(2, 3), keepdim=True).expand_as(norms)
    return torch.cat([norms, around / count.clamp(min=1), tile], dim=1)


def some_cells(
    cells: Float32[np.ndarray, "tile value row column"], seeds: UInt64[np.ndarray, " tile"]
) -> Float32[np.ndarray, "tile cell value"]:
    """Some of each tile's cells, drawn with its seed."""
    rows = cells.reshape(*cells.shape[:2], -1).swapaxes(1, 2)
    most = min(CELLS_A_TILE, rows.shape[1])
    drawn = [np.random.default_rng(int(seed)).permutation(rows.shape[1])[:most] for seed in seeds]
    return np.stack([row[chosen] for row, chosen in zip(rows, drawn, strict=True)])


class SpatialFlow(nn.Module):
    """A conditional flow with what it standardises by; a third of the values is judged, two thirds are its context."""

    middle: torch.Tensor
    scale: torch.Tensor

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.register_buffer("middle", torch.zeros(3 * levels))
        self.register_buffer("scale", torch.ones(3 * levels))
        with torch.random.fork_rng(devices=[]):  # layers draw from the caller's random state, for nothing
            self.flow = Flow(levels, 2 * levels)

    def forward(self, cells: Cells) -> Float[torch.Tensor, "tile row column"]:
        """-log p of each cell, in nats of the standardised values."""
        rows = (cells.movedim(1, 3).flatten(0, 2) - self.middle) / self.scale
        surprise: torch.Tensor = self.flow(rows[:, : self.levels], rows[:, self.levels :])
        return surprise.view(len(cells), *cells.shape[2:])


def fit_spatial_flow(
    cells: Float32[np.ndarray, "tile cell value"], groups: Int64[np.ndarray, " tile"], *, most_steps: int, seed: int
) -> SpatialFlow:
    """The flow of these cells; it stops learning by those of some groups of tiles."""
    per_tile, values = cells.shape[1:]
    held_out = np.zeros(len(cells), bool)
    held_out[split_tiles(groups, _HELD_OUT, seed=seed)[1]] = True
    rows = cells.reshape(-1, values)
    middle, deviation = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
    scale = np.where(deviation > _ROUNDING * np.abs(middle), deviation, 1.0)
    standard = ((rows - middle) / scale).astype(np.float32)
    fitted = SpatialFlow(values // 3)
    levels = fitted.levels
    fitted.flow = fit_flow(
        standard[:, :levels], standard[:, levels:], held_out.repeat(per_tile), seed=seed, most_steps=most_steps
    )
    fitted.middle.copy_(torch.from_numpy(middle))
    fitted.scale.copy_(torch.from_numpy(scale))
    return fitted.eval()


_HELD_OUT = 0.2
_ROUNDING = 1e-6
