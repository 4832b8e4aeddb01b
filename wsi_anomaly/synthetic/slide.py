"""A slide made from nothing, of which any region can be drawn by itself: what it shows, and what is true of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from jaxtyping import UInt8

from wsi_anomaly.synthetic.anatomy import Anatomy, draw_node
from wsi_anomaly.synthetic.anomalies import Anomaly, AnomalyKind, Artefact, ArtefactKind
from wsi_anomaly.synthetic.artefacts import REACH_PX, Disturbance, disturbed_ink, disturbed_light, place_artefacts
from wsi_anomaly.synthetic.cells import Neighbourhood, stamp_cells
from wsi_anomaly.synthetic.disease import planted
from wsi_anomaly.synthetic.ground import ground
from wsi_anomaly.synthetic.looks import FOCUS_REACH_PX, Look, lit, photographed, usual_look, varied_look
from wsi_anomaly.synthetic.sprites import LARGEST_PX
from wsi_anomaly.synthetic.structures import MAP_STEP_PX, Structure

VISIBLE_SHARE = 0.01
"""A tile has a planted kind when at least this share of its area lies within an outline of it."""


@dataclass(frozen=True, slots=True)
class VirtualSlide:
    """A lymph node, how it is stained, and what was planted in it."""

    size_px: tuple[int, int]
    anatomy: Anatomy
    neighbourhood: Neighbourhood
    look: Look
    anomalies: tuple[Anomaly, ...]
    disturbances: tuple[Disturbance, ...]

    @property
    def artefacts(self) -> tuple[Artefact, ...]:
        """Folds, pen marks and the like, which are no disease."""
        return tuple(disturbance.artefact for disturbance in self.disturbances)


@dataclass(frozen=True, slots=True)
class Truth:
    """What is known of a tile."""

    shares: Mapping[str, float]
    """The share of the area that each structure takes, by its name in lower case, the largest first."""
    anomalies: tuple[AnomalyKind, ...]
    artefacts: tuple[ArtefactKind, ...]

    @property
    def is_normal(self) -> bool:
        """Whether there is neither disease nor artefact."""
        return not self.anomalies and not self.artefacts


def draw_slide(
    seed: int,
    *,
    size_px: tuple[int, int] = (4096, 4096),
    anomalies: Sequence[AnomalyKind] = (),
    artefacts: Sequence[ArtefactKind] = (),
    varied: bool = False,
) -> VirtualSlide:
    """Decide all of a slide but its pixels. `varied`: any stain, scanner and grade of tumour, not the usual ones.

    The same seed gives the same tissue with and without anomalies or artefacts.
    """
    normal, sick, light, faults = np.random.default_rng(seed).spawn(4)
    node = draw_node(normal, size_px)
    anatomy, placed = planted(sick, node, anomalies)
    paleness = float(sick.uniform(0.7, 1.0)) if varied else 0.0
    return VirtualSlide(
        size_px,
        anatomy,
        Neighbourhood(int(normal.integers(2**31)), anatomy, float(normal.uniform(0.94, 1.0)), paleness),
        varied_look(light) if varied else usual_look(light),
        placed,
        place_artefacts(faults, node, artefacts),
    )


def draw_region(
    slide: VirtualSlide, origin_px: tuple[int, int], size_px: tuple[int, int]
) -> UInt8[np.ndarray, "row column rgb"]:
    """The pixels of a region by its top left (x, y) and (width, height): the same ones whatever else is drawn."""
    reach_px = REACH_PX if slide.disturbances else FOCUS_REACH_PX
    left, top = origin_px[0] - reach_px, origin_px[1] - reach_px
    rows, columns = size_px[1] + 2 * reach_px, size_px[0] + 2 * reach_px
    # Cells whose centre lies outside still reach in, so they get a canvas with room for whole sprites.
    margin_px = LARGEST_PX
    canvas = np.zeros((rows + 2 * margin_px, columns + 2 * margin_px, 2), np.float32)
    ink = canvas[margin_px:-margin_px, margin_px:-margin_px]
    ink[:] = ground(slide.anatomy, origin_px=(left, top), shape=(rows, columns))
    stamp_cells(canvas, slide.neighbourhood, origin_px=(left, top), margin_px=margin_px)
    if not slide.disturbances:
        return photographed(lit(ink, slide.look), slide.look, origin_px=origin_px)
    ink = disturbed_ink(ink, slide.disturbances, origin_px=(left, top))
    crop = slice(reach_px - FOCUS_REACH_PX, FOCUS_REACH_PX - reach_px)
    seen = disturbed_light(lit(ink[crop, crop], slide.look), slide.disturbances, origin_px=origin_px)
    return photographed(seen, slide.look, origin_px=origin_px)


def truth_of(slide: VirtualSlide, origin_px: tuple[int, int], size_px: tuple[int, int]) -> Truth:
    """What a region shows."""
    (left, top), (width, height) = origin_px, size_px
    rows = slice(max(top, 0) // MAP_STEP_PX, -(-(top + height) // MAP_STEP_PX))
    columns = slice(max(left, 0) // MAP_STEP_PX, -(-(left + width) // MAP_STEP_PX))
    found, counts = np.unique(slide.anatomy.structures[rows, columns], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    shares = {Structure(found[i]).name.lower(): float(counts[i] / counts.sum()) for i in order}
    box = shapely.box(left, top, left + width, top + height)

    def visible(outline: shapely.Polygon) -> bool:
        return bool(outline.intersection(box).area >= VISIBLE_SHARE * box.area)

    return Truth(
        shares,
        tuple(dict.fromkeys(each.kind for each in slide.anomalies if visible(each.outline_level0_px))),
        tuple(dict.fromkeys(each.kind for each in slide.artefacts if visible(each.outline_level0_px))),
    )


def tile_with_truth(
    slide: VirtualSlide, origin_px: tuple[int, int], *, tile_px: int = 256
) -> tuple[UInt8[np.ndarray, "row column rgb"], Truth]:
    """A square region and what it shows."""
    size_px = (tile_px, tile_px)
    return draw_region(slide, origin_px, size_px), truth_of(slide, origin_px, size_px)
