"""Pictures of single cells as amounts of haematoxylin and eosin, many of each kind. Knows no slide.

Sizes are level-0 pixels of 0.5 µm: a small lymphocyte has a nucleus of 5-7 µm, a carcinoma cell one of 10-20 µm.
"""

from collections.abc import Callable
from enum import IntEnum
from functools import cache

import numpy as np

from wsi_anomaly.synthetic.bank import Bank, Sprites

LARGEST_PX = 72
"""No sprite is wider."""


class Cell(IntEnum):
    """Kinds of cells, and of what is left of dead ones."""

    LYMPHOCYTE = 0
    CENTROBLAST = 1
    CENTROCYTE = 2
    PLASMA_CELL = 3
    HISTIOCYTE = 4
    TINGIBLE_BODY_MACROPHAGE = 5
    SPINDLE = 6
    ENDOTHELIUM = 7
    RED_CELL = 8
    TUMOUR_BODY = 9
    DARK_TUMOUR_NUCLEUS = 10
    PALE_TUMOUR_NUCLEUS = 11
    SIGNET_RING_CELL = 12
    MITOSIS = 13
    GHOST = 14
    DEBRIS = 15


@cache
def sprites_of(cell: Cell) -> Sprites:
    """The pictures of one kind, the same for every slide."""
    return _PAINTERS[cell](cell)


def _lymphocyte(seed: int) -> Sprites:
    """A small round dark nucleus with clumped chromatin and hardly any cytoplasm."""
    bank = Bank(seed, 22)
    nucleus = bank.blob(bank.uniform(4.9, 6.3), stretch=bank.uniform(1.0, 1.3), wobble=0.16)
    bank.paint(nucleus + 1.7, 0.09, 0.17, opacity=0.6)
    # Some lie deep in the section: paler, and what is behind them shows.
    depth = bank.uniform(0.0, 1.0) ** 0.6
    bank.nucleus(nucleus, 0.5 + 0.28 * depth, clumps=0.28, clump_px=1.1, rim=0.1, opacity=0.72 + 0.24 * depth)
    return bank.finished()


def _centroblast(seed: int) -> Sprites:
    """A larger round vesicular nucleus with nucleoli at its membrane."""
    bank = Bank(seed, 32)
    nucleus = bank.blob(bank.uniform(6.6, 8.8), stretch=bank.uniform(1.0, 1.35), wobble=0.14)
    bank.paint(nucleus + 2.4, 0.2, 0.15, opacity=0.6)
    bank.nucleus(nucleus, bank.uniform(0.26, 0.46), clumps=0.4, clump_px=1.1, rim=0.28, opacity=0.88)
    for _ in range(3):
        nucleolus = np.minimum(bank.blob(bank.uniform(0.5, 1.5), off_px=5.0), nucleus)
        bank.paint(nucleolus, 0.75, 0.2, opacity=0.75)
    return bank.finished()


def _centrocyte(seed: int) -> Sprites:
    """A middle-sized cleaved nucleus without a nucleolus."""
    bank = Bank(seed, 26)
    nucleus = bank.blob(bank.uniform(5.0, 6.8), stretch=bank.uniform(1.2, 1.9), wobble=0.5)
    bank.paint(nucleus + 2.0, 0.12, 0.15, opacity=0.5)
    bank.nucleus(nucleus, bank.uniform(0.36, 0.6), clumps=0.32, clump_px=1.1, rim=0.18, opacity=0.85)
    return bank.finished()


def _plasma_cell(seed: int) -> Sprites:
    """An eccentric nucleus with cartwheel chromatin in an oval of purple cytoplasm, pale beside the nucleus."""
    bank = Bank(seed, 32)
    away = bank.uniform(0.0, 2 * np.pi)
    bank.paint(bank.blob(bank.uniform(8.0, 10.0), stretch=bank.uniform(1.1, 1.5), wobble=0.15), 0.19, 0.24, opacity=0.7)
    bank.paint(bank.blob(bank.uniform(2.0, 3.0)), 0.1, 0.2, opacity=0.6)
    nucleus = bank.blob(bank.uniform(4.8, 5.8), wobble=0.08, off_px=5.0, away=away)
    bank.nucleus(nucleus, bank.uniform(0.6, 0.8), clumps=0.4, clump_px=1.3, rim=0.25, opacity=0.95)
    return bank.finished()


