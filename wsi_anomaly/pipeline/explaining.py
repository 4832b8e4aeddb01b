"""`score --explain`: the tiles of highest and of median z, as the detector sees them, for the eye of a pathologist."""

from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from wsi_anomaly.detectors.protocol import Legible, Localizer, Reconstructor
from wsi_anomaly.pipeline.describing import caption
from wsi_anomaly.pipeline.preset import Pipeline
from wsi_anomaly.prompts.building import readable
from wsi_anomaly.reporting.score_pictures import ExplainedTile, choose_explained, write_score_sheet
from wsi_anomaly.stages.heatmap import z_of_tiles
from wsi_anomaly.stages.score import FittedDetector, SlideTiles
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.record import writable
from wsi_anomaly.storage.reference import Reference
from wsi_anomaly.storage.scores import read_scores

_TILES_SHOWN = 6
_ANY_MAP = "Map: higher is more abnormal, in the detector's own unit"


def explain_scores(slide: SlideFolder, detector: FittedDetector, reference: Reference, pipeline: Pipeline) -> Path:
    """Draw a dozen tiles of a scored slide beside their reconstructions and maps.

    Raises:
        ModelError: the reference does not know the slide's scores, or the model cannot be loaded.
    """
    z = z_of_tiles(slide, reference, pipeline.heatmap)
    source = SlideTiles.of(slide, seed=pipeline.seed, prompted=pipeline.prompt is not None)
    highest, median = (_explained(slide, source, detector, chosen, z) for chosen in choose_explained(z, _TILES_SHOWN))
    with writable(slide.root):
        write_score_sheet(
            slide.score_picture,
            highest=highest,
            median=median,
            slide_id=slide.slide_id,
            tile_mpp=float(source.store.attributes["tile_mpp"]),
            header=f"{detector.name}; z against {reference.source}",
            map_meaning=map_meaning(detector),
        )
    return slide.score_picture


def map_meaning(detector: FittedDetector) -> str:
    """What the maps of a detector show, in a line for who reads them."""
    scorer, _ = detector.load()
    return scorer.map_meaning if isinstance(scorer, Legible) else _ANY_MAP


def _explained(
    slide: SlideFolder,
    source: SlideTiles,
    detector: FittedDetector,
    chosen: Int64[np.ndarray, " _"],
    z: Float64[np.ndarray, " tile"],
) -> list[ExplainedTile]:
    if not len(chosen):
        return []
    scorer, _ = detector.load()
    batch = source.read(chosen)
    rebuilt = scorer.reconstruct(batch) if isinstance(scorer, Reconstructor) else None
    maps = scorer.score_map(batch) if isinstance(scorer, Localizer) else None
    scores, names = read_scores(slide.scores)
    return [
        ExplainedTile(
            pixels=batch.pixels[place],
            rebuilt=None if rebuilt is None else rebuilt[place],
            abnormality=None if maps is None else maps[place],
            prompt=readable(batch.prompts[place]),
            z=float(z[tile]),
            scores=dict(zip(names, scores[tile].tolist(), strict=True)),
            caption=caption(tile, *source.store.places.origins[tile].tolist()),
        )
        for place, tile in enumerate(chosen.tolist())
    ]
