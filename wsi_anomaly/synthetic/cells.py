"""Which cells live in which compartment, and their stamping on a canvas. Knows no colours, only amounts of stain."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from wsi_anomaly.synthetic.anatomy import MAP_STEP_PX, Anatomy, Compartment
from wsi_anomaly.synthetic.sprites import LARGEST_PX, VARIANTS, Cell, sprites_of

Canvas = Float32[np.ndarray, "row column stain"]
Places = Int64[np.ndarray, " place"]


class _Population(NamedTuple):
    """How close cells of a kind lie, and the chance that a place is taken in each compartment where there are any."""

    spacing_px: float
    disorder: float
    """Deviation from a regular grid, in spacings."""
    taken: dict[Compartment, float]


# In the order of painting: what comes later lies on top.
_POPULATIONS = {
    Cell.RED_CELL: _Population(
        10, 0.2, {Compartment.BLOOD: 0.9, Compartment.MEDULLARY_CORD: 0.03, Compartment.NECROSIS: 0.04}
    ),
    Cell.SPINDLE: _Population(
        27,
        0.2,
        {
            Compartment.COLLAGEN: 0.6,
            Compartment.PARACORTEX: 0.12,
            Compartment.MEDULLARY_CORD: 0.15,
            Compartment.SINUS: 0.2,
            Compartment.TUMOUR_STROMA: 0.9,
        },
    ),
    Cell.GHOST: _Population(34, 0.2, {Compartment.NECROSIS: 0.75, Compartment.NUCLEAR_DUST: 0.4}),
    Cell.TUMOUR_BODY: _Population(28, 0.12, {Compartment.TUMOUR_NEST: 0.95}),
    Cell.TUMOUR_NUCLEUS: _Population(28, 0.12, {Compartment.TUMOUR_NEST: 0.95}),
    Cell.CENTROBLAST: _Population(18, 0.2, {Compartment.GERMINAL_CENTRE: 0.92, Compartment.PARACORTEX: 0.06}),
    Cell.MACROPHAGE: _Population(
        34,
        0.2,
        {
            Compartment.SINUS: 0.45,
            Compartment.GERMINAL_CENTRE: 0.14,
            Compartment.MEDULLARY_CORD: 0.2,
            Compartment.PARACORTEX: 0.06,
        },
    ),
    Cell.LYMPHOCYTE: _Population(
        14.2,
        0.2,
        {
            Compartment.PARACORTEX: 0.88,
            Compartment.MANTLE: 1.0,
            Compartment.MEDULLARY_CORD: 0.75,
            Compartment.SINUS: 0.22,
            Compartment.GERMINAL_CENTRE: 0.06,
            Compartment.COLLAGEN: 0.03,
            Compartment.TUMOUR_STROMA: 0.25,
        },
    ),
    Cell.DEBRIS: _Population(
        24, 0.2, {Compartment.NUCLEAR_DUST: 0.8, Compartment.NECROSIS: 0.4, Compartment.TUMOUR_NEST: 0.02}
    ),
}


def stamp_cells(rng: np.random.Generator, canvas: Canvas, anatomy: Anatomy, *, margin_px: int, crowding: float) -> None:
    """Stamp every cell of the slide. `margin_px` of the canvas lie beyond each edge; `crowding` scales all chances."""
    along_fibres = _along_fibres(anatomy)
    for cell, population in _POPULATIONS.items():
        chance = np.zeros(len(Compartment))
        for compartment, taken in population.taken.items():
            chance[compartment] = taken * crowding
        x, y = _positions(rng, canvas.shape, population)
        row = np.clip((y - margin_px) // MAP_STEP_PX, 0, anatomy.compartments.shape[0] - 1)
        column = np.clip((x - margin_px) // MAP_STEP_PX, 0, anatomy.compartments.shape[1] - 1)
        settled = rng.random(x.size) < chance[anatomy.compartments[row, column]]
        if cell is Cell.SPINDLE:
            variants = (along_fibres[row, column] + rng.integers(-5, 6, x.size)) % VARIANTS
        else:
            variants = rng.integers(VARIANTS, size=x.size)
        _stamp(canvas, cell, x[settled], y[settled], variants[settled])


def _along_fibres(anatomy: Anatomy) -> Int64[np.ndarray, "row column"]:
    """The variant whose long axis follows the fibres, for each place of the map."""
    down, right = np.gradient(anatomy.grain)
    return np.asarray(np.round((np.arctan2(down, right) / np.pi + 0.5) * VARIANTS), np.int64)


def _positions(rng: np.random.Generator, shape: tuple[int, ...], population: _Population) -> tuple[Places, Places]:
    """A shaken hexagonal grid of places, x and y on the canvas; none so near its edge that a sprite would hang over."""
    spacing_px = population.spacing_px
    y, x = np.mgrid[0 : shape[0] : spacing_px * 0.93, 0 : shape[1] : spacing_px]
    x[1::2] += spacing_px / 2
    shaken = np.stack([x.ravel(), y.ravel()]) + rng.normal(0, population.disorder * spacing_px, (2, x.size))
    ends = np.array([[shape[1]], [shape[0]]]) - LARGEST_PX // 2
    x_px, y_px = shaken[:, np.all((shaken >= LARGEST_PX // 2) & (shaken < ends), axis=0)].astype(np.int64)
    return x_px, y_px


def _stamp(canvas: Canvas, cell: Cell, x: Places, y: Places, variants: Places) -> None:
    sprites = sprites_of(cell)
    side = sprites.ink.shape[1]
    for left, top, variant in zip((x - side // 2).tolist(), (y - side // 2).tolist(), variants.tolist(), strict=True):
        place = canvas[top : top + side, left : left + side]
        place *= sprites.keep[variant]
        place += sprites.ink[variant]
