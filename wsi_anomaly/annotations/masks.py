"""A user's picture of where tissue is -> a boolean array over the bounds of the slide. Opens no slide."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image, UnidentifiedImageError

from wsi_anomaly.annotations.frame import Frame, same_view, shown_region
from wsi_anomaly.errors import AnnotationError

_pil_limit = threading.Lock()


def read_mask(
    path: Path,
    *,
    shape: tuple[int, int],
    size_level0_px: tuple[int, int],
    bounds_level0_px: tuple[int, int, int, int],
) -> Bool[np.ndarray, "row column"]:
    """Tissue within the bounds (x, y, width, height) as `shape` (rows, columns), from a PNG or TIFF of the slide.

    The picture shows the whole level-0 frame at any size or, where its proportions say so, the bounds alone. A pixel is
    tissue where any colour is above 0 and where it is not transparent; of a picture with a palette the number counts,
    not the colour. Each cell takes the pixel at its centre. A pyramid is read at the level that is just fine enough.

    Raises:
        AnnotationError: no PNG or TIFF, damaged, stored as JPEG, or of other proportions than frame and bounds.
    """
    with opened_picture(path, ("PNG", "TIFF")) as picture:
        if picture.info.get("compression") in ("jpeg", "tiff_jpeg"):
            raise AnnotationError(f"{path.name}: JPEG blurs the edge of a mask; save it without loss (LZW)")
        left, top, width, height = shown_region(path.name, picture.size, Frame(size_level0_px, bounds_level0_px))
        x, y, bounds_width, bounds_height = bounds_level0_px
        box = np.array([x - left, y - top, x - left + bounds_width, y - top + bounds_height])
        share = np.clip(box / [width, height, width, height], 0, 1)
        rows, columns = shape
        _seek_level(picture, (columns / (share[2] - share[0]), rows / (share[3] - share[1])))
        box_px = np.minimum(share * ([*picture.size] * 2), [*picture.size] * 2)
        cells = picture.resize((columns, rows), Image.Resampling.NEAREST, box=tuple(box_px.tolist()))
    above_0 = np.asarray(cells).reshape(rows, columns, -1) > 0
    if cells.getbands()[-1] in ("A", "a"):
        return np.asarray(above_0[..., :-1].any(axis=-1) & above_0[..., -1])
    return np.asarray(above_0.any(axis=-1))


@contextmanager
def opened_picture(path: Path, formats: Sequence[str]) -> Iterator[Image.Image]:
    """The picture, however many pixels it has: a mask may be as large as its slide.

    Raises:
        AnnotationError: it is in none of the formats, or it turns out damaged while the caller reads it.
    """
    with _pil_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(path, formats=list(formats)) as picture:
                yield picture
        except UnidentifiedImageError as error:
            raise AnnotationError(
                f"{path.name}: no {' or '.join(formats)} picture; save the mask as one of them"
            ) from error
        except (OSError, EOFError, SyntaxError, ValueError) as error:  # Pillow reports damaged files with all of these
            raise AnnotationError(f"{path.name}: damaged picture or unknown kind of TIFF ({error})") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _seek_level(picture: Image.Image, wanted_px: tuple[float, float]) -> None:
    """Turn to the smallest level of a TIFF pyramid with at least `wanted_px` (width, height)."""
    full_px = picture.size
    levels = {}
    for page in range(getattr(picture, "n_frames", 1)):
        picture.seek(page)
        fine = picture.width >= wanted_px[0] and picture.height >= wanted_px[1]
        if fine and same_view(full_px, picture.size):
            levels[picture.width] = page
    picture.seek(levels[min(levels)] if levels else 0)
