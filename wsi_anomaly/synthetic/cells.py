"""Which cells live in which structure, and their stamping on a canvas. Knows no colours, only amounts of stain."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from wsi_anomaly.synthetic.anatomy import Anatomy
from wsi_anomaly.synthetic.bank import VARIANTS
from wsi_anomaly.synthetic.noise import PERIOD_PX, fat_depth_px, lumps, site_randoms
from wsi_anomaly.synthetic.sprites import LARGEST_PX, Cell, sprites_of
from wsi_anomaly.synthetic.structures import MAP_STEP_PX, Structure

Canvas = Float32[np.ndarray, "row column stain"]
Places = Int64[np.ndarray, " site"]

S = Structure


class _Lattice(NamedTuple):
    """Sites where cells may lie, and the chance of each kind to have one, in each structure where there are any."""

    spacing_px: float
    disorder: float
    """Largest deviation from a regular lattice, in spacings."""
    chances: dict[Structure, dict[Cell, float]]
    seed: int
    """Lattices of the same seed and spacing have the same sites."""


_LYMPHOID = {Cell.LYMPHOCYTE: 0.93}
_STROMA = {Cell.SPINDLE: 0.55, Cell.LYMPHOCYTE: 0.06}
_TUMOUR = {S.TUMOUR_NEST: 0.97, S.TUMOUR_GLAND: 0.97, S.LONE_TUMOUR_CELLS: 0.24}

# In the order of painting: what comes later lies on top.
_LATTICES = (
    _Lattice(
        9.6,
        0.42,
        {
            S.BLOOD: {Cell.RED_CELL: 0.88},
            S.MEDULLARY_SINUS: {Cell.RED_CELL: 0.05},
            S.MEDULLARY_CORD: {Cell.RED_CELL: 0.02},
            S.NECROSIS: {Cell.RED_CELL: 0.03},
        },
        seed=1,
    ),
    _Lattice(
        25,
        0.45,
        {
            S.FAT: {Cell.SPINDLE: 0.5},
            S.CAPSULE: _STROMA,
            S.TRABECULA: _STROMA,
            S.VESSEL_WALL: {Cell.SPINDLE: 0.75},
            S.PARACORTEX: {Cell.SPINDLE: 0.14},
            S.MEDULLARY_CORD: {Cell.SPINDLE: 0.15},
            S.SUBCAPSULAR_SINUS: {Cell.SPINDLE: 0.2},
            S.TRABECULAR_SINUS: {Cell.SPINDLE: 0.2},
            S.MEDULLARY_SINUS: {Cell.SPINDLE: 0.12},
            S.TUMOUR_STROMA: {Cell.SPINDLE: 0.75, Cell.LYMPHOCYTE: 0.15},
            S.FIBROSIS: {Cell.SPINDLE: 0.35, Cell.LYMPHOCYTE: 0.03},
        },
        seed=2,
    ),
    _Lattice(34, 0.45, {S.NECROSIS: {Cell.GHOST: 0.75}, S.NUCLEAR_DUST: {Cell.GHOST: 0.4}}, seed=3),
    _Lattice(
        17,
        0.4,
        {
            S.GERMINAL_CENTRE: {Cell.CENTROBLAST: 0.46, Cell.CENTROCYTE: 0.4, Cell.LYMPHOCYTE: 0.08},
            S.PARACORTEX: {Cell.CENTROBLAST: 0.06},
            S.HIGH_ENDOTHELIAL_VENULE: {Cell.ENDOTHELIUM: 0.8},
        },
        seed=5,
    ),
    _Lattice(
        13.3,
        0.42,
        {
            S.PARACORTEX: _LYMPHOID,
            S.PRIMARY_FOLLICLE: {Cell.LYMPHOCYTE: 0.97},
            S.MANTLE_ZONE: {Cell.LYMPHOCYTE: 1.0},
            S.MEDULLARY_CORD: {Cell.LYMPHOCYTE: 0.6},
            S.SUBCAPSULAR_SINUS: {Cell.LYMPHOCYTE: 0.16},
            S.TRABECULAR_SINUS: {Cell.LYMPHOCYTE: 0.22},
            S.MEDULLARY_SINUS: {Cell.LYMPHOCYTE: 0.22},
            S.HIGH_ENDOTHELIAL_VENULE: {Cell.LYMPHOCYTE: 0.12},
            S.TUMOUR_STROMA: {Cell.LYMPHOCYTE: 0.16},
            S.TUMOUR_NEST: {Cell.LYMPHOCYTE: 0.015},
            S.LONE_TUMOUR_CELLS: _LYMPHOID,
        },
        seed=6,
    ),
    _Lattice(
        21,
        0.45,
        {
            S.MEDULLARY_CORD: {Cell.PLASMA_CELL: 0.42},
            S.PARACORTEX: {Cell.PLASMA_CELL: 0.01},
            S.NUCLEAR_DUST: {Cell.DEBRIS: 0.85},
            S.NECROSIS: {Cell.DEBRIS: 0.5},
        },
        seed=7,
    ),
    _Lattice(
        34,
        0.45,
        {
            S.SUBCAPSULAR_SINUS: {Cell.HISTIOCYTE: 0.4},
            S.TRABECULAR_SINUS: {Cell.HISTIOCYTE: 0.45},
            S.MEDULLARY_SINUS: {Cell.HISTIOCYTE: 0.6},
            S.MEDULLARY_CORD: {Cell.HISTIOCYTE: 0.1},
            S.PARACORTEX: {Cell.HISTIOCYTE: 0.06},
            S.GERMINAL_CENTRE: {Cell.MITOSIS: 0.03},
            S.MUCIN: {Cell.SIGNET_RING_CELL: 0.28},
            S.TUMOUR_NEST: {Cell.MITOSIS: 0.02},
        },
        seed=8,
    ),
    _Lattice(62, 0.45, {S.GERMINAL_CENTRE: {Cell.TINGIBLE_BODY_MACROPHAGE: 0.36}}, seed=9),
    # The nucleus of a carcinoma cell lies on its body: the same sites, taken by the same chance.
    _Lattice(26, 0.3, {place: {Cell.TUMOUR_BODY: chance} for place, chance in _TUMOUR.items()}, seed=4),
    _Lattice(26, 0.3, {place: {Cell.DARK_TUMOUR_NUCLEUS: chance} for place, chance in _TUMOUR.items()}, seed=4),
)


class Neighbourhood(NamedTuple):
    """What decides which cells a slide has at a place."""

    seed: int
    anatomy: Anatomy
    crowding: float
    """Scales all chances."""
    paleness: float
    """The share of tumour nuclei with open chromatin."""


def stamp_cells(canvas: Canvas, slide: Neighbourhood, *, origin_px: tuple[int, int], margin_px: int) -> None:
    """Stamp every cell that reaches into a region; its top left is `margin_px` inside the canvas, which it may use up.

    `origin_px`: the region's top left (x, y) on the slide.
    """
    left, top = origin_px[0] - margin_px, origin_px[1] - margin_px
    for lattice in _LATTICES:
        x, y, randoms = _sites(lattice, slide.seed, (left, top), canvas.shape)
        cells = _inhabitants(lattice, slide, x, y, randoms)
        variants = (randoms[1] * VARIANTS).astype(np.int64)
        if Cell.SPINDLE in cells:
            along = _along_fibres(slide.anatomy, x, y)
            variants = np.where(
                cells == Cell.SPINDLE, (along + (randoms[1] * 13).astype(np.int64) - 6) % VARIANTS, variants
            )
        taken = np.flatnonzero(cells >= 0)
        # An order of the sites' own: by rows, cells would lie on each other like scales.
        taken = taken[np.argsort(randoms[2][taken], kind="stable")]
        _stamp(canvas, cells[taken], x[taken] - left, y[taken] - top, variants[taken])


def _sites(
    lattice: _Lattice, seed: int, corner_px: tuple[int, int], shape: tuple[int, ...]
) -> tuple[Places, Places, Float32[np.ndarray, "number site"]]:
    """The sites, in level-0 pixels, whose sprites lie wholly on a canvas, with four random numbers for each."""
    across, down = lattice.spacing_px, 0.9 * lattice.spacing_px
    rows = np.arange(int(corner_px[1] // down) - 1, int((corner_px[1] + shape[0]) // down) + 2)
    columns = np.arange(int(corner_px[0] // across) - 2, int((corner_px[0] + shape[1]) // across) + 2)
    row, column = (index.ravel() for index in np.meshgrid(rows, columns, indexing="ij"))
    randoms = site_randoms(1000 * seed + lattice.seed, column, row, 6)
    shift = (randoms[4:] - 0.5) * 2 * lattice.disorder
    x = np.floor((column + 0.5 * (row % 2) + shift[0]) * across).astype(np.int64)
    y = np.floor(row * down + shift[1] * across).astype(np.int64)
    half = LARGEST_PX // 2
    on_x = (x - corner_px[0] >= half) & (x - corner_px[0] < shape[1] - half)
    on_y = (y - corner_px[1] >= half) & (y - corner_px[1] < shape[0] - half)
    here = on_x & on_y
    return x[here], y[here], randoms[:4, here]


def _inhabitants(
    lattice: _Lattice, slide: Neighbourhood, x: Places, y: Places, randoms: Float32[np.ndarray, "number site"]
) -> Places:
    """The kind of cell at each site, -1 for none."""
    structure = _at(slide.anatomy.structures, x, y).astype(np.int64)
    cells = np.full(x.size, -1)
    shift_x, shift_y = slide.anatomy.texture_px
    texel = ((y + shift_y) % PERIOD_PX, (x + shift_x) % PERIOD_PX)
    crowding = slide.crowding * (1 + 0.07 * lumps(40.0)[texel])
    for place, chances in lattice.chances.items():
        here = np.flatnonzero(structure == place)
        if here.size:
            bounds = np.cumsum(list(chances.values()))
            chosen = np.searchsorted(bounds, randoms[0][here] / crowding[here], side="right")
            cells[here] = np.append(list(chances), -1)[chosen]
    cells[(cells == Cell.DARK_TUMOUR_NUCLEUS) & (randoms[3] < slide.paleness)] = Cell.PALE_TUMOUR_NUCLEUS
    # Fat cells have their nuclei in their walls.
    cells[(structure == Structure.FAT) & (fat_depth_px()[texel] > 1)] = -1
    return cells


def _along_fibres(anatomy: Anatomy, x: Places, y: Places) -> Places:
    """The variant whose long axis follows the fibres at each place."""
    down = _at(anatomy.grain, x, y + MAP_STEP_PX) - _at(anatomy.grain, x, y - MAP_STEP_PX)
    right = _at(anatomy.grain, x + MAP_STEP_PX, y) - _at(anatomy.grain, x - MAP_STEP_PX, y)
    return np.asarray(np.round((np.arctan2(down, right) / np.pi + 0.5) * VARIANTS), np.int64)


def _at(field: np.ndarray, x: Places, y: Places) -> np.ndarray:
    """A field of the map at places of the slide; beyond the edge, as at the edge."""
    row = np.clip(y // MAP_STEP_PX, 0, field.shape[0] - 1)
    return field[row, np.clip(x // MAP_STEP_PX, 0, field.shape[1] - 1)]


def _stamp(canvas: Canvas, cells: Places, x: Places, y: Places, variants: Places) -> None:
    for cell, column, row, variant in zip(cells.tolist(), x.tolist(), y.tolist(), variants.tolist(), strict=True):
        sprites = sprites_of(Cell(cell))
        half = sprites.ink.shape[1] // 2
        place = canvas[row - half : row + half, column - half : column + half]
        place *= sprites.keep[variant]
        place += sprites.ink[variant]
