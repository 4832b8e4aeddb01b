"""Where tensors live: choose a device, take pixels there and back, apply a network. Knows no architecture."""

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from jaxtyping import Float32, Shaped, UInt8

from wsi_anomaly.errors import OptionsError

CHUNK_TILES = 8
"""How many tiles a network sees at once when scoring, always."""


def resolve_device(name: str) -> torch.device:
    """The device called "cpu", "cuda" or "auto" (CUDA where there is one).

    Raises:
        OptionsError: the name is another one, or CUDA is asked for where there is none.
    """
    if name not in {"cpu", "cuda", "auto"}:
        raise OptionsError(f"device '{name}' is not known. Give 'cpu', 'cuda' or 'auto'.")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise OptionsError(
            f"device 'cuda': PyTorch {torch.__version__} finds no CUDA device here. Give 'cpu' or 'auto', "
            "or install a PyTorch that was built for this machine's driver."
        )
    if available and name != "cpu":
        return torch.device("cuda")
    _keep_freed_memory()
    return torch.device("cpu")


@contextmanager
def reproducible() -> Iterator[None]:
    """Inside, cuDNN computes the same bits every time, and in full float32 so that CPU and GPU agree closely."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def to_tensor(pixels: UInt8[np.ndarray, "tile y x rgb"], device: torch.device) -> Float32[torch.Tensor, "tile rgb y x"]:
    """Intensities in [0, 1], in channels_last memory format: it is what convolutions are fastest on."""
    return intensities(torch.tensor(pixels, device=device))


def to_pixels(images: Float32[torch.Tensor, "tile rgb y x"]) -> UInt8[torch.Tensor, "tile y x rgb"]:
    """Intensities in [0, 1] as pixels; what lies outside is clipped."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def apply_in_chunks(
    function: Callable[[Float32[torch.Tensor, "chunk rgb y x"]], torch.Tensor],
    pixels: UInt8[np.ndarray, "tile y x rgb"],
    device: torch.device,
) -> Shaped[np.ndarray, "tile ..."]:
    """The function's value for the intensities of each tile, whatever other tiles come with it."""
    return in_fixed_chunks(lambda chunk: function(intensities(chunk)), pixels, device)


def in_fixed_chunks(
    function: Callable[[Shaped[torch.Tensor, "chunk ..."]], torch.Tensor],
    values: Shaped[np.ndarray, "tile ..."],
    device: torch.device,
    *,
    size: int = CHUNK_TILES,
) -> Shaped[np.ndarray, "tile ..."]:
    """The function's value for each tile, without gradients, whatever other tiles come with it.

    Kernels are chosen by the shape of their input, and another kernel rounds otherwise. So the function always sees
    `size` tiles, zeros where there are too few.
    """
    parts = []
    with torch.inference_mode(), reproducible():
        for start in range(0, max(len(values), 1), size):  # no tiles: one chunk still tells shape and dtype
            part = values[start : start + size]
            chunk = np.zeros((size, *values.shape[1:]), values.dtype)
            chunk[: len(part)] = part
            parts.append(function(torch.from_numpy(chunk).to(device))[: len(part)].cpu().numpy())
    return np.concatenate(parts)


def intensities(pixels: UInt8[torch.Tensor, "tile y x rgb"]) -> Float32[torch.Tensor, "tile rgb y x"]:
    """Pixels as intensities in [0, 1], colours first."""
    return pixels.permute(0, 3, 1, 2).float() / 255


@cache
def _keep_freed_memory() -> None:
    """Have the C library keep what tensors leave for the next ones, up to a gibibyte.

    Else it gives back and asks anew for every larger tensor, and the system zeroes each page again: a sixth of the time
    of a slide, and half of that of likelihood regret.
    """
    if platform.libc_ver()[0] == "glibc":
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, _KEPT_BYTES)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""As `malloc.h` numbers them."""
_KEPT_BYTES = 2**30
