"""What somebody outlined -> lesions as Camelyon16 counts them. Knows outlines; knows no tile, no detector, no file."""

from dataclasses import dataclass

import numpy as np
import shapely
from jaxtyping import Bool, Float64, Int64, Real, Shaped

from wsi_anomaly.annotations.abnormal_mask import AbnormalMask
from wsi_anomaly.annotations.annotation import Annotation
from wsi_anomaly.annotations.coverage import boxes_near

WIDENED_UM = 37.5
"""On every side, half of 75 µm, which the challenge takes for five tumour cells: what lies nearer is one lesion."""
ISOLATED_BELOW_UM = 275.0
"""The major axis of a widened lesion: 200 µm, the limit of isolated tumour cells, and the 75 µm by which it grew."""
_PIXEL_UM = 7.8
_TOLERANCE_UM = 1.0
"""Hand-drawn outlines have so many corners that widening them takes seconds."""


@dataclass(frozen=True, slots=True)
class Lesions:
    """The lesions of one slide."""

    polygons: Shaped[np.ndarray, " lesion"]
    """Widened and without holes, in level-0 pixels; they do not touch each other."""
    isolated: Bool[np.ndarray, " lesion"]
    """Isolated tumour cells, which the challenge ignores."""

    def __len__(self) -> int:
        return len(self.polygons)

    def touched(
        self, boxes: Real[np.ndarray, "tile 4"]
    ) -> tuple[Int64[np.ndarray, " touch"], Int64[np.ndarray, " touch"]]:
        """Which boxes (x0, y0, x1, y1 in level-0 pixels) show a part of a lesion, and beside each, of which one."""
        near = boxes_near(boxes, self.polygons)
        lesion, box = shapely.STRtree(shapely.box(*boxes[near].T)).query(self.polygons, predicate="intersects")
        return near[box], lesion.astype(np.int64)


def lesions_of(annotation: Annotation | AbnormalMask, mpp: tuple[float, float]) -> Lesions:
    """The lesions that the abnormal areas of a slide make up; `mpp` is that of level 0, along x and y.

    The rules are those of the evaluation code of Camelyon16 (`computeEvaluationMask`, `computeITCList`; Ehteshami
    Bejnordi et al., JAMA 2017): outlines are widened by 37.5 µm and their holes filled; what then touches is one
    lesion. One with a major axis under 275 µm is ignored, that of the ellipse with the same second moments. The code
    does so with pixels of 7.8 µm. Here outlines are taken as they are, so that none is too small, and mask pictures
    with such pixels, each of which is abnormal where any part of it is.

    Raises:
        AnnotationError: the annotation is a mask that cannot be read.
    """
    outlines = (
        annotation.outlines(_PIXEL_UM / max(mpp)) if isinstance(annotation, AbnormalMask) else annotation.abnormal
    )
    if not outlines:
        return Lesions(np.empty(0, object), np.empty(0, np.bool_))
    in_um = shapely.transform([outline.polygon for outline in outlines], lambda xy: xy * mpp)
    wide = _parts(shapely.union_all(shapely.buffer(shapely.simplify(in_um, _TOLERANCE_UM), WIDENED_UM)))
    # Once more, as a lesion may lie in what was a hole of another.
    filled = _parts(shapely.union_all(shapely.polygons(shapely.get_exterior_ring(wide))))
    return Lesions(
        polygons=shapely.transform(filled, lambda xy: xy / mpp),
        isolated=np.array([major_axis(lesion) < ISOLATED_BELOW_UM for lesion in filled], np.bool_),
    )


def major_axis(polygon: shapely.Polygon) -> float:
    """Length of the longer axis of the ellipse with the same second moments; holes do not count."""
    corners: Float64[np.ndarray, "corner xy"] = np.asarray(polygon.exterior.coords)
    here, there = (corners[:-1] - corners[0], corners[1:] - corners[0])
    twice = here[:, 0] * there[:, 1] - here[:, 1] * there[:, 0]  # of the triangles from the first corner, signed
    area = twice.sum() / 2
    centre = twice @ (here + there) / (6 * area)
    mixed = here.T * twice @ there
    moments = (here.T * twice @ here + there.T * twice @ there + (mixed + mixed.T) / 2) / (12 * area)
    return float(4 * np.linalg.eigvalsh(moments - np.outer(centre, centre))[-1] ** 0.5)


def _parts(geometry: shapely.Geometry) -> Shaped[np.ndarray, " polygon"]:
    return shapely.get_parts(geometry)
