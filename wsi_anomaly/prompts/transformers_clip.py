"""CLIP models in the files of transformers, such as PLIP. Knows folders; what a user may write is told elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from PIL import Image

from wsi_anomaly.checkpoints import fill, read_state_dict
from wsi_anomaly.errors import ModelError
from wsi_anomaly.prompts.clip_embedder import ClipEmbedder
from wsi_anomaly.prompts.model_files import TOKENIZER_FILES, VOCABULARIES, digest, matching, read_table

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""In order of preference."""
PREPROCESSING = "preprocessor_config.json"
NEEDED = (("config.json",), (PREPROCESSING,), VOCABULARIES, WEIGHTS)
"""One file of each."""

_OF_OLDER_VERSIONS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
"""Counted, not learnt: files written before 2023 hold them."""


@dataclass(frozen=True, slots=True)
class TransformersClip:
    """The files of a CLIP model on this machine, all there."""

    folder: Path
    weights: Path

    def digest(self) -> str:
        """A sha256 of the weights and of all files that decide an embedding."""
        files = matching(self.folder, (*TOKENIZER_FILES, PREPROCESSING))
        return digest({"weights": self.weights} | {path.name: path for path in files})

    def load(self, device: torch.device) -> ClipEmbedder:
        """The model, from these files alone.

        Raises:
            ModelError: a file is damaged, or the weights are of another architecture.
        """
        network = self._network().to(device)
        tokenizer, preprocess = self._tokenizer(), self._preprocessing()
        size_px = network.config.vision_config.image_size
        shape = preprocess(Image.new("RGB", (size_px, size_px))).shape
        if shape != (3, size_px, size_px):
            raise ModelError(
                f"{self.folder}: {PREPROCESSING} makes pictures of {shape[2]} x {shape[1]} px, but the model "
                f"of config.json takes {size_px} x {size_px} px. Use the files that belong together."
            )
        context = network.config.text_config.max_position_embeddings

        def tokenize(texts: list[str]) -> Int64[np.ndarray, "text 2 token"]:
            tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=context)
            return np.stack([np.array(tokens[kind], np.int64) for kind in ("input_ids", "attention_mask")], axis=1)

        return ClipEmbedder(
            preprocess,
            tokenize,
            lambda images: network.get_image_features(pixel_values=images).pooler_output,
            lambda tokens: network.get_text_features(tokens[:, 0], tokens[:, 1]).pooler_output,
            device,
        )

    def _network(self) -> Any:  # noqa: ANN401 - its class is known only once transformers is imported
        from transformers import CLIPConfig, CLIPModel

        sizes = read_table(self.folder / "config.json")
        try:
            with torch.random.fork_rng(devices=[]):  # layers draw from the caller's random state, for nothing
                network: Any = CLIPModel(CLIPConfig.from_dict(sizes))
        except Exception as error:
            raise self._unusable("build the model that config.json describes", error) from error
        remedy = "Use the config.json and the weights of the same model."
        fill(network, read_state_dict(self.weights), path=self.weights, ignored=_OF_OLDER_VERSIONS, remedy=remedy)
        return network.eval()

    def _tokenizer(self) -> Any:  # noqa: ANN401 - its class depends on the files
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise self._unusable("read the tokenizer", error) from error

    def _preprocessing(self) -> Callable[[Image.Image], Float32[np.ndarray, "rgb y x"]]:
        from transformers import AutoImageProcessor

        try:
            processor = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                self.folder, backend="pil", local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise self._unusable(f"read {PREPROCESSING}", error) from error
        return lambda image: processor(image, return_tensors="np")["pixel_values"][0].astype(np.float32)

    def _unusable(self, what: str, error: Exception) -> ModelError:
        reason = next(iter(str(error).splitlines()), "")
        return ModelError(
            f"{self.folder}: transformers cannot {what} ({type(error).__name__}: {reason}). "
            "Fetch the model's files again, all of them."
        )


def transformers_clip(folder: Path) -> TransformersClip:
    """The CLIP model in a folder.

    Raises:
        ModelError: the folder lacks a file, or holds another kind of model.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: is no folder. Give the folder that holds a CLIP model of transformers.")
    kind = read_table(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ModelError(
            f"{folder}: holds no CLIP model of transformers (model_type in its config.json is {kind!r}, not 'clip'). "
            "Models of open_clip are written 'hf-hub:owner/name' or 'local-dir:/path/to/folder'."
        )
    lacking = [" or ".join(names) for names in NEEDED if not matching(folder, names)]
    if lacking:
        raise ModelError(f"{folder}: lacks {', and '.join(lacking)}. Copy all files of the model into it.")
    return TransformersClip(folder, matching(folder, WEIGHTS)[0])
