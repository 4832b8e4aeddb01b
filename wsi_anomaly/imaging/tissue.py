"""Find the tissue on the overview picture of a slide. Knows colours and areas; knows no slide, file or tile.

Tissue is what is both coloured and darker than the glass. White-balanced chroma takes the place of HSV saturation,
which is noise in dark pixels. A tinted lamp and the bleeding colours of JPEG are not dark; dust and cover-slip edges
have no colour. Constants without a unit are steps of 255.
"""

import math

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from pydantic import Field
from scipy import ndimage
from skimage import filters, morphology

from wsi_anomaly.options import Options

SMOOTHING_UM = 8.0
"""Scale of the smoothing against scanner noise and JPEG blocks: one cell, so that thin strands stay."""
SMALLEST_SMOOTHING_PX = 0.7
STAIN_BAND = (5.0, 8.0)
"""Where Otsu's threshold may lie: below is the noise of glass, above is pale tissue."""
STAIN_CEILING = 24.0
"""All stain from here on is equal, or strongly stained tissue would pull the threshold above pale tissue."""

FAT_UM = 40.0
"""Scale on which fatty tissue is even: half an adipocyte."""
FAT_STAIN = 2.0
"""The mean stain of the palest fat, most of which is a hole."""
FAT_BLUR_UM = 27.0
"""How far the mean carries strong stain onto the glass: two thirds of its scale, by FAT_STAIN over STAIN_BAND."""
GAP_UM = 60.0
"""Breaks in the wall of an adipocyte are closed up to this width."""
SMALLEST_OBJECT_PX = 9
"""What covers fewer pixels cannot be told from noise, however coarse the overview."""

GLASS_TINT = 12
"""More chroma than this in the brightest pixels is no lamp: the picture shows no glass."""
GLASS_SPREAD = 12
"""How far below the brightest pixels glass goes down: noise and the darker corners of the field."""
BRIGHT_RANGE = 40
"""How far below the brightest pixels the glass of a stitched slide may lie."""
PEAK_SHARE = 0.02
"""So many pixels of one brightness are glass: tissue spreads over many."""
GLASS_SHARE = 0.05
"""Less of a picture than this is the rim between white paint and the rest, not glass."""

INK_SATURATION = {"blue": 0.6, "green": 0.4}
INK_CHROMA = 50
GREEN_INK = 30
"""How much greener than red: no stain of the routine comes near."""
BLACK_INK_BRIGHTNESS, BLACK_INK_CHROMA = 80, 24
INK_REDNESS = 0.2
"""Share of the chroma by which red may exceed green: lymphocytes are purple and lie above, ultramarine lies below."""
RIM_CHROMA = 8
SMALLEST_STROKE_PX = 16
"""Ink of fewer pixels is a nucleus or a grain of pigment."""
PEN_RIM_PX = 5
"""How far a stroke bleeds: anti-aliasing, and the halved colour resolution of JPEG."""

NOT_VISITED = 2
"""Pixels up to here are black that no light made."""
NO_LIGHT = 24
"""The weakest colour of dense tissue in bright field is brighter."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of the brightness that JPEG keeps at full resolution (ITU-R BT.601)."""
SAMPLE_PX = 1_000_000
"""Colours are measured on about so many pixels; more change nothing but the time."""
STRIP_ROWS = 256
"""Colours are worked out in strips of so many rows, to keep temporaries small."""


class TissueOptions(Options):
    """How tissue is told from glass: the `[tissue]` table of a pipeline file."""

    mpp: float = Field(default=8.0, gt=0)
    """Microns per pixel of the overview picture."""
    min_object_um2: float = Field(default=1000.0, ge=0)
    """Smaller islands are debris: the default is a clump of some ten cells."""
    max_hole_um2: float = Field(default=100_000.0, ge=0)
    """Smaller holes are part of the tissue (fat cells, vessels, glands); larger ones are glass."""


def tissue_mask(
    overview: UInt8[np.ndarray, "row column rgb"],
    options: TissueOptions,
    *,
    readable: Bool[np.ndarray, "row column"] | None = None,
) -> Bool[np.ndarray, "row column"]:
    """Where the slide carries tissue; where `readable` is False nobody knows, and that counts as tissue.

    Made for bright-field slides with haematoxylin, eosin or DAB. Otsu's threshold on smoothed stain, kept within
    `STAIN_BAND`; fat comes in by its mean stain, closed gaps and filled holes.
    """
    pen = pen_mask(overview)
    measured = ~pen if readable is None else readable & ~pen
    tissue = _without_specks_and_holes(_stained(overview, measured, mpp=options.mpp), options) & ~pen
    return tissue if readable is None else tissue | ~readable


