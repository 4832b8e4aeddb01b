"""AnoDDPM: what a diffusion network that has only seen normal tissue cannot rebuild, pixel by pixel, is abnormal.

Wyatt et al., "AnoDDPM: Anomaly Detection with Denoising Diffusion Probabilistic Models using Simplex Noise" (CVPR
workshops 2022), and the form of it that Kim et al., "AnoPILaD" (MICCAI 2025), compare with.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float32, Int64
from pydantic import Field, PositiveInt, PrivateAttr, field_validator

from wsi_anomaly.detectors.diffusion.inpainting import Checkerboard, HalfNoise
from wsi_anomaly.detectors.diffusion.learner import DiffusionLearner, DiffusionTrainingOptions, Draws, Precision
from wsi_anomaly.detectors.diffusion.noise import GaussianNoise, NoiseMaker, SimplexNoise
from wsi_anomaly.detectors.diffusion.pixel import (
    NetworkSizes,
    PixelDiffusion,
    PixelModel,
    ScheduleOptions,
    described_model,
    model_from_scratch,
)
from wsi_anomaly.detectors.diffusion.pixel_base import load_pixel_base
from wsi_anomaly.detectors.diffusion.restoring import Restorer
from wsi_anomaly.detectors.diffusion.samplers import Ddim, SamplerOptions
from wsi_anomaly.detectors.diffusion.scoring import SEEN, DiffusionScorer, ScoreName, judging, names_of
from wsi_anomaly.detectors.diffusion.training import train_steps
from wsi_anomaly.detectors.diffusion.walk_norms import WalkNormOptions, WalkNorms
from wsi_anomaly.detectors.perceptual import Lpips, load_lpips, note_lpips, require_noted
from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.residuals import mse
from wsi_anomaly.detectors.weights import WEIGHTS, load_weights, save_weights, write_whole
from wsi_anomaly.devices import CHUNK_TILES, resolve_device
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.options import Options

NETWORK = "network.json"
FORMAT_VERSION = 1
PORTION_CUDA = 32

NoiseName = Literal["gaussian", "simplex"]


class AnoDdpmTraining(DiffusionTrainingOptions):
    """How the network learns: as in AnoPILaD's comparison, but at a constant rate, and all timesteps count alike."""

    steps: int = Field(500_000, ge=1)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(2e-5, gt=0)


