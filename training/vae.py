"""Teach a small VAE to keep in 32 x 32 latents what a tile shows. Knows no noise schedule and no text."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8, UInt64

from wsi_anomaly.torchvision_shim import make_importable

make_importable()

from diffusers import AutoencoderKL  # noqa: E402

from wsi_anomaly.detectors.diffusion.backbone import decode, downsampling, encode, quiet_libraries  # noqa: E402
from wsi_anomaly.detectors.diffusion.latents import posterior_moments  # noqa: E402
from wsi_anomaly.detectors.diffusion.learner import DiffusionLearner, DiffusionTrainingOptions, Draws  # noqa: E402
from wsi_anomaly.detectors.diffusion.noise import tile_noise  # noqa: E402
from wsi_anomaly.detectors.diffusion.training import train_steps  # noqa: E402
from wsi_anomaly.detectors.protocol import TileBatch, TileSource  # noqa: E402
from wsi_anomaly.devices import resolve_device, to_pixels, to_tensor  # noqa: E402
from wsi_anomaly.errors import ModelError  # noqa: E402

Size = Literal["small", "tiny"]
Images = Float[torch.Tensor, "tile rgb y x"]
Latents = Float[torch.Tensor, "tile latent y_latent x_latent"]
PerTile = Float[torch.Tensor, " tile"]

VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
EDGE_WEIGHT = 1.0
"""Of the differences between neighbouring pixels, at each scale: they keep chromatin sharp."""
EDGE_SCALES = 3
COLOUR_WEIGHT = 5.0
"""Of the error of means over 8 x 8 px: without it stains come back alike long after shapes do not."""
DIVERGENCE_WEIGHT = 1e-6
"""Of the divergence from a normal distribution, summed over a crop's latents, as that of Stable Diffusion's VAE."""


def learn_vae(
    tiles: TileSource,
    out: Path,
    options: DiffusionTrainingOptions,
    *,
    size: Size = "small",
    start: Path | None = None,
    colour_weight: float = COLOUR_WEIGHT,
    device: str,
) -> None:
    """Teach a VAE, or one that has learnt before, on crops of 3/8 of a tile's side, and leave it in `out`.

    Goes on from an unfinished training with the same arguments and tiles; a finished one is left as it is.

    Raises:
        CohortError: there are no tiles.
        OptionsError: the device does not exist or has too little memory for one tile.
        ModelError: training diverged, or there is no VAE at `start`.
    """
    place = resolve_device(device)
    beginning = load_vae(start).requires_grad_().train() if start else _new_vae(size, seed=options.seed)
    vae = beginning.to(place)
    lesson = _Lesson(_Rebuilder(vae), colour_weight, place)
    learner = DiffusionLearner(
        network=lesson.network,
        timesteps=1,
        loss=lesson.loss,
        rebuild=lesson.rebuild,
        save=partial(_save, vae, tiles, place),
        weights=VAE_WEIGHTS,
        recipe={
            "vae": vae_digest(start) if start else _SIZES[size],
            "edges": [EDGE_WEIGHT, EDGE_SCALES],
            "colours": colour_weight,
            "divergence": DIVERGENCE_WEIGHT,
        },
    )
    train_steps(learner, tiles, options, folder=out, device=device)


def load_vae(folder: Path) -> AutoencoderKL:
    """The VAE that `learn_vae` left in a folder, on the CPU and frozen.

    Raises:
        ModelError: it is missing, unfinished or damaged.
    """
    try:
        with quiet_libraries(), torch.random.fork_rng(devices=[]):
            vae = AutoencoderKL.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(
            f"{folder}: no VAE can be loaded from here ({reason}). Train it first, to its end: "
            f"python training/diffusion.py vae --tiles FOLDER --out {folder}"
        ) from error
    return vae.requires_grad_(requires_grad=False).eval()


def vae_digest(folder: Path) -> str:
    """A sha256 of the VAE in a folder that `load_vae` takes."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in ("config.json", VAE_WEIGHTS))).hexdigest()


