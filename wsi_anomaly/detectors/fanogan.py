"""The f-AnoGAN detector: what a generator of normal tissue cannot make is abnormal. Works on crops of a tile.

Schlegl et al., "f-AnoGAN: Fast unsupervised anomaly detection with generative adversarial networks" (Medical Image
Analysis 2019). The networks and the first stage are those of Gulrajani et al., "Improved Training of Wasserstein GANs"
(NeurIPS 2017): there the penalty is of one point between each real image and each made one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from pydantic import Field, PositiveInt, field_validator
from torch import nn

from wsi_anomaly.detectors.adversarial import AdversarialLearner, AdversarialOptions, Turn, train_in_turns
from wsi_anomaly.detectors.fanogan_networks import SMALLEST_PX, Critic, Encoder, Generator, Images
from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.residuals import squared_error_map
from wsi_anomaly.detectors.weights import load_weights, save_weights
from wsi_anomaly.devices import apply_in_chunks, resolve_device, to_pixels, to_tensor
from wsi_anomaly.errors import OptionsError
from wsi_anomaly.options import Options

ScoreName = Literal["izi_f", "image", "feature"]
Tiles = Float[torch.Tensor, "tile rgb y x"]


class FAnoGanTraining(AdversarialOptions):
    """How long and how fast to learn: first the generator against its critic, then the encoder."""

    batch_size: int = Field(64, ge=2)
    """Tiles of a step; each gives one crop."""
    generator_steps: PositiveInt = 20_000
    """Of the generator; the critic learns five times as often."""
    encoder_steps: PositiveInt = 50_000
    encoder_learning_rate: float = Field(5e-5, gt=0)

    @property
    def critic_steps(self) -> int:
        """The steps of the first stage."""
        return self.generator_steps * CRITIC_STEPS


class FAnoGan(Options):
    """Learns to make normal tissue, and then to find in it what is nearest to a tile. Can rank disease below normal.

    On lymph nodes the authors of AnoPILaD measured an AUROC of about 0.2 for metastases; on made-up tissue it is 0.3
    here, and lower for smooth disease such as fibrosis. What has little texture is easy to make. Turn no sign for it:
    compare with annotated slides first.
    """

    paper: ClassVar[str] = "Schlegl et al., Medical Image Analysis 2019"
    needs: ClassVar[tuple[str, ...]] = ("GPU",)
    caution: ClassVar[str] = "ranks disease below normal tissue, as in the AnoPILaD paper"

    crop_px: int = 64
    """Tiles are cut into squares of this side, a power of two, and scored by the mean of these."""
    latent: PositiveInt = 128
    """Numbers that a crop is described by."""
    width: PositiveInt = 64
    """Channels of the layers at full size; the smallest have eight times as many."""
    kappa: float = Field(1.0, ge=0)
    """What an error of the critic's features counts, beside one of the image."""
    scores: tuple[ScoreName, ...] = Field(("izi_f",), min_length=1)
    """Squared error of the image in [-1, 1], that of the features, and `izi_f`: the first plus kappa the second."""
    training: FAnoGanTraining = FAnoGanTraining()

    @field_validator("crop_px")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value < 2 * SMALLEST_PX or value & (value - 1):
            raise ValueError(f"must be a power of two, at least {2 * SMALLEST_PX}")
        return value

    @field_validator("scores")
    @classmethod
    def _no_twice(cls, value: tuple[ScoreName, ...]) -> tuple[ScoreName, ...]:
        if len(set(value)) < len(value):
            raise ValueError("the same twice")
        return value

    @property
    def score_names(self) -> tuple[str, ...]:
        """As they were chosen."""
        return self.scores

    def fit(self, tiles: TileSource, checkpoint: Path, *, device: str) -> None:
        """Learn normal tissue from `tiles` and leave the weights in the folder `checkpoint`.

        Goes on from an unfinished fit with the same options. On one machine with one number of threads, equal options
        and tiles give equal bytes.

        Raises:
            CohortError: there are fewer than two tiles.
            OptionsError: the device does not exist or has too little memory, or tiles cannot be cut into such crops.
            ModelError: training diverged.
        """
        place = resolve_device(device)
        networks = self._networks().to(place)
        learner = AdversarialLearner(
            networks,
            self._turns(networks, place),
            steps=self.training.critic_steps + self.training.encoder_steps,
            save=lambda folder: save_weights(networks, folder, self._architecture()),
            # Scores are chosen after learning.
            recipe=self.model_dump(mode="json", exclude={"scores": True, "training": {"save_every"}})
            | {"detector": _NAME},
        )
        train_in_turns(learner, tiles, self.training, folder=checkpoint)

    def load(self, checkpoint: Path, *, device: str) -> "FAnoGanScorer":
        """The scorer whose weights `fit` left in `checkpoint`.

        Raises:
            ModelError: the weights are missing, damaged, of another format or of another architecture.
            OptionsError: the device does not exist.
        """
        place = resolve_device(device)
        networks = self._networks()
        load_weights(networks, checkpoint, self._architecture())
        return FAnoGanScorer(networks.to(place).eval(), place, self)

    def _networks(self) -> "FAnoGanNetworks":
        return FAnoGanNetworks(self.crop_px, self.width, self.latent, seed=self.training.seed)

    def _architecture(self) -> dict[str, Any]:
        return {"detector": _NAME, "crop_px": self.crop_px, "latent": self.latent, "width": self.width}

    def _turns(self, networks: "FAnoGanNetworks", place: torch.device) -> dict[str, Turn]:
        """Critic and generator until the generator is done, then the encoder alone."""
        training = self.training

        def crops(batch: TileBatch, draws: torch.Generator) -> Images:
            return random_crops(to_tensor(batch.pixels, place) * 2 - 1, self.crop_px, draws)

        def made(count: int, draws: torch.Generator) -> Images:
            images: torch.Tensor = networks.generator(torch.randn(count, self.latent, generator=draws).to(place))
            return images

        def critic_loss(batch: TileBatch, draws: torch.Generator) -> Float[torch.Tensor, ""]:
            real = crops(batch, draws)
            fake = made(len(real), draws)
            distance = networks.critic(fake).mean() - networks.critic(real).mean()
            return distance + PENALTY * gradient_penalty(networks.critic, real, fake, draws)

        def generator_loss(batch: TileBatch, draws: torch.Generator) -> Float[torch.Tensor, ""]:
            return -networks.critic(made(len(batch), draws)).mean()

        def encoder_loss(batch: TileBatch, draws: torch.Generator) -> Float[torch.Tensor, ""]:
            networks.generator.eval()  # it is finished
            images, features = networks.errors(crops(batch, draws))
            return images.mean() + self.kappa * features.mean()

        def adversary(network: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.Adam(network.parameters(), training.learning_rate, betas=(0.0, 0.9))

        encoder = torch.optim.RMSprop(networks.encoder.parameters(), training.encoder_learning_rate)
        last = training.critic_steps
        return {
            "critic": Turn(adversary(networks.critic), critic_loss, lambda step: step <= last),
            "generator": Turn(
                adversary(networks.generator), generator_loss, lambda step: step <= last and step % CRITIC_STEPS == 0
            ),
            "encoder": Turn(encoder, encoder_loss, lambda step: step > last),
        }


@dataclass(frozen=True, slots=True)
class FAnoGanScorer:
    """A fitted f-AnoGAN. The scores of a tile do not depend on the other tiles of its batch."""

    networks: "FAnoGanNetworks"
    device: torch.device
    options: FAnoGan
    map_meaning: ClassVar[str] = "Residual: squared error of intensities from -1 to 1, mean of the colours"

    def score(self, batch: TileBatch) -> Float32[np.ndarray, "tile score"]:
        """The scores that were chosen, each the mean over the crops of a tile.

        Raises:
            OptionsError: tiles cannot be cut into such crops.
        """
        errors = apply_in_chunks(self._mean_errors, batch.pixels, self.device)
        image, feature = errors.T
        known = {"izi_f": image + self.options.kappa * feature, "image": image, "feature": feature}
        return np.stack([known[name] for name in self.options.scores], axis=1).astype(np.float32)

    def score_map(self, batch: TileBatch) -> Float32[np.ndarray, "tile y x"]:
        """Squared error of each pixel in [-1, 1], averaged over its colours; its mean is the score `image`."""
        return apply_in_chunks(
            lambda images: squared_error_map(images * 2 - 1, self._rebuilt(images)), batch.pixels, self.device
        )

    def reconstruct(self, batch: TileBatch) -> UInt8[np.ndarray, "tile y x rgb"]:
        """Each tile put together from the crops that the generator makes for it."""
        return apply_in_chunks(lambda images: to_pixels((self._rebuilt(images) + 1) / 2), batch.pixels, self.device)

    def _rebuilt(self, images: Tiles) -> Tiles:
        crops = cut(images * 2 - 1, self.options.crop_px)
        return put_together(self.networks.generator(self.networks.encoder(crops)), images)

    def _mean_errors(self, images: Tiles) -> Float[torch.Tensor, "tile 2"]:
        errors = self.networks.errors(cut(images * 2 - 1, self.options.crop_px))
        # Summed in float64, so that the last bits do not depend on how the sum is split.
        of_crops = torch.stack([each.double().mean(dim=(1, 2, 3)) for each in errors], dim=1)
        return of_crops.view(len(images), -1, 2).mean(dim=1)


class FAnoGanNetworks(nn.Module):
    """Generator, critic and encoder; their first weights depend on the seed alone."""

    def __init__(self, crop_px: int, width: int, latent: int, *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = Generator(crop_px, width, latent)
            self.critic = Critic(crop_px, width)
            self.encoder = Encoder(crop_px, width, latent)

    def errors(self, crops: Images) -> tuple[Images, Float[torch.Tensor, "crop feature row column"]]:
        """Squared errors of the rebuilt images, and of the critic's features of them."""
        rebuilt = self.generator(self.encoder(crops))
        seen, seen_again = self.critic.features(crops), self.critic.features(rebuilt)
        return (crops - rebuilt).square(), (seen - seen_again).square()


def random_crops(images: Tiles, crop_px: int, draws: torch.Generator) -> Images:
    """One square of each image, from anywhere in it."""
    _require_divisible(images, crop_px)
    height, width = (side - crop_px + 1 for side in images.shape[2:])
    tops = torch.randint(height, (len(images),), generator=draws).tolist()
    lefts = torch.randint(width, (len(images),), generator=draws).tolist()
    corners = zip(images, tops, lefts, strict=True)
    return torch.stack([image[:, top : top + crop_px, left : left + crop_px] for image, top, left in corners])


def cut(images: Tiles, crop_px: int) -> Images:
    """All squares of the images side by side: those of an image follow each other, row by row."""
    _require_divisible(images, crop_px)
    squares = images.unfold(2, crop_px, crop_px).unfold(3, crop_px, crop_px)
    return squares.permute(0, 2, 3, 1, 4, 5).flatten(end_dim=2).contiguous()


def put_together(crops: Images, like: Tiles) -> Tiles:
    """The opposite of `cut`, for images of the size of `like`."""
    crop_px = crops.shape[-1]
    rows, columns = (side // crop_px for side in like.shape[2:])
    squares = crops.reshape(len(like), rows, columns, -1, crop_px, crop_px).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(like.shape)


def gradient_penalty(critic: nn.Module, real: Images, fake: Images, draws: torch.Generator) -> Float[torch.Tensor, ""]:
    """How far the critic's slope is from 1 between each real image and a made one (Gulrajani et al., equation 3)."""
    # One place on the line between two images: not one for each colour, which would leave the line.
    place = torch.rand(len(real), 1, 1, 1, generator=draws).to(real.device)
    between = (real + place * (fake - real)).detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    # The root has no slope of its own at 0, where a critic that sees no difference starts.
    steepness = (slope.square().sum(dim=(1, 2, 3)) + _TINY).sqrt()
    return (steepness - 1).square().mean()


def _require_divisible(images: Tiles, crop_px: int) -> None:
    height_px, width_px = images.shape[2:]
    if height_px % crop_px or width_px % crop_px or not height_px or not width_px:
        raise OptionsError(
            f"tiles are {width_px} x {height_px} px: f-AnoGAN cuts them into squares of {crop_px} px, so they need a "
            f"multiple of it. Change crop_px under [detector], or tile_px under [tiles] of the pipeline file."
        )


CRITIC_STEPS = 5
"""Of the critic for one of the generator."""
PENALTY = 10.0
_NAME = "fanogan"
_TINY = 1e-12
