"""The GNSM detector: combinations of what keywords and cohort say of a tile. Looks at categories, never at pixels.

Gumbel-noise score matching (Mahmood, "Score-based anomaly detection", thesis, chapter 4): a network learns which way
leads back from noisy categories to those of normal tissue. How far it would go from the categories of a new tile, at
several amounts of noise, tells how usual they are.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float32, Int64
from pydantic import Field, PositiveInt, PrivateAttr

from wsi_anomaly.detectors.density import (
    Density,
    DensityName,
    fit_density,
    load_density,
    require_items,
    save_density,
)
from wsi_anomaly.detectors.gathered import forget, gathered
from wsi_anomaly.detectors.gnsm_network import GnsmNetwork, noise_loss, score_norms
from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.sampling import even_sample
from wsi_anomaly.detectors.training import Learner, TrainingOptions, fit_identity, split_tiles, train
from wsi_anomaly.detectors.weights import load_weights, write_whole
from wsi_anomaly.devices import resolve_device
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.options import Options

VARIABLES = "variables.json"
FORMAT_VERSION = 2

Codes = Int64[np.ndarray, "tile variable"]


class GnsmTraining(TrainingOptions):
    """How long and how fast to learn. Categories are small: many epochs take less time than reading the tiles once."""

    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(256, ge=1)
    max_epochs: int = Field(200, ge=1)
    patience: int = Field(20, ge=1)
    held_out_fraction: float = Field(0.3, gt=0, lt=1)
    """The density is made of these tiles: the network knows the others too well."""


class Gnsm(Options):
    """Learns which keywords and facts of the cohort go together in normal tissue.

    It finds values that normal tissue does not have better than unusual combinations of usual ones. From three coarse
    facts of made-up tiles: metastases 0.95 (AUROC), mucin 0.88, fibrosis 0.72; necrosis ranks below normal (0.38).
    """

    score_names: ClassVar[tuple[str, ...]] = ("gnsm",)
    paper: ClassVar[str] = "Mahmood, thesis, chapter 4"
    licence_of: ClassVar[str] = "CONCH: CC BY-NC-ND 4.0"
    needs: ClassVar[tuple[str, ...]] = ("prompts",)

    columns: tuple[str, ...] = ()
    """Columns of the cohort's CSV whose values tell of a tile too, such as "scanner"; every slide must be in it."""
    width: PositiveInt = 96
    blocks: PositiveInt = 2
    density: DensityName = "gmm"
    most_tiles: PositiveInt = 50_000
    """How many tiles are read to learn from, evenly from all slides."""
    training: GnsmTraining = GnsmTraining()
    _categories: dict[str, tuple[int, ...]] = PrivateAttr(default_factory=dict)

    def on_categories(self, categories: Mapping[str, tuple[int, ...]]) -> "Gnsm":
        """The same detector with the keyword columns of each category. Without, all keywords are one category.

        Raises:
            OptionsError: a category has no keywords.
        """
        if empty := [name for name, columns in categories.items() if not columns]:
            raise OptionsError(f"the keyword category '{empty[0]}' has no keywords. Leave it out, or give it some.")
        grouped = self.model_copy()
        grouped._categories = dict(categories)  # noqa: SLF001 - a copy of its own class
        return grouped

    def fit(self, tiles: TileSource, checkpoint: Path, *, device: str) -> None:
        """Learn the categories of normal tiles and leave network and density in the folder `checkpoint`.

        Goes on from an unfinished fit with the same options, categories and tiles.

        Raises:
            CohortError: there are too few tiles to learn from and to hold out.
            OptionsError: the tiles have no keyword scores, or not the `columns` of the cohort, or the categories name
                more keywords than they have.
            ModelError: training diverged.
        """
        place, training = resolve_device(device), self.training
        chosen = even_sample(tiles.slides, self.most_tiles, seed=training.seed)
        groups = tiles.groups[chosen]
        held_out = split_tiles(groups, training.held_out_fraction, seed=training.seed)[1]
        require_items(self.density, len(held_out), total=len(chosen))
        recipe = self.model_dump(mode="json") | {"categories": self._categories}
        identity = fit_identity(tiles, recipe)
        if _is_fitted(checkpoint, identity):
            return
        read = partial(_codes, categories=self._categories, columns=self.columns)
        codes = gathered(tiles, chosen, read, folder=checkpoint, identity=identity)
        variables = _variables(codes, self._categories, self.columns)
        codes = variables.known(codes)
        network = self._network(variables).to(place)
        optimizer = torch.optim.AdamW(network.parameters(), training.learning_rate, weight_decay=1e-4)
        learner = Learner(network, optimizer, noise_loss(network, place), self._architecture(variables))
        train(learner, _CodeSource(codes, groups), training, folder=checkpoint, recipe=recipe | {"tiles": identity})
        vectors = score_norms(network.eval(), codes[held_out], place)
        save_density(fit_density(self.density, vectors, seed=training.seed), checkpoint)
        content = json.dumps({"format_version": FORMAT_VERSION, "identity": identity, **asdict(variables)}, indent=1)
        write_whole(checkpoint / VARIABLES, lambda file: file.write(content.encode()))
        forget(checkpoint)

    def load(self, checkpoint: Path, *, device: str) -> "GnsmScorer":
        """The scorer whose weights `fit` left in `checkpoint`.

        Raises:
            ModelError: the weights are missing, damaged, of another format or architecture, or of other categories.
            OptionsError: the device does not exist.
        """
        place = resolve_device(device)
        variables = _read_variables(checkpoint / VARIABLES)
        if self.columns != variables.columns:
            raise ModelError(
                f"{checkpoint}: was fitted with the columns [{', '.join(variables.columns)}] of the cohort, and the "
                f"options ask for [{', '.join(self.columns)}]. Use the options of the fit, or fit it again."
            )
        if self._categories and self._categories != variables.categories:
            raise ModelError(
                f"{checkpoint}: was fitted to other keyword categories ({', '.join(variables.categories)}). "
                "Use the keyword list that it was fitted with, or fit it again."
            )
        network = self._network(variables)
        load_weights(network, checkpoint, self._architecture(variables))
        return GnsmScorer(network.to(place).eval(), load_density(checkpoint), variables, place)

    def _network(self, variables: "_Variables") -> GnsmNetwork:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            return GnsmNetwork(variables.outcomes, self.width, self.blocks)

    def _architecture(self, variables: "_Variables") -> dict[str, Any]:
        outcomes = list(variables.outcomes)
        return {"detector": "gnsm", "outcomes": outcomes, "width": self.width, "blocks": self.blocks}


