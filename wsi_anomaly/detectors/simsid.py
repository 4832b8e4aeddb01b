"""The SimSID detector: what a discriminator finds unreal in a tile rebuilt from remembered patches is abnormal.

Xiang et al., "Exploiting Structural Consistency of Chest Anatomy for Unsupervised Anomaly Detection in Radiography
Images" (IEEE TPAMI 2024), the simpler successor of "SQUID" (CVPR 2023). Written for chest radiographs, where each
place of the image shows the same organ. Tissue has no such places, so here all of them share one memory by default.
"""

from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from pydantic import Field, PositiveInt, model_validator
from torch import nn
from torch.nn.functional import affine_grid, grid_sample, interpolate, mse_loss, softplus

from wsi_anomaly.detectors.adversarial import AdversarialLearner, AdversarialOptions, Turn, train_in_turns
from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.sampling import even_sample
from wsi_anomaly.detectors.simsid_networks import (
    HEADS,
    LEVELS,
    Decoder,
    Discriminator,
    Encoder,
    Images,
    Inpainting,
    Memory,
    MemoryKind,
    Patches,
    Sizes,
    as_tokens,
    into_images,
    into_patches,
)
from wsi_anomaly.detectors.weights import load_weights, save_weights
from wsi_anomaly.devices import apply_in_chunks, resolve_device, to_pixels, to_tensor
from wsi_anomaly.options import Options

AnySize = Float[torch.Tensor, "tile rgb _ _"]


class SimSidTraining(AdversarialOptions):
    """How long to learn; the rate falls along half a cosine, to a fifth of the first one."""

    steps: PositiveInt = 20_000
    """Of the discriminator; all else learns in every second one."""
    weight_decay: float = Field(1e-5, ge=0)
    reference_tiles: int = Field(2000, ge=2)
    """Of how many of the tiles, at most, mean and deviation of the score are taken at the end."""


