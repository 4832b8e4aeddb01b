"""A model of open_clip whose files are all on this machine: digest and load it. Fetches nothing."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from PIL import Image

from wsi_anomaly.checkpoints import read_state_dict
from wsi_anomaly.errors import ModelError
from wsi_anomaly.prompts.clip_embedder import ClipEmbedder
from wsi_anomaly.prompts.model_files import TOKENIZER_FILES, digest, matching


@dataclass(frozen=True, slots=True)
class OpenClipModel:
    """A model by its files."""

    config: dict[str, Any]
    """The architecture: `model_cfg` of the model's open_clip_config.json."""
    preprocessing: dict[str, Any]
    """`preprocess_cfg` of it."""
    weights: Path
    tokenizer: Path | None
    """The folder with a tokenizer of transformers; none where the model uses open_clip's own."""
    text_tower: Path | None
    """The folder with the config of a text tower of transformers; none where the model uses open_clip's own."""

    def digest(self) -> str:
        """A sha256 of all that decides an embedding. Not of where it lies."""
        config = deepcopy(self.config)
        for reference in ("hf_model_name", "hf_tokenizer_name"):  # what lies there is digested itself
            config["text_cfg"].pop(reference, None)
        contents: dict[str, Path | bytes] = {
            "config": json.dumps([config, self.preprocessing], sort_keys=True).encode(),
            "weights": self.weights,
        }
        if self.tokenizer:
            contents |= {f"tokenizer/{path.name}": path for path in matching(self.tokenizer, TOKENIZER_FILES)}
        if self.text_tower:
            contents["text_tower"] = self.text_tower / "config.json"
        return digest(contents)

    def load(self, device: torch.device) -> ClipEmbedder:
        """The model, ready to embed.

        Raises:
            ModelError: a file is damaged, or the weights are of another architecture.
        """
        network = self._network()
        preprocess, tokenizer = self._preprocessing(network), self._tokenizer()

        def tokenize(texts: list[str]) -> Int64[np.ndarray, "text token"]:
            return tokenizer(texts).numpy()

        network = network.to(device).eval()
        return ClipEmbedder(preprocess, tokenize, network.encode_image, network.encode_text, device)

    def _network(self) -> Any:  # noqa: ANN401 - its class depends on the config
        import open_clip

        try:
            with torch.random.fork_rng(devices=[]):  # layers draw from the caller's random state, for nothing
                network = self._untrained()
        except Exception as error:
            raise self._unusable("build the model that its config describes", error) from error
        try:
            open_clip.load_checkpoint(network, str(self.weights), strict=True, weights_only=True)
        except Exception as error:
            read_state_dict(self.weights)  # says so where the file itself is at fault
            raise ModelError(
                f"{self.weights}: the weights are of another architecture than the config describes: "
                f"{_shortened(error)} Use the config and the weights of the same model."
            ) from error
        return network

    def _untrained(self) -> Any:  # noqa: ANN401 - its class depends on the config
        import open_clip
        from transformers import AutoConfig

        config = deepcopy(self.config)
        # Neither tower may fetch weights of its own: they come with the model's.
        config["vision_cfg"]["timm_model_pretrained"] = config["text_cfg"]["hf_model_pretrained"] = False
        custom = config.pop("custom_text", False) or self.text_tower is not None
        if self.text_tower:
            # open_clip would ask at the terminal whether to run code that comes with the config; this refuses it.
            AutoConfig.from_pretrained(self.text_tower, local_files_only=True, trust_remote_code=False)
            config["text_cfg"]["hf_model_name"] = str(self.text_tower)
        if not custom:
            return open_clip.CLIP(**config)
        return (open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP)(**config)

    def _preprocessing(self, network: Any) -> Callable[[Image.Image], Float32[np.ndarray, "rgb y x"]]:  # noqa: ANN401
        from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

        try:
            settings = merge_preprocess_dict(PreprocessCfg(), self.preprocessing) | {"size": network.visual.image_size}
            transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
        except Exception as error:
            raise self._unusable("use the preprocessing of its config", error) from error
        return lambda image: transform(image).numpy()

    def _tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

        text = self.config["text_cfg"]
        settings = {"context_length": text.get("context_length", DEFAULT_CONTEXT_LENGTH)}
        settings |= text.get("tokenizer_kwargs") or {}
        settings.pop("reduction_mask", None)  # made for training: drops words at random. Long texts are cut.
        try:
            if not self.tokenizer:
                return SimpleTokenizer(**settings)
            settings |= {"tokenizer_mode": text.get("tokenizer_mode")}
            return HFTokenizer(str(self.tokenizer), local_files_only=True, trust_remote_code=False, **settings)
        except Exception as error:
            raise self._unusable("read the tokenizer", error) from error

    def _unusable(self, what: str, error: Exception) -> ModelError:
        return ModelError(
            f"{self.weights.parent}: open_clip cannot {what} ({type(error).__name__}: {_shortened(error)}). Fetch all "
            "files of the model again; where it still fails, this version of open_clip does not know the model."
        )


def _shortened(error: Exception) -> str:
    """The first lines of a message, each cut: those of PyTorch name every tensor."""
    return " ".join(line.strip()[:200] for line in str(error).splitlines()[:4])