@dataclass(frozen=True, slots=True)
class GnsmScorer:
    """A fitted GNSM. The scores of a tile do not depend on the other tiles of its batch."""

    network: GnsmNetwork
    density: Density
    variables: "_Variables"
    device: torch.device

    def score(self, batch: TileBatch) -> Float32[np.ndarray, "tile 1"]:
        """-log p of the tile's score norms under the density of normal ones.

        Raises:
            OptionsError: the tiles lack keyword scores or cohort columns, or have other keywords than were learnt.
        """
        return self.scores_and_vectors(batch)[0]

    def scores_and_vectors(
        self, batch: TileBatch
    ) -> tuple[Float32[np.ndarray, "tile 1"], Float32[np.ndarray, "tile level"]]:
        """With the norm of the score of each tile at each temperature, from the highest to the lowest."""
        codes = self.variables.known(_codes(batch, self.variables.categories, self.variables.columns))
        vectors = score_norms(self.network, codes, self.device)
        return self.density.anomaly(vectors)[:, None], vectors


@dataclass(frozen=True, slots=True)
class _Variables:
    """What is known of a tile: the top keyword of each category, then its values in columns of the cohort."""

    categories: dict[str, tuple[int, ...]]
    columns: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    """Of each variable, the numbers that the fit saw, in ascending order."""

    @property
    def outcomes(self) -> tuple[int, ...]:
        """How many values each variable has; the last is for all that the fit did not see."""
        return tuple(len(seen) + 1 for seen in self.values)

    def known(self, codes: Codes) -> Codes:
        """The numbers of values, as `_codes` gives them, as outcomes."""
        return np.column_stack([_places(column, seen) for column, seen in zip(codes.T, self.values, strict=True)])


