"""The VAE detector: crops that a variational autoencoder of normal tissue finds unlikely are abnormal.

One network, four ways to read it; see `ScoreName`. All of them see a tile as its whole crops, and average over these.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64, UInt8, UInt64
from pydantic import Field, PositiveInt, field_validator

from wsi_anomaly.detectors.diffusion.noise import tile_noise
from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.training import Learner, TrainingOptions, train
from wsi_anomaly.detectors.vae_network import (
    SMALLEST_CROP_PX,
    PerCrop,
    VaeNetwork,
    negative_evidence,
    with_replaced_values,
)
from wsi_anomaly.detectors.vae_scores import (
    Compression,
    RegretOptions,
    adapted,
    compressed_bits,
    in_bits,
    unlikeliness,
)
from wsi_anomaly.detectors.weights import load_weights
from wsi_anomaly.devices import reproducible, resolve_device
from wsi_anomaly.errors import OptionsError
from wsi_anomaly.options import Options

BACKGROUND = "background"
PORTION_CROPS = 64
"""How many crops the networks see at once when scoring, always: another number would round otherwise.

So many, because fitting encoders side by side gains from company.
"""

ScoreName = Literal["nll", "regret", "llr", "complexity"]
"""Sums over a crop, the first three in nats, the last in bits, each averaged over the crops of a tile.

