"""What a fit leaves: weights that say what they belong to. Whole or not at all; knows no training and no tiles."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from wsi_anomaly.errors import ModelError

WEIGHTS = "weights.safetensors"
FORMAT_VERSION = 1

Weights = dict[str, torch.Tensor]


def save_weights(network: torch.nn.Module, folder: Path, architecture: Mapping[str, Any]) -> None:
    """Write the weights, labelled with their format and architecture."""
    label = json.dumps({"format_version": FORMAT_VERSION, "architecture": architecture}, sort_keys=True)
    # One key only: safetensors writes several in no fixed order, and equal weights should be equal files.
    content = save({name: tensor.contiguous() for name, tensor in copy_of(network).items()}, {"wsi_anomaly": label})
    write_whole(folder / WEIGHTS, lambda file: file.write(content))


def load_weights(network: torch.nn.Module, folder: Path, architecture: Mapping[str, Any]) -> None:
    """Fill the network with the weights that a fit left in `folder`.

    Raises:
        ModelError: they are missing, damaged, of another format or of another architecture.
    """
    path = folder / WEIGHTS
    label, weights = _read_weights(path)
    version, found = label.get("format_version"), label.get("architecture")
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path}: its format version is {version}, this version of wsi-anomaly reads {FORMAT_VERSION}. "
            "Use the version that made the model, or fit it again."
        )
    wanted = json.loads(json.dumps(architecture))
    faults = _differences(found if isinstance(found, dict) else {}, wanted)
    if not faults:
        faults = _differences(_shapes(weights), _shapes(network.state_dict()))
    if faults:
        raise ModelError(
            f"{path}: the weights do not fit the detector's options: {'; '.join(faults)}. "
            "Use the options that the model was fitted with, or fit it again."
        )
    network.load_state_dict(weights)


def copy_of(network: torch.nn.Module) -> Weights:
    """The weights as they are now."""
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def write_digest(path: Path, digest: str) -> None:
    """Note which weights of others, not part of what a fit leaves, its own belong to."""
    write_whole(path, lambda file: file.write(f"{json.dumps({'digest': digest})}\n".encode()))


def read_digest(path: Path) -> str:
    """What `write_digest` noted.

    Raises:
        ModelError: the note is missing or damaged.
    """
    try:
        return str(json.loads(path.read_bytes())["digest"])
    except FileNotFoundError as error:
        raise ModelError(f"{path}: is missing: the fit was not finished, or not all of the model copied.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: is damaged ({error}). Copy the model again, or fit it anew.") from error


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Put a whole file in place, or none."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read_weights(path: Path) -> tuple[dict[str, Any], Weights]:
    try:
        with safe_open(path, framework="pt") as file:
            label = dict(json.loads((file.metadata() or {}).get("wsi_anomaly", "{}")))
            return label, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: the weights are missing. If the fit was interrupted, run it again: it goes on where it was. "
            "If the model was copied, copy all of it."
        ) from error
    except (SafetensorError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: the weights are damaged ({error}). Copy the model anew, or fit it again.") from error


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: list(tensor.shape) for name, tensor in weights.items()}


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    return [f"{key} is {found.get(key, 'missing')}, not {wanted.get(key, 'expected')}" for key in keys]
