"""A pixel-space diffusion model that others trained: found or fetched, of the right family, loaded. Trains nothing."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import UNet2DModel

from wsi_anomaly.detectors.diffusion.backbone import quiet_libraries
from wsi_anomaly.detectors.diffusion.base_files import read_table
from wsi_anomaly.detectors.diffusion.pixel import PixelModel
from wsi_anomaly.errors import ModelError
from wsi_anomaly.hub import hub_parts
from wsi_anomaly.shipped import local_place

INDEX = "model_index.json"
LAYOUTS = (("unet", "scheduler"), (".", "."))
"""Folders of network and scheduler: as diffusers saves a pipeline, and flat as the repositories of google/ddpm-*."""
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""In order of preference: no pickle where it can be helped."""


def load_pixel_base(base: str, *, offline: bool) -> tuple[PixelModel, str]:
    """A DDPM and a sha256 of the files that decide what it is; with `offline` nothing is asked of the network.

    `base` is a folder of diffusers or, where there is none of that name, a repository of the hub.

    Raises:
        ModelError: the base is of another family, incomplete, damaged, gated, or cannot be had.
    """
    folder = local_place(base)
    if folder.is_file():
        raise ModelError(f"{base}: is a single file, not a folder as diffusers saves a DDPM. {_NEEDED}")
    if not folder.is_dir():
        folder = _fetched(base, offline=offline)
    config, schedule, weights = _complete(folder, base)
    digest = hashlib.sha256()
    for path in (config, schedule, weights):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return PixelModel(_loaded(weights), read_table(schedule)), digest.hexdigest()


def _fetched(repository: str, *, offline: bool) -> Path:
    licence = f"the licence shown at https://huggingface.co/{repository}"
    tables = [_files("config.json", 0), _files("scheduler_config.json", 1)]
    # What tells the family is small: other models are refused before gigabytes have come.
    told = hub_parts(
        repository,
        [(INDEX, *tables[0])],
        beside=(INDEX, *(name for choice in tables for name in choice)),
        licence=licence,
        offline=offline,
    )
    _refuse_strangers(told, repository)
    weights = tuple(name for kind in WEIGHTS for name in _files(kind, 0))
    return hub_parts(repository, [*tables, weights], licence=licence, offline=offline)


def _complete(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """Configuration, schedule and weights."""
    _refuse_strangers(folder, name)
    config = _first(folder, _files("config.json", 0))
    schedule = _first(folder, _files("scheduler_config.json", 1))
    weights = _first(config.parent, WEIGHTS) if config else None
    if not config or not schedule or not weights:
        parts = {
            "config.json of a UNet2DModel": config,
            "scheduler_config.json": schedule,
            " or ".join(WEIGHTS): weights,
        }
        lacking = [part for part, path in parts.items() if not path]
        raise ModelError(
            f"{folder}: the base model lacks {'; '.join(lacking)}. Copy all of the model's folder, with large files as "
            f"they are and not as pointers of git-lfs. {_NEEDED}"
        )
    return config, schedule, weights


def _refuse_strangers(folder: Path, name: str) -> None:
    """Without opening weights; files that are missing say nothing."""
    index, unet, schedule = (
        read_table(path) if (path := _first(folder, names)) else {}
        for names in ((INDEX,), _files("config.json", 0), _files("scheduler_config.json", 1))
    )
    if fault := _other_pipeline(index) or _other_network(unet) or _other_schedule(schedule):
        raise ModelError(f"{name}: {fault}. {_NEEDED}")


def _other_pipeline(index: Mapping[str, Any]) -> str | None:
    pipeline = index.get("_class_name", "pipeline without a name")
    for part, meaning in _STRANGE_PARTS.items():
        if part in index:
            return f"is a {pipeline}, {meaning}"
    return None


def _other_network(config: Mapping[str, Any]) -> str | None:
    if config and "_class_name" not in config:
        return "its config.json is not that of a network of diffusers"
    kind = config.get("_class_name", UNet2DModel.__name__)
    if kind != UNet2DModel.__name__:
        return f"its network is a {kind}, not a {UNet2DModel.__name__}"
    if config.get("time_embedding_type", "positional") == "fourier":
        return "is a score model of continuous noise levels, not of timesteps"
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        return "its network wants to be told the class of an image"
    return next(
        (
            f"its network has {key} {config[key]}, not 3 for red, green and blue"
            for key in ("in_channels", "out_channels")
            if config.get(key, _RGB) != _RGB
        ),
        None,
    )


def _other_schedule(config: Mapping[str, Any]) -> str | None:
    if config and "beta_schedule" not in config and not config.get("trained_betas"):
        return f"its noise levels are those of a {config.get('_class_name', 'scheduler without a name')}, not betas"
    if (prediction := config.get("prediction_type", "epsilon")) not in _PREDICTIONS:
        return f"its scheduler has prediction_type {prediction!r}, not one of {_PREDICTIONS}"
    return None


def _loaded(weights: Path) -> UNet2DModel:
    load = cast(Callable[..., tuple[UNet2DModel, dict[str, Any]]], UNet2DModel.from_pretrained)
    try:
        # Layers draw from the caller's random state, for nothing.
        with quiet_libraries(), torch.random.fork_rng(devices=[]):
            unet, report = load(
                weights.parent,
                use_safetensors=weights.suffix == ".safetensors",  # pickles are loaded with weights_only
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ModelError(
            f"{weights}: cannot be loaded ({type(error).__name__}: {reason}). It is damaged or belongs to another "
            "model: compare its size with the original's, and copy or fetch it again."
        ) from error
    faults = [
        f"{len(names)} {fault.replace('_', ' ')}, such as {min(names)}" for fault, names in report.items() if names
    ]
    if faults:
        raise ModelError(
            f"{weights}: the weights do not fit the config.json beside them ({'; '.join(faults)}). "
            "Use the files of one model, all of them."
        )
    return unet.eval()


def _files(name: str, part: int) -> tuple[str, ...]:
    """Where a file of the network (part 0) or of the scheduler (part 1) may be."""
    return tuple((Path(layout[part]) / name).as_posix() for layout in LAYOUTS)


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


_RGB = 3
_PREDICTIONS = ("epsilon", "v_prediction")
_STRANGE_PARTS = {
    "transformer": "a diffusion transformer",
    "vae": "which works on the latents of a VAE",
    "vqvae": "which works on the latents of a VAE",
    "movq": "which works on the latents of a VAE",
    "prior": "which makes embeddings, not images",
    "text_encoder": "which is steered by texts",
}
_NEEDED = (
    "Needed is a DDPM that works on RGB pixels: a UNet2DModel with its scheduler, such as google/ddpm-celebahq-256, or "
    "a model trained from one."
)
