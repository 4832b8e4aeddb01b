"""The LoRA adapter of a UNet: added to be trained, saved as diffusers reads it, loaded, fused. Trains nothing.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022): beside a frozen weight W stands a product
of two thin matrices, W + alpha / rank * up @ down, and only these are learnt.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from wsi_anomaly.detectors.diffusion.backbone import quiet_libraries
from wsi_anomaly.detectors.weights import Weights, write_whole
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.options import Options, nearest

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
FORMAT_VERSION = 1


class LoraOptions(Options):
    """How much the UNet can learn, and where."""

    rank: PositiveInt = 4
    alpha: PositiveFloat | None = None
    """What is learnt counts alpha / rank times; as large as the rank where it is not given."""
    targets: tuple[str, ...] = Field(("to_q", "to_k", "to_v", "to_out.0"), min_length=1)
    """Names of layers, or ends of their names: by default the four projections of every attention."""


def add_lora(unet: UNet2DConditionModel, options: LoraOptions, *, seed: int) -> list[nn.Parameter]:
    """Add an adapter that changes nothing yet, freeze all else, and return what is to be trained, in float32.

    The matrices that lead down are normal with deviation 1 / rank, drawn from `seed` alone; those up are zero.

    Raises:
        OptionsError: a target names no layer of the UNet, or one that cannot be adapted.
    """
    layers = [name for name, _ in unet.named_modules()]
    for target in options.targets:
        if not any(_is_target(name, target) for name in layers):
            ends = sorted({name.rpartition(".")[2] for name in layers} - {""})
            raise OptionsError(f"lora.targets: the UNet has no layer '{target}' ({nearest(target, ends)})")
    unet.requires_grad_(requires_grad=False)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha or options.rank,
        init_lora_weights="gaussian",
        target_modules=list(options.targets),
    )
    with torch.random.fork_rng(devices=[]):  # new layers are made on the CPU, whatever the UNet's device
        torch.default_generator.manual_seed(seed)
        try:
            unet.add_adapter(config, adapter_name=_ADAPTER)
        except ValueError as error:
            raise OptionsError(f"lora.targets: {_first_line(error)}") from error
    learnt = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in learnt:
        parameter.data = parameter.data.float()
    return learnt


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the adapter as `load_lora_weights` of diffusers reads it; equal weights give equal bytes."""
    config = unet.peft_config[_ADAPTER]
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name=_ADAPTER))
    weights = {f"{_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    label = {
        f"{_PREFIX}r": config.r,
        f"{_PREFIX}lora_alpha": config.lora_alpha,
        f"{_PREFIX}target_modules": sorted(config.target_modules),
        _VERSION: FORMAT_VERSION,
    }
    # Our version stands in the entry of diffusers, which reads what begins with the name of a network and leaves the
    # rest: safetensors writes several entries in no fixed order, and equal weights should be equal files.
    content = save(weights, {_LABEL: json.dumps(label, sort_keys=True)})
    write_whole(folder / LORA_WEIGHTS, lambda file: file.write(content))


def load_lora(unet: UNet2DConditionModel, folder: Path, *, fuse: bool) -> None:
    """Give a UNet in float32 the adapter in `folder`, frozen; fused, it becomes part of the weights and costs nothing.

    An adapter that diffusers saved is read too.

    Raises:
        ModelError: the adapter is missing, damaged, of a newer format version, or does not fit the UNet.
    """
    path = folder / LORA_WEIGHTS
    weights, label = _read(path)
    _refuse_newer(path, label)
    _refuse_misfit(path, weights, label, unet)
    config = {name: value for name, value in label.items() if name.startswith(_PREFIX)}
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        try:
            unet.load_lora_adapter(weights, prefix="unet", adapter_name=_ADAPTER, metadata=config or None)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: cannot be loaded ({_first_line(error)}). {_REMEDY}") from error
        if fuse:
            unet.fuse_lora()
            unet.unload_lora()
    unet.requires_grad_(requires_grad=False)


def _read(path: Path) -> tuple[Weights, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            label = dict(json.loads((file.metadata() or {}).get(_LABEL, "{}")))
            return {name: file.get_tensor(name) for name in file.keys()}, label  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: the adapter is missing. If the fit was interrupted, run it again. If the model was copied, copy "
            "all of it."
        ) from error
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: the adapter is damaged ({error}). Copy the model anew, or fit it again.") from error


def _refuse_newer(path: Path, label: Mapping[str, Any]) -> None:
    version = label.get(_VERSION, FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path}: its format version is {version}, this version of wsi-anomaly reads {FORMAT_VERSION}. "
            "Use the version that made the model, or fit it again."
        )


def _refuse_misfit(path: Path, weights: Weights, label: Mapping[str, Any], unet: UNet2DConditionModel) -> None:
    """By names and shapes, before anything is changed."""
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    misfits = [key for key in weights if not _fits(key, weights, layers)]
    if misfits or not weights:
        raise ModelError(f"{path}: {_some(misfits, len(weights))} not fit the UNet of the base model. {_REMEDY}")
    adapted = {match["layer"] for match in map(_KEY.fullmatch, weights) if match}
    targets = label.get(f"{_PREFIX}target_modules")
    if isinstance(targets, list):
        wanted = {name for name in layers if any(_is_target(name, str(target)) for target in targets)}
        if lacking := sorted(wanted - adapted):
            raise ModelError(
                f"{path}: lacks weights for {len(lacking)} of the {len(wanted)} layers it is to adapt "
                f"({', '.join(lacking[:_NAMED])}{', ...' if len(lacking) > _NAMED else ''}). {_REMEDY}"
            )


def _fits(key: str, weights: Weights, layers: Mapping[str, nn.Linear | nn.Conv2d]) -> bool:
    """Whether the matrix has its partner, and the product of both the shape of the layer's weight."""
    match = _KEY.fullmatch(key)
    if not match or match["layer"] not in layers:
        return False
    start = f"{_PREFIX}{match['layer']}."
    down, up = (weights.get(f"{start}{side}.weight") for side in _SIDES[match["side"]])
    if down is None or up is None:
        return False
    shape = layers[match["layer"]].weight.shape
    return (
        down.ndim == up.ndim == len(shape)
        and down.shape[1:] == shape[1:]
        and up.shape[0] == shape[0]
        and up.shape[1] == down.shape[0]
    )


def _is_target(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _some(keys: list[str], total: int) -> str:
    if not total:
        return "holds no weights, so it does"
    more = ", ..." if len(keys) > _NAMED else ""
    return f"{len(keys)} of its {total} keys ({', '.join(keys[:_NAMED])}{more}) do"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


_ADAPTER = "default"
_PREFIX = "unet."
_LABEL = "lora_adapter_metadata"
_VERSION = "wsi_anomaly.format_version"
_NAMED = 3
_KEY = re.compile(r"unet\.(?P<layer>.+)\.(?P<side>lora\.down|lora\.up|lora_A|lora_B)\.weight")
_SIDES = {
    "lora.down": ("lora.down", "lora.up"),
    "lora.up": ("lora.down", "lora.up"),
    "lora_A": ("lora_A", "lora_B"),
    "lora_B": ("lora_A", "lora_B"),
}
_REMEDY = "It was made for another base model, or is not whole: give the base it was trained on, or fit again."
