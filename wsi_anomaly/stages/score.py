"""Stage `score`: how abnormal is each tile? Reads `tiles.zarr` and a detector's scorer; writes `scores.zarr`."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8
from pydantic import Field

from wsi_anomaly.detectors.protocol import Accountable, Localizer, Reconstructor, Scorer, TileBatch
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.execution import Progress, read_ahead, report
from wsi_anomaly.options import Options
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.prompts import NoPrompts, PromptStore
from wsi_anomaly.storage.record import Recipe, Record, current_record, read_record, writing
from wsi_anomaly.storage.scores import ScoreStatus, ScoreWriter
from wsi_anomaly.storage.tiles import TileStore

FORMAT_VERSION = 2

log = logging.getLogger(__name__)


class ScoreOptions(Options):
    """What is kept beside the scores."""

    keep_maps: Literal["none", "all"] = "none"
    """Per-pixel anomaly of each tile."""
    keep_reconstructions: str = Field("none", pattern=r"^(none|all|worst:[1-9][0-9]*)$")
    """Each tile as the model believes normal tissue would look; "worst:200" keeps those of the 200 highest scores."""

    @property
    def worst(self) -> int:
        """How many reconstructions are kept, where only the worst are."""
        name, _, count = self.keep_reconstructions.partition(":")
        return int(count) if name == "worst" else 0


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
    source = SlideTiles.of(folder, seed=seed, prompted=prompted)
    store = source.store
    _check_tiles(store, detector, folder.slide_id)
    scorer, score_names = detector.load()
    _check_abilities(scorer, detector.name, options)
    with writing(folder.root, recipe) as work:
        writer = ScoreWriter(
            work.folder / folder.scores.name,
            tiles=len(store),
            tile_px=store.tile_px,
            attributes=_attributes(detector.name, score_names, scorer),
            maps=options.keep_maps != "none",
            reconstructions=options.keep_reconstructions != "none",
        )
        with writer:
            for readable, batch in source.batches(batch_size):
                writer.append(readable, *_outputs(scorer, batch, options, len(score_names)))
                report(Progress("score", folder.slide_id, writer.tiles_done, len(store)))
            _keep_worst(writer, source, scorer, options.worst, batch_size)
        failed = int((writer.status == ScoreStatus.FAILED).sum())
        _tell_failed(folder.slide_id, failed, int(store.readable.sum()))
        work.facts.update({"scored": int(store.readable.sum()) - failed, "failed": failed})
    return read_record(folder.root, "score")


@dataclass(frozen=True, slots=True)
class SlideTiles:
    """The tiles of a slide with what is known of each."""

    store: TileStore
    prompts: PromptStore | NoPrompts
    seed: int

    @classmethod
    def of(cls, folder: SlideFolder, *, seed: int, prompted: bool) -> "SlideTiles":
        """Those that the stages `tile` and, if wanted, `prompt` left."""
        return cls(TileStore(folder.tiles), PromptStore(folder.prompts) if prompted else NoPrompts(), seed)

    def batches(self, batch_size: int) -> Iterator[tuple[Bool[np.ndarray, " tile"], TileBatch]]:
        """All tiles in their order: which of a batch are readable, and those. The next batch is read meanwhile."""

        def read(indices: Int64[np.ndarray, " tile"]) -> tuple[Bool[np.ndarray, " tile"], TileBatch]:
            readable = self.store.readable[indices]
            return readable, self.read(indices[readable])

        chunks = np.split(np.arange(len(self.store)), range(batch_size, len(self.store), batch_size))
        return read_ahead(read, chunks, threads=1)

    def read(self, indices: Int64[np.ndarray, " tile"]) -> TileBatch:
        """Some readable tiles."""
        return TileBatch(self.store.read(indices), self.store.seeds(indices, self.seed), *self.prompts.read(indices))


def _attributes(detector_name: str, score_names: tuple[str, ...], scorer: Scorer) -> dict[str, Any]:
    facts = dict(scorer.facts) if isinstance(scorer, Accountable) else {}
    return {"detector": detector_name, "score_names": list(score_names), **facts}


def _keep_worst(writer: ScoreWriter, source: SlideTiles, scorer: Scorer, count: int, batch_size: int) -> None:
    """Rebuild the tiles of the highest first scores once more: cheaper than to rebuild all on the way."""
    if not count or not isinstance(scorer, Reconstructor):
        return
    first = writer.scores[:, 0]
    finite = np.flatnonzero(np.isfinite(first))
    worst = np.sort(finite[np.argsort(-first[finite], kind="stable")[:count]])
    for indices in np.split(worst, range(batch_size, len(worst), batch_size)):
        for tile, rebuilt in zip(indices.tolist(), scorer.reconstruct(source.read(indices)), strict=True):
            writer.keep(tile, rebuilt)


def _tell_failed(slide_id: str, failed: int, readable: int) -> None:
    if readable and failed == readable:
        raise ModelError(
            f"{slide_id}: the detector gives no number for any of its {readable} tiles. Its weights may be damaged, or "
            'the precision too low: try precision = "bf16" or "fp32" under [detector].'
        )
    if failed:
        log.warning(
            "%s: the detector gives no number for %d of %d tiles; they are left out", slide_id, failed, readable
        )


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
    if options.keep_reconstructions == "all" and isinstance(scorer, Reconstructor):
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