class SimSid(Options):
    """Learns to rebuild normal tissue from remembered patches, and to tell what is rebuilt well. Needs long training.

    On made-up tissue, after seconds of learning, fibrosis ranks above normal tissue (AUROC 0.6 to 0.8), metastases do
    not (0.5 to 0.6). Which steps are kept is never decided by labelled tiles: the last ones are.
    """

    score_names: ClassVar[tuple[str, ...]] = ("unreal",)
    paper: ClassVar[str] = "Xiang et al., TPAMI 2024"
    needs: ClassVar[tuple[str, ...]] = ("GPU",)

    image_px: PositiveInt = 128
    """Tiles are resized to it."""
    grid: int = Field(4, ge=2)
    """Patches along a side."""
    width: PositiveInt = 32
    """Channels of the first layer; each of the four halvings of a patch doubles them."""
    memory: MemoryKind = "free"
    """"position" gives each place of the grid a memory of its own: for tissue that always lies the same way."""
    slots: PositiveInt = 100
    """Items of a memory."""
    active: PositiveInt = 5
    """How many items a patch is put together from."""
    training: SimSidTraining = SimSidTraining()

    @model_validator(mode="after")
    def _divisible(self) -> "SimSid":
        step = self.grid * 2**LEVELS
        if self.image_px % step or self.image_px & (self.image_px - 1):
            raise ValueError(f"image_px must be a power of two and, with a grid of {self.grid}, a multiple of {step}")
        if self._sizes().token(LEVELS) % HEADS:
            raise ValueError(f"width must be such that {self._sizes().token(LEVELS)} is a multiple of {HEADS}")
        return self

    def fit(self, tiles: TileSource, checkpoint: Path, *, device: str) -> None:
        """Learn normal tissue from `tiles` and leave the weights in the folder `checkpoint`.

        Goes on from an unfinished fit with the same options. On one machine with one number of threads, equal options
        and tiles give equal bytes.

        Raises:
            CohortError: there are fewer than two tiles.
            OptionsError: the device does not exist or has too little memory.
            ModelError: training diverged.
        """
        place = resolve_device(device)
        network = self._network().to(place)

        def save(folder: Path) -> None:
            self._standardise(network.eval(), tiles, place)
            save_weights(network, folder, self._architecture())

        recipe = self.model_dump(mode="json", exclude={"training": {"save_every"}}) | {"detector": _NAME}
        turns = self._turns(network, place)
        learner = AdversarialLearner(network, turns, self.training.steps, save=save, recipe=recipe)
        train_in_turns(learner, tiles, self.training, folder=checkpoint)

    def load(self, checkpoint: Path, *, device: str) -> "SimSidScorer":
        """The scorer whose weights `fit` left in `checkpoint`.

        Raises:
            ModelError: the weights are missing, damaged, of another format or of another architecture.
            OptionsError: the device does not exist.
        """
        place = resolve_device(device)
        network = self._network()
        load_weights(network, checkpoint, self._architecture())
        return SimSidScorer(network.to(place).eval(), place)

    def _sizes(self) -> Sizes:
        return Sizes(self.image_px, self.grid, self.width, self.memory, slots=self.slots, active=self.active)

    def _network(self) -> "SimSidNetwork":
        return SimSidNetwork(self._sizes(), seed=self.training.seed)

    def _architecture(self) -> dict[str, Any]:
        return {"detector": _NAME} | self.model_dump(mode="json", exclude={"training"})

    def _turns(self, network: "SimSidNetwork", place: torch.device) -> dict[str, Turn]:
        training = self.training

        def shown(batch: TileBatch, draws: torch.Generator) -> Images:
            return moved(network.resized(to_tensor(batch.pixels, place)), draws)

        def discriminator_loss(batch: TileBatch, draws: torch.Generator) -> Float[torch.Tensor, ""]:
            images = shown(batch, draws)
            with torch.no_grad():
                rebuilt = network.student_images(images)
            real, unreal = network.discriminator(images), network.discriminator(rebuilt)
            return DISCRIMINATOR_WEIGHT * (softplus(-real).mean() + softplus(unreal).mean())

        def rebuilding_loss(batch: TileBatch, draws: torch.Generator) -> Float[torch.Tensor, ""]:
            return network.rebuilding_loss(shown(batch, draws))

        def rate(step: int) -> float:
            falling = (1 + cos(pi * (step - 1) / training.steps)) / 2
            return training.learning_rate * (LAST_RATE + (1 - LAST_RATE) * falling)

        def optimizer(*parts: nn.Module) -> torch.optim.Optimizer:
            parameters = [parameter for part in parts for parameter in part.parameters()]
            return torch.optim.Adam(
                parameters, training.learning_rate, betas=(0.5, 0.999), weight_decay=training.weight_decay
            )

        rebuilding = optimizer(*(part for name, part in network.named_children() if name != "discriminator"))
        return {
            "discriminator": Turn(optimizer(network.discriminator), discriminator_loss, learning_rate=rate),
            "rebuilding": Turn(rebuilding, rebuilding_loss, lambda step: step % 2 == 0, rate),
        }

    def _standardise(self, network: "SimSidNetwork", tiles: TileSource, place: torch.device) -> None:
        """Note mean and deviation of how real normal tiles look, as they are: not shifted, not enlarged."""
        chosen = even_sample(tiles.slides, self.training.reference_tiles, seed=self.training.seed)
        parts = [chosen[start : start + _READ_TILES] for start in range(0, len(chosen), _READ_TILES)]
        found = [apply_in_chunks(network.realness, tiles.read(part).pixels, place) for part in parts]
        realness = np.concatenate(found).astype(np.float64)
        network.middle.fill_(realness.mean())
        network.deviation.fill_(max(realness.std(), _SMALLEST_DEVIATION))


@dataclass(frozen=True, slots=True)
class SimSidScorer:
    """A fitted SimSID. The scores of a tile do not depend on the other tiles of its batch."""

    network: "SimSidNetwork"
    device: torch.device

    def score(self, batch: TileBatch) -> Float32[np.ndarray, "tile 1"]:
        """How much less real the rebuilt tile looks than those of normal tiles to learn from, in their deviations.

        The paper's score before its sigmoid, which keeps the order, and turned round: there, high is normal.
        """
        realness = apply_in_chunks(self.network.realness, batch.pixels, self.device)
        middle, deviation = float(self.network.middle), float(self.network.deviation)
        return ((middle - realness.astype(np.float64)) / deviation).astype(np.float32)[:, None]

    def reconstruct(self, batch: TileBatch) -> UInt8[np.ndarray, "tile y x rgb"]:
        """Each tile as it is remembered, coarser where tiles are larger than the images of the network."""
        side_px = batch.pixels.shape[1:3]

        def rebuilt(images: AnySize) -> UInt8[torch.Tensor, "tile y x rgb"]:
            remembered = self.network.student_images(self.network.resized(images))
            return to_pixels((_resize(remembered, side_px) + 1) / 2)

        return apply_in_chunks(rebuilt, batch.pixels, self.device)