nll         the negative log-likelihood (bounded: see `unlikeliness`)
regret      how much of it goes when the encoder is fitted to the crop (Xiao et al., NeurIPS 2020)
llr         how much it is above that of a background model, which has learnt perturbed crops (Ren et al., NeurIPS 2019)
complexity  how much it is above the size of the compressed crop (Serra et al., ICLR 2020)
"""


class VaeTraining(TrainingOptions):
    """How the networks learn: as in Xiao et al. (2020), but stopped early. With its crops, a batch is theirs of 128."""

    learning_rate: float = Field(3e-4, gt=0)
    weight_decay: float = Field(3e-5, ge=0)
    batch_size: int = Field(32, ge=1)
    crops_per_tile: PositiveInt = 4
    """Anywhere in the tile, and elsewhere in each epoch."""
    max_epochs: int = Field(200, ge=1)


class Vae(Options):
    """Learns how likely each value of each pixel is in normal tissue, and scores how unlikely a tile is.

    Plain tissue is likely whatever it is, diseased or not; only `complexity` makes up for it in part. After seconds of
    learning on made-up tissue it ranks mucin above normal tissue (AUROC 0.99) and metastases mostly (0.77), but not
    fibrosis (0.6) or necrosis (0.5). By the other three, fibrosis ranks below normal tissue (0.05 to 0.3).
    On real lymph node, after minutes of learning, `regret` ranks tumour below normal tissue (0.30).
    """

    paper: ClassVar[str] = "Xiao et al., NeurIPS 2020"
    needs: ClassVar[tuple[str, ...]] = ("GPU",)
    caution: ClassVar[str] = "can rank tumour below normal tissue"

    scores: tuple[ScoreName, ...] = Field(("complexity",), min_length=1)
    crop_px: int = 64
    """What the network sees: a power of two, at least 8."""
    width: PositiveInt = 32
    """Channels of the first layer; each further one halves the crop, down to 4 px, and doubles them."""
    latents: PositiveInt = 100
    samples: PositiveInt = 32
    """Draws for the bound of the likelihood. The paper takes 1000."""
    regret: RegretOptions = RegretOptions()
    replaced_fraction: float = Field(0.2, gt=0, lt=1)
    """Of the values of the crops that the background model of `llr` learns from."""
    compression: Compression = "png"
    training: VaeTraining = VaeTraining()

    @field_validator("scores")
    @classmethod
    def _no_twice(cls, value: tuple[ScoreName, ...]) -> tuple[ScoreName, ...]:
        if len(set(value)) < len(value):
            raise ValueError("the same twice")
        return value

    @field_validator("crop_px")
    @classmethod
    def _halves_to_four(cls, value: int) -> int:
        if value < SMALLEST_CROP_PX or value & (value - 1):
            raise ValueError(f"is no power of two of at least {SMALLEST_CROP_PX}")
        return value

    @property
    def score_names(self) -> tuple[str, ...]:
        """Those asked for, in that order."""
        return self.scores

    def fit(self, tiles: TileSource, checkpoint: Path, *, device: str) -> None:
        """Learn normal tissue from crops of `tiles`, and leave the weights in `checkpoint`.

        A background model is learnt only where `llr` is asked for, in a folder of its own. Goes on from an unfinished
        fit with the same options.

        Raises:
            CohortError: there are fewer than two tiles.
            OptionsError: the device does not exist or has too little memory, or tiles are smaller than a crop.
            ModelError: training diverged.
        """
        place = resolve_device(device)
        self._learn(tiles, checkpoint, place, replaced_fraction=0.0)
        if "llr" in self.scores:
            self._learn(tiles, checkpoint / BACKGROUND, place, replaced_fraction=self.replaced_fraction)

    def load(self, checkpoint: Path, *, device: str) -> "VaeScorer":
        """The scorer whose weights `fit` left in `checkpoint`.

        Raises:
            ModelError: weights are missing, damaged, of another format or of another architecture.
            OptionsError: the device does not exist.
        """
        place = resolve_device(device)
        network = self._loaded(checkpoint, place, replaced_fraction=0.0)
        background = None
        if "llr" in self.scores:
            background = self._loaded(checkpoint / BACKGROUND, place, replaced_fraction=self.replaced_fraction)
        return VaeScorer(self, network, background, place)

    def _learn(self, tiles: TileSource, folder: Path, place: torch.device, *, replaced_fraction: float) -> None:
        network, training = self._network().to(place), self.training

        def loss(batch: TileBatch, generator: torch.Generator) -> Float[torch.Tensor, ""]:
            crops = random_crops(batch.pixels, self.crop_px, training.crops_per_tile, generator)
            seen = with_replaced_values(crops, replaced_fraction, generator) if replaced_fraction else crops
            return negative_evidence(network, seen.to(place), generator)

        optimizer = torch.optim.Adam(network.parameters(), training.learning_rate, weight_decay=training.weight_decay)
        architecture = self._architecture(replaced_fraction)
        # How to score is no part of the recipe: another score needs no other network.
        recipe = {**architecture, "training": training.model_dump(mode="json")}
        train(Learner(network, optimizer, loss, architecture), tiles, training, folder=folder, recipe=recipe)

    def _loaded(self, folder: Path, place: torch.device, *, replaced_fraction: float) -> VaeNetwork:
        network = self._network()
        load_weights(network, folder, self._architecture(replaced_fraction))
        return network.to(place).eval().requires_grad_(requires_grad=False)

    def _network(self) -> VaeNetwork:
        generator = torch.Generator().manual_seed(self.training.seed)
        return VaeNetwork(self.crop_px, self.width, self.latents, generator=generator)

    def _architecture(self, replaced_fraction: float) -> dict[str, Any]:
        sizes = {"crop_px": self.crop_px, "width": self.width, "latents": self.latents}
        return {"detector": "vae", "replaced_fraction": replaced_fraction, **sizes}


@dataclass(frozen=True, slots=True)
class VaeScorer:
    """A fitted VAE. The scores of a tile depend on its pixels and its seed, and not on the other tiles of its batch."""

    options: Vae
    network: VaeNetwork
    background: VaeNetwork | None
    device: torch.device

    def score(self, batch: TileBatch) -> Float32[np.ndarray, "tile score"]:
        """One column for each of the options' scores, averaged over the whole crops of the tile.

        Raises:
            OptionsError: the tiles are smaller than a crop.
        """
        crops = whole_crops(batch.pixels, self.options.crop_px)
        tiles, each = crops.shape[:2]
        pixels = crops.reshape(tiles * each, *crops.shape[2:])
        seeds, numbers = np.repeat(batch.seeds, each), np.tile(np.arange(each), tiles)
        scores = np.empty((tiles, each, len(self.options.scores)))
        by_crop = scores.reshape(tiles * each, len(self.options.scores))
        for start in range(0, len(pixels), PORTION_CROPS):
            portion = slice(start, start + PORTION_CROPS)
            by_crop[portion] = self._of_portion(pixels[portion], seeds[portion], numbers[portion])
        return scores.mean(axis=1).astype(np.float32)

    def _of_portion(
        self,
        pixels: UInt8[np.ndarray, "crop y x rgb"],
        seeds: UInt64[np.ndarray, " crop"],
        numbers: Int64[np.ndarray, " crop"],
    ) -> Float64[np.ndarray, "crop score"]:
        """The scores of some crops, filled up to a whole portion with black ones."""
        options, wanted = self.options, self.options.scores
        crops = torch.from_numpy(_filled_up(pixels)).to(self.device)
        draws = self._draws(seeds, numbers, options.samples, stream=0)
        scores: dict[str, PerCrop] = {}
        with torch.no_grad(), reproducible():
            bound = partial(unlikeliness, draws=draws, crops=crops)
            nll = scores["nll"] = bound(self.network, self.network.posterior(crops))
            if self.background is not None:
                scores["llr"] = nll - bound(self.background, self.background.posterior(crops))
            if "regret" in wanted:
                steps = self._draws(seeds, numbers, options.regret.steps, stream=1)
                scores["regret"] = nll - bound(self.network, adapted(self.network, crops, steps, options.regret))
        found = {name: values[: len(pixels)].cpu().numpy() for name, values in scores.items()}
        if "complexity" in wanted:
            found["complexity"] = in_bits(found["nll"]) - compressed_bits(pixels, options.compression)
        return np.stack([found[name] for name in wanted], axis=1)

    def _draws(
        self, seeds: UInt64[np.ndarray, " crop"], numbers: Int64[np.ndarray, " crop"], count: int, *, stream: int
    ) -> Float32[torch.Tensor, "filled draw latent"]:
        """Noise that each crop has whatever comes with it: a function of its tile's seed and its number in the tile."""
        shape = (count, self.options.latents)
        made = [
            tile_noise(seeds[i : i + 1], shape, draw=_STREAMS * int(number) + stream)[0]
            for i, number in enumerate(numbers)
        ]
        return torch.from_numpy(_filled_up(np.stack(made))).to(self.device)


