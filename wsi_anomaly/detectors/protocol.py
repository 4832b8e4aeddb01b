"""What a detector is. A plug-in fulfils these protocols; `wsi_anomaly.testing.DetectorContract` checks that it does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64, UInt8, UInt64

Fragment = tuple[str, float]
"""A piece of a prompt and its weight, 1 being plain. Never parsed: a keyword may hold any character."""
Prompt = tuple[Fragment, ...]


@dataclass(frozen=True, slots=True)
class TileBatch:
    """Some tiles of one or more slides, with what the earlier stages know of each."""

    pixels: UInt8[np.ndarray, "tile y x rgb"]
    seeds: UInt64[np.ndarray, " tile"]
    """Per-tile noise: made of run seed, slide and origin, so that a score never depends on the batch."""
    prompts: tuple[Prompt, ...]
    """One a tile; empty where the pipeline has no prompt stage."""
    embeddings: Float32[np.ndarray, "tile d"] | None = None
    keyword_scores: Float32[np.ndarray, "tile keyword"] | None = None
    categories: Int64[np.ndarray, "tile variable"] | None = None
    """What the cohort says of each tile's slide in the detector's `columns`: a number of each value, the same in every
    run and not from 0 on; -1 where the table has nothing."""

    def __len__(self) -> int:
        return len(self.pixels)


@runtime_checkable
class TileSource(Protocol):
    """The readable tiles of many slides. Reads only what is asked for, so it may be larger than memory."""

    @property
    def groups(self) -> Int64[np.ndarray, " tile"]:
        """Tiles with the same number lie together (one slide, or one block of a slide).

        Whoever splits tiles keeps groups whole, so that neighbours never stand on both sides.
        """

    @property
    def slides(self) -> Int64[np.ndarray, " tile"]:
        """Tiles with the same number are of one slide. Whoever takes some of the tiles takes as many of each slide."""

    def __len__(self) -> int:
        """How many tiles there are."""

    def read(self, indices: Int64[np.ndarray, " tile"]) -> TileBatch:
        """The tiles at these positions, in this order."""


@runtime_checkable
class Scorer(Protocol):
    """A trained detector."""

    def score(self, batch: TileBatch) -> Float32[np.ndarray, "tile score"]:
        """One column for each of the detector's `score_names`. Higher scores are more abnormal."""


@runtime_checkable
class Detector(Protocol):
    """A way to find anomalies, not yet trained. Its fields are its options."""

    @property
    def score_names(self) -> tuple[str, ...]:
        """What `Scorer.score` gives, in this order."""

    def fit(self, tiles: TileSource, checkpoint: Path, *, device: str) -> None:
        """Learn normal tissue from `tiles` and leave the weights in the folder `checkpoint`.

        Called again on the folder of an unfinished fit, it goes on from there and ends with the same weights.
        """

    def load(self, checkpoint: Path, *, device: str) -> Scorer:
        """The scorer whose weights `fit` left in `checkpoint`.

        Raises:
            ModelError: weights are missing, damaged or of another architecture.
        """


@runtime_checkable
class Based(Protocol):
    """A detector on top of a public base model, which is not part of what `fit` leaves."""

    def on_base(self, place: str, *, offline: bool) -> Detector:
        """The same detector with its base at another place ("" for the same); `offline` forbids to fetch it."""


@runtime_checkable
class Perception(Protocol):
    """How the image-text model of the prompts sees tiles."""

    def embed(self, pixels: UInt8[np.ndarray, "tile y x rgb"]) -> Float32[np.ndarray, "tile d"]:
        """Unit vectors. A tile's does not depend on the tiles it comes with."""

    def abnormality(self, embeddings: Float32[np.ndarray, "tile d"]) -> Float32[np.ndarray, " tile"]:
        """How near each is to the keywords of abnormal tissue: the mean cosine of the nearest of them."""


@runtime_checkable
class Perceiving(Protocol):
    """A detector that can compare tiles as the image-text model sees them."""

    def perceiving(self, load: Callable[[], Perception]) -> "Detector":
        """The same detector with the way to that model, which is loaded when the detector is."""


@runtime_checkable
class Accountable(Protocol):
    """A scorer that tells how it scores, for the record."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Plain JSON values."""


@runtime_checkable
class Vectorial(Protocol):
    """A scorer that describes each tile by some numbers before it judges them."""

    def scores_and_vectors(
        self, batch: TileBatch
    ) -> tuple[Float32[np.ndarray, "tile score"], Float32[np.ndarray, "tile value"]]:
        """What `score` gives, and from the same pass the numbers it comes from: as many for each tile, none judged."""


@runtime_checkable
class Reconstructor(Protocol):
    """A scorer that can also show what it believes normal tissue would look like."""

    def reconstruct(self, batch: TileBatch) -> UInt8[np.ndarray, "tile y x rgb"]:
        """Each tile as the model rebuilds it."""


@runtime_checkable
class Localizer(Protocol):
    """A scorer that can also say where in the tile."""

    def score_map(self, batch: TileBatch) -> Float32[np.ndarray, "tile y x"]:
        """The anomaly of each pixel; its mean over a tile is the detector's first score where that is an error."""


@runtime_checkable
class Legible(Localizer, Protocol):
    """One that also says what its maps show."""

    @property
    def map_meaning(self) -> str:
        """A line for who reads a map: "Map: -log p of each place". "Residual: ..." for errors of a reconstruction."""


@runtime_checkable
class Categorical(Protocol):
    """A detector that asks which keyword of a category a tile shows most."""

    def on_categories(self, categories: Mapping[str, tuple[int, ...]]) -> Detector:
        """The same detector with the columns of `TileBatch.keyword_scores` that belong to each category."""
