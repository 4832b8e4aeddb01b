"""Everything that one detector is worth, put together from tiles, slides, segmentations and lesions. Reads no file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wsi_anomaly.imaging.classification import Ranking
from wsi_anomaly.imaging.froc import FrocCurve
from wsi_anomaly.stages.evaluate.controls import control_warnings
from wsi_anomaly.stages.evaluate.evidence import Evidence
from wsi_anomaly.stages.evaluate.lesions import lesion_level
from wsi_anomaly.stages.evaluate.protocol import Protocol
from wsi_anomaly.stages.evaluate.sanity import sanity_warnings
from wsi_anomaly.stages.evaluate.slide_by_slide import (
    segment,
    segmentation_intervals,
    segmentation_measures,
    slide_rows,
)
from wsi_anomaly.stages.evaluate.slide_level import (
    SLIDE_SCORES,
    rank_slides,
    scores_of,
    slide_intervals,
    slide_measures,
)
from wsi_anomaly.stages.evaluate.tile_level import certain_tiles, rank_tiles, tile_intervals, tile_measures

Measure = float | int | None


@dataclass(frozen=True, slots=True)
class Findings:
    """What one detector is worth."""

    measures: Mapping[str, Measure]
    """None where the truth does not allow it, such as where a class is missing."""
    intervals: Mapping[str, tuple[float, float]]
    """Of those measures that have one."""
    per_slide: tuple[Mapping[str, Measure | str], ...]
    """One row a slide, with equal names."""
    tiles: Ranking
    slides: Mapping[str, Ranking]
    """By slide score."""
    froc: FrocCurve | None
    warnings: tuple[str, ...]


def measure(evidence: Sequence[Evidence], protocol: Protocol) -> Findings:
    """Everything that the truth allows."""
    tiles = [certain_tiles(one, protocol) for one in evidence]
    tile_ranking = rank_tiles(tiles)
    scores = scores_of(evidence, protocol)
    slides = [segment(one, protocol) for one in evidence]
    curve, lesions = lesion_level(evidence, protocol)
    return Findings(
        measures=tile_measures(evidence, tile_ranking)
        | slide_measures(evidence, scores)
        | segmentation_measures(slides)
        | lesions,
        intervals=tile_intervals(tiles, tile_ranking, protocol)
        | slide_intervals(evidence, scores, protocol)
        | segmentation_intervals(slides, protocol),
        per_slide=slide_rows(slides, scores),
        tiles=tile_ranking,
        slides={name: ranking for name, ranking in rank_slides(evidence, scores).items() if name in SLIDE_SCORES},
        froc=curve,
        warnings=(
            *sanity_warnings(evidence, tiles, tile_ranking, protocol),
            *control_warnings(evidence, protocol),
        ),
    )
