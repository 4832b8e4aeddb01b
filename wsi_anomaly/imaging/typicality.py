"""A self-organising map of vectors: a grid of prototypes, alike ones side by side. Knows no slide, tile or file.

minisom was tried and left out: its first prototypes span one unit instead of the spread of the data, the signs of its
eigenvectors are open, and it takes vector after vector: 95 s for a round of 20,000 with 512 features on 700 cells,
where matrix products take 1.3 s.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64
from scipy.sparse import csr_array

FEWEST = 50
"""Vectors that a map is worth the name with."""
_ROUNDS, _LAST_SPREAD = 30, 1.0
"""Of the training, and how many cells far a vector reaches in the last of them."""
_MOST_OBLONG = 3.0
_VECTORS_AT_ONCE = 4096
_SLIGHT = 1e-6
"""A feature that deviates less, against its mean, is the same everywhere but for rounding."""


@dataclass(frozen=True, slots=True)
class TypicalityMap:
    """Prototypes on a grid, and how vectors are standardised before they are held against them."""

    prototypes: Float32[np.ndarray, "row column feature"]
    """In deviations from the mean."""
    mean: Float32[np.ndarray, " feature"]
    deviation: Float32[np.ndarray, " feature"]
    """Infinite where a feature was the same everywhere: it tells nothing, not even of new vectors."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.prototypes.shape[0], self.prototypes.shape[1]

    def standardised(self, vectors: Float32[np.ndarray, "tile feature"]) -> Float32[np.ndarray, "tile feature"]:
        """In deviations from the mean."""
        return (vectors - self.mean) / self.deviation


@dataclass(frozen=True, slots=True)
class Placement:
    """Where vectors lie on a map."""

    cell: Int64[np.ndarray, " tile"]
    """Of the nearest prototype: row * columns + column."""
    distance: Float32[np.ndarray, " tile"]
    """To it: Euclidean, of standardised vectors."""


class Census:
    """Counts what lies in each cell of a map, some vectors after others."""

    def __init__(self, shape: tuple[int, int], *, groups: int) -> None:
        cells = shape[0] * shape[1]
        self._shape = shape
        self._hits = np.zeros((groups, cells), np.int64)
        self._z_sum, self._z_count = np.zeros(cells), np.zeros(cells, np.int64)
        self._distance = 0.0
        self._nearest = np.full((cells, 2), -1, np.int64)
        self._nearest_distance = np.full(cells, np.inf)
        self.all_hits = np.zeros(shape, np.int64)
        """By row and column, those of no group too."""

    def add(
        self,
        placement: Placement,
        *,
        group: Int64[np.ndarray, " tile"],
        z: Float64[np.ndarray, " tile"],
        source: int,
        tile: Int64[np.ndarray, " tile"],
    ) -> None:
        """Vectors of one source; -1 for those of no group, NaN for those without z. Earlier ones win ties."""
        cells = self._nearest_distance.size
        grouped = group >= 0
        at = group[grouped] * cells + placement.cell[grouped]
        self._hits += np.bincount(at, minlength=self._hits.size).reshape(self._hits.shape)
        known = np.isfinite(z)
        self._z_sum += np.bincount(placement.cell[known], z[known], minlength=cells)
        self._z_count += np.bincount(placement.cell[known], minlength=cells)
        self._distance += float(placement.distance.sum(dtype=np.float64))
        self.all_hits += np.bincount(placement.cell, minlength=cells).reshape(self._shape)
        order = np.lexsort((placement.distance, placement.cell))
        filled, first = np.unique(placement.cell[order], return_index=True)
        best = order[first]
        nearer = placement.distance[best] < self._nearest_distance[filled]
        self._nearest_distance[filled[nearer]] = placement.distance[best[nearer]]
        self._nearest[filled[nearer], 0] = source
        self._nearest[filled[nearer], 1] = tile[best[nearer]]

    @property
    def hits(self) -> Int64[np.ndarray, "group row column"]:
        """How many of each group."""
        return self._hits.reshape(-1, *self._shape)

    @property
    def mean_z(self) -> Float64[np.ndarray, "row column"]:
        """NaN where nothing has a z."""
        empty = self._z_count == 0
        return np.where(empty, np.nan, self._z_sum / np.maximum(self._z_count, 1)).reshape(self._shape)

    @property
    def nearest(self) -> Int64[np.ndarray, "row column 2"]:
        """Source and tile of the vector that lies nearest to the prototype of its cell; -1 where none lies in it."""
        return self._nearest.reshape(*self._shape, 2)

    @property
    def quantisation_error(self) -> float:
        """The mean distance of a vector to its prototype."""
        return self._distance / int(self.all_hits.sum())


