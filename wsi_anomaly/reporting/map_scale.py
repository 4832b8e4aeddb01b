"""One scale of colours for the maps of several tiles, and maps in these colours. Knows nothing of what they show."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from wsi_anomaly.reporting.page import Lettering, Page, round_length

_COLOUR_MAP = "inferno"
"""Perceptually uniform, and read with any colour vision: black where there is least."""
_FULL_QUANTILE = 0.995
"""Of all values shown, where colours end: a few hot pixels must not make the rest black."""
_HATCH_PX, _HATCH = 6, np.array([[0xF4] * 3, [0xB4] * 3], np.uint8)
"""Greys, which no value is shown in."""
_COLOUR_BAR_PX, _FIGURES_BELOW_PX, _MOST_STEPS_WITH_FIGURES = 12, 28, 4

Map = Float32[np.ndarray, "y x"]


@dataclass(frozen=True, slots=True)
class MapScale:
    """Where colours begin and end, with a figure at each step."""

    begin: int
    """In steps."""
    step: float
    steps: int

    @property
    def least(self) -> float:
        """Where colours begin."""
        return self.begin * self.step

    @property
    def most(self) -> float:
        """Where colours end."""
        return (self.begin + self.steps) * self.step


def scale_of(maps: Sequence[Map]) -> MapScale | None:
    """From 0, or from the lowest values where those are negative, to the highest but for a few; None without maps."""
    if not maps:
        return None
    known = np.concatenate([np.zeros(0, np.float32), *(one[np.isfinite(one)] for one in maps)])
    if not len(known):
        return MapScale(0, 0.5, 2)
    least, most = np.quantile(known, [1 - _FULL_QUANTILE, _FULL_QUANTILE]).tolist()
    if least >= 0:
        most = most or float(known.max()) or 1.0
        step = round_length(most / 1.75)
        return MapScale(0, step, round(most / step))
    step = round_length(max(most - least, -least / 4) / 1.75)
    begin = floor(least / step)
    return MapScale(begin, step, max(-floor(-most / step) - begin, 1))


def map_picture(values: Map, size_px: tuple[int, int], scale: MapScale) -> UInt8[np.ndarray, "row column rgb"]:
    """In the colours of a scale, width and height as wanted, and hatched where the value is not known."""
    from matplotlib import colormaps

    known = np.isfinite(values)
    parts = (known.astype(np.float32), np.where(known, values, np.float32(0)))
    share, sums = (np.asarray(Image.fromarray(part).resize(size_px, Image.Resampling.LANCZOS)) for part in parts)
    shown = share > 0.5  # noqa: PLR2004 - what is known for the greater part
    position = np.clip((sums / np.where(shown, share, 1) - scale.least) / (scale.most - scale.least), 0, 1)
    colours = np.asarray(colormaps[_COLOUR_MAP](position, bytes=True))[..., :3]
    y, x = np.indices(shown.shape)
    return np.where(shown[..., None], colours, _HATCH[(x + y) // _HATCH_PX % 2])


def draw_colour_bar(
    page: Page, left_px: int, top_px: int, scale: MapScale, *, width_px: int, lettering: Lettering
) -> None:
    """With a figure at each step; the last one stands for all above too, and the first, if below 0, for all below."""
    ramp = np.linspace(scale.least, scale.most, width_px, dtype=np.float32)[None]
    size_px = (width_px, _COLOUR_BAR_PX)
    page.show(left_px, top_px, map_picture(ramp, size_px, scale), size_px=size_px)
    figures_px = top_px + _FIGURES_BELOW_PX
    page.write(left_px, figures_px, ("≤ " if scale.least else "") + _figure(scale.least), lettering)
    every = 1 if scale.steps <= _MOST_STEPS_WITH_FIGURES else 2
    for i in range(every, scale.steps - every + 1, every):
        x_px = left_px + round(i * width_px / scale.steps)
        page.write(x_px, figures_px, _figure((scale.begin + i) * scale.step), lettering, align="center")
    page.write(left_px + width_px, figures_px, f"≥ {_figure(scale.most)}", lettering, align="right")


def _figure(value: float) -> str:
    sign = "\N{MINUS SIGN}" if value < 0 else ""
    return f"{sign}{abs(value):g}"
