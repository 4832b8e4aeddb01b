"""The last layer of a VAE that learns no more, apart: how likely crops are by it, and the slopes of that. No autograd.

Nearly all arithmetic of the network is here, for it makes 768 channels. Two by two output pixels, the "corners", lie
over each hidden place, and each is made of a window of two by two hidden places around it. The logit of a value is the
product of this window with a key, and the slope of the log-sum-exp of the logits is their keys' mean under the softmax.
So both are products of matrices, done for few places at a time, whose logits a cache holds.
"""

from collections.abc import Iterator
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import nn
from torch.nn import functional

from wsi_anomaly.detectors.vae_network import RGB, VALUES, Crops, Hidden, PerCrop

LOGITS_AT_ONCE_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
"""Of one colour of one corner, but those of one crop at least: what the caches of a core hold, or a part of memory."""

Windows = Float[torch.Tensor, "crop half_y half_x window"]


class Readout:
    """The transposed convolution that makes the values of all pixels, and the softmax over them."""

    def __init__(self, values: nn.ConvTranspose2d) -> None:
        # Windows lie over the kernel the other way round, and the corners take turns in it.
        kernel = values.weight.detach().flip(2, 3).reshape(-1, RGB, VALUES, 2, 2, 2, 2)
        self._keys = kernel.permute(4, 6, 1, 2, 3, 5, 0).reshape(len(_CORNERS), RGB, VALUES, -1)
        self._bias = cast("torch.Tensor", values.bias).detach().view(RGB, VALUES)

    def log_likelihoods(self, hidden: Hidden, crops: Crops) -> PerCrop:
        """Log-probability of each whole crop by its hidden values, in nats."""
        found = torch.zeros(len(crops), dtype=torch.float64, device=crops.device)
        for part in _parts(hidden):
            for windows, by_colour, keys in zip(_windows(hidden[part]), _corners(crops[part]), self._keys, strict=True):
                for seen, *key in zip(by_colour, keys, self._bias, strict=True):
                    costs = functional.cross_entropy(_product(windows, *key), seen.flatten(), reduction="none")
                    found[part] -= costs.view(len(windows), -1).sum(1, dtype=torch.float64)
        return found

    def slopes(self, hidden: Hidden) -> Hidden:
        """By the hidden values, of the normaliser of the likelihoods; less `seen`, of negative log-likelihoods."""
        return torch.cat([_assembled(self._expected_keys(hidden[part])) for part in _parts(hidden)])

    def seen(self, crops: Crops) -> Hidden:
        """The slopes of the logits of the values that crops have, the same wherever the hidden values are."""
        return _assembled(
            torch.stack([keys[seen] for keys, seen in zip(by_colour, own, strict=True)]).sum(0)
            for by_colour, own in zip(self._keys, _corners(crops), strict=True)
        )

    def _expected_keys(self, hidden: Hidden) -> Iterator[Windows]:
        """For each corner, the sum over the colours of the keys' means."""
        for windows, by_colour in zip(_windows(hidden), self._keys, strict=True):
            expected = torch.zeros_like(windows)
            for keys, bias in zip(by_colour, self._bias, strict=True):
                chances = _product(windows, keys, bias).softmax(1)
                expected += _product(chances.view(*windows.shape[:3], VALUES), keys.T).view_as(windows)
            yield expected


def _parts(hidden: Hidden) -> Iterator[slice]:
    most = max(1, LOGITS_AT_ONCE_BYTES[hidden.device.type] // (4 * VALUES * hidden[0, 0].numel()))
    return (slice(start, start + most) for start in range(0, len(hidden), most))


def _product(
    rows: Float[torch.Tensor, "crop half_y half_x entry"],
    columns: Float[torch.Tensor, "column entry"],
    bias: Float[torch.Tensor, " column"] | None = None,
) -> Float[torch.Tensor, "place column"]:
    """Of matrices, as a convolution of sixteen pictures: for that PyTorch uses oneDNN, twice as fast on many CPUs."""
    pictures = rows.view(_PICTURES, 1, -1, rows.shape[3]).permute(0, 3, 1, 2)
    found = functional.conv2d(pictures, columns[:, :, None, None], bias)
    return found.permute(0, 2, 3, 1).reshape(-1, len(columns))


def _corners(crops: Crops) -> Int64[torch.Tensor, "corner rgb crop half_y half_x"]:
    """The values of each colour that lie in each corner, as indices."""
    side = crops.shape[1] // 2
    return crops.long().view(-1, side, 2, side, 2, RGB).permute(2, 4, 5, 0, 1, 3).flatten(0, 1)


def _windows(hidden: Hidden) -> Iterator[Windows]:
    """What the output pixels of each corner are made of."""
    height, width = hidden.shape[2:]
    padded = functional.pad(hidden.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    around = padded.unfold(1, 2, 1).unfold(2, 2, 1).permute(0, 1, 2, 4, 5, 3)
    return (around[:, top : top + height, left : left + width].flatten(3) for top, left in _CORNERS)


def _assembled(corners: Iterator[Windows]) -> Hidden:
    """The sum, at each hidden place, of all that windows say of it: the transpose of `_windows`."""
    by_corner = list(corners)
    crops, height, width, length = by_corner[0].shape
    padded = by_corner[0].new_zeros(crops, height + 2, width + 2, length // len(_CORNERS))
    for (top, left), windows in zip(_CORNERS, by_corner, strict=True):
        places = windows.view(crops, height, width, len(_CORNERS), -1)
        for (y, x), part in zip(_CORNERS, places.unbind(3), strict=True):
            padded[:, top + y : top + y + height, left + x : left + x + width] += part
    return padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2)


_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))
_PICTURES = 16
