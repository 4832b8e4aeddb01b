"""`explore`: one map of the kinds of tissue in a results folder, from score vectors or embeddings. Opens no slide."""

import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Float64, Int64
from pydantic import Field

from wsi_anomaly.detectors.sampling import even_sample
from wsi_anomaly.errors import CohortError, OutputError
from wsi_anomaly.imaging.typicality import FEWEST, Census, TypicalityMap, fit_map, place, u_matrix
from wsi_anomaly.options import Options
from wsi_anomaly.pipeline.single import having
from wsi_anomaly.pipeline.tile_groups import Groups, groups_of
from wsi_anomaly.reporting.typicality_picture import PrototypeTile, choose_cells, write_typicality_page
from wsi_anomaly.storage.arrays import read_array, read_attributes, write_arrays
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.prompts import PromptStore
from wsi_anomaly.storage.record import Recipe, Work, current_record, find_record, read_record, write_text, writing
from wsi_anomaly.storage.scores import has_vectors, read_scores, read_vectors
from wsi_anomaly.storage.tiles import TileStore

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
Of = Literal["scores", "embeddings"]
_STAGES: Mapping[Of, str] = {"scores": "score", "embeddings": "prompt"}
_Read = Callable[[Int64[np.ndarray, " tile"]], Float32[np.ndarray, "tile feature"]]
_Known = Int64[np.ndarray, " known"]
_TILES_AT_ONCE = 4096
_SEED = 0


class ExploreOptions(Options):
    """What the map is made of, and how large it is."""

    of: Of | None = None
    """None: embeddings where there are some."""
    rows: int | None = Field(default=None, ge=2, le=60)
    columns: int | None = Field(default=None, ge=2, le=60)
    most_tiles: int = Field(default=10_000, ge=FEWEST)
    """That the map is fitted to, taken evenly from the slides; all tiles are placed on it."""


@dataclass(frozen=True, slots=True)
class Explored:
    """What `explore` left, in figures."""

    features: str
    """What told tiles apart."""
    slides: int
    tiles: int
    shape: tuple[int, int]
    quantisation_error: float
    """The mean distance of a tile to its prototype, in deviations."""


@dataclass(frozen=True, slots=True)
class _Features:
    """What is known of the tiles of one slide."""

    slide: SlideFolder
    source: str
    """Which scores or which model they are of: only equal ones can be compared."""
    known: _Known
    read: _Read
    group: Int64[np.ndarray, " tile"]
    """Of all tiles, also of those that are not known; -1: none."""
    z: Float64[np.ndarray, " tile"]


def explore(run: RunFolder, options: ExploreOptions, *, labels: Path | None = None) -> Explored:
    """Map all tiles of a results folder, unless that has been done with the same inputs: picture, table and map.

    `labels` is a CSV that says a text of each slide: hits are then counted apart for each text.

    Raises:
        MissingOutputError: nothing has been scored or described.
        AnnotationError: the labels cannot be read, are too many, or none belongs to a slide.
        OutputError: slides were scored or described by different models, or the folder cannot be written.
        CohortError: the tiles are too few, or of one score only and without vectors.
    """
    of: Of = options.of or ("embeddings" if _has_embeddings(run) else "scores")
    slides = having(run, _STAGES[of])
    if left_out := sum(1 for _ in run.slides()) - len(slides):
        log.warning("left out, since they have no %s: %d slides; see wsi-anomaly %s -h", of, left_out, _STAGES[of])
    groups = groups_of(slides, labels)
    recipe = _recipe(slides, of, options, groups)
    if current_record(run.root, recipe) is None:
        read = _embedded if of == "embeddings" else _vectors if _have_vectors(slides) else _scored
        features = [_features(slide, read, groups) for slide in slides]
        _require_one_source(run, features)
        typicality, fitted_to = _fit(run, features, options)
        with writing(run.root, recipe) as work:
            work.facts.update({"slides": len(slides), "shape": list(typicality.shape), "fitted_to": fitted_to})
            work.facts["features"] = features[0].source
            _write(work, run, features, typicality, groups)
    facts = read_record(run.root, "explore").facts
    rows, columns = facts["shape"]
    return Explored(facts["features"], facts["slides"], facts["tiles"], (rows, columns), facts["quantisation_error"])


