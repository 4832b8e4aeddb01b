"""The Embedder of every CLIP: pictures and texts through its own preprocessing and towers. Knows no file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, Shaped, UInt8
from PIL import Image
from torch.nn import functional

from wsi_anomaly.devices import CHUNK_TILES, in_fixed_chunks

CUDA_CHUNK_TILES = 64
"""How many tiles or texts a CUDA device sees at once, always."""

Vectors = Float[torch.Tensor, "item d"]


@dataclass(frozen=True, slots=True)
class ClipEmbedder:
    """A loaded CLIP."""

    preprocess: Callable[[Image.Image], Float32[np.ndarray, "rgb y x"]]
    tokenize: Callable[[list[str]], Int64[np.ndarray, "text ..."]]
    """Texts at a fixed length, cut where they are longer."""
    of_images: Callable[[torch.Tensor], Vectors]
    of_texts: Callable[[torch.Tensor], Vectors]
    device: torch.device

    @property
    def on_cpu(self) -> bool:
        """See `Embedder`."""
        return self.device.type == "cpu"

    def prepare(self, pixels: UInt8[np.ndarray, "tile y x rgb"]) -> Float32[np.ndarray, "tile rgb height width"]:
        """Tiles resized, cropped and normalised as the model's own preprocessing does."""
        tiles = pixels if len(pixels) else np.zeros((1, 1, 1, 3), np.uint8)  # no tiles: one still tells the size
        return np.stack([self.preprocess(Image.fromarray(tile)) for tile in tiles])[: len(pixels)]

    def embed_tiles(self, prepared: Shaped[np.ndarray, "tile ..."]) -> Float32[np.ndarray, "tile d"]:
        """Unit vectors. A tile's does not depend on the tiles it comes with."""
        return self._unit_vectors(self.of_images, prepared, half=self.device.type == "cuda")

    def embed_texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "text d"]:
        """Unit vectors. Texts longer than the model's context are cut."""
        # In full precision everywhere: texts are embedded once and kept, perhaps for another device.
        return self._unit_vectors(self.of_texts, self.tokenize([*texts] or [""])[: len(texts)], half=False)

    def _unit_vectors(
        self, function: Callable[[torch.Tensor], Vectors], values: Shaped[np.ndarray, "item ..."], *, half: bool
    ) -> Float32[np.ndarray, "item d"]:
        def unit(chunk: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, torch.float16, enabled=half):
                vectors = function(chunk)
            return functional.normalize(vectors.float(), dim=-1)

        size = CUDA_CHUNK_TILES if self.device.type == "cuda" else CHUNK_TILES
        return in_fixed_chunks(unit, values, self.device, size=size)