def fit_map(
    vectors: Float32[np.ndarray, "tile feature"], *, rows: int | None = None, columns: int | None = None
) -> TypicalityMap:
    """The map of some vectors: the same for the same vectors, since nothing is drawn by chance.

    Prototypes begin on the plane of the first two principal components (Kinouchi et al. 2002) and become, round after
    round, the means of all vectors, weighted by a Gaussian of the distance on the grid that narrows to one cell
    (Kohonen 2013, batch algorithm). Without `rows` and `columns` there are 5 sqrt(n) cells, the sides as the deviations
    along both components.

    Raises:
        ValueError: fewer than 50 vectors, or fewer than two features that differ between them.
    """
    if len(vectors) < FEWEST:
        raise ValueError(f"{len(vectors)} vectors; a map needs {FEWEST}")
    mean, deviation = vectors.mean(0, dtype=np.float64), vectors.std(0, dtype=np.float64)
    differs = deviation > _SLIGHT * np.maximum(np.abs(mean), _SLIGHT)
    if differs.sum() < 2:  # noqa: PLR2004 - a plane has two axes
        raise ValueError(f"{differs.sum()} features that differ; a map needs 2")
    mean, deviation = mean.astype(np.float32), np.where(differs, deviation, np.inf).astype(np.float32)
    standard = (vectors - mean) / deviation
    axes, spreads = _principal_axes(standard)
    shape = grid_shape(len(vectors), (float(spreads[0]), float(spreads[1])), rows=rows, columns=columns)
    down, across = (np.linspace(-1, 1, side) for side in shape)
    prototypes = (across[None, :, None] * axes[0] + down[:, None, None] * axes[1]).astype(np.float32)
    start = max(max(shape) / 4, _LAST_SPREAD)
    for spread in np.geomspace(start, _LAST_SPREAD, _ROUNDS).tolist():
        prototypes = _next_prototypes(prototypes, standard, spread)
    return TypicalityMap(prototypes, mean, deviation)


def grid_shape(
    vectors: int, spreads: tuple[float, float], *, rows: int | None = None, columns: int | None = None
) -> tuple[int, int]:
    """Rows and columns: about 5 sqrt(n) cells, the longer side across, at least two and at most three times as long."""
    cells = 5 * np.sqrt(vectors)
    oblong = min(spreads[0] / max(spreads[1], spreads[0] / _MOST_OBLONG), _MOST_OBLONG)
    if rows is None:
        rows = max(round(cells / columns if columns else np.sqrt(cells / oblong)), 2)
    return rows, columns or max(round(cells / rows), 2)


def place(typicality: TypicalityMap, vectors: Float32[np.ndarray, "tile feature"]) -> Placement:
    """Hold vectors against all prototypes."""
    flat = typicality.prototypes.reshape(-1, typicality.prototypes.shape[2])
    squares = _squared_distances(flat, typicality.standardised(vectors))
    cell = squares.argmin(axis=1)
    return Placement(cell, np.sqrt(squares[np.arange(len(vectors)), cell]))


def u_matrix(typicality: TypicalityMap) -> Float64[np.ndarray, "row column"]:
    """The mean distance of each prototype to those above, below, left and right: high between kinds of tissue."""
    prototypes = typicality.prototypes.astype(np.float64)
    total, count = np.zeros(typicality.shape), np.zeros(typicality.shape)
    for axis in (0, 1):
        step = np.linalg.norm(np.diff(prototypes, axis=axis), axis=2)
        for pad in ((1, 0), (0, 1)):
            width = [pad if axis == 0 else (0, 0), pad if axis == 1 else (0, 0)]
            total += np.pad(step, width)
            count += np.pad(np.ones_like(step), width)
    return total / count


def _principal_axes(
    standard: Float32[np.ndarray, "tile feature"],
) -> tuple[Float64[np.ndarray, "2 feature"], Float64[np.ndarray, "2"]]:
    """The first two, each as long as the deviation along it, and these; signs by the largest component."""
    values, vectors = np.linalg.eigh((standard.T @ standard / len(standard)).astype(np.float64))
    axes = vectors[:, :-3:-1].T
    axes = axes * np.sign(axes[[0, 1], np.abs(axes).argmax(axis=1)])[:, None]
    spreads = np.sqrt(np.maximum(values[:-3:-1], 0))
    return axes * spreads[:, None], spreads


def _next_prototypes(
    prototypes: Float32[np.ndarray, "row column feature"], standard: Float32[np.ndarray, "tile feature"], spread: float
) -> Float32[np.ndarray, "row column feature"]:
    """Means of all vectors, weighted by how far from each cell their nearest prototype is."""
    rows, columns, features = prototypes.shape
    flat = prototypes.reshape(-1, features)
    parts = [standard[start : start + _VECTORS_AT_ONCE] for start in range(0, len(standard), _VECTORS_AT_ONCE)]
    cell = np.concatenate([_squared_distances(flat, part).argmin(axis=1) for part in parts])
    members = csr_array((np.ones(len(cell), np.float32), (cell, np.arange(len(cell)))), (len(flat), len(cell)))
    sums = np.asarray(members @ standard, np.float64).reshape(prototypes.shape)
    counts = np.bincount(cell, minlength=len(flat)).reshape(rows, columns, 1).astype(np.float64)
    # A Gaussian on the grid is one along the rows times one along the columns.
    along_rows, along_columns = (_gaussian(side, spread) for side in (rows, columns))
    weighted, weights = (
        np.einsum("ri,cj,ijf->rcf", along_rows, along_columns, part, optimize=True) for part in (sums, counts)
    )
    return np.asarray(weighted / weights, np.float32)


def _gaussian(side: int, spread: float) -> Float64[np.ndarray, "side side"]:
    """Of the distance of two places on a side, nowhere zero, so that far cells have a mean too."""
    steps = np.arange(side, dtype=np.float64)
    return np.maximum(np.exp(-((steps[:, None] - steps) ** 2) / (2 * spread**2)), 1e-140)


def _squared_distances(
    prototypes: Float32[np.ndarray, "cell feature"], standard: Float32[np.ndarray, "tile feature"]
) -> Float32[np.ndarray, "tile cell"]:
    """Euclidean."""
    products = standard @ prototypes.T
    squares = (standard**2).sum(1)[:, None] + (prototypes**2).sum(1) - 2 * products
    return np.maximum(squares, np.float32(0))