def _has_embeddings(run: RunFolder) -> bool:
    return any(find_record(slide.root, "prompt") for slide in run.slides())


def _recipe(slides: Sequence[SlideFolder], of: Of, options: ExploreOptions, groups: Groups) -> Recipe:
    inputs = {
        f"{slide.slide_id} {stage}": record.digest
        for slide in slides
        for stage in (_STAGES[of], "heatmap")
        if (record := find_record(slide.root, stage))
    }
    settings = options.model_dump(mode="json") | {"of": of, "groups": dict(groups.of_slide), "shown": groups.names}
    return Recipe("explore", FORMAT_VERSION, settings, inputs)


def _have_vectors(slides: Sequence[SlideFolder]) -> bool:
    """Whether all do; who mixes is told."""
    without = [slide.slide_id for slide in slides if not has_vectors(slide.scores)]
    if 0 < len(without) < len(slides):
        log.warning(
            "%d of %d slides have scores without score vectors (%s, ...): the map is of scores. "
            "Score these again: wsi-anomaly score -h",
            len(without),
            len(slides),
            without[0],
        )
    return not without


def _vectors(slide: SlideFolder) -> tuple[str, _Known, _Read]:
    vectors = read_vectors(slide.scores)
    source = f"the score vectors of {read_attributes(slide.scores)['detector']} ({vectors.shape[1]} values a tile)"
    return source, np.flatnonzero(np.isfinite(vectors).all(axis=1)), vectors.__getitem__


def _scored(slide: SlideFolder) -> tuple[str, _Known, _Read]:
    scores, names = read_scores(slide.scores)
    kinds = f"the score {names[0]}" if len(names) == 1 else f"the scores {', '.join(names)}"
    source = f"{kinds} of {read_attributes(slide.scores)['detector']}"
    return source, np.flatnonzero(np.isfinite(scores).all(axis=1)), scores.__getitem__


def _embedded(slide: SlideFolder) -> tuple[str, _Known, _Read]:
    store = PromptStore(slide.prompts)
    model, digest = (store.attributes[name] for name in ("image_text_model", "image_text_model_digest"))
    known = np.flatnonzero(TileStore(slide.tiles).readable)
    return f"embeddings of {model} ({digest[:8]})", known, store.embedding


def _features(
    slide: SlideFolder, tell: Callable[[SlideFolder], tuple[str, _Known, _Read]], groups: Groups
) -> _Features:
    source, known, read = tell(slide)
    if find_record(slide.root, "heatmap"):
        z = read_array(slide.heatmap, "z_tile").astype(np.float64)
    else:
        z = np.full(len(TileStore(slide.tiles)), np.nan)
    return _Features(slide, source, known, read, groups.of_tiles(slide.slide_id, z), z)


def _require_one_source(run: RunFolder, features: Sequence[_Features]) -> None:
    sources = {one.source: one.slide.slide_id for one in features}
    if len(sources) > 1:
        listed = "; ".join(f"{slide_id}: {source}" for source, slide_id in sources.items())
        raise OutputError(
            f"{run.root}: its slides are of different models and cannot lie on one map ({listed}). "
            "Redo them with one model: wsi-anomaly score -h, wsi-anomaly prompt -h"
        )


def _fit(run: RunFolder, features: Sequence[_Features], options: ExploreOptions) -> tuple[TypicalityMap, int]:
    """The map, and how many tiles it was fitted to."""
    sizes = [len(one.known) for one in features]
    if sum(sizes) < FEWEST:
        raise CohortError(
            f"{run.root}: {sum(sizes)} tiles with {features[0].source}; a map needs {FEWEST}. Add slides to the run."
        )
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    chosen = even_sample(np.repeat(np.arange(len(sizes)), sizes), options.most_tiles, seed=_SEED)
    parts = np.split(chosen, np.searchsorted(chosen, starts[1:]))
    vectors = np.concatenate(
        [one.read(one.known[part - start]) for one, part, start in zip(features, parts, starts, strict=True)]
    )
    try:
        return fit_map(vectors, rows=options.rows, columns=options.columns), len(vectors)
    except ValueError as error:
        raise CohortError(
            f"{run.root}: its tiles differ in fewer than two respects ({features[0].source}), which makes no map. "
            "Describe them, then explore their embeddings: wsi-anomaly prompt -h"
        ) from error


