"""A user's masks, outlines and labels -> boolean arrays and polygons in level-0 pixels. Opens no slide.

The caller, who has the slide open, says how large it is and where its bounds lie. Messages name the file alone.
"""

import csv
import gzip
import io
import json
import logging
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import shapely.geometry
from jaxtyping import Bool, Float64, Real
from PIL import Image, UnidentifiedImageError

from wsi_anomaly.errors import AnnotationError

_log = logging.getLogger(__name__)
_pil_limit = threading.Lock()

_POLYGONS = ("Polygon", "MultiPolygon")
_ABNORMAL = {"normal": False, "0": False, "abnormal": True, "tumor": True, "tumour": True, "1": True}
_ASPECT_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class Outline:
    """One annotated area, in level-0 pixels."""

    polygon: shapely.Polygon | shapely.MultiPolygon
    """Valid and of some area, with holes."""
    class_name: str
    """As QuPath shows it ("Tumor", "Tumor: Positive"); "" where the area has no class."""


def read_outlines(path: Path, *, offset_level0_px: tuple[int, int] = (0, 0)) -> tuple[Outline, ...]:
    """The areas of a GeoJSON file as QuPath writes it: a FeatureCollection, a list or one Feature, gzipped or not.

    QuPath counts from the corner of the slide's bounds, so the caller passes their (x, y) as `offset_level0_px`, and it
    is added. An outline that crosses itself is mended: every part that the line goes round belongs to it. Features
    without an area (points, lines, empty ones) are left out. Both are counted in a logged warning.

    Raises:
        AnnotationError: the file cannot be read, is not JSON, or holds no area.
    """
    features = list(_features(_read_json(path)))
    drawn = [(_polygon(feature), feature) for feature in features]
    valid = [(_mended(polygon), polygon.is_valid, feature) for polygon, feature in drawn if polygon is not None]
    kept = [(polygon, as_drawn, feature) for polygon, as_drawn, feature in valid if polygon.area > 0]
    if not kept:
        raise AnnotationError(f"{path.name}: no polygon in it; export annotations as GeoJSON from QuPath")
    if len(kept) < len(features):
        _log.warning(
            "%s: %d of %d features are no areas and left out", path.name, len(features) - len(kept), len(features)
        )
    if crossing := sum(not as_drawn for _, as_drawn, _ in kept):
        _log.warning("%s: %d of %d outlines cross themselves and were mended", path.name, crossing, len(kept))
    return tuple(
        Outline(shapely.transform(polygon, lambda xy: xy + offset_level0_px), _class_name(feature))
        for polygon, _, feature in kept
    )


def rasterise(
    outlines: Sequence[Outline],
    *,
    shape: tuple[int, int],
    origin_level0_px: tuple[int, int],
    downsample: tuple[float, float],
) -> Bool[np.ndarray, "row column"]:
    """The pixels whose centres lie in an outline or on its edge.

    `shape` is (rows, columns), `origin_level0_px` the (x, y) of the top left corner of the array and `downsample` the
    width and height of its pixels in level-0 pixels.
    """
    inside = np.zeros(shape, np.bool_)
    for outline in outlines:
        x0, y0, x1, y1 = (np.array(outline.polygon.bounds) - [*origin_level0_px] * 2) / ([*downsample] * 2)
        rows = np.arange(max(0, int(y0)), min(shape[0], int(y1) + 1))
        columns = np.arange(max(0, int(x0)), min(shape[1], int(x1) + 1))
        if rows.size == 0 or columns.size == 0:
            continue
        x = origin_level0_px[0] + (columns + 0.5) * downsample[0]
        y = origin_level0_px[1] + (rows + 0.5) * downsample[1]
        shapely.prepare(outline.polygon)
        inside[np.ix_(rows, columns)] |= shapely.intersects_xy(outline.polygon, x[None, :], y[:, None])
    return inside


def area_fractions(outlines: Sequence[Outline], boxes: Real[np.ndarray, "tile 4"]) -> Float64[np.ndarray, " tile"]:
    """The exact share of each box (x0, y0, x1, y1 in level-0 pixels) that the outlines cover together, 0 to 1."""
    tiles = shapely.box(*boxes.T.astype(np.float64))
    parts = shapely.get_parts(shapely.union_all([outline.polygon for outline in outlines]))
    tree = shapely.STRtree(tiles)
    covered = np.zeros(len(tiles), np.float64)
    covered[tree.query(parts, predicate="covers")[1]] = 1
    touching = tree.query(parts, predicate="intersects")
    part, tile = touching[:, covered[touching[1]] < 1]  # the union's parts share no area: a covered tile has all of it
    shares = shapely.area(shapely.intersection(parts[part], tiles[tile])) / shapely.area(tiles[tile])
    np.add.at(covered, tile, shares)
    return np.clip(covered, 0, 1)


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
    with _opened(path) as picture:
        left, top, width, height = _shown_region(path, picture.size, size_level0_px, bounds_level0_px)
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


def read_labels(path: Path) -> dict[str, bool]:
    """What each slide is, True for abnormal, from a CSV with the columns `slide_id` and `label`.

    A label is `normal` or `0`, `abnormal`, `tumor`, `tumour` or `1`, in letters of any case.

    Raises:
        AnnotationError: the table cannot be read, or rows are faulty (all are listed).
    """
    rows = _rows(path)
    columns = [name.lower() for name in rows[0][1]] if rows else []
    if sorted(columns) != ["label", "slide_id"]:
        raise AnnotationError(f"{path.name}: columns are '{', '.join(columns)}'; they must be slide_id and label")
    labels: dict[str, bool] = {}
    faults: list[str] = []
    for number, cells in rows[1:]:
        row = dict(zip(columns, [*cells, ""], strict=False))
        slide_id, label = row["slide_id"], row["label"].lower()
        if not slide_id:
            faults.append(f"row {number}: slide_id is empty")
        elif slide_id in labels:
            faults.append(f"row {number}: '{slide_id}' is there already")
        elif label not in _ABNORMAL:
            faults.append(f"row {number}: label '{label}' is none of {', '.join(_ABNORMAL)}")
        labels[slide_id] = _ABNORMAL.get(label, False)
    if faults:
        raise AnnotationError("\n  ".join([f"{path.name} has faults; mend them and run again:", *faults]))
    return labels


