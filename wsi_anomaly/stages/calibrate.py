"""Stage `calibrate`: what scores does normal tissue have? Reads `scores.zarr` of normal slides; makes a reference."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32

from wsi_anomaly.errors import ModelError
from wsi_anomaly.imaging.zscore import ScoreReference, describe
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.record import read_record
from wsi_anomaly.storage.reference import Reference, Source
from wsi_anomaly.storage.scores import read_scores

_FEW_TILES = 100

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Selection:
    """The tiles of one slide that count; all of them where `tiles` is None."""

    folder: SlideFolder
    tiles: Bool[np.ndarray, " tile"] | None = None


def calibrate(selections: Sequence[Selection], source: Source) -> Reference:
    """The statistics of the selected tiles' scores. Every tile counts once; unreadable ones do not count.

    Raises:
        MissingOutputError: the stage `score` has not run.
        ModelError: the slides were scored by different detectors, or too few scores differ.
    """
    scores, names = [], set()
    for selection in selections:
        read_record(selection.folder.root, "score")
        values, score_names = read_scores(selection.folder.scores)
        scores.append(values if selection.tiles is None else values[selection.tiles])
        names.add(score_names)
    if len(names) != 1:
        raise ModelError(f"the slides hold scores of different detectors ({names}). Score them all with one model.")
    table, columns = np.concatenate(scores), names.pop()
    if len(table) < _FEW_TILES:
        log.warning(
            "the reference is made of %d normal tiles: too few to know how much normal tissue varies, so that normal "
            "tissue may get high z-scores. Add normal slides.",
            len(table),
        )
    described = {name: _described(name, column) for name, column in zip(columns, table.T, strict=True)}
    return Reference(source=source, slides=len(selections), scores=described)


def _described(name: str, scores: Float32[np.ndarray, " tile"]) -> ScoreReference:
    try:
        return describe(scores)
    except ValueError as error:
        raise ModelError(
            f"the score '{name}' has no reference: {error}, and z-scores need at least two tiles that differ. Look at "
            "overview.png of the normal slides whether their tiles show tissue, and add normal slides."
        ) from error
