"""The networks of SimSID: images are in [-1, 1], cut into a grid of patches. Know no loss and no tiles."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import nn
from torch.nn.functional import one_hot

Images = Float[torch.Tensor, "tile rgb y x"]
Patches = Float[torch.Tensor, "patch _ _ _"]
"""Of all images, those of one image following each other, row by row."""
Tokens = Float[torch.Tensor, "tile place d"]
"""One vector a patch."""
MemoryKind = Literal["position", "free"]

LEVELS = 4
"""How often a patch is halved."""
HEADS = 8
_INPAINTING_LAYERS = 3
_REMEMBERED_LEVELS = 2
_NEIGHBOURS = 8
_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Sizes:
    """All that decides the shapes of the weights."""

    image_px: int
    grid: int
    """Patches along a side."""
    width: int
    """Channels of the first layer; each halving of a patch doubles them."""
    memory: MemoryKind
    slots: int
    active: int
    """How many items of a memory a feature is put together from."""

    @property
    def patch_px(self) -> int:
        """The side of a patch."""
        return self.image_px // self.grid

    def channels(self, level: int) -> int:
        """After so many halvings."""
        return self.width * 2**level

    def token(self, level: int) -> int:
        """Numbers in the features of one patch after so many halvings."""
        return self.channels(level) * (self.patch_px // 2**level) ** 2


class Memory(nn.Module):
    """Puts each patch's features together from a few learnt items; of its place in the grid alone, or of one store."""

    def __init__(self, sizes: Sizes, level: int) -> None:
        super().__init__()
        self.active, places = sizes.active, sizes.grid**2 if sizes.memory == "position" else 1
        bound = sizes.token(level) ** -0.5
        self.items = nn.Parameter(torch.empty(places, sizes.slots, sizes.token(level)).uniform_(-bound, bound))

    def forward(self, tokens: Tokens) -> Tokens:
        """The same, as far as the memory knows it."""
        items = self.items if len(self.items) > 1 else self.items.expand(tokens.shape[1], -1, -1)
        alike = torch.einsum("tpd,psd->tps", tokens, items)
        return torch.einsum("tps,psd->tpd", shrunk(alike.softmax(dim=-1), self.active), items)


class Inpainting(nn.Module):
    """What the neighbours of a patch, as the memory knows them, say that it should be: cross-attention in layers."""

    near: Int64[torch.Tensor, "place neighbour"]
    absent: Bool[torch.Tensor, "place neighbour"]

    def __init__(self, grid: int, token: int) -> None:
        super().__init__()
        near, absent = neighbours(grid)
        self.register_buffer("near", near, persistent=False)
        self.register_buffer("absent", absent, persistent=False)
        # On which side of the patch a neighbour lies: attention alone could not tell.
        self.sides = nn.Parameter(torch.zeros(_NEIGHBOURS, token))
        self.layers = nn.ModuleList(InpaintingLayer(token) for _ in range(_INPAINTING_LAYERS))

    def forward(self, tokens: Tokens, remembered: Tokens) -> Tokens:
        """The features of each patch, by those of its neighbours."""
        around = (remembered[:, self.near] + self.sides).flatten(end_dim=1)
        absent = self.absent.repeat(len(tokens), 1)
        painted = tokens.flatten(end_dim=1)[:, None]
        for layer in self.layers:
            painted = layer(painted, around, absent)
        return painted.view(tokens.shape)


class InpaintingLayer(nn.Module):
    """One layer: look at the neighbours, then think about it."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(token, HEADS, batch_first=True)
        self.after_attention = nn.LayerNorm(token)
        self.forwards = nn.Sequential(nn.Linear(token, token // 4), nn.ReLU(), nn.Linear(token // 4, token))
        self.after_forwards = nn.LayerNorm(token)

    def forward(
        self,
        painted: Float[torch.Tensor, "patch 1 d"],
        around: Float[torch.Tensor, "patch neighbour d"],
        absent: Bool[torch.Tensor, "patch neighbour"],
    ) -> Float[torch.Tensor, "patch 1 d"]:
        """The patches after one more look at their neighbours."""
        # With weights: the fused kernel for attention without them sums its gradients in no fixed order.
        found, _ = self.attention(painted, around, around, key_padding_mask=absent, need_weights=True)
        seen = self.after_attention(painted + found)
        thought: torch.Tensor = self.after_forwards(seen + self.forwards(seen))
        return thought


class Encoder(nn.Module):
    """From patches to features at each level."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.first = _convolutions(3, sizes.width)
        self.halve = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), _convolutions(sizes.channels(level), sizes.channels(level + 1)))
            for level in range(LEVELS)
        )

    def forward(self, patches: Patches) -> list[Patches]:
        """Features before the first halving and after each."""
        levels = [self.first(patches)]
        for halve in self.halve:
            levels.append(halve(levels[-1]))
        return levels


