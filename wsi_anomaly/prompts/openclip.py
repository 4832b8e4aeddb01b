"""Image-text models that open_clip can load, and CLIP models of transformers: from what a user writes to their files.

All that a model consists of is found on this machine, or fetched, before a library is asked to load it, and libraries
get paths only. So the digest is of the very files that are loaded, and nothing but the fetching can need a network.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from wsi_anomaly.devices import resolve_device
from wsi_anomaly.errors import ModelError
from wsi_anomaly.options import Options, nearest
from wsi_anomaly.prompts import transformers_clip
from wsi_anomaly.prompts.clip_embedder import ClipEmbedder
from wsi_anomaly.prompts.model_files import TOKENIZER_FILES, VOCABULARIES, fetched, matching, read_table
from wsi_anomaly.prompts.openclip_model import OpenClipModel

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
"""As open_clip names them, in order of preference."""

_FURTHER_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""In a folder of the user's own, open_clip takes these too. In a repository they belong to transformers."""
_ANY_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
_BESIDE = (CONFIG, transformers_clip.PREPROCESSING, *TOKENIZER_FILES)
_HUB = "hf-hub:"
_FOLDERS = ("local-dir:", "transformers:")

_ModelFiles = OpenClipModel | transformers_clip.TransformersClip


class OpenClip(Options):
    """A model of open_clip, or a CLIP model of transformers."""

    model: str
    """Of open_clip: "hf-hub:wisdomik/QuiltNet-B-32", "local-dir:/path" with the files of such a repository, or
    "ViT-B-32" with `pretrained`. Of transformers: "vinid/plip", or "transformers:/path"."""
    pretrained: str = ""
    """Which weights, for models that open_clip knows by name: "laion2b_s34b_b79k"."""
    weights: str = ""
    """The folder with the model's files, or `hf-hub:` and a repository, where they lie elsewhere than `model` says."""

    def at(self, place: str) -> "OpenClip":
        """The same model with its files in another folder, or in another repository of the hub."""
        return self.model_copy(update={"weights": place})

    def digest(self, *, offline: bool) -> str:
        """A sha256 of weights, config and tokenizer. Not of where they lie.

        Raises:
            ModelError: a file is missing, gated or cannot be fetched.
        """
        return self._files(offline=offline).digest()

    def load(self, *, device: str, offline: bool) -> ClipEmbedder:
        """The model, ready to embed. With `offline` nothing is asked of the network.

        Raises:
            ModelError: a file is missing, gated, damaged or of another architecture.
            OptionsError: the device does not exist.
        """
        place = resolve_device(device)
        return self._files(offline=offline).load(place)

    def _files(self, *, offline: bool) -> _ModelFiles:
        kind, colon, rest = self.model.partition(":")
        if not colon:
            return self._by_name(offline=offline)
        if not rest or f"{kind}:" not in {_HUB, *_FOLDERS}:
            raise ModelError(
                f"model '{self.model}' cannot be understood. Write 'hf-hub:owner/name' or 'local-dir:/path/to/folder' "
                "for models of open_clip, 'owner/name' or 'transformers:/path/to/folder' for CLIP models of "
                "transformers."
            )
        if self.pretrained:
            raise ModelError(
                f"pretrained = '{self.pretrained}' is for models that open_clip knows by name, and '{self.model}' "
                "brings its own weights. Leave pretrained out."
            )
        place = self.weights or self.model
        find = _of_transformers if kind == "transformers" else _by_config
        return find(place, offline=offline)

    def _by_name(self, *, offline: bool) -> _ModelFiles:
        import open_clip

        name, known = self.model.replace("/", "-"), open_clip.list_models()  # ViT-B/32 is an old way to write ViT-B-32
        if name in known:
            return _by_tag(name, self.pretrained, self.weights, offline=offline)
        if self.model and Path(self.model).expanduser().is_dir():
            raise ModelError(
                f"model '{self.model}': say whose files lie in that folder: 'local-dir:{self.model}' for a model of "
                f"open_clip, 'transformers:{self.model}' for a CLIP model of transformers."
            )
        if "/" not in self.model or self.pretrained:
            near = ", ".join(get_close_matches(self.model, known, cutoff=0))
            raise ModelError(
                f"open_clip knows no model '{self.model}' (nearest: {near}). Models of the Hugging Face hub are "
                "written 'hf-hub:owner/name', or 'owner/name' without pretrained for CLIP models of transformers."
            )
        return _of_transformers(self.weights or f"{_HUB}{self.model}", offline=offline)


def _of_transformers(place: str, *, offline: bool) -> transformers_clip.TransformersClip:
    advice = "A folder of your own is given as model = 'transformers:/path/to/folder'."
    return transformers_clip.transformers_clip(_folder(place, transformers_clip.NEEDED, advice, offline=offline))