def pen_mask(overview: UInt8[np.ndarray, "row column rgb"]) -> Bool[np.ndarray, "row column"]:
    """Where someone drew on the glass in green, blue or black, with the bleeding rim of the stroke.

    Black that the scanner did not visit counts too. Not found are red ink, which has the colours of eosin, and a pale
    haze further than PEN_RIM_PX from the stroke, which has those of a haematoxylin counterstain. Stains that are
    saturated blue or green themselves (trichrome, Alcian blue) are taken for ink.
    """
    strips = [overview[start : start + STRIP_ROWS] for start in range(0, len(overview), STRIP_ROWS)]
    core = np.concatenate([_ink(strip) for strip in strips])
    core = morphology.remove_small_objects(core, max_size=SMALLEST_STROKE_PX - 1)
    if not core.any():
        return core
    hue = np.concatenate([_ink_hue(strip) for strip in strips])
    return ndimage.binary_dilation(core, iterations=PEN_RIM_PX, mask=core | hue)


def looks_brightfield(overview: UInt8[np.ndarray, "row column rgb"]) -> bool:
    """Whether light came through the slide; False for fluorescence and an all-black picture.

    Light that passes even dense tissue keeps some of all three colours. Black is left out: the scanner may not have
    been there.
    """
    sample = _sample(overview)
    visited = sample[sample.max(axis=1) > NOT_VISITED]
    return bool(len(visited)) and float(np.median(visited.min(axis=1))) > NO_LIGHT


def _sample(
    overview: UInt8[np.ndarray, "row column rgb"], wanted: Bool[np.ndarray, "row column"] | None = None
) -> UInt8[np.ndarray, "pixel rgb"]:
    step = _sample_step(overview.shape[:2])
    sample = overview[::step, ::step]
    return sample.reshape(-1, 3) if wanted is None else sample[wanted[::step, ::step]]