def whole_crops(
    pixels: UInt8[np.ndarray, "tile y x rgb"], crop_px: int
) -> UInt8[np.ndarray, "tile crop row column rgb"]:
    """As many crops side by side as fit into each tile, row by row; what is left over is left over on all sides.

    Raises:
        OptionsError: not one fits.
    """
    _require_room(pixels, crop_px)
    tiles, height_px, width_px, colours = pixels.shape
    down, across = height_px // crop_px, width_px // crop_px
    top, left = height_px % crop_px // 2, width_px % crop_px // 2
    middle = pixels[:, top : top + down * crop_px, left : left + across * crop_px]
    grid = middle.reshape(tiles, down, crop_px, across, crop_px, colours).swapaxes(2, 3)
    return grid.reshape(tiles, down * across, crop_px, crop_px, colours)


def random_crops(
    pixels: UInt8[np.ndarray, "tile y x rgb"], crop_px: int, each: int, generator: torch.Generator
) -> UInt8[torch.Tensor, "crop row column rgb"]:
    """So many crops of each tile, anywhere in it.

    Raises:
        OptionsError: not one fits.
    """
    _require_room(pixels, crop_px)
    rows, columns = (
        torch.randint(size - crop_px + 1, (len(pixels), each), generator=generator).tolist()
        for size in pixels.shape[1:3]
    )
    crops = [
        tile[row : row + crop_px, column : column + crop_px]
        for tile, *places in zip(pixels, rows, columns, strict=True)
        for row, column in zip(*places, strict=True)
    ]
    return torch.from_numpy(np.stack(crops))


def _require_room(pixels: UInt8[np.ndarray, "tile y x rgb"], crop_px: int) -> None:
    height_px, width_px = pixels.shape[1:3]
    if min(height_px, width_px) < crop_px:
        raise OptionsError(
            f"tiles are {width_px} x {height_px} px: too small for a crop of {crop_px} px. Lower crop_px under "
            "[detector] or raise tile_px under [tiles] of the pipeline file."
        )


def _filled_up(values: np.ndarray) -> np.ndarray:
    """With zeros, to a whole portion."""
    return np.pad(values, [(0, PORTION_CROPS - len(values)), *[(0, 0)] * (values.ndim - 1)])


_STREAMS = 2