def _histiocyte(seed: int) -> Sprites:
    """A pale bean of a nucleus in much foamy cytoplasm."""
    bank = Bank(seed, 52)
    body = bank.blob(bank.uniform(11.0, 18.0), stretch=bank.uniform(1.0, 1.7), wobble=0.35)
    bank.paint(body, 0.07, 0.2 + 0.05 * bank.texture(1.6), opacity=np.clip(0.25 * body, 0, 0.85))
    nucleus = bank.blob(bank.uniform(5.5, 7.5), stretch=bank.uniform(1.2, 1.9), wobble=0.25, off_px=4.0)
    bank.nucleus(nucleus, bank.uniform(0.24, 0.42), clumps=0.3, clump_px=1.1, rim=0.2)
    bank.paint(np.minimum(bank.blob(bank.uniform(0.4, 1.2), off_px=3.0), nucleus), 0.6, 0.2, opacity=0.7)
    return bank.finished()


def _tingible_body_macrophage(seed: int) -> Sprites:
    """Much clear cytoplasm with crumbs of eaten cells, and a pale nucleus at one side."""
    bank = Bank(seed, 60)
    body = bank.blob(bank.uniform(11.0, 21.0), stretch=bank.uniform(1.0, 1.6), wobble=0.5)
    bank.paint(body, 0.02, 0.08 + 0.03 * bank.texture(1.8), opacity=np.clip(0.35 * body, 0, 0.92))
    away = bank.uniform(0.0, 2 * np.pi)
    nucleus = bank.blob(bank.uniform(6.0, 7.5), stretch=bank.uniform(1.2, 1.7), wobble=0.2, off_px=11.0, away=away)
    bank.nucleus(nucleus, bank.uniform(0.22, 0.32), clumps=0.3, clump_px=1.1, rim=0.22)
    for _ in range(4):
        crumb = bank.blob(bank.uniform(0.6, 3.2), wobble=0.3, off_px=9.0)
        bank.paint(crumb + 1.5, 0.08, 0.28, opacity=0.5)
        bank.paint(crumb, bank.uniform(0.8, 1.3), 0.3)
    return bank.finished()


def _spindle(seed: int) -> Sprites:
    """The long thin nucleus of a fibroblast."""
    bank = Bank(seed, 44)
    nucleus = bank.blob(bank.uniform(3.5, 5.4), stretch=bank.uniform(2.6, 6.5), wobble=0.2)
    bank.nucleus(nucleus, bank.uniform(0.4, 0.75), clumps=0.2, clump_px=1.2, rim=0.1, opacity=0.85)
    return bank.finished()


def _endothelium(seed: int) -> Sprites:
    """A plump oval nucleus in pale cytoplasm, as high endothelium has."""
    bank = Bank(seed, 34)
    nucleus = bank.blob(bank.uniform(5.6, 7.0), stretch=bank.uniform(1.4, 2.1), wobble=0.15)
    bank.paint(nucleus + 3, 0.08, 0.24, opacity=0.7)
    bank.nucleus(nucleus, bank.uniform(0.26, 0.42), clumps=0.28, clump_px=1.1, rim=0.22)
    return bank.finished()


def _red_cell(seed: int) -> Sprites:
    """A disc of eosin, paler in the middle."""
    bank = Bank(seed, 22)
    disc = bank.blob(bank.uniform(4.6, 6.6), stretch=bank.uniform(1.0, 1.7), wobble=0.18)
    eosin = bank.uniform(0.42, 0.66)
    bank.paint(disc, 0.0, eosin - 0.05 * np.clip(disc, 0, 5), opacity=0.9)
    return bank.finished()


def _tumour_body(seed: int) -> Sprites:
    """The ample cytoplasm of a carcinoma cell, with its border."""
    bank = Bank(seed, LARGEST_PX)
    body = bank.blob(bank.uniform(16.0, 23.0), stretch=bank.uniform(1.0, 1.5), wobble=0.3)
    border = 0.12 * np.exp(-((body - 1) ** 2) / 2)
    bank.paint(body, bank.uniform(0.1, 0.2), bank.uniform(0.18, 0.34) + border + 0.05 * bank.texture(1.4), opacity=0.8)
    return bank.finished()


def _dark_tumour_nucleus(seed: int) -> Sprites:
    """A large uneven nucleus with coarse dark chromatin."""
    bank = Bank(seed, 56)
    nucleus = bank.blob(bank.uniform(8.5, 15.0), stretch=bank.uniform(1.0, 1.7), wobble=0.35)
    bank.nucleus(nucleus, bank.uniform(0.6, 1.2), clumps=0.5, clump_px=1.6, rim=0.45, opacity=0.95)
    for _ in range(2):
        bank.paint(np.minimum(bank.blob(bank.uniform(1.2, 3.2), off_px=4.0), nucleus), 1.2, 0.6)
    return bank.finished()


