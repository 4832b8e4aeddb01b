"""What can be read on a page: its text, where it stands, and whether anything runs into it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from wsi_anomaly.reporting.page import Page

LEAST_MARGIN_PX = 16


def written(page: Page) -> list[Any]:
    """All text artists that say something."""
    return [text for text in page.axes.texts if text.get_text()]


def extents(page: Page, artists: Any) -> Any:
    """Left, bottom, right and top of each, in pixels from the bottom left."""
    renderer = FigureCanvasAgg(page.figure).get_renderer()
    return np.array([artist.get_window_extent(renderer).extents for artist in artists]).reshape(-1, 4)


def overlaps(some: Any, others: Any) -> int:
    """How many pairs run into each other; lines may share two pixels, where only descenders are."""
    left, bottom, right, top = some.T[:, :, None]
    other_left, other_bottom, other_right, other_top = others.T
    across = np.minimum(right, other_right) - np.maximum(left, other_left)
    along = np.minimum(top, other_top) - np.maximum(bottom, other_bottom)
    return int(((across > 0) & (along > 2)).sum())


def within_margins(page: Page, artists: Any) -> bool:
    """Whether they stay away from the border of the page."""
    places, size_px = extents(page, artists), page.figure.get_size_inches() * page.figure.dpi
    return bool((places[:, :2] >= LEAST_MARGIN_PX).all() and (places[:, 2:] <= size_px - LEAST_MARGIN_PX).all())


@pytest.fixture
def texts() -> Callable[[Page], list[str]]:
    """All that is written on a page."""
    return lambda page: [text.get_text() for text in written(page)]


@pytest.fixture
def require_readable() -> Callable[..., None]:
    """`require_readable(page, lines, panels)`: no text leaves the page or meets another, a line or a panel.

    Panels stay on the page too, and apart.
    """

    def require(page: Page, lines: Any, panels: Any = ()) -> None:
        words = extents(page, written(page))
        assert within_margins(page, [*written(page), *panels])
        assert overlaps(words, words) == len(words)
        assert overlaps(words, extents(page, [*lines, *panels])) == 0
        assert overlaps(extents(page, panels), extents(page, panels)) == len(panels)

    return require


@pytest.fixture
def pairs_that_meet() -> Callable[[Any, Any], int]:
    """`overlaps`, for tests that know the extents themselves."""
    return overlaps


@pytest.fixture
def long_name() -> str:
    """A name that is too long, with what may mean something to whoever sets it."""
    return f"$x_1^{{2$ & <b>naïve ß</b>\n滤泡\t\\alpha_1 100 % {'w' * 200}"
