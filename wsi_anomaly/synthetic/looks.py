"""How a slide was stained and scanned: from amounts of stain to colours. Knows no tissue."""

import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from scipy.ndimage import gaussian_filter

from wsi_anomaly.synthetic.noise import laid, lumps

FOCUS_REACH_PX = 6
"""Pixels beyond a region that a sharp picture of it depends on."""

Ink = Float32[np.ndarray, "wider_row wider_column stain"]


@dataclass(frozen=True, slots=True)
class Look:
    """Stain and scanner of one slide."""

    optical_density: Float32[np.ndarray, "stain rgb"]
    """Of one unit of haematoxylin and of eosin, to base 10."""
    light: Float32[np.ndarray, " rgb"]
    """Grey value of empty glass."""
    blur_px: float
    """Deviation of the scanner's point spread."""
    sharpening: float
    """The share of lost detail that the scanner's software adds again, with its halos."""
    noise: float
    """Deviation in grey values."""
    jpeg_quality: int
    """Of the tiles that a stream yields; pyramids bring their own."""


def usual_look(rng: np.random.Generator) -> Look:
    """A look close to the usual one: vectors as seen in scanned lymph nodes, near those of Ruifrok 2001."""
    vectors = np.array([[0.61, 0.75, 0.26], [0.18, 0.93, 0.30]]) + rng.normal(0, 0.012, (2, 3))
    vectors *= rng.normal(1, 0.04, (2, 1)) / np.linalg.norm(vectors, axis=1, keepdims=True)
    light = np.array([243, 241, 244]) + rng.normal(0, 1, 3)
    return Look(vectors.astype(np.float32), light.astype(np.float32), 0.75, 0.0, 1.5, 90)


def varied_look(rng: np.random.Generator) -> Look:
    """Any look between the violet and the brown stains of Camelyon, as Macenko's method (2009) finds them."""
    violet = np.array([[0.62, 0.74, 0.25], [0.22, 0.93, 0.28]])
    brown = np.array([[0.54, 0.70, 0.46], [0.24, 0.87, 0.43]])
    share = rng.beta(0.8, 0.5)
    vectors = (1 - share) * violet + share * brown + rng.normal(0, 0.018, (2, 3))
    strength = np.array([[rng.uniform(1.0, 1.4) + 0.4 * share], [rng.uniform(0.9, 1.45)]])
    vectors *= strength / np.linalg.norm(vectors, axis=1, keepdims=True)
    light = rng.uniform(232, 250) + rng.normal(0, 2, 3)
    return Look(
        vectors.astype(np.float32),
        light.astype(np.float32),
        blur_px=float(rng.uniform(0.45, 0.9)),
        sharpening=float(rng.uniform(0.2, 2.2)),
        noise=float(rng.uniform(0.5, 2.5)),
        jpeg_quality=int(rng.integers(60, 95)),
    )


def lit(ink: Ink, look: Look) -> Float32[np.ndarray, "row column rgb"]:
    """What the lens shows of a region, given with `FOCUS_REACH_PX` more on each side: the law of Beer and Lambert."""
    crop = slice(FOCUS_REACH_PX, -FOCUS_REACH_PX)
    sharp = gaussian_filter(ink, (look.blur_px, look.blur_px, 0), truncate=3.0)
    if look.sharpening:
        sharp += look.sharpening * (sharp - gaussian_filter(sharp, (1.2, 1.2, 0), truncate=2.0))
    density = sharp[crop, crop] @ look.optical_density
    return np.exp(density * np.float32(-np.log(10))) * look.light


def photographed(
    seen: Float32[np.ndarray, "row column rgb"], look: Look, *, origin_px: tuple[int, int]
) -> UInt8[np.ndarray, "row column rgb"]:
    """What the camera makes of it: grain, and whole grey values."""
    grain = laid(lumps(0.0), origin_px[0], origin_px[1], (seen.shape[0], seen.shape[1]))
    return np.asarray(np.clip(seen + np.float32(look.noise) * grain[..., None] + 0.5, 0, 255), np.uint8)


def compressed(pixels: UInt8[np.ndarray, "row column rgb"], quality: int) -> UInt8[np.ndarray, "row column rgb"]:
    """The pixels after JPEG has had them."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))
