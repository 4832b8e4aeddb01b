"""Stage `score`: how abnormal is each tile? Reads `tiles.zarr` and a detector's scorer; writes `scores.zarr`."""

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from pydantic import Field

from wsi_anomaly.detectors.abilities import require_abilities
from wsi_anomaly.detectors.protocol import Accountable, Localizer, Reconstructor, Scorer, TileBatch, Vectorial
from wsi_anomaly.errors import ModelError
from wsi_anomaly.execution import Progress, read_ahead, report
from wsi_anomaly.options import Options
from wsi_anomaly.storage.descriptions import Descriptions, description_digests
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.record import Recipe, Record, current_record, read_record, writing
from wsi_anomaly.storage.scores import ScoreStatus, ScoreWriter, TileOutputs
from wsi_anomaly.storage.tiles import TileStore

FORMAT_VERSION = 3

_Batch = tuple[Bool[np.ndarray, " tile"], TileBatch]
"""Which tiles are readable, and those."""

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


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """What one detector has to do on a slide; `prompted`: it is told what the stage `prompt` found."""

    folder: SlideFolder
    detector: FittedDetector
    options: ScoreOptions
    seed: int
    prompted: bool = False

    @property
    def recipe(self) -> Recipe:
        """What decides the scores.

        Raises:
            MissingOutputError: the stage `tile` has not run, or `prompt` where it is needed.
        """
        inputs = {"tiles": read_record(self.folder.root, "tile").digest, "detector": self.detector.digest}
        inputs |= description_digests(self.folder, prompted=self.prompted)
        return Recipe("score", FORMAT_VERSION, self.options.model_dump() | {"seed": self.seed}, inputs)


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

    Raises:
        MissingOutputError: the stage `tile` has not run, or `prompt` where it is needed.
        ModelError: the model was fitted on tiles of another size or mpp.
        OptionsError: the detector makes no maps or reconstructions, and they are to be kept.
    """
    (done,) = score_together([ScoreJob(folder, detector, options, seed, prompted)], batch_size=batch_size)
    done.result()
    return read_record(folder.root, "score")


def score_together(jobs: Sequence[ScoreJob], *, batch_size: int) -> tuple[Future[float], ...]:
    """Score the tiles of one slide with several detectors, reading each tile once: as `score_slide`, job by job.

    The folders must hold the same tiles. A future has the seconds of its detector, or what went wrong with this job.
    """
    with contextlib.ExitStack() as stack:
        scorings = [stack.enter_context(contextlib.closing(_Scoring(job, batch_size))) for job in jobs]
        if waiting := [scoring for scoring in scorings if not scoring.ended.done()]:
            _feed(waiting, batch_size)
    return tuple(scoring.ended for scoring in scorings)


def _feed(scorings: "Sequence[_Scoring]", batch_size: int) -> None:
    """Hand all tiles to all jobs, until none wants more."""
    slide_id, sources = scorings[0].job.folder.slide_id, [scoring.source for scoring in scorings]
    count = len(sources[0].store)
    try:
        for number, batches in enumerate(_batches(sources, batch_size), 1):
            for scoring, batch in zip(scorings, batches, strict=True):
                scoring.take(batch)
            report(Progress("score", slide_id, min(number * batch_size, count), count))
            if all(scoring.ended.done() for scoring in scorings):
                return
    except Exception as error:  # noqa: BLE001 - that tiles cannot be read is the affair of each job
        for scoring in scorings:
            scoring.fail(error)
    for scoring in scorings:
        scoring.take(None)


def _batches(sources: "Sequence[SlideTiles]", batch_size: int) -> Iterator[list[_Batch]]:
    """All tiles of one slide in their order, as each source tells of them. The next batch is read meanwhile."""
    store = sources[0].store

    def read(indices: Int64[np.ndarray, " tile"]) -> list[_Batch]:
        readable = store.readable[indices]
        pixels = store.read(indices[readable])
        return [(readable, source.batch(indices[readable], pixels)) for source in sources]

    return read_ahead(read, np.split(np.arange(len(store)), range(batch_size, len(store), batch_size)))


class _Scoring:
    """A job under way. It takes batches, and keeps to itself what goes wrong."""

    def __init__(self, job: ScoreJob, batch_size: int) -> None:
        self.job = job
        self.ended: Future[float] = Future()
        self._seconds = 0.0
        self._work = self._score(batch_size)
        self.take(None)

    @cached_property
    def source(self) -> "SlideTiles":
        """The tiles with what the detector is told of them."""
        return SlideTiles.of(self.job.folder, seed=self.job.seed, prompted=self.job.prompted)

    def take(self, batch: _Batch | None) -> None:
        """The next tiles; None at the start and at the end."""
        self._go(lambda: self._work.send(batch))

    def close(self) -> None:
        """Give up what is not finished."""
        self._work.close()

    def fail(self, error: Exception) -> None:
        """There will be no more tiles."""
        self._go(lambda: self._work.throw(error))

    def _go(self, step: Callable[[], None]) -> None:
        if self.ended.done():
            return
        started = time.monotonic()
        try:
            step()
        except StopIteration:
            self.ended.set_result(self._seconds + time.monotonic() - started)
        except Exception as error:  # noqa: BLE001 - a future hands on whatever went wrong
            self.ended.set_exception(error)
        else:
            self._seconds += time.monotonic() - started

    def _score(self, batch_size: int) -> Generator[None, _Batch | None, None]:
        """The stage, for which tiles come from outside: a detector that fails leaves the others their turn."""
        folder, detector, options = self.job.folder, self.job.detector, self.job.options
        recipe = self.job.recipe
        if current_record(folder.root, recipe):
            return
        store = self.source.store
        _check_tiles(store, detector, folder.slide_id)
        scorer, score_names = detector.load()
        require_abilities(scorer, detector.name, maps=options.keep_maps, reconstructions=options.keep_reconstructions)
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
                while (given := (yield)) is not None:
                    writer.append(given[0], _outputs(scorer, given[1], options, len(score_names)))
                _keep_worst(writer, self.source, scorer, options.worst, batch_size)
            work.facts.update(_counts(folder.slide_id, writer, int(store.readable.sum())))


@dataclass(frozen=True, slots=True)
class SlideTiles:
    """The tiles of a slide with what is known of each."""

    store: TileStore
    known: Descriptions
    seed: int

    @classmethod
    def of(cls, folder: SlideFolder, *, seed: int, prompted: bool) -> "SlideTiles":
        """Those that the stages `tile` and, if wanted, `prompt` left."""
        return cls(TileStore(folder.tiles), Descriptions(folder, prompted=prompted), seed)

    def read(self, indices: Int64[np.ndarray, " tile"]) -> TileBatch:
        """Some readable tiles."""
        return self.batch(indices, self.store.read(indices))

    def batch(self, indices: Int64[np.ndarray, " tile"], pixels: UInt8[np.ndarray, "tile y x rgb"]) -> TileBatch:
        """Some readable tiles whose pixels are at hand."""
        return TileBatch(pixels, self.store.seeds(indices, self.seed), *self.known.read(indices))


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


def _counts(slide_id: str, writer: ScoreWriter, readable: int) -> dict[str, int]:
    failed = int((writer.status == ScoreStatus.FAILED).sum())
    if readable and failed == readable:
        raise ModelError(
            f"{slide_id}: the detector gives no number for any of its {readable} tiles. Its weights may be damaged, or "
            'the precision too low: try precision = "bf16" or "fp32" under [detector].'
        )
    if failed:
        log.warning(
            "%s: the detector gives no number for %d of %d tiles; they are left out", slide_id, failed, readable
        )
    return {"scored": readable - failed, "failed": failed}


def _outputs(scorer: Scorer, batch: TileBatch, options: ScoreOptions, score_count: int) -> TileOutputs:
    """Scores, with vectors where they have some, and maps and reconstructions where they are to be kept."""
    vectors = maps = reconstructions = None
    if isinstance(scorer, Vectorial):  # of no tiles too: how long are they?
        scores, vectors = scorer.scores_and_vectors(batch)
    else:
        scores = scorer.score(batch) if len(batch) else np.empty((0, score_count), np.float32)
    if len(batch) and options.keep_maps != "none" and isinstance(scorer, Localizer):
        maps = scorer.score_map(batch)
    if len(batch) and options.keep_reconstructions == "all" and isinstance(scorer, Reconstructor):
        reconstructions = scorer.reconstruct(batch)
    return TileOutputs(scores, vectors, maps, reconstructions)


def _check_tiles(store: TileStore, detector: FittedDetector, slide_id: str) -> None:
    found = (store.tile_px, store.attributes["tile_mpp"])
    wanted = (detector.tile_px, detector.tile_mpp)
    if found != wanted:
        raise ModelError(
            f"{slide_id}: its tiles are {found[0]} px at {found[1]} µm/px, the model was fitted on {wanted[0]} px at "
            f"{wanted[1]} µm/px. Tile again with the model's own pipeline: wsi-anomaly tile --pipeline "
            "MODEL/pipeline.toml, or let 'wsi-anomaly run --model MODEL' do all stages."
        )
