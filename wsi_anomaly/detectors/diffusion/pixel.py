"""A diffusion network that works on the pixels themselves, as `Restorer` wants it: a UNet2DModel. Knows no files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from diffusers import UNet2DModel
from jaxtyping import Float, Float32, Int64, UInt8
from pydantic import Field, PositiveInt, field_validator

from wsi_anomaly.detectors.diffusion.backbone import quiet_libraries
from wsi_anomaly.detectors.diffusion.learner import Precision
from wsi_anomaly.detectors.diffusion.schedule import BetaKind, NoiseSchedule
from wsi_anomaly.detectors.protocol import Prompt
from wsi_anomaly.devices import intensities
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.options import Options

Pixels = Float32[torch.Tensor, "tile rgb y x"]
"""With intensities in [-1, 1], or noised."""


class NetworkSizes(Options):
    """The sizes of a network from scratch; the defaults are those of Wyatt et al. for 256 px, 127 million weights."""

    channels: tuple[PositiveInt, ...] = Field((128, 128, 256, 256, 512, 512), min_length=1)
    """Width of each level. Between two levels, width and height of the tile are halved."""
    layers_per_level: PositiveInt = 2
    attention_levels: tuple[int, ...] = (4, 5)
    """Levels that look at the whole tile, counted from 0; 4 and 5 are 16 and 8 px wide where the tile is 256 px."""
    head_channels: PositiveInt = 256
    """Channels of one head of attention."""
    norm_groups: PositiveInt = 32
    """Groups of channels that are normalised together."""

    @field_validator("attention_levels")
    @classmethod
    def _are_levels(cls, value: tuple[int, ...], info: Any) -> tuple[int, ...]:  # noqa: ANN401 - a ValidationInfo
        channels = info.data.get("channels", ())
        if channels and not set(value) <= set(range(len(channels))):
            raise ValueError(f"there are levels 0 to {len(channels) - 1}")
        return value

    @field_validator("head_channels")
    @classmethod
    def _makes_heads(cls, value: int, info: Any) -> int:  # noqa: ANN401 - a ValidationInfo
        channels, levels = info.data.get("channels", ()), info.data.get("attention_levels", ())
        # Attention is always in the middle too, which is as wide as the last level.
        widths = [channels[level] for level in (*levels, -1)] if channels else []
        if misfits := [width for width in widths if width % value]:
            where = "a level with attention" if set(misfits) - {widths[-1]} else "the middle, where attention always is"
            raise ValueError(f"does not divide the {misfits[0]} channels of {where}; {gcd(*widths)} divides all")
        return value

    @field_validator("norm_groups")
    @classmethod
    def _makes_groups(cls, value: int, info: Any) -> int:  # noqa: ANN401 - a ValidationInfo
        if misfits := [width for width in info.data.get("channels", ()) if width % value]:
            raise ValueError(f"does not divide the {misfits[0]} channels of a level")
        return value


class ScheduleOptions(Options):
    """The noise schedule of a network from scratch, of 1000 timesteps; the defaults are those of Ho et al."""

    kind: BetaKind = "linear"
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)


@dataclass(frozen=True, slots=True)
class PixelModel:
    """A network on the CPU, in float32, and what it was or will be trained with."""

    unet: UNet2DModel
    schedule_config: Mapping[str, Any]
    """As in the scheduler configuration of diffusers."""

    @property
    def description(self) -> dict[str, Any]:
        """All that `described_model` needs, as JSON values."""
        tables = {"unet": self.unet.config, "schedule": self.schedule_config}
        # Underscores begin what diffusers notes of its version and of the place a model came from.
        kept = {name: {k: v for k, v in table.items() if k[0] != "_"} for name, table in tables.items()}
        return json.loads(json.dumps(kept))


def model_from_scratch(sizes: NetworkSizes, schedule: ScheduleOptions, *, seed: int) -> PixelModel:
    """An untrained network whose first weights depend on the seed alone.

    That of Wyatt et al., "AnoDDPM" (CVPR workshops 2022), as a UNet2DModel has it: residual blocks halve and double
    the size, as in BigGAN.
    """
    levels = range(len(sizes.channels))
    attention = ["Attn" if level in sizes.attention_levels else "" for level in levels]
    unet = {
        "block_out_channels": list(sizes.channels),
        "layers_per_block": sizes.layers_per_level,
        "down_block_types": [f"{kind}DownBlock2D" for kind in attention],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(attention)],
        "attention_head_dim": sizes.head_channels,
        "norm_num_groups": sizes.norm_groups,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    }
    betas = {
        "beta_schedule": schedule.kind,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "num_train_timesteps": _TIMESTEPS,
        "prediction_type": "epsilon",
    }
    return described_model({"unet": unet, "schedule": betas}, where="the options of the network", seed=seed)


def described_model(description: Mapping[str, Any], *, where: str, seed: int = 0) -> PixelModel:
    """An untrained network of these sizes.

    Raises:
        ModelError: no such network can be made. `where` says where the description is from.
    """
    with quiet_libraries(), torch.random.fork_rng(devices=[]):  # layers draw from the caller's random state
        torch.default_generator.manual_seed(seed)
        try:
            unet = UNet2DModel.from_config(dict(description["unet"])).eval()
            return PixelModel(unet, dict(description["schedule"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{where}: describes no network ({type(error).__name__}: {error})") from error


class PixelDiffusion:
    """A network, put where it computes. Images are float32 whatever the network computes in."""

    passes = 1

    def __init__(
        self, model: PixelModel, device: torch.device, *, precision: Precision, where: str = "scheduler_config.json"
    ) -> None:
        dtype = _TYPES[precision] if device.type == "cuda" else torch.float32  # slower in anything else on a CPU
        self.schedule = NoiseSchedule.from_config(model.schedule_config, where=where)
        with quiet_libraries():
            self.unet = model.unet.to(device, dtype, memory_format=torch.channels_last)

    def encode(self, pixels: UInt8[torch.Tensor, "tile y x rgb"]) -> Pixels:
        """Intensities in [-1, 1].

        Raises:
            OptionsError: the network cannot halve and double tiles of this size back to their own size.
        """
        height_px, width_px = pixels.shape[1:3]
        step_px = 2 ** (len(self.unet.config.block_out_channels) - 1)
        if height_px % step_px or width_px % step_px:
            raise OptionsError(
                f"tiles are {width_px} x {height_px} px: the network needs a multiple of {step_px} px. "
                "Change tile_px under [tiles] of the pipeline file."
            )
        return intensities(pixels) * 2 - 1

    def decode(self, latents: Pixels) -> Pixels:
        """Intensities about [0, 1], not clipped."""
        return (latents + 1) / 2

    def condition(self, prompts: Sequence[Prompt]) -> None:
        """Nothing: the network knows no texts."""

    def noise(self, latents: Pixels, t: int, condition: None) -> Pixels:  # noqa: ARG002 - there is none
        """The noise that the network sees."""
        timesteps = torch.full((len(latents),), t, device=latents.device)
        return self.schedule.noise(self.output(latents, timesteps), latents, t)

    def output(self, latents: Pixels, timesteps: Int64[torch.Tensor, " tile"]) -> Float[torch.Tensor, "tile rgb y x"]:
        """What the network puts out, each tile being at a timestep of its own; see `NoiseSchedule.target`."""
        inputs = latents.to(self.unet.dtype, memory_format=torch.channels_last)
        output: torch.Tensor = self.unet(inputs, timesteps, return_dict=False)[0]
        return output


_TIMESTEPS = 1000
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
