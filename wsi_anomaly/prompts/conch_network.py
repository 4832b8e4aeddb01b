"""The architecture of CONCH, a CoCa without its decoder, in plain torch. Knows no file, no tokenizer and no device.

After Lu et al., "A visual-language foundation model for computational pathology" (Nature Medicine 2024) and Yu et al.,
"CoCa: Contrastive Captioners are Image-Text Foundation Models" (TMLR 2022). Tensors have the names of the released
checkpoint. Layers are as its authors' package computes them, which is what the weights were trained in.
"""

from collections import OrderedDict
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field, PositiveInt, field_validator
from torch import nn
from torch.nn import functional

from wsi_anomaly.options import Options

PAD, START, END = 0, 1, 2
"""The tokens that no text consists of."""

Tokens = Float[torch.Tensor, "item token channel"]


class ConchSizes(Options):
    """The sizes of a model of this class; the defaults are those of CONCH v1."""

    embedding: PositiveInt = 512
    """Length of a tile's and of a text's vector."""
    image_px: PositiveInt = 448
    patch_px: PositiveInt = 16
    image_width: PositiveInt = 768
    image_layers: PositiveInt = 12
    image_heads: PositiveInt = 12
    pooler_heads: PositiveInt = 8
    text_width: PositiveInt = 768
    text_layers: PositiveInt = 12
    text_heads: PositiveInt = 12
    vocabulary: PositiveInt = 32007
    context: int = Field(128, ge=4)
    """Tokens of a text with its start, its end and the learned token that stands for the whole."""

    @field_validator("patch_px", "image_heads", "pooler_heads", "text_heads")
    @classmethod
    def _divides(cls, value: int, info: Any) -> int:  # noqa: ANN401 - a ValidationInfo, which beartype cannot check
        whole = _WHOLE[info.field_name]
        if whole in info.data and info.data[whole] % value:
            raise ValueError(f"does not divide {whole} = {info.data[whole]}")
        return value


class ConchNetwork(nn.Module):
    """Both towers. Vectors are not yet of unit length."""

    def __init__(self, sizes: ConchSizes) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))  # of the training loss: an embedding does not depend on it
        self.text = TextTower(sizes)
        self.visual = ImageTower(sizes)

    def encode_images(self, images: Float[torch.Tensor, "tile rgb y x"]) -> Float[torch.Tensor, "tile d"]:
        """From normalised images."""
        vectors: torch.Tensor = self.visual(images)
        return vectors

    def encode_texts(self, tokens: Int64[torch.Tensor, "text token"]) -> Float[torch.Tensor, "text d"]:
        """From tokens padded on the right, at most one fewer than the context.

        Columns that hold padding in each row may be left out, all but the first: nothing looks at them.
        """
        vectors: torch.Tensor = self.text(tokens)
        return vectors


class ImageTower(nn.Module):
    """A vision transformer whose tokens one learned query pools."""

    def __init__(self, sizes: ConchSizes) -> None:
        super().__init__()
        self.trunk = Trunk(sizes)
        self.attn_pool_contrast = Pooler(sizes)
        self.ln_contrast = nn.LayerNorm(sizes.embedding)
        self.proj_contrast = nn.Parameter(torch.zeros(sizes.embedding, sizes.embedding))

    def forward(self, images: Float[torch.Tensor, "tile rgb y x"]) -> Float[torch.Tensor, "tile d"]:
        """One vector for each image."""
        pooled: torch.Tensor = self.ln_contrast(self.attn_pool_contrast(self.trunk(images)))
        return pooled @ self.proj_contrast


class Trunk(nn.Module):
    """The vision transformer of Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021), with its last norm."""

    def __init__(self, sizes: ConchSizes) -> None:
        super().__init__()
        width, patch_px = sizes.image_width, sizes.patch_px
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch_px, stride=patch_px)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (sizes.image_px // patch_px) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(ImageBlock(width, sizes.image_heads) for _ in range(sizes.image_layers)))
        self.norm = nn.LayerNorm(width, eps=_TRUNK_EPS)

    def forward(self, images: Float[torch.Tensor, "tile rgb y x"]) -> Tokens:
        """A token for the whole image, then one for each patch, row by row."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        normed: torch.Tensor = self.norm(self.blocks(tokens))
        return normed


class ImageBlock(nn.Module):
    """Attention, then a layered perceptron, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_TRUNK_EPS)
        self.attn = ImageAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_TRUNK_EPS)
        self.mlp = _perceptron(width, "fc1", "fc2")

    def forward(self, tokens: Tokens) -> Tokens:
        """The tokens one layer on."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class ImageAttention(nn.Module):
    """Every token looks at every token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tokens) -> Tokens:
        """What each token gathers."""
        gathered: torch.Tensor = self.proj(_attend(self.qkv(tokens), self.heads))
        return gathered


