"""Put the small model together that comes with the package: base, image-text model, adapter, reference. Scores no test.

    python training/release.py --base FOLDER --image-text FOLDER --tiles FOLDER --reference FOLDER
                               [--most-tiles 4000] [--device auto] [--out wsi_anomaly/models/lymph-node-small]

--tiles: what the adapter learns from: normal made-up tiles and real ones, as many of each, as `tiles.py` and
`real_tiles.py` leave them. --reference: tiles of the same kind that nothing has learnt from. The pipeline is the preset
'lymph-node-small', which finds base and image-text model where they are put first. A killed command goes on when it is
run again; the manifest is written last. The card is `card.md` beside this file.
"""

import argparse
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from rich.console import Console
from tiles import LessonTiles

from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.detectors.training import fit_identity
from wsi_anomaly.errors import WsiAnomalyError
from wsi_anomaly.execution import Resources
from wsi_anomaly.imaging.zscore import describe
from wsi_anomaly.pipeline.preset import Pipeline, build_detector, load_pipeline, write_pipeline
from wsi_anomaly.pipeline.prompting import build_prompter, informed
from wsi_anomaly.prompts.keywords import load_keywords
from wsi_anomaly.stages.prompt import Prompter, PromptOptions, describe_tiles
from wsi_anomaly.storage.layout import ModelFolder
from wsi_anomaly.storage.model import read_model, write_manifest
from wsi_anomaly.storage.record import Recipe
from wsi_anomaly.storage.reference import Reference, write_reference
from wsi_anomaly.synthetic import keywords_of

NAME = "lymph-node-small"
PACKAGE = Path(__file__).parents[1] / "wsi_anomaly"
CARD = Path(__file__).with_name("card.md")
LEFT_IN_TRAINING = ("loss.png", "samples.png", "cache")
"""What a fit leaves that nobody needs to score."""
BATCH_TILES = 32


def main() -> None:
    """Fit what is missing, then seal the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base", "--image-text", "--tiles", "--reference"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--most-tiles", type=int, default=4000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=PACKAGE / "models" / NAME)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        copy_parts(given.out, base=given.base, image_text=given.image_text)
        release(
            given.out,
            load_pipeline(NAME),
            learnt=normal_tiles(given.tiles, given.most_tiles),
            reference=normal_tiles(given.reference, given.most_tiles),
            device=given.device,
        )
    except WsiAnomalyError as error:
        raise SystemExit(f"error: {error}") from error
    size = sum(path.stat().st_size for path in given.out.rglob("*") if path.is_file()) / 1e6
    Console().print(f"The model is in {given.out}: {size:.1f} MB", highlight=False)


@dataclass(frozen=True, slots=True)
class NormalTiles:
    """Some tiles of a folder, as a `TileSource` of the same tiles under other numbers."""

    tiles: LessonTiles
    chosen: Int64[np.ndarray, " tile"]
    prompter: Prompter | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def groups(self) -> Int64[np.ndarray, " tile"]:
        """Shards."""
        return self.tiles.groups[self.chosen]

    @property
    def slides(self) -> Int64[np.ndarray, " tile"]:
        """Shards too."""
        return self.groups

    def read(self, indices: Int64[np.ndarray, " tile"]) -> TileBatch:
        """The tiles at these positions, described by the image-text model."""
        batch = self.tiles.read(self.chosen[indices])
        if self.prompter is None:
            return batch
        return TileBatch(batch.pixels, batch.seeds, *describe_tiles(self.prompter, batch.pixels))


def normal_tiles(folder: Path, most: int) -> NormalTiles:
    """Evenly spaced ones of the tiles without disease, as many made-up as real ones where there are enough of both.

    Raises:
        CohortError: there are no tiles.
    """
    tiles = LessonTiles(folder)
    disease = {keyword.text for keyword in load_keywords("lymph_node").abnormal}
    real = np.array([shares is None for shares in tiles.shares])
    normal = np.array([shares is not None and not disease & set(keywords_of(shares)) for shares in tiles.shares])
    halves = [_evenly(np.flatnonzero(side), most // 2) for side in (normal, real)]
    return NormalTiles(tiles, np.concatenate(halves))


def copy_parts(out: Path, *, base: Path, image_text: Path) -> None:
    """Put base and image-text model where the pipeline looks for them."""
    for source, target in ((base, out / "base"), (image_text, out / "image-text")):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("training"))


def release(out: Path, pipeline: Pipeline, *, learnt: NormalTiles, reference: NormalTiles, device: str) -> None:
    """Fit the adapter, measure normal tissue, and seal the folder."""
    prompter = build_prompter(pipeline.prompt or PromptOptions(), Resources(device=device, offline=True))
    pipeline = pipeline.with_defaults()
    detector = informed(build_detector(pipeline), lambda: prompter)
    work = out.with_name(f"{out.name}.fit")
    detector.fit(replace(learnt, prompter=prompter), work, device=device)
    scorer = detector.load(work, device=device)
    known = replace(reference, prompter=prompter)
    parts = np.array_split(np.arange(len(known)), -(-len(known) // BATCH_TILES))
    scores = np.concatenate([scorer.score(known.read(part)) for part in parts])
    columns = {name: describe(column) for name, column in zip(detector.score_names, scores.T, strict=True)}

    model = ModelFolder(out)
    shutil.rmtree(model.detector, ignore_errors=True)
    shutil.copytree(work, model.detector, ignore=shutil.ignore_patterns(*LEFT_IN_TRAINING))
    write_pipeline(model, pipeline)
    # Of PatchCamelyon nobody knows which tiles are of one slide.
    write_reference(model.reference, Reference(source="held-out normal tiles", slides=0, scores=columns))
    shutil.copyfile(CARD, model.card)
    model.manifest.unlink(missing_ok=True)
    image_text = {"name": prompter.model_name, "digest": prompter.digest}
    recipe = Recipe("model", 1, {"pipeline": pipeline.as_table()}, {"tiles": fit_identity(learnt, {})})
    write_manifest(out, recipe_digest=recipe.digest, image_text_model=image_text)
    read_model(out)


def _evenly(positions: Int64[np.ndarray, " _"], most: int) -> Int64[np.ndarray, " _"]:
    return positions[np.unique(np.linspace(0, len(positions) - 1, min(most, len(positions))).round().astype(np.int64))]


if __name__ == "__main__":
    main()
