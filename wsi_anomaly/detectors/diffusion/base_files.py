"""The files of a Stable Diffusion base: found or fetched, of the right family, complete, digested. Loads nothing."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from wsi_anomaly.errors import ModelError
from wsi_anomaly.hub import hub_parts
from wsi_anomaly.shipped import local_place

DEFAULT_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
INDEX = "model_index.json"
SCHEDULE = "scheduler/scheduler_config.json"

_DIFFUSERS_WEIGHTS = tuple(
    f"diffusion_pytorch_model{variant}{suffix}" for suffix in (".safetensors", ".bin") for variant in ("", ".fp16")
)
WEIGHTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "unet": _DIFFUSERS_WEIGHTS,
        "vae": _DIFFUSERS_WEIGHTS,
        "text_encoder": ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "pytorch_model.fp16.bin"),
    }
)
"""Names by part in order of preference: no pickle where it can be helped, then full precision."""
_CONFIGS = (*(f"{part}/config.json" for part in WEIGHTS), SCHEDULE)
_VOCABULARIES = (
    ("tokenizer/tokenizer.json", "tokenizer/vocab.json"),
    ("tokenizer/tokenizer.json", "tokenizer/merges.txt"),
)
_BESIDE_VOCABULARY = ("tokenizer/*.json",)


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """The files of an SD 1.x/2.x base on this machine, all there."""

    folder: Path
    weights: Mapping[str, Path]
    """The file of each part."""

    def digest(self) -> str:
        """A sha256 of all that decides a result: weights, configs, tokenizer. Not of where they lie.

        It tells which base this is, not whether each bit of it is sound, and reads a few megabytes of four gigabytes:
        of a safetensors file the names, types and shapes of all tensors, and the first and last 4 KiB of each. Training
        moves every element of the tensors that it trains, so weights that differ, differ there. The name that the hub's
        cache gives to a file would come free, but the same base copied into a folder must have the same digest.
        """
        names = [*_CONFIGS, *(path.relative_to(self.folder).as_posix() for path in self.weights.values())]
        names += [
            f"tokenizer/{path.name}"
            for path in (self.folder / "tokenizer").iterdir()
            if path.suffix in {".json", ".txt"}
        ]
        whole = hashlib.sha256()
        for name in sorted(names):
            whole.update(f"{name}\0{_fingerprint(self.folder / name)}\n".encode())
        return whole.hexdigest()


def require_floats(files: BaseFiles) -> None:
    """Refuse integers of quantised models, which would be taken for weights. Pickles are looked at in loading.

    Raises:
        ModelError: a file is damaged, or holds weights that are no floats.
    """
    for path in files.weights.values():
        if path.suffix == ".safetensors":
            _require_floats(path)


def base_files(base: str, *, offline: bool) -> BaseFiles:
    """The files of a base: a folder of diffusers, else a repository of the hub.

    Raises:
        ModelError: it is of another family, incomplete, damaged, gated, or cannot be had.
    """
    folder = local_place(base)
    if folder.is_file():
        raise ModelError(f"{base}: is a single file, not a folder with the parts of a base model. {_CONVERT}")
    if not folder.is_dir():
        folder = _fetched(base, offline=offline)
    refuse_other_families(folder, name=base)
    return _complete(folder)


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table.

    Raises:
        ModelError: it is damaged.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: is damaged ({error}). Fetch the file again.") from error
    if not isinstance(table, dict):
        raise ModelError(f"{path}: is damaged (it holds no table). Fetch the file again.")
    return table


def refuse_other_families(folder: Path, *, name: str) -> None:
    """Compare what a folder says of the base called `name`, without opening weights; files it lacks say nothing.

    Raises:
        ModelError: it is not of the family of SD 1.x/2.x; says of which, or what differs.
    """
    index, unet, vae, schedule = (
        read_table(folder / file) if (folder / file).is_file() else {}
        for file in (INDEX, "unet/config.json", "vae/config.json", SCHEDULE)
    )
    fault = (
        _other_pipeline(index)
        or _difference("UNet", unet, _PLAIN_UNET)
        or _difference("VAE", vae, _PLAIN_VAE)
        or _other_prediction(schedule)
    )
    if fault:
        raise ModelError(
            f"{name}: {fault}. Needed is a base of the family of Stable Diffusion 1.x or 2.x for text to image, "
            f"such as {DEFAULT_BASE}, or a model trained from one."
        )


def _fetched(repository: str, *, offline: bool) -> Path:
    weights = [[f"{part}/{name}" for name in names] for part, names in WEIGHTS.items()]
    licence = f"the licence shown at https://huggingface.co/{repository}"
    # What tells the family is small: other models are refused before gigabytes have come.
    index = hub_parts(repository, [[INDEX]], beside=_CONFIGS, licence=licence, offline=offline)
    refuse_other_families(index, name=repository)
    parts = [[INDEX], *([name] for name in _CONFIGS), *_VOCABULARIES, *weights]
    return hub_parts(repository, parts, beside=_BESIDE_VOCABULARY, licence=licence, offline=offline)


def _complete(folder: Path) -> BaseFiles:
    choices = [(name,) for name in _CONFIGS] + list(_VOCABULARIES)
    lacking = [" or ".join(names) for names in choices if not _first(folder, names)]
    found = {part: _first(folder / part, names) for part, names in WEIGHTS.items()}
    lacking += [f"the weights {part}/{' or '.join(WEIGHTS[part])}" for part, path in found.items() if not path]
    if lacking:
        single = sorted(path.name for path in folder.iterdir() if path.suffix in {".safetensors", ".ckpt"})
        remedy = f"{single[0]} may hold all parts in one file. {_CONVERT}" if single else _COPY
        raise ModelError(f"{folder}: the base model lacks {'; '.join(lacking)}. {remedy}")
    return BaseFiles(folder, MappingProxyType({part: path for part, path in found.items() if path}))


def _require_floats(path: Path) -> None:
    try:
        with path.open("rb") as file:
            header = json.loads(_header(file)[_LENGTH_BYTES:])
        kinds = {entry["dtype"] for name, entry in header.items() if name.endswith((".weight", ".bias"))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: is damaged, or no file of weights ({error}). {_COPY}") from error
    if strange := sorted(kinds - _FLOATS):
        raise ModelError(
            f"{path}: holds weights of dtype {', '.join(strange)}, which are no floats: a quantised model cannot be "
            "used. Give the model in half or full precision."
        )


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _other_pipeline(index: Mapping[str, Any]) -> str | None:
    """What a model index tells of another family."""
    pipeline = str(index.get("_class_name", ""))
    known = next((family for start, family in _FAMILIES.items() if pipeline.startswith(start)), None)
    if known:
        return f"is {known} ({pipeline})"
    if "transformer" in index:
        return f"is a diffusion transformer ({pipeline})"
    for part, wanted in _CLASSES.items() if index else ():
        found = (index.get(part) or [None, None])[-1]
        if found != wanted:
            return f"is a {pipeline}, whose {part} is {found or 'missing'}, not {wanted}"
    return None


def _difference(part: str, config: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """What a config says that those of the family do not, with a name for it where it has one."""
    for key, value in wanted.items():
        found = config.get(key, value)
        if found != value:
            name = _NAMES.get((key, found)) if isinstance(found, str | int) else None
            return f"{f'is {name}: ' if name else ''}its {part} has {key} {found!r}, not {value!r}"
    return None


def _other_prediction(schedule: Mapping[str, Any]) -> str | None:
    found = schedule.get("prediction_type", "epsilon")
    return None if found in PREDICTIONS else f"its scheduler has prediction_type {found!r}, not one of {PREDICTIONS}"


def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            return hashlib.file_digest(file, "sha256").hexdigest()
        whole = hashlib.sha256()
        try:
            for piece in _telling(file):
                whole.update(piece)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: is damaged, or no file of weights ({error}). {_COPY}") from error
        return whole.hexdigest()


def _telling(file: IO[bytes]) -> Iterator[bytes]:
    """Header and both ends of each tensor of a safetensors file: https://github.com/huggingface/safetensors#format."""
    header = _header(file)
    yield header
    data, table = len(header), json.loads(header[_LENGTH_BYTES:])
    for start, end in sorted(entry["data_offsets"] for name, entry in table.items() if name != "__metadata__"):
        file.seek(data + start)
        yield file.read(min(end - start, _END_BYTES))
        file.seek(data + max(start, end - _END_BYTES))
        yield file.read(min(end - start, _END_BYTES))