def _read_json(path: Path) -> Any:  # noqa: ANN401 - whatever the user's file holds
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return json.loads(content.decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error) as error:  # the last two: a cut-off or damaged gzip file
        raise AnnotationError(f"{path.name}: cannot be read ({error.__class__.__name__})") from error
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path.name}: not JSON; export annotations as GeoJSON from QuPath") from error


def _features(content: object) -> Iterator[Mapping[str, Any]]:
    """The features of a collection, of a list, or the one that it is; each followed by its child objects."""
    if isinstance(content, list):
        for item in content:
            yield from _features(item)
    elif isinstance(content, dict) and isinstance(content.get("features"), list):
        yield from _features(content["features"])
    elif isinstance(content, dict):
        yield content
        properties = content.get("properties")
        yield from _features(properties.get("childObjects") if isinstance(properties, dict) else None)


def _polygon(feature: Mapping[str, Any]) -> shapely.Polygon | shapely.MultiPolygon | None:
    geometry = feature.get("geometry", feature)  # QuPath takes a bare geometry for an annotation too
    if not isinstance(geometry, dict) or geometry.get("type") not in _POLYGONS:
        return None
    try:
        with np.errstate(invalid="ignore"):  # NaN among the corners is refused below
            drawn = shapely.force_2d(shapely.geometry.shape(geometry))
    except (shapely.errors.ShapelyError, LookupError, TypeError, ValueError):
        return None
    return drawn if np.isfinite(shapely.get_coordinates(drawn)).all() else None


def _mended(polygon: shapely.Polygon | shapely.MultiPolygon) -> shapely.Polygon | shapely.MultiPolygon:
    if polygon.is_valid:
        return polygon
    # The method "linework" would punch a hole wherever a hand-drawn line overlaps itself.
    mended = shapely.make_valid(polygon, method="structure", keep_collapsed=False)
    # Rounding can leave a crossing of a hair's breadth; a buffer of 0 alone would drop half of a bow tie.
    return mended if mended.is_valid else mended.buffer(0)


def _class_name(feature: Mapping[str, Any]) -> str:
    """The class in any of the ways that versions of QuPath write it."""
    properties = feature.get("properties")
    classification = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(classification, dict):
        names = classification.get("names")
        return ": ".join(map(str, names)) if isinstance(names, list) else str(classification.get("name") or "")
    return classification if isinstance(classification, str) else ""


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture, however many pixels it has: a mask may be as large as its slide."""
    with _pil_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(path, formats=("PNG", "TIFF")) as picture:
                if picture.info.get("compression") in ("jpeg", "tiff_jpeg"):
                    raise AnnotationError(f"{path.name}: JPEG blurs the edge of a mask; save it without loss (LZW)")
                yield picture
        except UnidentifiedImageError as error:
            raise AnnotationError(f"{path.name}: no PNG or TIFF picture; save the mask as one of them") from error
        except (OSError, EOFError, SyntaxError, ValueError) as error:  # Pillow reports damaged files with all of these
            raise AnnotationError(f"{path.name}: damaged picture or unknown kind of TIFF ({error})") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _shown_region(
    path: Path,
    size_px: tuple[int, int],
    size_level0_px: tuple[int, int],
    bounds_level0_px: tuple[int, int, int, int],
) -> tuple[int, int, int, int]:
    """What a picture of this size shows: the level-0 frame or the bounds, as (x, y, width, height)."""
    frame = (0, 0, *size_level0_px)
    width, height = size_px
    regions = [(region, width * region[3] / region[2]) for region in (frame, bounds_level0_px)]
    # To a pixel first: frame and bounds may differ by less than the tolerance.
    for tolerance_px in (max(1, height / width), _ASPECT_TOLERANCE * height):
        for region, expected_height in regions:
            if abs(height - expected_height) < tolerance_px:
                return region
    raise AnnotationError(
        f"{path.name}: {width} x {height} px; neither the slide ({size_level0_px[0]} x {size_level0_px[1]}) nor its "
        f"bounds ({bounds_level0_px[2]} x {bounds_level0_px[3]}) have these proportions; export a mask of all of it"
    )


def _seek_level(picture: Image.Image, wanted_px: tuple[float, float]) -> None:
    """Turn to the smallest level of a TIFF pyramid with at least `wanted_px` (width, height)."""
    width, height = picture.size
    levels = {}
    for page in range(getattr(picture, "n_frames", 1)):
        picture.seek(page)
        same_view = abs(picture.width / width * height / picture.height - 1) <= _ASPECT_TOLERANCE
        if same_view and picture.width >= wanted_px[0] and picture.height >= wanted_px[1]:
            levels[picture.width] = page
    picture.seek(levels[min(levels)] if levels else 0)


def _rows(table: Path) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, numbered as in a spreadsheet; blanks around cells are cut off."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        header = text.lstrip().partition("\n")[0]
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
        rows = [(number, [cell.strip() for cell in row]) for number, row in enumerate(reader, start=1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AnnotationError(f"{table.name}: no table that can be read; save it as 'CSV UTF-8'") from error
    return [(number, cells) for number, cells in rows if any(cells)]
