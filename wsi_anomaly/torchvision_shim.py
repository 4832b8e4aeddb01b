"""Let torchvision be imported beside a PyTorch that its compiled operators do not fit. Imports torch when called only.

The torchvision of the package index is compiled for CUDA. Beside a PyTorch for CPUs its operators cannot be loaded, its
import fails, and with it that of transformers, diffusers, timm and open_clip, which see that it is installed. They use
its picture transforms, which need no compiled operator. All that is missing are the names of two operators to which
torchvision adds facts while it is imported.
"""

from contextlib import suppress
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder
from importlib.util import find_spec

OPERATORS = ("nms", "qnms")


def make_importable() -> None:
    """Declare the operators that torchvision cannot load itself; where it can, or is not installed, change nothing.

    To be called before anyone imports torchvision. Using a declared operator raises torchvision's own error.
    """
    spec = find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return

    import torch

    if operators := _compiled_operators(spec.submodule_search_locations[0]):
        # Before anything is declared: the real operators cannot be loaded where their names are taken.
        with suppress(OSError):
            torch.ops.load_library(operators)  # type: ignore[no-untyped-call]
    for operator in OPERATORS:
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )


def _compiled_operators(folder: str) -> str | None:
    """The file that torchvision will try to load, whatever it is called on this platform."""
    library = FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES)).find_spec("_C")
    return library.origin if library else None