def _header(file: IO[bytes]) -> bytes:
    """With the length that it begins with."""
    length = file.read(_LENGTH_BYTES)
    return length + file.read(min(int.from_bytes(length, "little"), _LONGEST_HEADER))


PREDICTIONS = ("epsilon", "v_prediction")
_FAMILIES = {
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusionInpaint": "an inpainting model",
    "StableDiffusionInstructPix2Pix": "InstructPix2Pix",
    "StableDiffusionDepth2Img": "a model guided by depth",
    "StableDiffusionUpscale": "an upscaler",
    "StableDiffusionLatentUpscale": "an upscaler",
    "StableUnCLIP": "Stable unCLIP",
    "StableCascade": "Stable Cascade",
    "LatentConsistencyModel": "a latent consistency model",
    "Flux": "FLUX",
    "Kandinsky": "Kandinsky",
    "PixArt": "PixArt",
    "Wuerstchen": "Würstchen",
    "IF": "DeepFloyd IF",
}
"""By how the name of a pipeline's class begins."""
_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
_PLAIN_UNET = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "in_channels": 4,
    "out_channels": 4,
}
_PLAIN_VAE = {"_class_name": "AutoencoderKL", "latent_channels": 4, "shift_factor": None}
_NAMES = {
    ("addition_embed_type", "text_time"): "Stable Diffusion XL",
    ("addition_embed_type", "image"): "Kandinsky",
    ("addition_embed_type", "text_image"): "Kandinsky",
    ("in_channels", 5): "a model guided by depth",
    ("in_channels", 7): "an upscaler",
    ("in_channels", 8): "a model guided by a picture",
    ("in_channels", 9): "an inpainting model",
}
_CONVERT = (
    "Convert it with diffusers, StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER), and give that "
    "folder."
)
_COPY = "Copy all of the model's folder, with large files as they are and not as pointers of git-lfs."
_FLOATS = {"F16", "BF16", "F32", "F64"}
_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000
_END_BYTES = 4096