def _census(features: Sequence[_Features], typicality: TypicalityMap, groups: Groups) -> Census:
    census = Census(typicality.shape, groups=len(groups.names))
    for number, one in enumerate(features):
        for start in range(0, len(one.known), _TILES_AT_ONCE):
            tile = one.known[start : start + _TILES_AT_ONCE]
            placement = place(typicality, one.read(tile))
            census.add(placement, group=one.group[tile], z=one.z[tile], source=number, tile=tile)
    return census


def _write(
    work: Work, run: RunFolder, features: Sequence[_Features], typicality: TypicalityMap, groups: Groups
) -> None:
    census = _census(features, typicality, groups)
    borders = u_matrix(typicality)
    work.facts.update({"tiles": int(census.all_hits.sum()), "quantisation_error": census.quantisation_error})
    attributes = {"groups": list(groups.names)}
    arrays = {
        "prototypes": typicality.prototypes,
        "mean": typicality.mean,
        "deviation": typicality.deviation,
        "u_matrix": borders,
        "hits": census.hits,
    }
    write_arrays(work.folder / run.typicality_map.name, arrays, attributes | work.facts)
    _write_table(work.folder / run.typicality_table.name, features, census, borders, groups)
    store = TileStore(features[0].slide.tiles)
    write_typicality_page(
        work.folder / run.typicality_picture.name,
        u_matrix=borders,
        mean_z=census.mean_z,
        hits=dict(zip(groups.names, census.hits, strict=True)),
        prototypes=_prototypes(features, census),
        title=f"Kinds of tissue in {run.root.resolve().name}",
        header=_header(work.facts),
        tile_mpp=float(store.attributes["tile_mpp"]),
    )


def _header(facts: Mapping[str, Any]) -> str:
    rows, columns = facts["shape"]
    return (
        f"{facts['tiles']:,} tiles of {facts['slides']} slides by {facts['features']}; a self-organising map of {rows} "
        f"by {columns} cells, fitted to {facts['fitted_to']:,} tiles; a tile lies {facts['quantisation_error']:.2f} "
        "deviations from its prototype on average."
    )


def _prototypes(features: Sequence[_Features], census: Census) -> list[PrototypeTile]:
    """With pixels, of the cells to show."""
    mean_z = census.mean_z
    shown = []
    for block, (row, column) in choose_cells(census.all_hits).items():
        source, tile = census.nearest[row, column].tolist()
        (pixels,) = TileStore(features[source].slide.tiles).read(np.array([tile]))
        shown.append(
            PrototypeTile(block, row, column, pixels, int(census.all_hits[row, column]), float(mean_z[row, column]))
        )
    return shown


def _write_table(
    path: Path,
    features: Sequence[_Features],
    census: Census,
    borders: Float64[np.ndarray, "row column"],
    groups: Groups,
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    hits = [f"hits {name}" for name in groups.names]
    writer.writerow(["row", "column", "hits", *hits, "mean_z", "neighbour_distance", "slide_id", "tile"])
    mean_z = census.mean_z
    for row, column in np.ndindex(borders.shape):
        source, tile = census.nearest[row, column].tolist()
        z = mean_z[row, column]
        writer.writerow(
            [
                row,
                column,
                census.all_hits[row, column],
                *census.hits[:, row, column],
                f"{z:.6g}" if np.isfinite(z) else "",
                f"{borders[row, column]:.6g}",
                features[source].slide.slide_id if source >= 0 else "",
                tile if source >= 0 else "",
            ]
        )
    write_text(path, text.getvalue())
