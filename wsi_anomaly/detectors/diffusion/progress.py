"""Show how a fit is going: lines in the log, a curve of the loss, rebuilt tiles. Decides nothing and learns nothing."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8

from wsi_anomaly.detectors.weights import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Tiles = UInt8[np.ndarray, "tile y x rgb"]

log = logging.getLogger(__name__)


class Pace:
    """Tells the log how far a fit is, how fast, and after its first steps how long it will take."""

    def __init__(self, steps: int, device: torch.device, *, done: int) -> None:
        """`done` steps of an earlier run are not counted for the speed."""
        self._steps, self._device, self._first = steps, device, done
        self._durations: list[float] = []
        self._last = self._told = time.perf_counter()
        self._told_step = done
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def tell(self, losses: Sequence[float]) -> None:
        """What there is to tell after the step with the last of these losses, if anything."""
        now, step = time.perf_counter(), len(losses)
        if len(self._durations) < _ESTIMATE_STEPS:
            self._durations.append(now - self._last)
            if len(self._durations) == min(_ESTIMATE_STEPS, self._steps - self._first):
                self._tell_estimate()
        self._last = now
        if step % _STEPS_BETWEEN_LINES == 0 or now - self._told >= _SECONDS_BETWEEN_LINES or step == self._steps:
            speed = (step - self._told_step) / max(now - self._told, 1e-9)
            loss, left = running_loss(losses), duration((self._steps - step) / speed)
            log.info("step %d of %d: loss %.4f, %.3g steps/s, %s left", step, self._steps, loss, speed, left)
            self._told, self._told_step = now, step

    def _tell_estimate(self) -> None:
        # The median: the first step, and one that ran out of memory and was done again, take much longer.
        each = max(median(self._durations), 1e-9)
        if self._device.type == "cuda":
            gibibytes = torch.cuda.max_memory_reserved(self._device) / 2**30
            where = f"at most {gibibytes:.1f} GiB of GPU memory"
        else:
            where = "on the CPU"
        steps, left = self._steps, self._steps - self._first
        log.info("%.3g steps/s, %s: about %s for %d of %d steps", 1 / each, where, duration(each * left), left, steps)


def running_loss(losses: Sequence[float]) -> float:
    """The mean of the last steps; not a number if none of them had a loss that is one."""
    return float(window_means(losses[-_RUNNING_STEPS:], most=1)[1][-1])


def window_means(
    losses: Sequence[float], *, most: int
) -> tuple[Int64[np.ndarray, " window"], Float64[np.ndarray, " window"]]:
    """At most so many windows of equal length: the last step of each, counted from 1, and the mean of its losses.

    Losses that are no finite numbers are left out.
    """
    length = -(-len(losses) // most)
    starts = np.arange(0, len(losses), length)
    values = np.asarray(losses, np.float64)
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        means = np.add.reduceat(np.where(finite, values, 0), starts) / np.add.reduceat(finite, starts, dtype=np.int64)
    return np.minimum(starts + length, len(losses)), means


def duration(seconds: float) -> str:
    """In the two largest units that matter."""
    minutes = round(seconds / 60)
    if seconds < 2 * 60:
        return f"{seconds:.0f} s"
    if minutes < 2 * 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def write_loss_picture(path: Path, losses: Sequence[float], *, steps: int) -> None:
    """Draw the loss of the steps so far as a pale line, and its trend as a dark one."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    at, means = window_means(losses, most=_MOST_POINTS)
    trend = _trend(means)
    figure = Figure((10, 5.5), dpi=100, facecolor="white")
    axes = figure.add_axes((0.09, 0.16, 0.89, 0.77))
    axes.plot(at, means, color=_PALE, linewidth=1, marker="" if len(at) > 1 else "o", label=_each(at))
    axes.plot(at, trend, color=_DARK, linewidth=2.5, label=f"trend, now {trend[-1]:.4g}")
    shown = means[np.isfinite(means)]
    if len(shown) and shown.min() > 0 and shown.max() > _WIDE * shown.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(f"Learning: step {len(losses):,} of {steps:,}", loc="left", weight="bold")
    axes.grid(color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.text(0.98, 0.02, _HINT, ha="right", size=9, color="#666666")
    _save(figure, path)


def write_samples(path: Path, tiles: Tiles, made: Tiles, *, caption: str, label: str) -> None:
    """Draw the tiles, pixel by pixel, and below them, under `label`, what the model makes of them."""
    from matplotlib.figure import Figure

    count, height, width = tiles.shape[:3]
    full_width = max(count * (width + _GAP_PX) + _GAP_PX, _LEAST_WIDTH_PX)
    full_height = _CAPTION_PX + 2 * (_LABEL_PX + height) + _GAP_PX
    figure = Figure((full_width / 100, full_height / 100), dpi=100, facecolor="white")
    _write(figure, caption, _GAP_PX, 10, size=12, weight="bold")
    rows = (("tiles that it learns from", tiles), (label, made))
    for row, (heading, pictures) in enumerate(rows):
        top = _CAPTION_PX + row * (_LABEL_PX + height)
        _write(figure, heading, _GAP_PX, top + 5, size=10)
        for column, picture in enumerate(pictures):
            left = _GAP_PX + column * (width + _GAP_PX)
            figure.figimage(picture, left, full_height - top - _LABEL_PX - height, origin="upper")
    _save(figure, path)


def _trend(values: Float64[np.ndarray, " window"]) -> Float64[np.ndarray, " window"]:
    """Means over the twentieth of the curve around each point, or what there is of it."""
    reach = len(values) // 40
    finite = np.isfinite(values)
    sums, counts = (np.convolve(kind, np.ones(2 * reach + 1), "full") for kind in (np.where(finite, values, 0), finite))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / counts
    return np.where(counts > 0, means, np.nan)[reach : reach + len(values)]


def _each(at: Int64[np.ndarray, " window"]) -> str:
    return "each step" if at[0] == 1 else f"mean of {at[0]:,} steps"


def _write(figure: "Figure", text: str, left_px: int, top_px: int, **style: Any) -> None:  # noqa: ANN401 - as matplotlib takes it
    width, height = figure.get_size_inches() * 100
    figure.text(left_px / width, 1 - top_px / height, text, va="top", parse_math=False, **style)


def _save(figure: "Figure", path: Path) -> None:
    """Equal pictures are equal files: the name and version of the drawing library are left out."""
    write_whole(
        path,
        lambda file: figure.savefig(file, format="png", metadata={"Software": None}, pil_kwargs={"compress_level": 2}),
    )


_ESTIMATE_STEPS = 20
_STEPS_BETWEEN_LINES, _SECONDS_BETWEEN_LINES = 50, 30
_RUNNING_STEPS = 100
_MOST_POINTS = 400
_WIDE = 5
"""From this ratio of the largest to the smallest loss on, the axis is logarithmic: else the end would be flat."""
_PALE, _DARK = "#9ecae1", "#08519c"
_HINT = "Lower is better. Each step draws other tiles, noise and timesteps, so only the trend counts."
_GAP_PX, _CAPTION_PX, _LABEL_PX, _LEAST_WIDTH_PX = 8, 40, 28, 480
