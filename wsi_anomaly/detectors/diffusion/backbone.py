"""The parts of a Stable Diffusion base, loaded from files on this machine and frozen. Samples and trains nothing."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from jaxtyping import Float
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from wsi_anomaly.detectors.diffusion.base_files import SCHEDULE, BaseFiles, base_files, read_table, require_floats
from wsi_anomaly.errors import ModelError, OptionsError

Images = Float[torch.Tensor, "tile rgb y x"]
Latents = Float[torch.Tensor, "tile latent y_latent x_latent"]

Part = TypeVar("Part", UNet2DConditionModel, AutoencoderKL, CLIPTextModel)

CHUNK_TILES = 16
"""How many tiles go through the VAE at once, at most: of 256 px they take up to 3 GB in float32."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """The parts of an SD 1.x/2.x base, and what its files say of its noise schedule."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule_config: Mapping[str, Any]

    @property
    def latent_scale(self) -> float:
        """What latents are multiplied by, so that the UNet sees them with a deviation near one."""
        return float(self.vae.config.scaling_factor)

    @property
    def downsampling(self) -> int:
        """How many pixels along a side go into one latent."""
        return downsampling(self.vae)

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: "epsilon" or "v_prediction"."""
        return str(self.schedule_config.get("prediction_type", "epsilon"))


def load_backbone(base: str, *, offline: bool) -> Backbone:
    """The parts of a base on the CPU, in float32, frozen; with `offline` nothing is asked of the network.

    `base` is a folder of diffusers or, where there is none of that name, a repository of the hub.

    Raises:
        ModelError: the base is of another family, incomplete, damaged, gated, or cannot be had.
    """
    files = base_files(base, offline=offline)
    _refuse_strangers(files)
    require_floats(files)
    with (
        quiet_libraries(),
        torch.random.fork_rng(devices=[]),
    ):  # layers draw from the caller's random state, for nothing
        return Backbone(
            _network(UNet2DConditionModel, files, "unet"),
            _network(AutoencoderKL, files, "vae"),
            _network(CLIPTextModel, files, "text_encoder"),
            _tokenizer(files),
            read_table(files.folder / SCHEDULE),
        )


def digest(base: str, *, offline: bool) -> str:
    """A sha256 of all that decides a result: weights, configs, tokenizer. Not of where they lie.

    Raises:
        ModelError: as for `load_backbone`, of which only the loading is left out.
    """
    return base_files(base, offline=offline).digest()


def write_backbone(backbone: Backbone, folder: Path) -> None:
    """Write the parts as a complete folder of diffusers."""
    pipeline = StableDiffusionPipeline(
        vae=backbone.vae,
        text_encoder=backbone.text_encoder,
        tokenizer=backbone.tokenizer,
        unet=backbone.unet,
        scheduler=PNDMScheduler.from_config(dict(backbone.schedule_config)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with quiet_libraries():
        pipeline.save_pretrained(folder)
    for path in folder.glob("*/config.json"):  # where the parts came from is nobody's business, and not what they are
        table = json.loads(path.read_text(encoding="utf-8"))
        if table.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def encode(vae: AutoencoderKL, pixels: Images) -> Latents:
    """Scaled latents of tiles with intensities in [-1, 1]: the mode of the posterior, so that nothing is random.

    Computed in the type of the VAE, a slice of the tiles at a time. Rounding may depend on how many there are.

    Raises:
        OptionsError: width or height is no multiple of the VAE's downsampling.
    """
    height_px, width_px = pixels.shape[2:]
    step_px = downsampling(vae)
    if height_px % step_px or width_px % step_px:
        raise OptionsError(
            f"tiles are {width_px} x {height_px} px: the base model needs a multiple of {step_px} px. "
            "Change tile_px under [tiles] of the pipeline file."
        )
    return _in_slices(
        lambda part: vae.encode(part.to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor, pixels
    )


def decode(vae: AutoencoderKL, latents: Latents) -> Images:
    """Tiles with intensities about [-1, 1], not clipped, from scaled latents; a slice of them at a time."""
    return _in_slices(lambda part: vae.decode((part / vae.config.scaling_factor).to(vae.dtype)).sample, latents)


def downsampling(vae: AutoencoderKL) -> int:
    """How many pixels along a side go into one latent of this VAE."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, diffusers and transformers print no progress and no advice: we check what they load, and raise errors."""
    levels = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for library, _ in levels:
        library.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _in_slices(function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([function(part) for part in torch.split(values, CHUNK_TILES)])


def _refuse_strangers(files: BaseFiles) -> None:
    unet, text_encoder = (read_table(files.folder / part / "config.json") for part in ("unet", "text_encoder"))
    wanted, found = unet.get("cross_attention_dim"), text_encoder.get("hidden_size")
    if wanted and found and wanted != found:
        raise ModelError(
            f"{files.folder}: the parts are of different models: the UNet takes texts as vectors of {wanted}, the text "
            f"encoder makes vectors of {found}. Use the parts of one model."
        )


def _network(kind: type[Part], files: BaseFiles, part: str) -> Part:
    path, load = files.weights[part], cast(Callable[..., tuple[Part, dict[str, Any]]], kind.from_pretrained)
    try:
        network, report = load(
            files.folder / part,
            variant="fp16" if ".fp16." in path.name else None,
            use_safetensors=path.suffix == ".safetensors",  # pickles are loaded with weights_only by both libraries
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise _unusable(path, error) from error
    faults = [
        f"{len(names)} {fault.replace('_', ' ')}, such as {min(names)}" for fault, names in report.items() if names
    ]
    if faults:
        raise ModelError(
            f"{path}: the weights do not fit the config.json beside them ({'; '.join(faults)}). "
            "Use the files of one model, all of them."
        )
    network.requires_grad_(requires_grad=False)
    network.train(mode=False)
    return network


def _tokenizer(files: BaseFiles) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_pretrained(files.folder / "tokenizer", local_files_only=True)
    except Exception as error:
        raise _unusable(files.folder / "tokenizer", error) from error


def _unusable(path: object, error: Exception) -> ModelError:
    reason = next(iter(str(error).splitlines()), "")
    return ModelError(
        f"{path}: cannot be loaded ({type(error).__name__}: {reason}). It is damaged or belongs to another model: "
        "compare its size with the original's, and copy or fetch it again."
    )