class Pooler(nn.Module):
    """A learned query looks at all tokens of the trunk."""

    def __init__(self, sizes: ConchSizes) -> None:
        super().__init__()
        width, context_width = sizes.embedding, sizes.image_width
        self.query = nn.Parameter(torch.zeros(1, width))
        self.attn = nn.MultiheadAttention(
            width, sizes.pooler_heads, kdim=context_width, vdim=context_width, batch_first=True
        )
        self.ln_q = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(context_width)

    def forward(self, tokens: Tokens) -> Float[torch.Tensor, "item d"]:
        """What the query gathers."""
        context = self.ln_k(tokens)
        query = self.ln_q(self.query).expand(len(tokens), -1, -1)
        # Asked for its weights, torch multiplies matrices. Its fused kernel, given a single query and several threads,
        # rounds by the place of an item in the batch.
        gathered: torch.Tensor = self.attn(query, context, context, average_attn_weights=False)[0]
        return gathered[:, 0]


class TextTower(nn.Module):
    """A transformer in which tokens look back only; a learned token at the end stands for the whole text."""

    def __init__(self, sizes: ConchSizes) -> None:
        super().__init__()
        width = sizes.text_width
        self.cls_emb = nn.Parameter(torch.zeros(width))
        self.token_embedding = nn.Embedding(sizes.vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(sizes.context, width))
        self.transformer = TextBlocks(width, sizes.text_heads, sizes.text_layers)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, sizes.embedding))

    def forward(self, tokens: Int64[torch.Tensor, "text token"]) -> Float[torch.Tensor, "text d"]:
        """One vector for each text. However few columns there are, the learned token has the last position."""
        count, length = tokens.shape
        embedded = self.token_embedding(tokens) + self.positional_embedding[:length]
        whole = (self.cls_emb + self.positional_embedding[-1]).expand(count, 1, -1)
        last = self.transformer(torch.cat([embedded, whole], dim=1), _visible(tokens))[:, -1]
        normed: torch.Tensor = self.ln_final(last)
        return normed @ self.text_projection


class TextBlocks(nn.Module):
    """The layers of the text tower."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))

    def forward(self, tokens: Tokens, visible: Bool[torch.Tensor, "item 1 token token"]) -> Tokens:
        """The tokens after the last layer."""
        for block in self.resblocks:
            tokens = block(tokens, visible)
        return tokens


class TextBlock(nn.Module):
    """Attention to what is visible, then a layered perceptron, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = TextAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = _perceptron(width, "c_fc", "c_proj")

    def forward(self, tokens: Tokens, visible: Bool[torch.Tensor, "item 1 token token"]) -> Tokens:
        """The tokens one layer on."""
        tokens = tokens + self.attn(self.ln_1(tokens), visible)
        return tokens + self.mlp(self.ln_2(tokens))


class TextAttention(nn.Module):
    """Tokens look at those that are visible to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, tokens: Tokens, visible: Bool[torch.Tensor, "item 1 token token"]) -> Tokens:
        """What each token gathers."""
        projected = functional.linear(tokens, self.in_proj_weight, self.in_proj_bias)
        gathered: torch.Tensor = self.out_proj(_attend(projected, self.heads, visible))
        return gathered


def _attend(
    projected: Float[torch.Tensor, "item token three_channels"],
    heads: int,
    visible: Bool[torch.Tensor, "item 1 token token"] | None = None,
) -> Tokens:
    """Attention among tokens whose queries, keys and values lie side by side."""
    count, length, _ = projected.shape
    queries, keys, values = projected.view(count, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=visible)
    return mixed.transpose(1, 2).flatten(2)


def _visible(tokens: Int64[torch.Tensor, "text token"]) -> Bool[torch.Tensor, "text 1 whole whole"]:
    """Which token (third axis) may look at which (fourth), the learned one being last.

    The learned token should look at whatever is not padding. The original shifts that row right by one, so that it
    sees the first padding and mostly not itself. The weights were trained so, and the shift has to stay.
    """
    count, length = tokens.shape
    back = torch.ones(length + 1, length + 1, dtype=torch.bool, device=tokens.device).tril()
    visible = back.repeat(count, 1, 1)
    visible[:, -1, 1:] = tokens != PAD
    return visible[:, None]


def _perceptron(width: int, first: str, second: str) -> nn.Sequential:
    wide = _MLP_RATIO * width
    layers = {first: nn.Linear(width, wide), "gelu": nn.GELU(), second: nn.Linear(wide, width)}
    return nn.Sequential(OrderedDict(layers))


_MLP_RATIO = 4
_TRUNK_EPS = 1e-6
_WHOLE = {
    "patch_px": "image_px",
    "image_heads": "image_width",
    "pooler_heads": "embedding",
    "text_heads": "text_width",
}
