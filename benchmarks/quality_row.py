"""One row of `quality.py`: read the tiles, describe them, fit a detector, score. Knows no table and no other row."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wsi_anomaly.detectors.protocol import Prompt, TileBatch
from wsi_anomaly.errors import CohortError, OptionsError
from wsi_anomaly.execution import Resources
from wsi_anomaly.options import Options
from wsi_anomaly.pipeline.preset import Pipeline, build_detector_here
from wsi_anomaly.pipeline.prompting import build_prompter, informed
from wsi_anomaly.plugins import DETECTORS, load_plugin
from wsi_anomaly.stages.prompt import Prompter, PromptOptions, describe_tiles

TRAIN, REFERENCE = "pcam/train_normal", "pcam/val_normal"
TESTS = {
    "PatchCamelyon": ("pcam/test_normal", "pcam/test_tumor"),
    "Camelyon16": ("camelyon16/normal", "camelyon16/tumor"),
}
SCALES = {"pcam": (2, Image.Resampling.BICUBIC), "camelyon16": (0.5, Image.Resampling.BOX)}
"""From 0.97 and 0.25 µm/px to about the 0.5 µm/px of the pipelines."""
BATCH_TILES = 64

Scores = dict[str, dict[str, list[float | None]]]
"""By name of the score, then by folder of tiles."""
Describer = Callable[[np.ndarray], tuple[tuple[Prompt, ...], np.ndarray | None, np.ndarray | None]]
"""Prompts, embeddings and similarities to keywords of some tiles."""


class Entry(Options):
    """One row of `quality.toml`."""

    name: str
    detector: dict[str, Any]
    prompt: PromptOptions | None = None
    base: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """What all rows share."""

    tiles: Path
    work: Path
    seed: int
    device: str
    budget_minutes: float


@dataclass(frozen=True, slots=True)
class KnownTiles:
    """Tiles at hand, as a source. Their slides are unknown: each is a group of its own."""

    batch: TileBatch

    @property
    def groups(self) -> np.ndarray:
        """One a tile."""
        return np.arange(len(self.batch))

    @property
    def slides(self) -> np.ndarray:
        """As if each tile were of another: nobody says which is of which."""
        return self.groups

    def __len__(self) -> int:
        return len(self.batch)

    def read(self, indices: np.ndarray) -> TileBatch:
        """The tiles at these positions, in this order."""
        batch = self.batch
        rows = [None if known is None else known[indices] for known in (batch.embeddings, batch.keyword_scores)]
        return TileBatch(batch.pixels[indices], batch.seeds[indices], tuple(batch.prompts[i] for i in indices), *rows)


def folders() -> list[str]:
    """All folders of tiles but the one to learn from."""
    return [REFERENCE, *(folder for pair in TESTS.values() for folder in pair)]


def measured(entry: Entry, settings: Settings, folder: Path) -> dict[str, Any]:
    """Fit on normal tiles, then score all others: scores by name and folder, training steps, refusals by folder."""
    resources = Resources(device=settings.device, offline=True, base_weights=entry.base)
    pipeline = Pipeline(name=entry.name, seed=settings.seed, detector=seeded(entry.detector, settings.seed))
    prompter = build_prompter(entry.prompt, resources) if entry.prompt else None
    detector = informed(build_detector_here(pipeline, resources), lambda: prompter)
    describe = describer(entry, prompter)
    checkpoint = folder / "detector"
    shutil.rmtree(checkpoint, ignore_errors=True)  # time and memory are of the whole row, or they mean nothing
    detector.fit(KnownTiles(described(TRAIN, settings, describe)), checkpoint, device=settings.device)
    scorer = detector.load(checkpoint, device=settings.device)
    scores: Scores = {name: {} for name in detector.score_names}
    refused = {}
    for place in folders():
        tiles = KnownTiles(described(place, settings, describe))
        try:
            table = np.concatenate([scorer.score(tiles.read(part)) for part in in_batches(len(tiles))])
        except OptionsError as error:  # tiles of a size that the detector cannot take
            refused[place] = str(error)
            continue
        for name, column in zip(detector.score_names, table.T, strict=True):
            scores[name][place] = [value if np.isfinite(value) else None for value in column.tolist()]
    return {"scores": scores, "refused": refused, "steps": steps_of(checkpoint, detector)}


def seeded(options: dict[str, Any], seed: int) -> dict[str, Any]:
    """The table of a detector with a seed for its training, if it has such a thing and the row says none."""
    fields = getattr(load_plugin(DETECTORS, options.get("name", "")), "model_fields", {})
    if "training" not in fields or "seed" not in getattr(fields["training"].annotation, "model_fields", {}):
        return options
    return options | {"training": {"seed": seed, **options.get("training", {})}}


def steps_of(checkpoint: Path, detector: Any) -> int | None:
    """Batches learnt from, by the history that our training loops leave; None for others."""
    path = checkpoint / "history.json"
    history = json.loads(path.read_text()) if path.exists() else {}
    if "steps" in history or "best_epoch" not in history:
        return history.get("steps")
    return len(history["loss"]) * -(-history["tiles"]["train"] // detector.training.batch_size)


def describer(entry: Entry, prompter: Prompter | None) -> Describer:
    """What finds the prompts of tiles: the row's text, else the row's image-text model, else nothing."""
    if prompter is None or entry.text:
        text: Prompt = ((entry.text, 1.0),) if entry.text else ()
        return lambda pixels: ((text,) * len(pixels), None, None)
    return partial(describe_tiles, prompter)


def described(place: str, settings: Settings, describe: Describer) -> TileBatch:
    """The tiles of a folder with their prompts, each with a seed made of its name."""
    pixels, names = read_tiles(settings.tiles, place)
    digests = [hashlib.blake2b(f"{settings.seed}|{place}/{name}".encode(), digest_size=8).digest() for name in names]
    seeds = np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)
    return TileBatch(pixels, seeds, *describe(pixels))


def read_tiles(tiles: Path, place: str) -> tuple[np.ndarray, list[str]]:
    """All pictures of a folder at about 0.5 µm/px, in the order of their names."""
    paths = sorted((tiles / place).glob("*.png"))
    if not paths:
        raise CohortError(f"{tiles / place}: holds no PNG files. Give the folder with pcam and camelyon16 as --tiles.")
    factor, method = SCALES[place.partition("/")[0]]
    pictures = [Image.open(path).convert("RGB") for path in paths]  # alpha is 255 throughout
    sides = [(round(factor * picture.width), round(factor * picture.height)) for picture in pictures]
    pixels = [np.asarray(picture.resize(side, method)) for picture, side in zip(pictures, sides, strict=True)]
    return np.stack(pixels), [path.name for path in paths]


def in_batches(count: int) -> list[np.ndarray]:
    """Positions of tiles that are scored at once."""
    return np.array_split(np.arange(count), -(-count // BATCH_TILES))
