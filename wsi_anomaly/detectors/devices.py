"""Where tensors live: choose a device, take pixels there and back, apply a network. Knows no architecture."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    return torch.device("cuda" if available and name != "cpu" else "cpu")


@contextmanager
def reproducible() -> Iterator[None]:
    """Inside, cuDNN computes the same bits every time, and in full float32 so that CPU and GPU agree closely."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def to_tensor(pixels: UInt8[np.ndarray, "tile y x rgb"], device: torch.device) -> Float32[torch.Tensor, "tile rgb y x"]:
    """Intensities in [0, 1], in channels_last memory format: it is what convolutions are fastest on."""
    return torch.tensor(pixels, device=device).permute(0, 3, 1, 2).float() / 255


def to_pixels(images: Float32[torch.Tensor, "tile rgb y x"]) -> UInt8[torch.Tensor, "tile y x rgb"]:
    """Intensities in [0, 1] as pixels; what lies outside is clipped."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def apply_in_chunks(
    function: Callable[[Float32[torch.Tensor, "chunk rgb y x"]], torch.Tensor],
    pixels: UInt8[np.ndarray, "tile y x rgb"],
    device: torch.device,
) -> Shaped[np.ndarray, "tile ..."]:
    """The function's value for each tile, without gradients, whatever other tiles come with it.

    Kernels are chosen by the shape of their input, and another kernel rounds otherwise. So the function always sees
    `CHUNK_TILES` tiles, black ones where there are too few.
    """
    parts = []
    with torch.inference_mode(), reproducible():
        for start in range(0, max(len(pixels), 1), CHUNK_TILES):  # no tiles: one chunk still tells shape and dtype
            part = pixels[start : start + CHUNK_TILES]
            chunk = np.zeros((CHUNK_TILES, *pixels.shape[1:]), np.uint8)
            chunk[: len(part)] = part
            parts.append(function(to_tensor(chunk, device))[: len(part)].cpu().numpy())
    return np.concatenate(parts)