class Decoder(nn.Module):
    """From features back to patches; a memory, if it has one, stands behind each of the two deepest levels.

    These two also see what the encoder saw at their level, and hand it on only as far as the memory knows it.
    """

    def __init__(self, sizes: Sizes, *, remembers: bool) -> None:
        super().__init__()
        self.grid = sizes.grid
        below = list(range(LEVELS - 1, -1, -1))
        self.enlarge = nn.Upsample(scale_factor=2, mode="nearest")
        self.convolve = nn.ModuleList(
            _convolutions(sizes.channels(level + 1) + self._shown(level) * sizes.channels(level), sizes.channels(level))
            for level in below
        )
        self.memories = nn.ModuleList(Memory(sizes, level) for level in below[:_REMEMBERED_LEVELS] if remembers)
        self.last = nn.Sequential(nn.Conv2d(sizes.width, 3, 3, padding=1), nn.Tanh())

    def forward(self, deepest: Patches, seen: list[Patches]) -> tuple[Patches, list[Patches]]:
        """The patches, and the features at each level on the way to them."""
        features, levels = deepest, []
        for i, convolve in enumerate(self.convolve):
            level = LEVELS - 1 - i
            features = self.enlarge(features)
            features = convolve(torch.cat([features, seen[level]], dim=1) if self._shown(level) else features)
            if i < len(self.memories):
                tokens = as_tokens(features, self.grid)
                features = self.memories[i](tokens).reshape(features.shape)
            levels.append(features)
        return self.last(features), levels

    @staticmethod
    def _shown(level: int) -> bool:
        return level >= LEVELS - _REMEMBERED_LEVELS


class Discriminator(nn.Module):
    """From whole images to how real they look, without bounds."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        # Half the encoder's width at the same level; an image ends in 4 x 4 places.
        before, layers, side = 3, list[nn.Module](), sizes.image_px
        after = max(sizes.width // 2, 1)
        while side > _DISCRIMINATED_PX:
            layers += [nn.Conv2d(before, after, 5, stride=2, padding=2), nn.LeakyReLU(0.2)]
            before, after, side = after, after * 2, side // 2
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(before * side**2, 1)

    def forward(self, images: Images) -> Float[torch.Tensor, " tile"]:
        """Higher is more real."""
        realness: torch.Tensor = self.last(self.layers(images).flatten(start_dim=1))
        return realness[:, 0]


_DISCRIMINATED_PX = 4


def shrunk(weights: Float[torch.Tensor, "*batch slot"], active: int) -> Float[torch.Tensor, "*batch slot"]:
    """The `active` largest weights made to sum to one, the others nothing; gradients are those of all the weights.

    The Gumbel shrinkage of SimSID, with exactly as many weights kept as are asked for.
    """
    kept = one_hot(weights.topk(min(active, weights.shape[-1]), dim=-1).indices, weights.shape[-1]).sum(dim=-2)
    few = weights * kept
    few = few / few.sum(dim=-1, keepdim=True).clamp(min=_TINY)
    return weights + (few - weights).detach()


def neighbours(grid: int) -> tuple[Int64[torch.Tensor, "place neighbour"], Bool[torch.Tensor, "place neighbour"]]:
    """The places of the eight neighbours of each place of a grid, and which of them do not exist (0 stands there)."""
    rows, columns = torch.arange(grid**2) // grid, torch.arange(grid**2) % grid
    steps = torch.tensor([(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)])
    near_rows, near_columns = rows[:, None] + steps[:, 0], columns[:, None] + steps[:, 1]
    absent = (near_rows < 0) | (near_rows >= grid) | (near_columns < 0) | (near_columns >= grid)
    return (near_rows * grid + near_columns).masked_fill(absent, 0), absent


def into_patches(images: Images, grid: int) -> Patches:
    """The squares of a grid over each image."""
    side = images.shape[-1] // grid
    squares = images.unfold(2, side, side).unfold(3, side, side)
    return squares.permute(0, 2, 3, 1, 4, 5).flatten(end_dim=2).contiguous()


def into_images(patches: Patches, grid: int) -> Images:
    """The opposite of `into_patches`."""
    squares = patches.reshape(-1, grid, grid, *patches.shape[1:]).permute(0, 3, 1, 4, 2, 5)
    return squares.flatten(4, 5).flatten(2, 3)


def as_tokens(patches: Patches, grid: int) -> Tokens:
    """The features of each patch as one vector."""
    flat = patches.flatten(start_dim=1)
    return flat.view(-1, grid**2, flat.shape[1])


def _convolutions(before: int, after: int) -> nn.Module:
    layers: list[nn.Module] = []
    for width in (before, after):
        layers += [nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)
