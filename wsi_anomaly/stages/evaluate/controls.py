"""Tiles that hold only glass or a pen's ink, as controls of a detector. Looks at overviews, never into a tile."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8
from PIL import Image

from wsi_anomaly.errors import MissingOutputError
from wsi_anomaly.execution import read_ahead
from wsi_anomaly.imaging.geometry import area_fraction
from wsi_anomaly.imaging.tissue import STAIN_CEILING, glass_colour, pen_mask, stain_of
from wsi_anomaly.stages.evaluate.evidence import Evidence
from wsi_anomaly.stages.evaluate.protocol import Protocol
from wsi_anomaly.storage.arrays import read_array, read_attributes

_TILE_SIDE_PX = 3
"""The overview is shrunk until a tile is so wide: enough to tell tissue from none, and a slide takes milliseconds."""
_STAINED = 0.03
"""A tile with less of it strongly stained, or with more of it so much more weakly, holds no tissue."""
_INKED = 0.1
"""From this share of a tile without tissue it is the ink, not the glass, that a detector sees there."""
_RED_INK_BRIGHTNESS, _RED_INK_REST = 150, 0.3
_SAMPLE_PX = 50_000
"""About so many pixels are enough to know the colour of the lamp."""
_MOST_NAMED = 10
_ROUNDING = 1e-6
"""Areas are sums of floats: a tile fully inside may miss 1 by so much."""
_THREADS = 2
"""The next overview is read while one is looked at."""


@dataclass(frozen=True, slots=True)
class Controls:
    """The scored tiles of a slide that hold no tissue, by what they hold instead."""

    glass: Bool[np.ndarray, " tile"]
    pen: Bool[np.ndarray, " tile"]

    @property
    def either(self) -> Bool[np.ndarray, " tile"]:
        """Those that no detector should find anything on."""
        return self.glass | self.pen


Found = Sequence[tuple[Evidence, Controls]]


def control_warnings(evidence: Sequence[Evidence], protocol: Protocol) -> tuple[str, ...]:
    """What a detector makes of tiles without tissue: how many it calls abnormal, and whether they outdo what is.

    The stage `mask` leaves such tiles out, except for red ink, holes in tissue, which it fills, and what a user's own
    mask covers. A slide whose overview cannot be read adds nothing.
    """
    controls = read_ahead(find_controls, evidence, threads=_THREADS)
    found = [(one, tiles) for one, tiles in zip(evidence, controls, strict=True) if tiles is not None]
    abnormal = _z([(one, _abnormal(one, protocol) & ~tiles.either) for one, tiles in found])
    return (
        *_of_kind("glass", [(one, tiles.glass) for one, tiles in found], abnormal, protocol),
        *_of_kind("pen", [(one, tiles.pen) for one, tiles in found], abnormal, protocol),
        *_misled(found, of=len(evidence)),
    )


def find_controls(one: Evidence) -> Controls | None:
    """The controls of a slide by its overview; None where it has none that can be read, or no bright field.

    A tile holds no tissue if its mean stain is near 0 once ink is taken for glass.
    """
    try:
        attributes = read_attributes(one.folder.tissue)
        overview, readable = (read_array(one.folder.tissue, name) for name in ("overview", "readable"))
    except (MissingOutputError, KeyError, RuntimeError):  # no group, no such array, no chunk that can be decoded
        return None
    if not attributes.get("brightfield", True) or not overview.any():
        return None
    downsample = np.array(attributes["overview_downsample"])
    boxes = (one.tile_boxes - np.tile(one.tile_grid.origin_level0_px, 2)) / np.tile(downsample, 2)
    shrunk = max(1, int((boxes[:, 2:] - boxes[:, :2]).min()) // _TILE_SIDE_PX)
    stain, ink = _stain_and_ink(overview, shrunk, mpp=float(downsample[0] * attributes["mpp"][0]))
    bare = np.isfinite(one.z_tile) & (_means(stain, boxes / shrunk) < _STAINED * STAIN_CEILING)
    if not readable.all():
        bare &= area_fraction(~readable, boxes) == 0
    inked = area_fraction(ink, boxes / shrunk) >= _INKED
    return Controls(glass=bare & ~inked, pen=bare & inked)


def _stain_and_ink(
    overview: UInt8[np.ndarray, "row column rgb"], shrunk: int, *, mpp: float
) -> tuple[Float32[np.ndarray, "y x"], Bool[np.ndarray, "y x"]]:
    """Of the overview, so many times smaller."""
    picture = np.asarray(Image.fromarray(overview).reduce(shrunk))
    ink = pen_mask(picture) | _red_ink(picture)
    step = max(1, math.isqrt(ink.size // _SAMPLE_PX))
    # Not of the small picture, on which fat has one colour throughout, as glass has.
    white = glass_colour(overview[:: shrunk * step, :: shrunk * step], ~ink[::step, ::step])
    return stain_of(picture, ~ink, white=white, mpp=mpp * shrunk), ink


def _red_ink(pixels: UInt8[np.ndarray, "row column rgb"]) -> Bool[np.ndarray, "row column"]:
    """Bright red that lets next to no green and blue through.

    Eosin, red chromogens and blood let more blue through than this, and pigment and DAB are darker. Pale or dried red
    ink has their colours and is not found.
    """
    red, rest = pixels[..., 0], np.maximum(pixels[..., 1], pixels[..., 2])
    return np.asarray((red >= _RED_INK_BRIGHTNESS) & (rest <= _RED_INK_REST * red))


def _means(
    values: Float32[np.ndarray, "row column"], boxes: Float64[np.ndarray, "box corners"]
) -> Float64[np.ndarray, " box"]:
    """The mean over each box (x0, y0, x1, y1), rounded to whole pixels, at least one."""
    integral = np.pad(values.astype(np.float64), ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    height, width = values.shape
    x0, y0, x1, y1 = np.rint(boxes).astype(np.int64).T
    x0, y0 = np.clip(x0, 0, width - 1), np.clip(y0, 0, height - 1)
    x1, y1 = np.clip(x1, x0 + 1, width), np.clip(y1, y0 + 1, height)
    sums = integral[y1, x1] - integral[y0, x1] - integral[y1, x0] + integral[y0, x0]
    return np.asarray(sums / ((x1 - x0) * (y1 - y0)))


def _abnormal(one: Evidence, protocol: Protocol) -> Bool[np.ndarray, " tile"]:
    """The tiles that are surely annotated as abnormal."""
    if one.share is None:
        return np.zeros(len(one.cells), np.bool_)
    return np.isfinite(one.z_tile) & (one.share >= protocol.abnormal_from - _ROUNDING)


def _z(chosen: Sequence[tuple[Evidence, Bool[np.ndarray, " _"]]]) -> Float64[np.ndarray, " some"]:
    return np.concatenate([one.z_tile[tiles] for one, tiles in chosen] or [np.empty(0)])


def _of_kind(
    kind: str,
    chosen: Sequence[tuple[Evidence, Bool[np.ndarray, " _"]]],
    abnormal: Float64[np.ndarray, " some"],
    protocol: Protocol,
) -> list[str]:
    z, slides = _z(chosen), sum(bool(tiles.any()) for _, tiles in chosen)
    if not len(z):
        return []
    above, limit = float((z > protocol.threshold_z).mean()), protocol.threshold_z
    lines = [f"scored tiles of only {kind}: {len(z)} on {slides} slides, {above:.0%} of them above z = {limit:g}"]
    if len(abnormal) and (median := float(np.median(z))) > (usual := float(np.median(abnormal))):
        lines.append(
            f"the detector answers to {kind}: median z {median:.2f} there, {usual:.2f} on annotated abnormal tiles"
        )
    return lines


def _misled(found: Found, *, of: int) -> list[str]:
    """Where a slide's Z_MAX comes from a tile without tissue."""
    names = [one.slide_id for one, tiles in found if _is_highest(one, tiles.either)]
    if not names:
        return []
    listed = ", ".join([*names[:_MOST_NAMED], *(["..."] if len(names) > _MOST_NAMED else [])])
    return [f"the highest eroded z lies on glass or pen on {len(names)} of {of} slides: {listed}"]


def _is_highest(one: Evidence, tiles: Bool[np.ndarray, " tile"]) -> bool:
    """Whether one of these tiles has the slide's highest eroded z; where all are equal, none is highest."""
    z = one.z_eroded[one.cells[:, 0], one.cells[:, 1]]
    scored = z[np.isfinite(z)]
    return bool(tiles.any() and scored.min() < scored.max() == z[tiles].max())