@dataclass(frozen=True, slots=True)
class _CodeSource:
    """The categories of tiles as a source that is in memory: their pixels are of no use any more."""

    codes: Codes
    groups: Int64[np.ndarray, " tile"]

    @property
    def slides(self) -> Int64[np.ndarray, " tile"]:
        return self.groups

    def __len__(self) -> int:
        return len(self.codes)

    def read(self, indices: Int64[np.ndarray, " _"]) -> TileBatch:
        pixels = np.zeros((len(indices), 1, 1, 3), np.uint8)
        return TileBatch(pixels, np.zeros(len(indices), np.uint64), (), categories=self.codes[indices])


def _codes(batch: TileBatch, categories: Mapping[str, tuple[int, ...]], columns: Sequence[str]) -> Codes:
    """A number for what each variable of a tile is; -1 for what is unknown."""
    if batch.keyword_scores is None:
        raise OptionsError(
            "the detector 'gnsm' looks at the keywords of tiles, and these have none. Add a table [prompt] to the "
            "pipeline file."
        )
    width = batch.keyword_scores.shape[1]
    groups = list(categories.values()) or [tuple(range(width))]
    if (most := max(map(max, groups))) >= width:
        raise OptionsError(
            f"the keyword categories name column {most}, and tiles have scores of {width} keywords. "
            "Use the keyword list that the tiles were compared with."
        )
    found = 0 if batch.categories is None else batch.categories.shape[1]
    if found != len(columns):
        raise OptionsError(
            f"the detector 'gnsm' looks at {len(columns)} columns of the cohort ({', '.join(columns)}), and its tiles "
            f"come with {found}. Name the slides in a CSV that has these columns."
        )
    tops = [batch.keyword_scores[:, list(group)].argmax(axis=1) for group in groups]
    cohort = () if batch.categories is None else batch.categories.T
    return np.column_stack([*tops, *cohort]).astype(np.int64)


def _variables(codes: Codes, categories: Mapping[str, tuple[int, ...]], columns: tuple[str, ...]) -> _Variables:
    values = tuple(tuple(np.unique(column[column >= 0]).tolist()) for column in codes.T)
    return _Variables(dict(categories), columns, values)


def _places(codes: Int64[np.ndarray, " tile"], seen: Sequence[int]) -> Int64[np.ndarray, " tile"]:
    """Where each number stands among those seen; behind the last one where it is none of them."""
    places = np.searchsorted(seen, codes)
    return np.where(np.isin(codes, seen), places, len(seen))


def _read_variables(path: Path) -> _Variables:
    try:
        content = json.loads(path.read_bytes())
        if content["format_version"] != FORMAT_VERSION:
            raise ModelError(
                f"{path}: its format version is {content['format_version']}, this version of wsi-anomaly reads "
                f"{FORMAT_VERSION}. Use the version that made the model, or fit it again."
            )
        categories = {str(name): tuple(map(int, columns)) for name, columns in content["categories"].items()}
        values = tuple(tuple(map(int, seen)) for seen in content["values"])
        return _Variables(categories, tuple(map(str, content["columns"])), values)
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: is missing: the model is of another detector, its fit was not finished, or not all of it copied. "
            "Copy the model again, or fit it anew."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: is damaged ({error}). Copy the model again, or fit it anew.") from error


def _is_fitted(folder: Path, identity: str) -> bool:
    try:
        return bool(json.loads((folder / VARIABLES).read_bytes())["identity"] == identity)
    except (OSError, ValueError, KeyError, TypeError):
        return False
