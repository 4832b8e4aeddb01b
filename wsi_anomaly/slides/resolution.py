"""Find the mpp of a slide in what its file says and what the user says. Knows property names, opens nothing."""

import html
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from wsi_anomaly.errors import MissingMppError, SlideError

MppSource = Literal["metadata", "tiff tags", "objective power", "user"]

_FINEST_MPP = 0.01
_COARSEST_MPP = 100.0
# 600 dpi and coarser are print resolutions that image programs write, not what a scanner measured.
_COARSEST_TAG_MPP = 20.0
_DISAGREEMENT = 0.02
_TAG_UNIT_UM = {"inch": 25_400.0, "centimeter": 10_000.0, "millimeter": 1_000.0, "micrometer": 1.0}
# The micro sign and the Greek letter mu look alike; files have both.
_OME_UNIT_UM = {"\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_OME_PIXELS = re.compile(r"<(?:\w+:)?Pixels\b[^>]*>")
# An objective of power p images 10/p µm on a pixel, as scanners are built.
_MPP_TIMES_POWER = 10.0


@dataclass(frozen=True, slots=True)
class Resolution:
    """Microns per pixel of level 0, (x, y), and where they come from."""

    mpp: tuple[float, float]
    source: MppSource
    warnings: tuple[str, ...]


def find_resolution(properties: Mapping[str, str], *, vendor: str, name: str, given_mpp: float | None) -> Resolution:
    """The first believable mpp: metadata, TIFF resolution tags, objective power, else what the user gave.

    `properties` are those of OpenSlide or TiffSlide without their prefix; `name` is the slide's, for messages.

    Raises:
        MissingMppError: no source has a believable mpp.
        SlideError: the mpp the user gave is impossible.
    """
    if given_mpp is not None and not _believable((given_mpp, given_mpp), _COARSEST_MPP):
        raise SlideError(
            f"{name}: the given {given_mpp} µm/px cannot be right. "
            f"Give a number between {_FINEST_MPP} and {_COARSEST_MPP:g}."
        )
    warnings: list[str] = []
    for source, mpp, coarsest in _candidates(properties, vendor):
        if _believable(mpp, coarsest):
            warnings += _disagreement(mpp, source, given_mpp, name)
            return Resolution(mpp, source, tuple(warnings))
        warnings.append(f"{name}: {mpp[0]:.4g} x {mpp[1]:.4g} µm/px from its {source} cannot be right and is ignored.")
    if given_mpp is None:
        unknown = f"{name}: the file does not say how many microns a pixel has."
        remedy = "Give it with --mpp, or in an mpp column of the slides' CSV."
        raise MissingMppError(" ".join([*warnings, unknown, remedy]))
    return Resolution((given_mpp, given_mpp), "user", tuple(warnings))


def is_ome(properties: Mapping[str, str]) -> bool:
    """Whether the image description is OME-XML."""
    return "<OME" in properties.get("tiff.ImageDescription", "")


def _candidates(properties: Mapping[str, str], vendor: str) -> list[tuple[MppSource, tuple[float, float], float]]:
    """Every mpp the file states, best source first, with the coarsest value to believe of it."""
    tags = _tag_mpp(properties)
    power = _number(properties.get("objective-power"))
    found: list[tuple[MppSource, tuple[float, float], float]] = []
    if metadata := _metadata_mpp(properties, vendor):
        found.append(("metadata", metadata, _COARSEST_MPP))
    if tags:
        found.append(("tiff tags", tags, _COARSEST_TAG_MPP))
    if power is not None:
        mpp = _MPP_TIMES_POWER / power if power else math.inf
        found.append(("objective power", (mpp, mpp), _COARSEST_MPP))
    return found


def _metadata_mpp(properties: Mapping[str, str], vendor: str) -> tuple[float, float] | None:
    if vendor == "ome-tiff":
        return _ome_mpp(properties["tiff.ImageDescription"])
    if vendor == "generic-tiff":
        return None  # the readers only repeat the TIFF tags there
    return _pair(_number(properties.get("mpp-x")), _number(properties.get("mpp-y")))


def _tag_mpp(properties: Mapping[str, str]) -> tuple[float, float] | None:
    unit_um = _TAG_UNIT_UM.get(properties.get("tiff.ResolutionUnit", "").lower())
    per_unit = _pair(_number(properties.get("tiff.XResolution")), _number(properties.get("tiff.YResolution")))
    if unit_um is None or per_unit is None:
        return None
    return (unit_um / per_unit[0] if per_unit[0] else math.inf, unit_um / per_unit[1] if per_unit[1] else math.inf)


def _ome_mpp(description: str) -> tuple[float, float] | None:
    """PhysicalSizeX and Y of the first image; the unit is µm where none is given (OME schema 2016-06)."""
    # A pattern, not an XML parser: a slide is foreign input, and entities in it must not be expanded.
    pixels = _OME_PIXELS.search(description)
    if pixels is None:
        return None
    attributes = dict(re.findall(r'(\w+)="([^"]*)"', html.unescape(pixels.group())))
    sizes = []
    for axis in "XY":
        size = _number(attributes.get(f"PhysicalSize{axis}"))
        unit_um = _OME_UNIT_UM.get(attributes.get(f"PhysicalSize{axis}Unit", "um"))
        sizes.append(None if size is None or unit_um is None else size * unit_um)
    return _pair(*sizes)


def _disagreement(mpp: tuple[float, float], source: MppSource, given_mpp: float | None, name: str) -> list[str]:
    if given_mpp is None or all(abs(given_mpp / axis_mpp - 1) <= _DISAGREEMENT for axis_mpp in mpp):
        return []
    stated = f"its {source} says {mpp[0]:.4g} x {mpp[1]:.4g}"
    return [f"{name}: {given_mpp:.4g} µm/px was given, but {stated}; the file's value is used."]


def _believable(mpp: tuple[float, float], coarsest: float) -> bool:
    return all(math.isfinite(axis_mpp) and _FINEST_MPP <= axis_mpp <= coarsest for axis_mpp in mpp)


def _pair(x: float | None, y: float | None) -> tuple[float, float] | None:
    return None if x is None or y is None else (x, y)


def _number(text: str | None) -> float | None:
    """None where nothing is written, NaN where it is no number."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return math.nan