class AnoDdpm(Options):
    """Diffusion of the pixels themselves: what comes back other than it was is abnormal."""

    paper: ClassVar[str] = "Wyatt et al., CVPR workshops 2022"
    needs: ClassVar[tuple[str, ...]] = ("GPU",)
    caution: ClassVar[str] = "mse_pixel can rank tumour below normal tissue"
    licence_of: ClassVar[str] = "google/ddpm-celebahq-256: Apache-2.0"

    base: str = ""
    """A DDPM to start from: a folder as diffusers saves it, or a repository of the hub. Without: from scratch."""
    sizes: NetworkSizes = NetworkSizes()
    """From scratch only: a base has its own."""
    schedule: ScheduleOptions = ScheduleOptions()
    """From scratch only: a base has its own."""
    noise: NoiseName = "gaussian"
    """What is learnt and added. "simplex" is lumpy, and a quarter as strong at the same timestep."""
    timesteps: tuple[int, ...] = Field((674,), min_length=1)
    """How much noise is added; one walk for each, and one column of each score."""
    sampler: SamplerOptions = Ddim(snap=False)
    restoration: Literal["noise", "inpaint"] = "noise"
    """"noise" adds noise to the tile; "inpaint" rebuilds each half of a checkerboard from the other, in two walks."""
    cell_px: PositiveInt = 32
    """Of the checkerboard."""
    scores: tuple[ScoreName, ...] = Field(("mse_pixel",), min_length=1)
    msma: WalkNormOptions = WalkNormOptions()
    """Of the score `msma`."""
    lpips_weights: str = ""
    """The weights of VGG16 and of LPIPS, for the score `lpips`: a file with all of them, or a folder."""
    precision: Precision = "fp16"
    """Of the network on CUDA; a CPU computes in fp32."""
    training: AnoDdpmTraining = AnoDdpmTraining()
    _offline: bool = PrivateAttr(default=False)

    @field_validator("timesteps", "scores")
    @classmethod
    def _no_twice(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(value)) < len(value):
            raise ValueError("the same twice")
        return value

    @field_validator("scores")
    @classmethod
    def _of_pixels(cls, value: tuple[ScoreName, ...], info: Any) -> tuple[ScoreName, ...]:  # noqa: ANN401 - as below
        if "mse_latent" in value:
            raise ValueError("there are no latents: this network works on pixels. Use mse_pixel")
        if set(SEEN) & set(value):
            raise ValueError("this network knows no keywords. Use mse_pixel, ms_ssim, lpips or msma")
        if "msma" in value and info.data.get("restoration") == "inpaint":
            raise ValueError('in-painting knows the noise in half of each tile. For msma, set restoration = "noise"')
        return value

    @field_validator("restoration")
    @classmethod
    def _on_a_grid_with_the_start(cls, value: str, info: Any) -> str:  # noqa: ANN401 - a ValidationInfo
        sampler = info.data.get("sampler")
        if value == "inpaint" and isinstance(sampler, Ddim) and sampler.snap:
            raise ValueError("known cells would be of another noise level than their tile. Set sampler.snap = false")
        return value

    @property
    def score_names(self) -> tuple[str, ...]:
        """Each score at each starting timestep."""
        return names_of(self.scores, self.timesteps)

    def on_base(self, place: str, *, offline: bool) -> "AnoDdpm":
        """The same detector with its base at another place ("" for the same); `offline` forbids to fetch it.

        Raises:
            OptionsError: a place is given, but the network is one from scratch.
        """
        if place and not self.base:
            raise OptionsError(
                f"base model at {place}: this pipeline learns from scratch and has none. To start from a base, set "
                "base under [detector] of the pipeline file."
            )
        moved = self.model_copy(update={"base": place or self.base})
        moved._offline = offline  # noqa: SLF001 - a copy of its own class
        return moved

    def fit(self, tiles: TileSource, checkpoint: Path, *, device: str) -> None:
        """Teach the network normal tissue, and leave all of its weights in `checkpoint`: scoring needs no base.

        Goes on from an unfinished fit with the same options, base and tiles.

        Raises:
            ModelError: the base cannot be had or is of another family, weights for LPIPS are missing, or training
                diverged.
            OptionsError: the device does not exist or has too little memory for one tile, a start is not within the
                schedule, or tiles are of a size that the network cannot halve.
            CohortError: there are no tiles, or too few for the score `msma`.
        """
        norms, place = self._norms(), resolve_device(device)
        norms.require(tiles)
        self._learn(tiles, checkpoint, device)
        norms.fit(tiles, checkpoint, lambda: self._restorer(self._trained(checkpoint, place), place))

    def _learn(self, tiles: TileSource, checkpoint: Path, device: str) -> None:
        place = resolve_device(device)
        model, origin = self._beginning()
        # What is learnt stays in full precision; accelerate computes in the precision of the training options.
        network = PixelDiffusion(model, place, precision="fp32")
        # Refuses now what would be refused after days of learning.
        lpips = self._lpips(place)
        self._scorer(network, place, lpips)
        learner = DiffusionLearner(
            network=network.unet,
            timesteps=len(network.schedule),
            loss=partial(_loss, network, self._noise_maker(len(network.schedule))),
            # A scorer remembers its last batch, and the network changes.
            rebuild=lambda batch: self._scorer(network, place, lpips).reconstruct(batch),
            save=partial(self._save, model),
            weights=WEIGHTS,
            recipe={"detector": "anoddpm", "noise": self.noise, "start": origin, **model.description},
        )
        train_steps(learner, tiles, self.training, folder=checkpoint, device=device)
        note_lpips(lpips, checkpoint)

    def load(self, checkpoint: Path, *, device: str) -> DiffusionScorer:
        """The scorer whose weights `fit` left in `checkpoint`. Needs no base.

        Raises:
            ModelError: the weights are missing, damaged, newer or of another architecture, or those of LPIPS are
                missing or others than in the fit.
            OptionsError: the device does not exist, or a start is not within the schedule.
        """
        place = resolve_device(device)
        network = self._trained(checkpoint, place)
        if lpips := self._lpips(place):
            require_noted(lpips, checkpoint, weights=self.lpips_weights)
        return judging(self._scorer(network, place, lpips), self._norms().load(checkpoint))

    def _trained(self, checkpoint: Path, place: torch.device) -> PixelDiffusion:
        """The network as it was left, for scoring."""
        model = _described(checkpoint / NETWORK) if self.base else self._from_scratch()
        load_weights(model.unet, checkpoint, self._architecture(model))
        return PixelDiffusion(model, place, precision=self.precision)

    def _beginning(self) -> tuple[PixelModel, str]:
        """The network before it learns, and what its weights are made of."""
        if self.base:
            return load_pixel_base(self.base, offline=self._offline)
        return self._from_scratch(), f"seed {self.training.seed}"

    def _from_scratch(self) -> PixelModel:
        return model_from_scratch(self.sizes, self.schedule, seed=self.training.seed)

    def _save(self, model: PixelModel, folder: Path) -> None:
        content = {"format_version": FORMAT_VERSION, **model.description}
        write_whole(folder / NETWORK, lambda file: file.write(f"{json.dumps(content, indent=1)}\n".encode()))
        save_weights(model.unet, folder, self._architecture(model))

    def _architecture(self, model: PixelModel) -> dict[str, Any]:
        """In one level, so that an error can name what differs."""
        parts = {f"{name}.{key}": value for name, part in model.description.items() for key, value in part.items()}
        return {"detector": "anoddpm", "noise": self.noise, **parts}

    def _lpips(self, place: torch.device) -> Lpips | None:
        return load_lpips(self.lpips_weights, device=place) if "lpips" in self.scores else None

    def _norms(self) -> WalkNorms:
        walk = {"sampler": self.sampler.model_dump_json()}
        wanted, seed = "msma" in self.scores, self.training.seed
        return WalkNorms("anoddpm", wanted, self.msma, walk, self.timesteps, weights=WEIGHTS, seed=seed)

    def _scorer(self, network: PixelDiffusion, place: torch.device, lpips: Lpips | None) -> DiffusionScorer:
        return DiffusionScorer(self._restorer(network, place), self.scores, lpips)

    def _restorer(self, network: PixelDiffusion, place: torch.device) -> Restorer:
        in_painting = self.restoration == "inpaint"
        make_noise = self._noise_maker(len(network.schedule))
        return Restorer(
            Checkerboard(network, self.cell_px) if in_painting else network,
            self.sampler,
            self.timesteps,
            make_noise=HalfNoise(make_noise) if in_painting else make_noise,
            device=place,
            portion=PORTION_CUDA if place.type == "cuda" else CHUNK_TILES,
        )

    def _noise_maker(self, timesteps: int) -> NoiseMaker:
        return GaussianNoise() if self.noise == "gaussian" else SimplexNoise(timesteps)


