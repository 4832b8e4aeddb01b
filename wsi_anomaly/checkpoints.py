"""Weights that others saved: read without running what the file carries, filled in strictly. Knows no architecture."""

import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from wsi_anomaly.errors import ModelError

Weights = dict[str, torch.Tensor]

NAMED = 3
"""How many tensors of a kind an error names before it only counts them."""


def read_state_dict(path: Path) -> Weights:
    """The tensors of a safetensors file or of a PyTorch pickle by name, on the CPU.

    A state dict below the key `state_dict` is found, and the prefix `module.` of parallel training is dropped. Tensors
    may be views of the file: copy them before the file may change.

    Raises:
        ModelError: the file is missing, damaged, carries code, or is no state dict.
    """
    content = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(_is_weight(*item) for item in content.items()):
        raise ModelError(
            f"{path}: is no state dict, which is a table of tensors by name, but {_described(content)}. "
            "Give the file that holds the model's weights."
        )
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in content.items()}


def fill(network: nn.Module, weights: Weights, *, path: Path, ignored: Sequence[str] = (), remedy: str) -> None:
    """Give a network, which may be on the meta device, copies of the weights in its own types.

    `ignored` are the beginnings of names that the network has no use for; every other name and shape must fit.

    Raises:
        ModelError: says which tensors are missing, unexpected, of another shape or no floats, and the `remedy`.
    """
    wanted = network.state_dict()
    found = {name: tensor for name, tensor in weights.items() if name in wanted or not name.startswith(tuple(ignored))}
    faults = [
        _some("missing", [name for name in wanted if name not in found]),
        _some("unexpected", [name for name in found if name not in wanted]),
        _some(
            "of another shape",
            [
                f"{name} is {list(found[name].shape)}, not {list(tensor.shape)}"
                for name, tensor in wanted.items()
                if name in found and found[name].shape != tensor.shape
            ],
        ),
        _some(
            "of another dtype",
            [
                f"{name} is {found[name].dtype}"
                for name, tensor in wanted.items()
                if name in found and tensor.is_floating_point() and not found[name].is_floating_point()
            ],
        ),
    ]
    if any(faults):
        raise ModelError(
            f"{path}: the weights are of another architecture: {'; '.join(filter(None, faults))}. {remedy}"
        )
    network.load_state_dict({name: found[name].to(wanted[name].dtype, copy=True) for name in wanted}, assign=True)


def _is_safetensors(path: Path) -> bool:
    """By name, or because a JSON table begins after eight bytes of length: files get renamed."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: the weights are missing. Check the path, or copy the file there.") from error
    except OSError as error:
        raise ModelError(f"{path}: the weights cannot be read ({error.strerror}). Give a readable file.") from error
    return path.suffix == ".safetensors" or head[8:] == b"{"


def _read_safetensors(path: Path) -> Weights:
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_pickle(path: Path) -> Any:  # noqa: ANN401 - a pickle may hold anything
    with path.open("rb") as file:
        head = file.read(len(_ZIP))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of odd files, and then refuses them
            return torch.load(path, map_location="cpu", weights_only=True, mmap=head == _ZIP)
    except Exception as error:  # what PyTorch raises for a damaged file is anything from KeyError to EOFError
        if (isinstance(error, pickle.UnpicklingError) and head.startswith((_ZIP, _PICKLE))) or "Script" in str(error):
            raise ModelError(
                f"{path}: carries {_code(error)}, and is not loaded because loading would run it. Get the weights as "
                "safetensors, or, where you trust the file, convert it: load it in Python with torch.load(..., "
                "weights_only=False) and write its state dict with safetensors.torch.save_file."
            ) from error
        raise _damaged(path, error) from error


def _code(error: Exception) -> str:
    name = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"code ({name[1]})" if name else "more than tensors"


def _damaged(path: Path, error: Exception) -> ModelError:
    reason = str(error).splitlines()[0] if str(error) else "it ends too early"
    return ModelError(
        f"{path}: is damaged, or no file of weights ({type(error).__name__}: {reason}). "
        "Compare its size with the original's and fetch it again."
    )


def _is_weight(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, torch.Tensor)


def _described(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    others = [f"{name!r}: {type(value).__name__}" for name, value in content.items() if not _is_weight(name, value)]
    return f"a table with {_some('other entries', others)}" if others else "an empty table"


def _some(kind: str, names: list[str]) -> str:
    """How many and the first few, or nothing."""
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} {kind} ({', '.join(names[:NAMED])}{more})" if names else ""


_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