class SimSidNetwork(nn.Module):
    """Everything that is learnt; first weights depend on the seed alone."""

    middle: Float[torch.Tensor, ""]
    deviation: Float[torch.Tensor, ""]

    def __init__(self, sizes: Sizes, *, seed: int) -> None:
        super().__init__()
        self.image_px, self.grid = sizes.image_px, sizes.grid
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = Encoder(sizes)
            self.memory = Memory(sizes, LEVELS)
            self.inpainting = Inpainting(sizes.grid, sizes.token(LEVELS))
            self.student = Decoder(sizes, remembers=True)
            self.teacher = Decoder(sizes, remembers=False)
            self.discriminator = Discriminator(sizes)
        self.register_buffer("middle", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))

    def resized(self, images: AnySize) -> Images:
        """Intensities in [0, 1] of any size as the network wants them."""
        return _resize(images, (self.image_px, self.image_px)) * 2 - 1

    def realness(self, images: AnySize) -> Float[torch.Tensor, " tile"]:
        """What the discriminator says of tiles once they are rebuilt from memory."""
        realness: torch.Tensor = self.discriminator(self.student_images(self.resized(images)))
        return realness

    def student_images(self, images: Images) -> Images:
        """The images rebuilt from memory."""
        return into_images(self._student(self._seen(images))[0], self.grid)

    def rebuilding_loss(self, images: Images) -> Float[torch.Tensor, ""]:
        """Of all but the discriminator: errors of both decoders, how they differ, how unreal the student's look."""
        seen = self._seen(images)
        rebuilt, levels = self._student(seen)
        patches = into_patches(images, self.grid)
        taught, taught_levels = self.teacher(seen[-1].detach(), [features.detach() for features in seen])
        apart = torch.stack(
            [mse_loss(mine, theirs.detach()) for mine, theirs in zip(levels, taught_levels, strict=True)]
        ).sum()
        unreal = softplus(-self.discriminator(into_images(rebuilt, self.grid))).mean()
        return (
            STUDENT_WEIGHT * mse_loss(rebuilt, patches)
            + TEACHER_WEIGHT * mse_loss(taught, patches)
            + APART_WEIGHT * apart
            + UNREAL_WEIGHT * unreal
        )

    def _seen(self, images: Images) -> list[Patches]:
        levels: list[Patches] = self.encoder(into_patches(images, self.grid))
        return levels

    def _student(self, seen: list[Patches]) -> tuple[Patches, list[Patches]]:
        tokens = as_tokens(seen[-1], self.grid)
        painted = self.inpainting(tokens, self.memory(tokens))
        rebuilt: tuple[Patches, list[Patches]] = self.student(painted.reshape(seen[-1].shape), seen)
        return rebuilt


def moved(images: Images, draws: torch.Generator) -> Images:
    """Each image a little shifted, and a little larger or smaller; what lies outside mirrors what lies inside."""
    count = len(images)
    shift = (torch.rand(count, 2, 1, generator=draws) * 2 - 1) * 2 * MOST_SHIFT  # sides are from -1 to 1
    scale = 1 + (torch.rand(count, 1, 1, generator=draws) * 2 - 1) * MOST_SCALING
    place = torch.cat([torch.eye(2).expand(count, -1, -1) / scale, shift], dim=2).to(images.device)
    grid = affine_grid(place, list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _resize(images: AnySize, side_px: tuple[int, ...]) -> Images:
    if images.shape[2:] == side_px:
        return images
    return interpolate(images, side_px, mode="bilinear", align_corners=False, antialias=True)


STUDENT_WEIGHT, TEACHER_WEIGHT, APART_WEIGHT = 10.0, 0.01, 0.001
UNREAL_WEIGHT = DISCRIMINATOR_WEIGHT = 0.005
MOST_SHIFT, MOST_SCALING = 0.05, 0.05
LAST_RATE = 0.2
"""Of the first learning rate."""
_NAME = "simsid"
_READ_TILES = 64
_SMALLEST_DEVIATION = 1e-6
