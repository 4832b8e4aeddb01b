"""LPIPS: how far apart two images look to a network that knows photographs. Reads its weights, fetches none.

Zhang, Isola, Efros, Shechtman and Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
(CVPR 2018), equation 1, version 0.1 with VGG16.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Float32
from torch import nn

from wsi_anomaly.checkpoints import fill, read_state_dict
from wsi_anomaly.detectors.weights import read_digest, write_digest
from wsi_anomaly.errors import ModelError, OptionsError

NOTE = "lpips.json"
"""Beside a detector's weights: the digest of the LPIPS that its scores are of."""
LPIPS_SOURCES = (
    "LPIPS needs the weights of two files: those of VGG16 for ImageNet from torchvision (vgg16-397923af.pth, at "
    "https://download.pytorch.org/models/vgg16-397923af.pth) and the linear heads from the Python package lpips 0.1.4 "
    "(lpips/weights/v0.1/vgg.pth). Copy both into a folder of their own and give that folder, or one safetensors file "
    "that holds both."
)
"""What to tell a user who has no weights for the score `lpips`."""


class Lpips(nn.Module):
    """From images and their reconstructions, with intensities in [0, 1], to distances; 0 where they are equal.

    Weights have the names of the published files: `features.0.weight` to `features.28.bias`, and `lin0.model.1.weight`
    to `lin4.model.1.weight`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*_layers())
        for block, (width, _) in enumerate(_BLOCKS):
            self.add_module(f"lin{block}", _Head(width))

    @cached_property
    def digest(self) -> str:
        """A sha256 of all the numbers that decide a distance, however many files they came in. They stay as they are.

        Half-precision files of the same weights are others: their numbers are rounded.
        """
        told = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            told.update(f"{name}{list(tensor.shape)}".encode())
            told.update(tensor.cpu().contiguous().numpy().astype("<f4").tobytes())
        return told.hexdigest()

    def forward(
        self, images: Float32[torch.Tensor, "tile rgb y x"], rebuilt: Float32[torch.Tensor, "tile rgb y x"]
    ) -> Float32[torch.Tensor, " tile"]:
        """The distance of each tile: the squared differences of unit feature vectors, weighted, averaged over places.

        Raises:
            OptionsError: the tiles are smaller than 16 px.
        """
        height_px, width_px = images.shape[2:]
        if min(height_px, width_px) < _SMALLEST_PX:
            raise OptionsError(
                f"tiles are {width_px} x {height_px} px: the score lpips needs at least {_SMALLEST_PX} px. "
                "Choose another score, or a larger tile_px under [tiles] of the pipeline file."
            )
        first, second = _standardized(images), _standardized(rebuilt)
        distances = torch.zeros_like(first[:, 0, 0, 0])
        for block, layers in enumerate(_blocks(self.features)):
            first, second = layers(first), layers(second)
            head = self.get_submodule(f"lin{block}")
            distances = distances + head((_unit(first) - _unit(second)).square()).mean(dim=(1, 2, 3))
        return distances


def load_lpips(weights: str | Path | None, *, device: torch.device) -> Lpips:
    """LPIPS with the weights of a safetensors or PyTorch file, or of all such files in a folder.

    Raises:
        ModelError: no weights are given or there; they are damaged, incomplete or of another network.
    """
    if not weights:
        raise ModelError(f"the score lpips: no weights are given. {LPIPS_SOURCES}")
    path = Path(weights).expanduser()
    found = _read(path)
    if missing := [what for start, what in _PARTS.items() if not any(name.startswith(start) for name in found)]:
        raise ModelError(f"{path}: holds no {' and no '.join(missing)}. {LPIPS_SOURCES}")
    with torch.device("meta"):
        network = Lpips()
    fill(network, found, path=path, ignored=_CLASSIFIERS, remedy=LPIPS_SOURCES)
    return network.to(device).eval().requires_grad_(requires_grad=False)


def note_lpips(lpips: Lpips | None, folder: Path) -> None:
    """Leave the digest of its LPIPS in the folder of a fitted detector; no note where it uses none."""
    if lpips is None:
        (folder / NOTE).unlink(missing_ok=True)
    else:
        write_digest(folder / NOTE, lpips.digest)


def require_noted(lpips: Lpips, folder: Path, *, weights: str) -> None:
    """Refuse other weights than those that `note_lpips` noted; `weights` is where these lie.

    Raises:
        ModelError: they are others, or the note is missing or damaged.
    """
    noted = read_digest(folder / NOTE)
    if noted != lpips.digest:
        raise ModelError(
            f"{weights}: these weights of LPIPS are not those that the model in {folder} was fitted with (sha256 "
            f"{lpips.digest[:12]} instead of {noted[:12]}): its scores would mean something else. Put the right ones "
            "there, or fit again under another name."
        )


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, or of all files of a folder."""
    if not path.exists():
        raise ModelError(f"{path}: the weights of LPIPS are missing. {LPIPS_SOURCES}")
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES) if path.is_dir() else [path]
    origins: dict[str, Path] = {}
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        found = read_state_dict(file)
        if twice := next((name for name in found if name in tensors), None):
            raise ModelError(
                f"{path}: both {origins[twice].name} and {file.name} hold {twice}. Leave only the files of one network "
                f"there. {LPIPS_SOURCES}"
            )
        origins |= dict.fromkeys(found, file)
        tensors |= found
    return tensors


class _Head(nn.Module):
    """A weight for each channel, none of them negative. Where training had a dropout, the published names count it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, kernel_size=1, bias=False))

    def forward(self, differences: Float[torch.Tensor, "tile width y x"]) -> Float[torch.Tensor, "tile 1 y x"]:
        weighted: torch.Tensor = self.model(differences)
        return weighted


def _layers() -> Iterator[nn.Module]:
    """VGG16 without its classifier and last pooling. Simonyan and Zisserman (2015), configuration D."""
    before = 3
    for block, (width, convolutions) in enumerate(_BLOCKS):
        if block:
            yield nn.MaxPool2d(kernel_size=2)
        for _ in range(convolutions):
            yield nn.Conv2d(before, width, kernel_size=3, padding=1)
            yield nn.ReLU()
            before = width


def _blocks(features: nn.Sequential) -> Iterator[nn.Sequential]:
    """The same layers, parted before each pooling: what leaves a block is compared."""
    start = 0
    for block, (_, convolutions) in enumerate(_BLOCKS):
        end = start + 2 * convolutions + bool(block)
        yield nn.Sequential(*list(features)[start:end])
        start = end


def _standardized(images: Float32[torch.Tensor, "tile rgb y x"]) -> Float32[torch.Tensor, "tile rgb y x"]:
    """The intensities as the heads were trained on: in [-1, 1], then shifted and scaled colour by colour."""
    shift, scale = (images.new_tensor(values).view(3, 1, 1) for values in (_SHIFT, _SCALE))
    return (images * 2 - 1 - shift) / scale


def _unit(features: Float[torch.Tensor, "tile width y x"]) -> Float[torch.Tensor, "tile width y x"]:
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON)


_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Width and number of convolutions of each block of VGG16."""
_SMALLEST_PX = 16
"""What four poolings halve to one."""
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10
_SUFFIXES = {".safetensors", ".pth", ".pt"}
_PARTS = {"features.": "features of VGG16", "lin": "linear heads"}
_CLASSIFIERS = ("classifier.", "pre_logits.", "head.")
"""What follows the features in the files of torchvision and timm, and is of no use here."""
