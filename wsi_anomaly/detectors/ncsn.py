"""A small network that tells the noise in tiles at a few noise levels, and how it learns. Scores nothing.

The noise conditional score network of Song and Ermon (NeurIPS 2019) with its geometric noise levels, on the UNet that
the pixel diffusion detectors have. x + sigma * noise is scaled to variance one before the network sees it, so that a
level is a timestep of a diffusion whose signal is 1 / (1 + sigma^2); the loss is the paper's, sigma^2-weighted (eq. 6).
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from pydantic import Field, PositiveInt, field_validator

from wsi_anomaly.detectors.diffusion.learner import DiffusionLearner, DiffusionTrainingOptions, Draws
from wsi_anomaly.detectors.diffusion.noise import tile_noise
from wsi_anomaly.detectors.diffusion.pixel import (
    NetworkSizes,
    PixelDiffusion,
    PixelModel,
    ScheduleOptions,
    model_from_scratch,
)
from wsi_anomaly.detectors.diffusion.training import train_steps
from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.residuals import mse
from wsi_anomaly.detectors.weights import WEIGHTS, load_weights, save_weights
from wsi_anomaly.devices import to_pixels
from wsi_anomaly.options import Options


class NcsnSizes(NetworkSizes):
    """The sizes of the network."""

    channels: tuple[PositiveInt, ...] = Field((32, 32, 64, 64), min_length=1)
    """Width of each level. Between two levels, width and height of the tile are halved."""
    layers_per_level: PositiveInt = 1
    attention_levels: tuple[int, ...] = ()
    head_channels: PositiveInt = 64
    norm_groups: PositiveInt = 8


class NcsnTraining(DiffusionTrainingOptions):
    """How the network learns."""

    steps: int = Field(20_000, ge=1)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    ema_decay: float | None = Field(0.999, gt=0, lt=1)


class NcsnOptions(Options):
    """The network and its noise levels."""

    sizes: NcsnSizes = NcsnSizes()
    levels: int = Field(10, ge=2)
    """How many noise levels it knows: too few tell little, more than ten tell no more."""
    most_sigma: float = Field(1.0, gt=0)
    """The deviation of the strongest noise, on intensities in [0, 1]."""
    least_sigma: float = Field(0.01, gt=0)
    """Of the weakest; between the two, each level is weaker than the one before by the same factor."""
    training: NcsnTraining = NcsnTraining()

    @field_validator("least_sigma")
    @classmethod
    def _is_less(cls, value: float, info: Any) -> float:  # noqa: ANN401 - a ValidationInfo
        if value >= info.data.get("most_sigma", np.inf):
            raise ValueError("the weakest noise must be weaker than the strongest")
        return value


def ncsn(options: NcsnOptions, device: torch.device) -> PixelDiffusion:
    """The untrained network; timesteps 0, 1, ... are its noise levels, from the weakest to the strongest."""
    sigmas = np.geomspace(options.least_sigma, options.most_sigma, options.levels)
    signal = 1 / (1 + (2 * sigmas) ** 2)  # twice, because the network sees intensities in [-1, 1]
    betas = 1 - signal / np.append(1.0, signal[:-1])
    schedule = {"beta_schedule": "linear", "trained_betas": betas.tolist(), "prediction_type": "epsilon"}
    unet = model_from_scratch(options.sizes, ScheduleOptions(), seed=options.training.seed).unet
    return PixelDiffusion(PixelModel(unet, schedule), device, precision="fp32")


def fit_ncsn(detector: str, options: NcsnOptions, tiles: TileSource, *, folder: Path, device: torch.device) -> None:
    """Teach the network normal tissue and leave its weights in `folder`, for `load_ncsn` to find.

    Goes on from an unfinished fit with the same options and tiles. `detector` is the name of whom it is for.

    Raises:
        CohortError: there are no tiles.
        OptionsError: the device is too small for one tile, or tiles are of a size that the network cannot halve.
        ModelError: training diverged.
    """
    network = ncsn(options, device)
    architecture = _architecture(detector, options)
    learner = DiffusionLearner(
        network=network.unet,
        timesteps=options.levels,
        loss=partial(_loss, network),
        rebuild=partial(_denoised, network, device),
        save=lambda folder: save_weights(network.unet, folder, architecture),
        weights=WEIGHTS,
        recipe=architecture,
        label="as the network denoises them",
        table="[detector.ncsn.training]",
    )
    train_steps(learner, tiles, options.training, folder=folder, device=device.type)


def load_ncsn(detector: str, options: NcsnOptions, folder: Path, *, device: torch.device) -> PixelDiffusion:
    """The network whose weights `fit_ncsn` left in `folder`.

    Raises:
        ModelError: the weights are missing, damaged, of another format, architecture or detector.
    """
    network = ncsn(options, device)
    load_weights(network.unet, folder, _architecture(detector, options))
    network.unet.eval().requires_grad_(requires_grad=False)
    return network


def _architecture(detector: str, options: NcsnOptions) -> dict[str, Any]:
    return {"detector": detector, **options.model_dump(mode="json", exclude={"sizes", "training"})} | {
        f"sizes.{name}": value for name, value in options.sizes.model_dump(mode="json").items()
    }


def _loss(
    network: PixelDiffusion, batch: TileBatch, _: Int64[np.ndarray, " tile"], draws: Draws
) -> Float32[torch.Tensor, " tile"]:
    """The mean squared error of the predicted noise: denoising score matching, weighted by sigma squared."""
    clean = network.encode(torch.from_numpy(batch.pixels).to(network.unet.device))
    noise = torch.from_numpy(tile_noise(draws.seeds, tuple(clean.shape[1:]))).to(clean.device)
    timesteps = torch.from_numpy(draws.timesteps).to(clean.device)
    output = network.output(network.schedule.noised(clean, noise, timesteps), timesteps)
    return mse(output.float(), noise)


def _denoised(network: PixelDiffusion, device: torch.device, batch: TileBatch) -> UInt8[np.ndarray, "tile y x rgb"]:
    """For pictures: the middle level's noise, added and taken away."""
    level = len(network.schedule) // 2
    clean = network.encode(torch.from_numpy(batch.pixels).to(device))
    noise = torch.from_numpy(tile_noise(batch.seeds, tuple(clean.shape[1:]))).to(device)
    noised = network.schedule.noised(clean, noise, level)
    rebuilt = network.schedule.clean(noised, network.noise(noised, level, None), level)
    return to_pixels(network.decode(rebuilt)).cpu().numpy()
