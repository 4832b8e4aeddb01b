"""EfficientAD of the library anomalib without the network: teacher and pictures come from places on disk.

Batzner, Heckler and König, "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies" (WACV
2024). A student learns to see normal tiles as a teacher does; pictures of other things keep it from doing so elsewhere.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from wsi_anomaly.checkpoints import fill, read_state_dict
from wsi_anomaly.detectors import anomalib_library
from wsi_anomaly.errors import OptionsError

SMALLEST_PX = 256
"""The last layer of its encoder sees eight places of 32 px."""


def prepare(module: Any, teacher_weights: str, *, image_px: int) -> None:  # noqa: ANN401 - the library's
    """Give the library's module what it would fetch when training starts; without weights, the teacher is random.

    Raises:
        OptionsError: tiles are too small for it, or there is no folder of pictures.
        ModelError: the weights are missing, damaged or of another network.
    """
    if image_px < SMALLEST_PX:
        raise OptionsError(
            f"[detector] image_px is {image_px}: efficient_ad sees tiles of {SMALLEST_PX} px or more. Raise it."
        )
    _require_pictures(module.imagenet_dir)
    if teacher_weights:
        path = Path(teacher_weights)
        remedy = (
            "Give pretrained_teacher_small.pth or, for model_size medium, pretrained_teacher_medium.pth of anomalib."
        )
        fill(module.model.teacher, read_state_dict(path), path=path, remedy=remedy)
    module.prepare_pretrained_model = lambda: None


def train(
    module: Any,  # noqa: ANN401 - the library's
    pixels: UInt8[np.ndarray, "tile y x rgb"],
    device: torch.device,
    *,
    epochs: int,
) -> None:
    """Fit the prepared module, one tile at a time; every tenth tile is held out to learn how far normal ones differ.

    Raises:
        OptionsError: one of the pictures cannot be read.
    """
    held_out = np.arange(len(pixels)) % _HELD_OUT_EACH == 0
    try:
        anomalib_library.train(
            module, pixels[~held_out], device, epochs=epochs, batch_size=1, held_out=pixels[held_out]
        )
    except OSError as error:
        raise OptionsError(
            f"{module.imagenet_dir}: one of the pictures cannot be read ({error}). Remove it or copy it again."
        ) from error


def _require_pictures(folder: Path) -> None:
    try:
        anomalib_library.library("torchvision.datasets").ImageFolder(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise OptionsError(
            f"{folder}: holds no folders of pictures. EfficientAD needs pictures of anything but tissue, such as "
            "ImageNette, a folder for each kind, and fetches none: give theirs as imagenet_dir under "
            "[detector.parameters] of the pipeline file."
        ) from error


_HELD_OUT_EACH = 10
