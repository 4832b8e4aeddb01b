"""The image-text model CONCH: from its files to vectors of tiles and texts. Knows no keyword and no run.

The weights are gated (hub repository MahmoodLab/conch, CC BY-NC-ND 4.0). Nothing of them or of their authors' code is
part of this package; the network is our own, and its embeddings equal theirs.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped, UInt8
from PIL import Image
from pydantic import Field
from tokenizers import Tokenizer
from torch.nn import functional

from wsi_anomaly.checkpoints import fill, read_state_dict
from wsi_anomaly.devices import CHUNK_TILES, in_fixed_chunks, intensities, resolve_device
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.hub import hub_folder
from wsi_anomaly.options import Options, parse_options
from wsi_anomaly.prompts.conch_network import END, PAD, START, ConchNetwork, ConchSizes
from wsi_anomaly.shipped import local_place

HUB = "hf_hub:"
SIZES_FILE = "config.json"
TOKENIZER_FILES = ("tokenizer.json", "conch_byte_level_bpe_uncased.json")
SPECIAL_TOKENS = {"<pad>": PAD, "<start_of_text>": START, "<end_of_text>": END}


class Conch(Options):
    """CONCH v1, or a model of the same class whose sizes stand in a `config.json` beside its weights."""

    weights: str = Field(f"{HUB}MahmoodLab/conch", min_length=1)
    """A hub repository after `hf_hub:`, what comes with the package after `shipped:`, else the path of a file or of a
    folder with one."""
    tokenizer: str = ""
    """The path of the tokenizer; empty: it lies beside the weights."""

    def at(self, place: str) -> "Conch":
        """The same model with its weights at another place, written as the option `weights`.

        A tokenizer that was named and is not on this machine is looked for beside them.
        """
        is_here = Path(self.tokenizer).expanduser().is_file()
        return Conch(weights=place, tokenizer=self.tokenizer if is_here else "")

    def digest(self, *, offline: bool) -> str:
        """A sha256 of the weights, the tokenizer and the sizes, wherever they lie.

        Raises:
            ModelError: weights or tokenizer are missing, gated or cannot be fetched.
        """
        files = self._files(offline=offline)
        parts = {
            "weights": _sha256(files.weights),
            "tokenizer": _sha256(files.tokenizer),
            "sizes": files.sizes.model_dump(mode="json"),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def load(self, *, device: str, offline: bool) -> "ConchEmbedder":
        """The model, ready to embed. With `offline` nothing is asked of the network.

        Raises:
            ModelError: weights or tokenizer are missing, gated, damaged or of another architecture.
            OptionsError: the device does not exist.
        """
        place = resolve_device(device)
        files = self._files(offline=offline)
        tokenizer = _read_tokenizer(files.tokenizer, files.sizes)
        with torch.device("meta"):
            network = ConchNetwork(files.sizes)
        fill(
            network,
            read_state_dict(files.weights),
            path=files.weights,
            ignored=("text_decoder.", "visual.attn_pool_caption.", "visual.ln_caption."),
            remedy=f"Give the weights of CONCH (its pytorch_model.bin), or, for a model of the same class with other "
            f"sizes, put a {SIZES_FILE} beside them that says which. Now: {files.sizes.model_dump_json()}",
        )
        return ConchEmbedder(network.to(place).eval(), tokenizer, files.sizes, place)

    def _files(self, *, offline: bool) -> "ConchFiles":
        place = self._place(offline=offline)
        weights = _weights_in(place) if place.is_dir() else place
        if not weights.is_file():
            name = self.weights.removeprefix("hf-hub:")
            hint = f" For a repository of the hub write '{HUB}{name}'." if name.count("/") == 1 else ""
            raise ModelError(f"{weights}: there are no weights here. Check the option 'weights'.{hint}")
        sizes = _read_sizes(weights.with_name(SIZES_FILE))
        return ConchFiles(weights, self._tokenizer_beside(weights), sizes)

    def _place(self, *, offline: bool) -> Path:
        if not self.weights.startswith(HUB):
            return local_place(self.weights)
        return hub_folder(
            self.weights.removeprefix(HUB),
            weights=("model.safetensors", "pytorch_model.bin", "*.safetensors", "*.bin"),
            beside=(SIZES_FILE, *TOKENIZER_FILES),
            licence="its licence (CC BY-NC-ND 4.0)",
            offline=offline,
        )

    def _tokenizer_beside(self, weights: Path) -> Path:
        beside = [weights.with_name(name) for name in TOKENIZER_FILES]
        candidates = [Path(self.tokenizer).expanduser()] if self.tokenizer else beside
        for path in candidates:
            if path.is_file():
                return path
        raise ModelError(
            f"{' or '.join(map(str, candidates))}: the tokenizer is missing. It is the file conch/open_clip_custom/"
            "tokenizers/conch_byte_level_bpe_uncased.json of the CONCH code repository (github.com/mahmoodlab/CONCH). "
            "Name its path in the option 'tokenizer', or put it beside the weights."
        )


@dataclass(frozen=True, slots=True)
class ConchFiles:
    """What a model is read from."""

    weights: Path
    tokenizer: Path
    sizes: ConchSizes


@dataclass(frozen=True, slots=True)
class ConchEmbedder:
    """A loaded model. The vector of a tile or text does not depend on the others it comes with."""

    network: ConchNetwork
    tokenizer: Tokenizer
    sizes: ConchSizes
    device: torch.device

    @property
    def on_cpu(self) -> bool:
        """See `Embedder`."""
        return self.device.type == "cpu"

    def prepare(self, pixels: UInt8[np.ndarray, "tile y x rgb"]) -> UInt8[np.ndarray, "tile size size rgb"]:
        """Tiles resized to the model's image by their shorter side, bicubic as in Pillow, and cropped to its middle."""
        size_px = self.sizes.image_px
        if pixels.shape[1:3] == (size_px, size_px):
            return pixels
        prepared = np.empty((len(pixels), size_px, size_px, 3), np.uint8)
        for index, tile in enumerate(pixels):
            prepared[index] = _resized_and_cropped(Image.fromarray(tile), size_px)
        return prepared

    def embed_tiles(self, prepared: Shaped[np.ndarray, "tile size size rgb"]) -> Float32[np.ndarray, "tile d"]:
        """Unit vectors of tiles of the model's image size. On CUDA the network computes in half precision."""
        return in_fixed_chunks(self._tile_vectors, prepared, self.device, size=self._chunk)

    def embed_texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "text d"]:
        """Unit vectors of texts; of one longer than the context the beginning and an end token are read."""
        tokens = self.tokens(texts)
        columns = _columns_needed(tokens)
        vectors = np.zeros((len(texts), self.sizes.embedding), np.float32)
        for count in np.unique(columns):
            rows = columns == count
            part = tokens[rows, :count]
            vectors[rows] = in_fixed_chunks(self._text_vectors, part, self.device, size=self._chunk)
        return vectors

    def tokens(self, texts: Sequence[str]) -> Int64[np.ndarray, "text token"]:
        """What the network reads of texts, padded to one length."""
        # One by one, since encode_batch starts threads that a later fork would complain about.
        rows = [self.tokenizer.encode(text).ids for text in texts]
        return np.array(rows, np.int64).reshape(len(texts), self.sizes.context - 1)

    @property
    def _chunk(self) -> int:
        return CHUNK_TILES if self.device.type == "cpu" else _CHUNK_CUDA

    def _tile_vectors(self, pixels: UInt8[torch.Tensor, "tile y x rgb"]) -> Float32[torch.Tensor, "tile d"]:
        images = normalised(intensities(pixels))
        with self._precision():
            vectors = self.network.encode_images(images)
        return functional.normalize(vectors.float(), dim=-1)

    def _text_vectors(self, tokens: Int64[torch.Tensor, "text token"]) -> Float32[torch.Tensor, "text d"]:
        # In full precision everywhere: texts are embedded once and kept, perhaps for another device.
        return functional.normalize(self.network.encode_texts(tokens), dim=-1)

    def _precision(self) -> torch.autocast:
        # float16 and not bfloat16: three more bits of a similarity, and every GPU of the last ten years has it.
        return torch.autocast("cuda", torch.float16, enabled=self.device.type == "cuda")