def _loss(
    network: PixelDiffusion,
    make_noise: NoiseMaker,
    batch: TileBatch,
    _: Int64[np.ndarray, " tile"],
    draws: Draws,
) -> Float32[torch.Tensor, " tile"]:
    """The mean squared error of the predicted noise (Ho et al. 2020, eq. 14)."""
    device = network.unet.device
    clean = network.encode(torch.from_numpy(batch.pixels).to(device))
    made = [make_noise(draws.seeds[i : i + 1], tuple(clean.shape[1:]), int(t)) for i, t in enumerate(draws.timesteps)]
    noise = torch.from_numpy(np.concatenate(made)).to(device)
    timesteps = torch.from_numpy(draws.timesteps).to(device)
    output = network.output(network.schedule.noised(clean, noise, timesteps), timesteps)
    return mse(output.float(), network.schedule.target(clean, noise, timesteps))


def _described(path: Path) -> PixelModel:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["format_version"]
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: the description of the network is missing. If the fit was interrupted, run it again. If the "
            "model was copied, copy all of it."
        ) from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: is damaged ({error}). Copy the model anew, or fit it again.") from error
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path}: its format version is {version}, this version of wsi-anomaly reads {FORMAT_VERSION}. "
            "Use the version that made the model, or fit it again."
        )
    return described_model(description, where=str(path))