def _by_config(place: str, *, offline: bool) -> OpenClipModel:
    """A model that is described by a file beside its weights."""
    advice = "A folder of your own is given as model = 'local-dir:/path/to/folder'."
    folder = _folder(place, ((CONFIG,), WEIGHTS), advice, offline=offline)
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder}: is no folder of a model of open_clip, which has a file {CONFIG}. Check the path, or copy all "
            "files of the model's repository into it. CLIP models of transformers are written 'transformers:/path'."
        )
    table = read_table(folder / CONFIG)
    config = table.get("model_cfg")
    if not isinstance(config, dict) or not all(
        isinstance(config.get(part), dict) for part in ("vision_cfg", "text_cfg")
    ):
        raise ModelError(
            f"{folder / CONFIG}: describes no image-text model, which has model_cfg with vision_cfg and text_cfg. "
            "Choose another model, or copy the file anew."
        )
    return _complete(config, table.get("preprocess_cfg") or {}, _weights_in(folder, WEIGHTS), offline=offline)


def _by_tag(name: str, tag: str, place: str, *, offline: bool) -> OpenClipModel:
    """A model that open_clip describes itself; `place` is where its weights lie, if not where open_clip says."""
    import open_clip
    from open_clip.transform import merge_preprocess_dict

    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tag:
        raise ModelError(
            f"model '{name}' is an architecture; say which weights with pretrained = one of: {', '.join(tags)}."
        )
    source = open_clip.get_pretrained_cfg(name, tag)
    if not source:
        raise ModelError(f"open_clip has no weights '{tag}' for its model '{name}' ({nearest(tag, tags)}).")
    repository, _, file = source["hf_hub"].rpartition("/")
    names = (str(Path(file).with_suffix(".safetensors")), file) if file else WEIGHTS
    advice = "A folder of your own is given as weights = '/path/to/folder'."
    folder = _folder(place or f"{_HUB}{repository}", (names,), advice, offline=offline)
    config = open_clip.get_model_config(name)
    if source.get("quick_gelu"):  # open_clip only warns, and computes with another activation than was trained
        config["quick_gelu"] = True
    return _complete(config, merge_preprocess_dict({}, source), _weights_in(folder, names), offline=offline)


def _folder(place: str, needed: Sequence[Sequence[str]], advice: str, *, offline: bool) -> Path:
    """Where a model's files lie on this machine."""
    if place.startswith(_HUB):
        return fetched(place.removeprefix(_HUB), needed=needed, beside=_BESIDE, advice=advice, offline=offline)
    for prefix in _FOLDERS:
        place = place.removeprefix(prefix)
    return Path(place).expanduser()


def _weights_in(folder: Path, names: tuple[str, ...]) -> Path:
    """The file that open_clip would take, or the only one there is."""
    known = matching(folder, (*names, *WEIGHTS, *_FURTHER_WEIGHTS))
    weights = known or matching(folder, _ANY_WEIGHTS)
    if not weights:
        raise ModelError(f"{folder}: has no weights. Copy {' or '.join(names)} of the model's repository into it.")
    if not known and len(weights) > 1:
        raise ModelError(
            f"{folder}: which weights? There are {', '.join(path.name for path in weights)}. Rename the one to use: "
            f"{WEIGHTS[0]}, or {WEIGHTS[2]} if it is a pickle."
        )
    return weights[0]


def _complete(config: dict[str, Any], preprocessing: dict[str, Any], weights: Path, *, offline: bool) -> OpenClipModel:
    """The model with what its config refers to by the name of another repository."""
    folder, text, tower = weights.parent, config["text_cfg"], str(config["vision_cfg"].get("timm_model_name") or "")
    if ":" in tower:
        raise ModelError(
            f"{folder}: its image tower is '{tower}', in yet another repository. Such models are not supported."
        )
    tokenizer = text_tower = None
    if name := text.get("hf_tokenizer_name"):
        own = bool(matching(folder, VOCABULARIES))
        tokenizer = folder if own else _referred(folder, name, VOCABULARIES, offline=offline)
    if name := text.get("hf_model_name"):
        text_tower = _referred(folder, name, ("config.json",), offline=offline)
    return OpenClipModel(config, preprocessing, weights, tokenizer, text_tower)


def _referred(folder: Path, name: str, files: tuple[str, ...], *, offline: bool) -> Path:
    """The folder of a repository that a model refers to: below the model's own folder, or from the hub."""
    if matching(folder / name, files):
        return folder / name
    advice = f"It belongs to the model in {folder}. In a folder of your own, put its files at {folder / name}."
    return fetched(name, needed=(files,), beside=_BESIDE, advice=advice, offline=offline)
