"""What a table of measures must not hide: what is missing, and a detector that cannot be trusted. Measures nothing."""

from collections.abc import Iterator, Sequence

import numpy as np

from wsi_anomaly.imaging.classification import Ranking
from wsi_anomaly.stages.evaluate.evidence import Evidence
from wsi_anomaly.stages.evaluate.protocol import Protocol
from wsi_anomaly.stages.evaluate.tile_level import CertainTiles

_MANY_MISSING, _MANY_ABNORMAL, _MUCH_DRIFT = 0.05, 0.75, 1.0
_NARROW, _WIDE = 0.5, 2.0
_STANDARD_IQR = 1.349
"""From quartile to quartile of a standard normal distribution, as which the reference is described."""
_FEWEST_TILES = 20
"""Quartiles of fewer say little."""
_NAMED = 10


def sanity_warnings(
    evidence: Sequence[Evidence], tiles: Sequence[CertainTiles], ranking: Ranking, protocol: Protocol
) -> tuple[str, ...]:
    """Each a short sentence with its figures."""
    return (
        *_missing_classes(evidence, ranking),
        *_left_out(evidence),
        *_untrustworthy(evidence, ranking),
        *_normal_tissue(tiles, protocol),
    )


def some_of(slide_ids: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(slide_ids) - _NAMED
    return ", ".join(slide_ids[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _missing_classes(evidence: Sequence[Evidence], ranking: Ranking) -> Iterator[str]:
    slides = [one.label.abnormal for one in evidence]
    for name, there in (("abnormal", any(slides)), ("normal", not all(slides))):
        if not there:
            yield f"no slide is {name}: AUROC, AUPR and sensitivity of slides are left out, the rest is given"
    for name, count in (("abnormal", ranking.abnormal), ("normal", ranking.normal)):
        if not count:
            yield f"no tile is surely {name}: AUROC and the other measures of tiles are left out, the rest is given"


def _left_out(evidence: Sequence[Evidence]) -> Iterator[str]:
    if undrawn := [one.slide_id for one in evidence if one.share is None]:
        yield f"abnormal without annotation, so at the slide level only: {some_of(undrawn)}"
    if unscored := [one.slide_id for one in evidence if not np.isfinite(one.z_tile).any()]:
        yield f"no tile has a score, so left out: {some_of(unscored)}"
    drawn = [(one.slide_id, one.share.any()) for one in evidence if one.share is not None and not one.label.abnormal]
    if contradicted := [slide_id for slide_id, abnormal in drawn if abnormal]:
        yield f"labelled normal, but something abnormal is annotated: {some_of(contradicted)}"


def _untrustworthy(evidence: Sequence[Evidence], ranking: Ranking) -> Iterator[str]:
    if ranking.all_equal:
        yield "all tiles have the same score"
    tiles = sum(len(one.z_tile) for one in evidence)
    missing = sum(int(np.count_nonzero(~np.isfinite(one.z_tile))) for one in evidence)
    if tiles and missing / tiles > _MANY_MISSING:
        yield f"{missing / tiles:.0%} of the tiles have no score"


def _normal_tissue(tiles: Sequence[CertainTiles], protocol: Protocol) -> Iterator[str]:
    normal = np.concatenate([one.z[~one.abnormal] for one in tiles])
    if not len(normal):
        return
    if (share := float((normal > protocol.threshold_z).mean())) > _MANY_ABNORMAL:
        yield f"{share:.0%} of the normal tiles lie above z = {protocol.threshold_z:g}"
    lower, median, upper = np.quantile(normal, [0.25, 0.5, 0.75])
    if abs(median) > _MUCH_DRIFT:
        yield f"the normal tissue under test has a median z of {median:.1f}: it differs from the reference"
    spread = float(upper - lower) / _STANDARD_IQR
    if len(normal) >= _FEWEST_TILES and not _NARROW <= spread <= _WIDE:
        yield (
            f"z of the normal tissue under test is spread {spread:.2g} times as widely as in the reference "
            f"(quartiles {lower:.1f} and {upper:.1f}): it differs from it"
        )
