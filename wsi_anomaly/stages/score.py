"""Stage `score`: how abnormal is each tile? Reads `tiles.zarr` and a detector's scorer; writes `scores.zarr`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from wsi_anomaly.detectors.protocol import Localizer, Reconstructor, Scorer, TileBatch
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.execution import Progress, read_ahead, report
from wsi_anomaly.options import Options
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.prompts import NoPrompts, PromptStore
from wsi_anomaly.storage.record import Recipe, Record, current_record, read_record, writing
from wsi_anomaly.storage.scores import ScoreWriter
from wsi_anomaly.storage.tiles import TileStore

FORMAT_VERSION = 1


class ScoreOptions(Options):
    """What is kept beside the scores."""

    keep_maps: Literal["none", "all"] = "none"
    """Per-pixel anomaly of each tile."""
    keep_reconstructions: Literal["none", "all"] = "none"
    """Each tile as the model believes normal tissue would look."""


@dataclass(frozen=True, slots=True)
class FittedDetector:
    """A detector that is loaded only when there is something to score."""

    name: str
    digest: str
    """Of everything that decides its scores."""
    tile_px: int
    tile_mpp: float
    load: Callable[[], tuple[Scorer, tuple[str, ...]]]
    """The scorer and the names of its scores. Slow the first time; the same objects ever after."""


def score_slide(
    folder: SlideFolder,
    detector: FittedDetector,
    options: ScoreOptions,
    *,
    seed: int,
    batch_size: int,
    prompted: bool = False,
) -> Record:
    """Score the tiles of a slide, unless that has been done with the same model. Unreadable tiles get NaN.

    With `prompted` the detector is told what the stage `prompt` found.

    Raises:
        MissingOutputError: the stage `tile` has not run, or `prompt` where it is needed.
        ModelError: the model was fitted on tiles of another size or mpp.
        OptionsError: the detector makes no maps or reconstructions, and they are to be kept.
    """
    inputs = {"tiles": read_record(folder.root, "tile").digest, "detector": detector.digest}
    if prompted:
        inputs["prompts"] = read_record(folder.root, "prompt").digest
    recipe = Recipe("score", FORMAT_VERSION, options.model_dump() | {"seed": seed}, inputs)
    if done := current_record(folder.root, recipe):
        return done
    store = TileStore(folder.tiles)
    prompts = PromptStore(folder.prompts) if prompted else NoPrompts()
    _check_tiles(store, detector, folder.slide_id)
    scorer, score_names = detector.load()
    _check_abilities(scorer, detector.name, options)
    with writing(folder.root, recipe) as work:
        writer = ScoreWriter(
            work.folder / folder.scores.name,
            tiles=len(store),
            tile_px=store.tile_px,
            attributes={"detector": detector.name, "score_names": list(score_names)},
            maps=options.keep_maps != "none",
            reconstructions=options.keep_reconstructions != "none",
        )
        with writer:
            for readable, batch in _batches(store, prompts, seed=seed, batch_size=batch_size):
                writer.append(readable, *_outputs(scorer, batch, options, len(score_names)))
                report(Progress("score", folder.slide_id, writer.tiles_done, len(store)))
        work.facts.update({"scored": int(store.readable.sum())})
    return read_record(folder.root, "score")


def _batches(
    store: TileStore, prompts: PromptStore | NoPrompts, *, seed: int, batch_size: int
) -> Iterator[tuple[Bool[np.ndarray, " tile"], TileBatch]]:
    """All tiles in their order: which of a batch are readable, and those. The next batch is read meanwhile."""

    def read(indices: Int64[np.ndarray, " tile"]) -> tuple[Bool[np.ndarray, " tile"], TileBatch]:
        readable = store.readable[indices]
        kept = indices[readable]
        return readable, TileBatch(store.read(kept), store.seeds(kept, seed), *prompts.read(kept))

    chunks = np.split(np.arange(len(store)), range(batch_size, len(store), batch_size))
    return read_ahead(read, chunks, threads=1)


def _outputs(
    scorer: Scorer, batch: TileBatch, options: ScoreOptions, score_count: int
) -> tuple[
    Float32[np.ndarray, "tile score"],
    Float32[np.ndarray, "tile y x"] | None,
    UInt8[np.ndarray, "tile y x rgb"] | None,
]:
    """Scores, and maps and reconstructions where they are to be kept."""
    if not len(batch):
        return np.empty((0, score_count), np.float32), None, None
    maps = reconstructions = None
    if options.keep_maps != "none" and isinstance(scorer, Localizer):
        maps = scorer.score_map(batch)
    if options.keep_reconstructions != "none" and isinstance(scorer, Reconstructor):
        reconstructions = scorer.reconstruct(batch)
    return scorer.score(batch), maps, reconstructions


def _check_tiles(store: TileStore, detector: FittedDetector, slide_id: str) -> None:
    found = (store.tile_px, store.attributes["tile_mpp"])
    wanted = (detector.tile_px, detector.tile_mpp)
    if found != wanted:
        raise ModelError(
            f"{slide_id}: its tiles are {found[0]} px at {found[1]} µm/px, the model was fitted on {wanted[0]} px at "
            f"{wanted[1]} µm/px. Tile again with the model's own pipeline: wsi-anomaly tile --pipeline "
            "MODEL/pipeline.toml, or let 'wsi-anomaly run --model MODEL' do all stages."
        )


def _check_abilities(scorer: Scorer, name: str, options: ScoreOptions) -> None:
    if options.keep_maps != "none" and not isinstance(scorer, Localizer):
        raise OptionsError(f"the detector '{name}' makes no per-pixel maps. Leave out --keep-maps.")
    if options.keep_reconstructions != "none" and not isinstance(scorer, Reconstructor):
        raise OptionsError(f"the detector '{name}' makes no reconstructions. Leave out --keep-reconstructions.")
