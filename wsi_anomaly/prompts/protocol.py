"""What an image-text model is. Plug-ins fulfil these protocols; a class here knows no slide and no file of a run."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Shaped, UInt8


@runtime_checkable
class Embedder(Protocol):
    """A loaded image-text model: tiles and texts as unit vectors of one space, where the near ones mean the same."""

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on the cores that could prepare tiles meanwhile: then one thread does that, not many."""

    def prepare(self, pixels: UInt8[np.ndarray, "tile y x rgb"]) -> Shaped[np.ndarray, "tile ..."]:
        """Tiles resized as the model wants them: the part that a reading thread does while the model computes."""

    def embed_tiles(self, prepared: Shaped[np.ndarray, "tile ..."]) -> Float32[np.ndarray, "tile d"]:
        """Of what `prepare` made. A tile's vector does not depend on the tiles it comes with."""

    def embed_texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "text d"]:
        """Texts longer than the model's context are cut."""


@runtime_checkable
class ImageTextModel(Protocol):
    """An image-text model by its options; its weights are not read yet."""

    def at(self, place: str) -> "ImageTextModel":
        """The same model with its weights at another place: a path, or a repository of the hub."""

    def digest(self, *, offline: bool) -> str:
        """A sha256 of all that decides an embedding: weights, sizes, tokenizer. Not of where they lie.

        Raises:
            ModelError: weights or tokenizer are missing, gated or cannot be fetched.
        """

    def load(self, *, device: str, offline: bool) -> Embedder:
        """The model, ready to embed. With `offline` nothing is asked of the network.

        Raises:
            ModelError: weights or tokenizer are missing, gated, damaged or of another architecture.
            OptionsError: the device does not exist.
        """
