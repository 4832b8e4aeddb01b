"""Tiles as a detector ranks them against the annotations: one ranking, its measures, and how sure they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32

from wsi_anomaly.imaging.classification import Ranking, rank
from wsi_anomaly.imaging.clusters import bin_clusters, cluster_intervals
from wsi_anomaly.imaging.intervals import Measure
from wsi_anomaly.stages.evaluate.evidence import Evidence
from wsi_anomaly.stages.evaluate.protocol import Protocol

TILE_MEASURES: Mapping[str, Measure] = {
    "tile_auroc": Ranking.auroc,
    "tile_aupr": Ranking.aupr,
    "tile_aupr_in": Ranking.aupr_in,
    "tile_aupr_out": Ranking.aupr,
    "tile_fpr_at_95_tpr": lambda ranking: ranking.fpr_at_tpr(0.95),
    "tile_detection_error": Ranking.detection_error,
}
"""AUPR is given under the names of Hendrycks & Gimpel (ICLR 2017) and the MSMA thesis too: abnormal tiles are "out"."""
_ROUNDING = 1e-6
"""Areas are sums of floats: a tile fully inside may miss 1 by so much."""


@dataclass(frozen=True, slots=True)
class CertainTiles:
    """The scored tiles of a slide that are surely normal or surely abnormal."""

    z: Float32[np.ndarray, " tile"]
    abnormal: Bool[np.ndarray, " tile"]
    of_abnormal_slide: bool


def certain_tiles(one: Evidence, protocol: Protocol) -> CertainTiles:
    """Those of one slide; none of an abnormal slide without annotation."""
    if one.share is None:
        return CertainTiles(np.empty(0, np.float32), np.empty(0, np.bool_), one.label.abnormal)
    abnormal = one.share >= protocol.abnormal_from - _ROUNDING
    counts_as_normal = protocol.negatives == "all" or not one.label.abnormal
    chosen = np.isfinite(one.z_tile) & (abnormal | ((one.share <= protocol.normal_up_to) & counts_as_normal))
    return CertainTiles(one.z_tile[chosen].astype(np.float32), abnormal[chosen], one.label.abnormal)


def rank_tiles(tiles: Sequence[CertainTiles]) -> Ranking:
    """Those of all slides together."""
    return rank(np.concatenate([one.z for one in tiles]), np.concatenate([one.abnormal for one in tiles]))


def tile_measures(evidence: Sequence[Evidence], ranking: Ranking) -> dict[str, float | int | None]:
    """Each measure, None where a class is missing, and what it is counted from."""
    return {
        "tiles": ranking.abnormal + ranking.normal,
        "abnormal_tiles": ranking.abnormal,
        "tiles_without_score": sum(int(np.count_nonzero(~np.isfinite(one.z_tile))) for one in evidence),
        **{name: measured(ranking) for name, measured in TILE_MEASURES.items()},
    }


def tile_intervals(
    tiles: Sequence[CertainTiles], ranking: Ranking, protocol: Protocol
) -> dict[str, tuple[float, float]]:
    """Of each measure, by drawing slides: the tiles of one are too alike to be drawn alone."""
    slides = [one for one in tiles if len(one.z)]
    if not ranking.has_both_classes:
        return {}
    intervals = cluster_intervals(
        tuple(TILE_MEASURES.values()),
        bin_clusters(((one.z, one.abnormal) for one in slides), ranking.bin_edges()),
        np.array([one.of_abnormal_slide for one in slides]),
        seed=protocol.seed,
        level=protocol.level,
        resamples=protocol.resamples,
    )
    pairs = zip(TILE_MEASURES, intervals, strict=True)
    return {name: (interval.low, interval.high) for name, interval in pairs if interval}
