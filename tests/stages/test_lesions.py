"""The lesion level: facts by hand, and the curve against a plain transcription of its definition."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import shapely
from jaxtyping import Float64

from wsi_anomaly.annotations import (
    Annotation,
    Outline,
    SlideLabel,
    area_fractions,
    lesions_of,
)
from wsi_anomaly.imaging.geometry import Grid
from wsi_anomaly.stages.evaluate.evidence import Evidence
from wsi_anomaly.stages.evaluate.lesions import SUPPRESSION_UM, lesion_level
from wsi_anomaly.stages.evaluate.protocol import Protocol
from wsi_anomaly.storage.layout import SlideFolder

TILE_UM = 128.0
TILE_PX = 512.0
"""Level-0 pixels of 0.25 microns."""
MPP = TILE_UM / TILE_PX

Bounds = tuple[float, float, float, float]


def evidence_of(
    z: Float64[np.ndarray, "row column"], outlines_um: Sequence[Bounds | shapely.Polygon] = (), *, slide_id: str = "a"
) -> Evidence:
    """A slide with tiles where z is no NaN, its truth in microns from the corner of the grid."""
    shapes = [shapely.box(*outline) if isinstance(outline, tuple) else outline for outline in outlines_um]
    drawn = tuple(Outline(shapely.transform(shape, lambda xy: xy / MPP), "") for shape in shapes)
    grid = Grid((0, 0), (TILE_PX, TILE_PX), (TILE_PX, TILE_PX), z.shape)
    cells = np.argwhere(np.isfinite(z)).astype(np.int32)
    return Evidence(
        slide_id,
        SlideLabel(abnormal=bool(drawn)),
        area_fractions(drawn, grid.boxes(cells)),
        z_tile=z[tuple(cells.T)].astype(np.float64),
        ranks=None,
        cells=cells,
        tile_grid=grid,
        cell_um=TILE_UM,
        folder=SlideFolder(Path(slide_id)),
        annotation=Annotation(drawn, (), ()) if drawn else None,
    )


def measures_of(*evidence: Evidence, threshold_z: float = 0.0) -> dict[str, float | int | None]:
    """Of a cohort."""
    return lesion_level(evidence, Protocol(threshold_z=threshold_z))[1]


def peak(row: int, column: int, z: float = 9.0, *, shape: tuple[int, int] = (12, 16)) -> Float64[np.ndarray, "y x"]:
    """Two by two cells of this z, of which erosion leaves the one at the lower right; -1 elsewhere."""
    grid = np.full(shape, -1.0)
    grid[row - 1 : row + 1, column - 1 : column + 1] = z
    return grid


def test_a_lesion_under_a_peak_is_found_at_once() -> None:
    """And every other cell is a false positive at a lower threshold."""
    found = measures_of(evidence_of(peak(5, 5), [(4 * TILE_UM, 4 * TILE_UM, 6 * TILE_UM, 6 * TILE_UM)]))
    assert found["froc_score"] == 1
    assert found["froc_sensitivity_at_0.25"] == 1
    assert (found["lesions"], found["ignored_lesions"], found["lesions_without_tiles"]) == (1, 0, 0)
    assert (found["lesion_sensitivity_at_threshold"], found["false_positives_at_threshold"]) == (1, 0)


def test_a_peak_beside_the_lesion_comes_before_it() -> None:
    """One false positive on one slide: nothing is found before the rate of 1, at which the other cells still tie."""
    lesion = (9 * TILE_UM, 9 * TILE_UM, 11 * TILE_UM, 11 * TILE_UM)
    z = np.maximum(peak(3, 3), peak(10, 10, 5.0))
    found = measures_of(evidence_of(z, [lesion]), threshold_z=2.0)
    rates = ("0.25", "0.5", "1", "2", "4", "8")
    assert [found[f"froc_sensitivity_at_{rate}"] for rate in rates] == [0, 0, 1, 1, 1, 1]
    assert found["froc_score"] == pytest.approx(4 / 6)
    assert found["false_positives_at_threshold"] == 1
    halved = measures_of(evidence_of(z, [lesion]), evidence_of(np.full((9, 9), -1.0)), threshold_z=2.0)
    assert halved["froc_sensitivity_at_0.5"] == 1  # averaged over all slides, with and without lesions
    assert halved["false_positives_at_threshold"] == 0.5


def test_a_lesion_smaller_than_a_tile_does_not_vanish() -> None:
    """220 microns long in a strip 10 wide: no tile has much of it, and three tiles lie over it."""
    strip = (5 * TILE_UM + 10, 5 * TILE_UM + 50, 5 * TILE_UM + 230, 5 * TILE_UM + 60)
    assert measures_of(evidence_of(peak(5, 6), [strip]))["froc_score"] == 1
    missed = measures_of(evidence_of(peak(5, 10), [strip]))
    assert (missed["lesions"], missed["froc_sensitivity_at_0.5"]) == (1, 0)


def test_isolated_tumour_cells_are_neither_found_nor_false() -> None:
    """A dot under the highest peak, and a lesion under the second."""
    dot = (5 * TILE_UM, 5 * TILE_UM, 5 * TILE_UM + 20, 5 * TILE_UM + 20)
    lesion = (9 * TILE_UM, 9 * TILE_UM, 11 * TILE_UM, 11 * TILE_UM)
    z = np.maximum(peak(5, 5), peak(10, 10, 5.0))
    found = measures_of(evidence_of(z, [dot, lesion]), threshold_z=2.0)
    assert (found["lesions"], found["ignored_lesions"]) == (1, 1)
    assert (found["froc_score"], found["false_positives_at_threshold"]) == (1, 0)
    alone = measures_of(evidence_of(z, [dot]))
    assert (alone["lesions"], alone["froc_score"], alone["lesion_sensitivity_at_threshold"]) == (0, None, None)


def test_a_lesion_without_a_tile_is_missed() -> None:
    """However low the threshold; the other is found."""
    z = peak(5, 5)
    z[:, 9:] = np.nan
    lesions = [(4 * TILE_UM, 4 * TILE_UM, 6 * TILE_UM, 6 * TILE_UM), (12 * TILE_UM, 0, 14 * TILE_UM, 3 * TILE_UM)]
    found = measures_of(evidence_of(z, lesions))
    assert (found["lesions"], found["lesions_without_tiles"]) == (2, 1)
    assert found["froc_score"] == 0.5


def test_a_lesion_only_on_tiles_without_z_is_missed() -> None:
    """They are tiles, and no detections: nothing could be scored there."""
    one = evidence_of(peak(5, 5), [(9 * TILE_UM, 9 * TILE_UM, 11 * TILE_UM, 11 * TILE_UM)])
    one.z_tile[(one.cells >= 7).all(axis=1)] = np.nan
    found = measures_of(one)
    assert (found["lesions_without_tiles"], found["froc_score"]) == (0, 0)


def test_slides_whose_truth_is_unknown_do_not_count() -> None:
    """Neither their peaks nor their number."""
    known = evidence_of(peak(5, 5), [(0, 0, 400, 400)])
    unknown = Evidence(**{**vars(evidence_of(peak(5, 5))), "share": None})
    assert measures_of(known, unknown) == measures_of(known)
    assert lesion_level([unknown], Protocol())[0] is None
    assert measures_of(unknown)["false_positives_at_threshold"] is None
    assert lesion_level([], Protocol())[0] is None


def test_noise_over_half_of_a_slide_is_not_one_detection() -> None:
    """Two lesions in a slide where half of the raw cells lie above 0 are two hits, with few false positives between."""
    z = np.random.default_rng(3).normal(0, 1, (60, 60))
    z[10:14, 10:14] += 6
    z[40:44, 20:24] += 6
    lesions = [(10 * TILE_UM, 10 * TILE_UM, 14 * TILE_UM, 14 * TILE_UM), (20 * TILE_UM, 40 * TILE_UM, 3072, 5632)]
    found = measures_of(evidence_of(z, lesions))
    assert (found["froc_sensitivity_at_0.25"], found["lesion_sensitivity_at_threshold"]) == (1, 1)
    assert found["false_positives_at_threshold"] > 50


def plain_froc(slides: Sequence[Evidence]) -> tuple[list[float], list[float]]:
    """The definition, step by step: points, discs, polygons; rates and sensitivities at every threshold."""
    best, false = [], []
    for one in slides:
        left = one.z_eroded.astype(np.float64)
        row, column = np.mgrid[: one.shape[0], : one.shape[1]]
        lesions = lesions_of(one.annotation, (MPP, MPP)) if one.annotation else None
        wanted = (
            [] if lesions is None else [p for p, i in zip(lesions.polygons, lesions.isolated, strict=True) if not i]
        )
        ignored = [] if lesions is None else [p for p, i in zip(lesions.polygons, lesions.isolated, strict=True) if i]
        highest = [-np.inf] * len(wanted)
        while np.isfinite(left).any():
            r, c = np.unravel_index(np.nanargmax(left), left.shape)
            tile = shapely.box(c * TILE_PX, r * TILE_PX, (c + 1) * TILE_PX, (r + 1) * TILE_PX)
            hit = [number for number, lesion in enumerate(wanted) if lesion.intersects(tile)]
            for number in hit:
                highest[number] = max(highest[number], left[r, c])
            if not hit and not any(lesion.intersects(tile) for lesion in ignored):
                false.append(left[r, c])
            left[np.hypot(row - r, column - c) * TILE_UM <= SUPPRESSION_UM] = np.nan
        best += highest
    thresholds = sorted({*best, *false} - {-np.inf}, reverse=True)
    rates = [sum(z >= threshold for z in false) / len(slides) for threshold in thresholds]
    return [0, *rates], [0, *(float(np.mean(np.array(best) >= threshold)) for threshold in thresholds)]


def test_the_curve_is_that_of_the_definition() -> None:
    """Three slides with blobs, dots and torn tissue, and two normal ones; about half of the lesions stand out."""
    random = np.random.default_rng(11)
    slides = []
    for number in range(5):
        outlines = [
            shapely.Point(random.uniform(200, 3500, 2)).buffer(float(np.exp(random.uniform(2, 5.6))))
            for _ in range(9 if number < 3 else 0)
        ]
        z = random.normal(0, 1, (30, 32))
        z[random.random(z.shape) < 0.2] = np.nan
        z += 2 * evidence_of(np.zeros(z.shape), outlines).share.reshape(z.shape)
        slides.append(evidence_of(z, outlines, slide_id=str(number)))
    curve, found = lesion_level(slides, Protocol())
    rates, sensitivities = plain_froc(slides)
    assert found["lesions"] > 4
    assert found["ignored_lesions"] > 4
    assert len(rates) == len(curve.thresholds)
    assert curve.false_positives == pytest.approx(rates)
    assert curve.sensitivity == pytest.approx(sensitivities)
    assert 0.2 < found["froc_score"] < 0.9


def test_maps_follow_z_when_it_is_replaced() -> None:
    """What was made from the old z is not kept; the map is made once."""
    one = evidence_of(peak(5, 5), [(0, 0, 400, 400)])
    assert one.z_eroded is one.z_eroded
    assert one.z_eroded.max() == 9
    later = type(one)(**{**{name: getattr(one, name) for name in one.__dataclass_fields__}, "z_tile": one.z_tile + 1})
    assert later.z_eroded.max() == 10
    assert later.scores(Protocol()).z_max == 10
    assert one.truth.sum() == 16