def _pale_tumour_nucleus(seed: int) -> Sprites:
    """A large vesicular nucleus: open chromatin, a sharp membrane, a prominent nucleolus."""
    bank = Bank(seed, 56)
    nucleus = bank.blob(bank.uniform(8.0, 13.5), stretch=bank.uniform(1.0, 1.6), wobble=0.22)
    bank.nucleus(nucleus, bank.uniform(0.2, 0.44), clumps=0.5, clump_px=1.3, rim=0.34, opacity=0.9)
    for radius_px in (bank.uniform(1.4, 2.8), bank.uniform(-0.5, 1.6)):
        bank.paint(np.minimum(bank.blob(radius_px, off_px=4.0), nucleus), 0.85, 0.35, opacity=0.9)
    return bank.finished()


def _signet_ring_cell(seed: int) -> Sprites:
    """A vacuole of mucin that pushes the nucleus to the edge as a crescent."""
    bank = Bank(seed, 56)
    away = bank.uniform(0.0, 2 * np.pi)
    body = bank.blob(bank.uniform(13.0, 18.0), wobble=0.12)
    bank.paint(body, 0.16, 0.28, opacity=0.9)
    nucleus = np.minimum(bank.blob(bank.uniform(7.0, 9.0), wobble=0.15, off_px=11.0, away=away), body)
    bank.nucleus(nucleus, bank.uniform(0.6, 0.9), clumps=0.3, clump_px=1.4, rim=0.2, opacity=0.95)
    vacuole = bank.blob(bank.uniform(9.5, 12.0), wobble=0.1, off_px=3.0, away=away + np.float32(np.pi))
    bank.paint(vacuole, 0.12 + 0.03 * bank.texture(2.0), 0.03, opacity=0.95)
    return bank.finished()


def _mitosis(seed: int) -> Sprites:
    """A ragged dark plate in clear cytoplasm."""
    bank = Bank(seed, 40)
    bank.paint(bank.blob(bank.uniform(10.0, 13.0), wobble=0.1), 0.06, 0.16, opacity=0.8)
    plate = bank.blob(bank.uniform(4.0, 6.5), stretch=bank.uniform(1.6, 4.0), wobble=0.5) + bank.texture(1.2)
    bank.paint(plate, 1.05, 0.25, opacity=0.9)
    return bank.finished()


def _ghost(seed: int) -> Sprites:
    """The outline of a dead cell whose nucleus has faded."""
    bank = Bank(seed, 56)
    body = bank.blob(bank.uniform(13.0, 20.0), stretch=bank.uniform(1.0, 1.5), wobble=0.3)
    bank.paint(body, 0.03, bank.uniform(0.3, 0.56) + 0.08 * bank.texture(1.3), opacity=0.75)
    bank.paint(-np.abs(body) + 0.3, 0.03, 0.2, opacity=0.4)
    nucleus = bank.blob(bank.uniform(5.0, 8.0), stretch=bank.uniform(1.0, 1.4), wobble=0.2, off_px=3.0)
    bank.paint(nucleus, bank.uniform(0.05, 0.22), 0.45, opacity=np.clip(0.25 * nucleus, 0, 0.6))
    return bank.finished()


def _debris(seed: int) -> Sprites:
    """A nucleus shrunk to a dark clot or burst into crumbs."""
    bank = Bank(seed, 36)
    whole = bank.some(0.3)
    clot = bank.blob(bank.uniform(3.0, 5.5), stretch=bank.uniform(1.0, 1.8), wobble=0.4)
    bank.paint(np.where(whole, clot, -1), bank.uniform(0.9, 1.4), 0.4)
    for _ in range(7):
        crumb = bank.blob(bank.uniform(0.4, 2.4), wobble=0.4, off_px=9.0)
        bank.paint(np.where(whole, -1, crumb), bank.uniform(0.8, 1.3), 0.4)
    return bank.finished()


_PAINTERS: dict[Cell, Callable[[int], Sprites]] = {
    Cell.LYMPHOCYTE: _lymphocyte,
    Cell.CENTROBLAST: _centroblast,
    Cell.CENTROCYTE: _centrocyte,
    Cell.PLASMA_CELL: _plasma_cell,
    Cell.HISTIOCYTE: _histiocyte,
    Cell.TINGIBLE_BODY_MACROPHAGE: _tingible_body_macrophage,
    Cell.SPINDLE: _spindle,
    Cell.ENDOTHELIUM: _endothelium,
    Cell.RED_CELL: _red_cell,
    Cell.TUMOUR_BODY: _tumour_body,
    Cell.DARK_TUMOUR_NUCLEUS: _dark_tumour_nucleus,
    Cell.PALE_TUMOUR_NUCLEUS: _pale_tumour_nucleus,
    Cell.SIGNET_RING_CELL: _signet_ring_cell,
    Cell.MITOSIS: _mitosis,
    Cell.GHOST: _ghost,
    Cell.DEBRIS: _debris,
}