def crops(
    pixels: UInt8[np.ndarray, "tile y x rgb"], seeds: UInt64[np.ndarray, " tile"]
) -> UInt8[np.ndarray, "tile y_crop x_crop rgb"]:
    """A part of each square tile, 3/8 as wide and high, turned and mirrored: a function of the tile's seed."""
    side_px = pixels.shape[1] * 3 // 8
    return np.stack([_crop(tile, side_px, int(seed)) for tile, seed in zip(pixels, seeds, strict=True)])


def unlikeness(error: Images, colour_weight: float = COLOUR_WEIGHT) -> PerTile:
    """Mean absolute error of each tile, near and from afar, and that of steps between neighbours at several scales."""
    total = error.abs().mean(dim=(1, 2, 3))
    for _ in range(EDGE_SCALES):
        for axis in (2, 3):
            total = total + EDGE_WEIGHT * error.diff(dim=axis).abs().mean(dim=(1, 2, 3))
        error = torch.nn.functional.avg_pool2d(error, 2)
    return total + colour_weight * error.abs().mean(dim=(1, 2, 3))


class _Rebuilder(torch.nn.Module):
    """There and back again in one call."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Images, noise: Latents) -> tuple[Images, PerTile]:
        """The images from latents drawn with this noise, and how far these are from a normal distribution."""
        posterior = self.vae.encode(images).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.kl()


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What is asked of the VAE in each step."""

    network: _Rebuilder
    colour_weight: float
    device: torch.device

    def loss(self, batch: TileBatch, _: Int64[np.ndarray, " tile"], draws: Draws) -> PerTile:
        """How unlike each tile's crop is what comes back of it."""
        vae = self.network.vae
        images = to_tensor(crops(batch.pixels, draws.seeds), self.device) * 2 - 1
        shape = (vae.config.latent_channels, *(side_px // downsampling(vae) for side_px in images.shape[2:]))
        noise = torch.from_numpy(tile_noise(draws.seeds, shape)).to(self.device)
        rebuilt, divergence = self.network(images, noise)
        return unlikeness(rebuilt - images, self.colour_weight) + DIVERGENCE_WEIGHT * divergence

    def rebuild(self, batch: TileBatch) -> UInt8[np.ndarray, "tile y x rgb"]:
        """Whole tiles, with nothing drawn."""
        vae = self.network.vae
        images = decode(vae, encode(vae, to_tensor(batch.pixels, self.device) * 2 - 1))
        return to_pixels((images + 1) / 2).cpu().numpy()


def _new_vae(size: Size, *, seed: int) -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            **_SIZES[size],
            down_block_types=("DownEncoderBlock2D",) * _LEVELS,
            up_block_types=("UpDecoderBlock2D",) * _LEVELS,
            layers_per_block=1,
            norm_num_groups=_GROUPS,
            latent_channels=4,
            scaling_factor=1.0,
        )


def _save(vae: AutoencoderKL, tiles: TileSource, device: torch.device, folder: Path) -> None:
    """Write the VAE; its scaling factor gives latents of tiles a deviation of 1, as the noise schedule expects."""
    some = np.unique(np.linspace(0, len(tiles) - 1, _MEASURED_TILES).round().astype(np.int64))
    means = posterior_moments(vae, tiles.read(some).pixels, device)[:, 0]
    vae.register_to_config(scaling_factor=float(1 / means.std(dtype=np.float64)))
    with quiet_libraries():
        vae.save_pretrained(folder)


def _crop(tile: UInt8[np.ndarray, "y x rgb"], side_px: int, seed: int) -> UInt8[np.ndarray, "y_crop x_crop rgb"]:
    generator = np.random.default_rng(seed)
    x, y = generator.integers(0, tile.shape[1] - side_px + 1, 2)
    turns, mirrored = generator.integers(0, (4, 2))
    crop = np.rot90(tile[y : y + side_px, x : x + side_px], turns)
    return crop[:, ::-1] if mirrored else crop


_LEVELS = 4
_GROUPS = 8
_MEASURED_TILES = 64
_SIZES: dict[Size, dict[str, Any]] = {
    "small": {"block_out_channels": (16, 24, 48, 96), "sample_size": 256},
    "tiny": {"block_out_channels": (8,) * _LEVELS, "sample_size": 64},
}