def _sample_step(shape: tuple[int, ...]) -> int:
    return max(1, math.isqrt(math.prod(shape) // SAMPLE_PX))


def glass_colour(
    overview: UInt8[np.ndarray, "row column rgb"], measured: Bool[np.ndarray, "row column"]
) -> Float32[np.ndarray, " rgb"]:
    """The colour of the lamp: the usual colour among the brightest pixels, or grey where no glass is to be seen."""
    sample = _sample(overview, measured)
    if not len(sample):
        return np.full(3, 255, np.float32)
    darkest = sample.min(axis=1)
    top = int(darkest.max())
    # Readers paint white what the scanner did not visit, and overexposed glass is as white and as free of noise.
    painted, rest = darkest >= top - 1, darkest < top - 1
    bright = rest & (darkest >= _brightest_level(darkest[rest], top) - GLASS_SPREAD) if rest.any() else rest
    white = _median_colour(sample[painted])
    if np.count_nonzero(bright) >= GLASS_SHARE * len(sample):
        glass = _median_colour(sample[bright])
        paint = np.count_nonzero(painted) >= GLASS_SHARE * len(sample)
        if not paint or (np.ptp(glass) < STAIN_BAND[1] and glass.max() < top - 1):
            white = glass
    white = white if np.ptp(white) <= GLASS_TINT else np.full(3, white.max(), np.float32)
    return np.maximum(white, 1)


def _brightest_level(darkest: UInt8[np.ndarray, " pixel"], top: int) -> float:
    """Where the brightest pixels lie: the 99.5th percentile, unless most of the bright ones lie clearly below.

    White paint runs into what was scanned, and the rim reaches far above the glass.
    """
    brightest = float(np.percentile(darkest, 99.5))
    lowest = max(0, top - BRIGHT_RANGE)
    counts = np.bincount(darkest, minlength=256)[lowest:top]
    peak = int(np.argmax(counts))
    is_glass = counts[peak] >= PEAK_SHARE * len(darkest)
    return min(brightest, lowest + peak + GLASS_SPREAD / 2) if is_glass else brightest


def _median_colour(pixels: UInt8[np.ndarray, "pixel rgb"]) -> Float32[np.ndarray, " rgb"]:
    return np.median(pixels, axis=0).astype(np.float32)


def _stained(
    overview: UInt8[np.ndarray, "row column rgb"], measured: Bool[np.ndarray, "row column"], *, mpp: float
) -> Bool[np.ndarray, "row column"]:
    stain = stain_of(overview, measured, white=glass_colour(overview, measured), mpp=mpp)
    threshold = _stain_threshold(stain, measured)
    stained = stain > threshold
    np.minimum(stain, threshold, out=stain)  # or strong stain would make fat of its surroundings
    fat = ndimage.gaussian_filter(stain, FAT_UM / mpp, output=stain) > FAT_STAIN
    return stained | morphology.erosion(fat, _disk(FAT_BLUR_UM / mpp))


def stain_of(
    overview: UInt8[np.ndarray, "row column rgb"],
    measured: Bool[np.ndarray, "row column"],
    *,
    white: Float32[np.ndarray, " rgb"],
    mpp: float,
) -> Float32[np.ndarray, "row column"]:
    """How strongly each pixel is stained, 0 to STAIN_CEILING; glass has 0 in the median."""
    sigma_px = max(SMOOTHING_UM / mpp, SMALLEST_SMOOTHING_PX)
    margin = math.ceil(4 * sigma_px) + 1  # the smoothing reads nothing beyond it, so strips leave no seam
    stain = np.empty(measured.shape, np.float32)
    for start in range(0, len(overview), STRIP_ROWS):
        first, stop = max(0, start - margin), start + STRIP_ROWS
        # Ink is painted over with glass first, or its colour would be smoothed into the neighbourhood.
        clean = np.where(measured[first : stop + margin, :, None], overview[first : stop + margin], white)
        smooth = ndimage.gaussian_filter(clean, sigma_px, axes=(0, 1))
        stain[start:stop] = _stain_of_colours(smooth * (255 / white))[start - first :][:STRIP_ROWS]
    stain -= _glass_level(stain, measured)
    return np.clip(stain, 0, STAIN_CEILING, out=stain)


def _glass_level(stain: Float32[np.ndarray, "row column"], measured: Bool[np.ndarray, "row column"]) -> float:
    """What noise alone makes of glass: the chroma of grey with noise is not 0, and its mean would look like fat."""
    sample = _stain_sample(stain, measured)
    glass = sample[sample < STAIN_BAND[0]]
    return float(np.median(glass)) if glass.size else 0.0


def _stain_of_colours(pixels: Float32[np.ndarray, "row column rgb"]) -> Float32[np.ndarray, "row column"]:
    """The lesser of chroma and darkness. Chroma is what red or blue has over the weakest colour: no stain is green."""
    pixels = np.minimum(pixels, 255)
    red, green, blue = (pixels[..., channel] for channel in range(3))
    highest = np.maximum(red, blue)
    return np.minimum(highest - np.minimum(np.minimum(red, blue), green), 255 - pixels @ LUMA)


def _stain_threshold(stain: Float32[np.ndarray, "row column"], measured: Bool[np.ndarray, "row column"]) -> float:
    sample = _stain_sample(stain, measured)
    low, high = STAIN_BAND
    return float(np.clip(filters.threshold_otsu(sample), low, high)) if sample.size else high


def _stain_sample(
    stain: Float32[np.ndarray, "row column"], measured: Bool[np.ndarray, "row column"]
) -> Float32[np.ndarray, " pixel"]:
    step = _sample_step(stain.shape)
    return stain[::step, ::step][measured[::step, ::step]]


def _without_specks_and_holes(
    stained: Bool[np.ndarray, "row column"], options: TissueOptions
) -> Bool[np.ndarray, "row column"]:
    """Islands that are too small dropped, gaps closed, then holes filled."""
    pixel_um2 = options.mpp**2
    smallest_px = max(options.min_object_um2 / pixel_um2, SMALLEST_OBJECT_PX)
    # Islands go first: closing would join specks into something large.
    tissue = morphology.remove_small_objects(stained, max_size=math.ceil(smallest_px) - 1)
    tissue = morphology.closing(tissue, _disk(GAP_UM / 2 / options.mpp))
    return _without_holes(tissue, max_px=options.max_hole_um2 / pixel_um2)


def _without_holes(tissue: Bool[np.ndarray, "row column"], *, max_px: float) -> Bool[np.ndarray, "row column"]:
    """Glass that tissue encloses counts as tissue up to a size; glass at the edge of the picture is never enclosed."""
    glass, count = ndimage.label(~tissue)
    hole = np.bincount(glass.ravel(), minlength=count + 1) <= max_px
    for edge in (glass[0], glass[-1], glass[:, 0], glass[:, -1]):
        hole[edge] = False
    hole[0] = False
    return tissue | hole[glass]


def _disk(radius_px: float) -> tuple[tuple[UInt8[np.ndarray, "side side"], int], ...]:
    """A round footprint in the many small steps that make a large one fast."""
    if round(radius_px) == 0:
        return ((np.ones((1, 1), np.uint8), 1),)
    steps = morphology.disk(round(radius_px), decomposition="sequence")
    return tuple((footprint, int(times)) for footprint, times in steps)


def _ink(pixels: UInt8[np.ndarray, "row column rgb"]) -> Bool[np.ndarray, "row column"]:
    """Pixels that only ink explains: saturated blue or green, or black without a colour."""
    red, green, blue = _channels(pixels)
    highest = np.maximum(np.maximum(red, green), blue)
    chroma = highest - np.minimum(np.minimum(red, green), blue)
    # The haematoxylin of IHC is as blue as ink, but never so saturated.
    is_blue = (blue == highest) & (chroma >= INK_SATURATION["blue"] * highest) & (chroma >= INK_CHROMA)
    is_blue &= red - green <= INK_REDNESS * chroma
    is_green = (green - red >= GREEN_INK) & (green >= blue) & (chroma >= INK_SATURATION["green"] * highest)
    is_black = (highest < BLACK_INK_BRIGHTNESS) & (chroma <= BLACK_INK_CHROMA)
    return is_blue | is_green | is_black


def _ink_hue(pixels: UInt8[np.ndarray, "row column rgb"]) -> Bool[np.ndarray, "row column"]:
    """Pixels that may be ink mixed with glass."""
    red, green, blue = _channels(pixels)
    chroma = np.maximum(green, blue) - red
    return (chroma >= RIM_CHROMA) & (red - green <= INK_REDNESS * chroma)


def _channels(pixels: UInt8[np.ndarray, "row column rgb"]) -> Float32[np.ndarray, "rgb row column"]:
    return np.moveaxis(pixels, 2, 0).astype(np.float32)