def normalised(images: Float32[torch.Tensor, "tile rgb y x"]) -> Float32[torch.Tensor, "tile rgb y x"]:
    """Intensities as the network wants them: about mean 0 and deviation 1 over photographs."""
    mean, deviation = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (_MEAN, _DEVIATION))
    return (images - mean) / deviation


def _weights_in(folder: Path) -> Path:
    """The one file of weights in a folder, by its usual name or because there is no other."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if len(found) == 1:
        return found[0]
    names = f"several weights ({', '.join(path.name for path in found)})" if found else "no weights"
    raise ModelError(
        f"{folder}: there are {names}. Name the file itself in the option 'weights', or put one there that is called "
        "model.safetensors or pytorch_model.bin."
    )


def _read_sizes(path: Path) -> ConchSizes:
    if not path.is_file():
        return ConchSizes()
    remedy = f"Mend it, or take it away if the weights have CONCH v1's sizes. Its keys: {', '.join(_SIZE_NAMES)}."
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ModelError(f"{path}: is no table of sizes. {remedy}")
        return parse_options(ConchSizes, table, where=str(path))
    except OptionsError as error:
        raise ModelError(f"{error}. {remedy}") from error
    except ValueError as error:
        raise ModelError(f"{path}: is no JSON ({error}). {remedy}") from error


def _read_tokenizer(path: Path, sizes: ConchSizes) -> Tokenizer:
    """The tokenizer, set to cut and pad each text to what the network takes."""
    remedy = "Give the tokenizer that belongs to the weights."
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises the plain class
        raise ModelError(f"{path}: is damaged, or no tokenizer ({error}). {remedy}") from error
    for token, number in SPECIAL_TOKENS.items():
        if tokenizer.token_to_id(token) != number:
            raise ModelError(f"{path}: '{token}' is token {tokenizer.token_to_id(token)}, not {number}. {remedy}")
    if tokenizer.get_vocab_size() > sizes.vocabulary:
        raise ModelError(f"{path}: knows {tokenizer.get_vocab_size()} tokens, the weights {sizes.vocabulary}. {remedy}")
    tokenizer.enable_truncation(sizes.context - 1)
    tokenizer.enable_padding(length=sizes.context - 1, pad_id=PAD, pad_token="<pad>")  # noqa: S106 - no password
    return tokenizer


def _columns_needed(tokens: Int64[np.ndarray, "text token"]) -> Int64[np.ndarray, " text"]:
    """How many columns decide a text's vector: its tokens and one of padding, in steps so that few shapes occur.

    A keyword has some ten tokens of 127 and so costs an eighth. It depends on the text alone, not on its company.
    """
    last = np.where(tokens != PAD, np.arange(tokens.shape[1]), 0).max(axis=1, initial=0)
    needed = last + 2
    return np.minimum(-(-needed // _COLUMN_STEP) * _COLUMN_STEP, tokens.shape[1])


def _resized_and_cropped(image: Image.Image, size_px: int) -> UInt8[np.ndarray, "size size rgb"]:
    width_px, height_px = image.size
    shorter_px = min(width_px, height_px)
    wide_px, high_px = size_px * width_px // shorter_px, size_px * height_px // shorter_px
    left_px, top_px = round((wide_px - size_px) / 2), round((high_px - size_px) / 2)
    resized = np.asarray(image.resize((wide_px, high_px), Image.Resampling.BICUBIC))
    return resized[top_px : top_px + size_px, left_px : left_px + size_px]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_CHUNK_CUDA = 64
_COLUMN_STEP = 16
_SIZE_NAMES = tuple(ConchSizes.model_fields)
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
