"""The models of the library anomalib as detectors. Builds, fits and asks them; their methods stay in the library."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from pydantic import Field, PositiveInt, field_validator

from wsi_anomaly.detectors import anomalib_efficient_ad, anomalib_library
from wsi_anomaly.detectors.anomalib_library import library, quiet, seeded, weights_of
from wsi_anomaly.detectors.gathered import forget, gathered
from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.sampling import even_sample
from wsi_anomaly.detectors.training import fit_identity
from wsi_anomaly.detectors.weights import load_weights, save_weights, write_whole
from wsi_anomaly.devices import apply_in_chunks, resolve_device
from wsi_anomaly.errors import CohortError, ModelError, OptionsError
from wsi_anomaly.options import Options, nearest

FACTS = "anomalib.json"
FORMAT_VERSION = 1
MODELS = {
    "dfkde": "Dfkde",
    "dfm": "Dfm",
    "efficient_ad": "EfficientAd",
    "fastflow": "Fastflow",
    "fre": "Fre",
    "ganomaly": "Ganomaly",
    "padim": "Padim",
    "patchcore": "Patchcore",
    "reverse_distillation": "ReverseDistillation",
    "stfpm": "Stfpm",
}
"""Those that need nothing from the network but weights or pictures that files can hold. By our name, the class."""


class Anomalib(Options):
    """A model of the library anomalib: PaDiM, PatchCore, STFPM, EfficientAD, FastFlow, GANomaly and others.

    PaDiM has a normal for each place of a tile, and tissue has no places: on made-up tissue, with a backbone that has
    learnt nothing, it finds metastases but ranks necrosis, fibrosis and mucin below normal tiles. PatchCore ranks
    all of them above.
    """

    score_names: ClassVar[tuple[str, ...]] = ("anomalib",)
    paper: ClassVar[str] = "Akcay et al., ICIP 2022"
    licence_of: ClassVar[str] = "anomalib: Apache-2.0"
    extra: ClassVar[str] = "anomalib"
    needs: ClassVar[tuple[str, ...]] = ()
    caution: ClassVar[str] = "ranks tumour below normal tissue where the backbone has learnt nothing"

    model: str = "patchcore"
    backbone_weights: str = ""
    """A safetensors or PyTorch file with timm's weights of the model's backbone, or with the teacher of efficient_ad
    from anomalib. Without, these are random: nothing is fetched."""
    parameters: dict[str, bool | int | float | str | list[int | float | str]] = Field(default_factory=dict)
    """Of the library's class, such as backbone, coreset_sampling_ratio or, for efficient_ad, imagenet_dir: a folder of
    folders of pictures of anything but tissue, such as ImageNette, without which it does not learn."""
    image_px: PositiveInt = 256
    """Tiles are brought to this width and height."""
    epochs: PositiveInt = 10
    """For the models that learn; those that only remember go once over the tiles."""
    batch_size: PositiveInt = 16
    """How many tiles a model learns from at once; efficient_ad always takes one."""
    most_tiles: PositiveInt = 500
    """How many tiles are learnt from, evenly from all slides. PaDiM and PatchCore hold the features of all of them in
    memory: PaDiM with ResNet-18 about 2 MB for a tile of 256 px."""
    seed: int = Field(0, ge=0)
    """In a pipeline file, the pipeline's own where it is not given."""

    @field_validator("model")
    @classmethod
    def _is_there(cls, value: str) -> str:
        if value not in MODELS:
            raise ValueError(
                f"is none of anomalib's models that work here without the network ({nearest(value, list(MODELS))})"
            )
        return value

    def fit(self, tiles: TileSource, checkpoint: Path, *, device: str) -> None:
        """Fit the model to `tiles` and leave it in the folder `checkpoint`.

        An unfinished fit is begun anew, but its tiles are not read again.

        Raises:
            CohortError: there are fewer than two tiles.
            OptionsError: anomalib is not installed, the model has not those parameters, or the device does not exist.
            ModelError: the weights of the backbone are missing or damaged.
        """
        place = resolve_device(device)
        if len(tiles) < _FEWEST_TILES:
            raise CohortError(
                f"normal tiles to learn from: {len(tiles)}, needed: at least {_FEWEST_TILES}, better some hundreds. "
                "Add normal slides, or look at the tissue masks of those given."
            )
        identity = fit_identity(tiles, self.model_dump(mode="json") | {"backbone": _digest(self.backbone_weights)})
        if _facts(checkpoint).get("identity") == identity:
            return
        with seeded(self.seed), quiet():
            module = self._module(self.backbone_weights)
            if self.model == _EFFICIENT_AD:
                anomalib_efficient_ad.prepare(module, self.backbone_weights, image_px=self.image_px)
            fresh = _shapes(module.model)
            chosen = even_sample(tiles.slides, self.most_tiles, seed=self.seed)
            pixels = gathered(tiles, chosen, lambda batch: batch.pixels, folder=checkpoint, identity=identity)
            self._train(module, pixels, place)
        network = module.cpu().eval().model
        grown = {name: shape for name, shape in _shapes(network).items() if shape != fresh.get(name)}
        with torch.inference_mode():
            example = torch.zeros(1, 3, self.image_px, self.image_px)
            maps = network(example).anomaly_map is not None
        save_weights(network, checkpoint, self._architecture())
        facts = {"format_version": FORMAT_VERSION, "identity": identity, "grown": grown, "maps": maps}
        write_whole(checkpoint / FACTS, lambda file: file.write(json.dumps(facts, indent=1).encode()))
        forget(checkpoint)

    def load(self, checkpoint: Path, *, device: str) -> "AnomalibScorer | AnomalibLocalizer":
        """The model that `fit` left in `checkpoint`; a `Localizer` where it makes maps.

        Raises:
            ModelError: weights are missing, damaged, of another format or architecture.
            OptionsError: anomalib is not installed, or the device does not exist.
        """
        place = resolve_device(device)
        facts = _facts(checkpoint)
        if facts.get("format_version") != FORMAT_VERSION:
            raise ModelError(
                f"{checkpoint / FACTS}: is missing, damaged or of another version: the model is of another detector, "
                "its fit was not finished, or not all of it was copied. Copy it again, or fit it anew."
            )
        with seeded(self.seed), quiet():
            module = self._module("")
        _grow(module.model, facts["grown"])
        load_weights(module.model, checkpoint, self._architecture())
        scorer = AnomalibScorer(module.eval().to(place), place)
        return AnomalibLocalizer(scorer) if facts["maps"] else scorer

    def _train(self, module: Any, pixels: UInt8[np.ndarray, "tile y x rgb"], place: torch.device) -> None:  # noqa: ANN401
        if self.model == _EFFICIENT_AD:
            anomalib_efficient_ad.train(module, pixels, place, epochs=self.epochs)
            return
        try:
            anomalib_library.train(module, pixels, place, epochs=self.epochs, batch_size=self.batch_size)
        except RuntimeError as error:
            if "shapes" not in str(error):
                raise
            raise OptionsError(
                f"[detector] model '{self.model}' does not fit tiles of {self.image_px} px ({error}). Give image_px "
                "another value or, where the model has it, the parameter input_dim that of the features: the second "
                "number of the first shape."
            ) from error

    def _architecture(self) -> dict[str, Any]:
        options = {"model": self.model, "image_px": self.image_px, "parameters": self.parameters}
        return {"detector": "anomalib", **options}

    def _module(self, backbone_weights: str) -> Any:  # noqa: ANN401 - the library is not always there to be known
        """The library's Lightning module.

        Raises:
            OptionsError: anomalib is not installed, or the model has not those parameters.
        """
        build = getattr(library("anomalib.models.image"), MODELS[self.model])
        prepare = build.configure_pre_processor((self.image_px, self.image_px))
        try:
            with weights_of(backbone_weights):
                return build(
                    **self.parameters, pre_processor=prepare, post_processor=False, evaluator=False, visualizer=False
                )
        except (TypeError, ValueError) as error:
            raise OptionsError(
                f"[detector] model '{self.model}' cannot be built of these parameters: {error}. "
                "See the documentation of anomalib for those that it has."
            ) from error


@dataclass(frozen=True, slots=True)
class AnomalibScorer:
    """A fitted model of anomalib. The scores of a tile do not depend on the other tiles of its batch."""

    module: Any
    device: torch.device

    def score(self, batch: TileBatch) -> Float32[np.ndarray, "tile 1"]:
        """The model's score, before the library would bring it to the range of its validation pictures."""
        scores = apply_in_chunks(lambda images: self.answer(images).pred_score, batch.pixels, self.device)
        return scores.reshape(len(batch), 1).astype(np.float32)

    def answer(self, images: Float32[torch.Tensor, "tile rgb y x"]) -> Any:  # noqa: ANN401 - the library's
        """What the model says of tiles with intensities in [0, 1]."""
        # Some models look at their features in the order of memory.
        return self.module.model(self.module.pre_processor(images.contiguous()))


@dataclass(frozen=True, slots=True)
class AnomalibLocalizer:
    """A fitted model of anomalib that also says where in the tile."""

    scorer: AnomalibScorer

    def score(self, batch: TileBatch) -> Float32[np.ndarray, "tile 1"]:
        """The model's score, before the library would bring it to the range of its validation pictures."""
        return self.scorer.score(batch)

    def score_map(self, batch: TileBatch) -> Float32[np.ndarray, "tile y x"]:
        """The model's map, brought to the size of the tile; most models score a tile by the highest value of it."""
        size = batch.pixels.shape[1:3]

        def resized(images: Float32[torch.Tensor, "tile rgb y x"]) -> Float32[torch.Tensor, "tile y x"]:
            maps = self.scorer.answer(images).anomaly_map.float()
            maps = maps.reshape(len(images), 1, *maps.shape[-2:])
            return torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)[:, 0]

        return apply_in_chunks(resized, batch.pixels, self.scorer.device)


def _grow(network: torch.nn.Module, shapes: Mapping[str, list[int]]) -> None:
    """Bring buffers to these shapes: memory banks are as large as what they remember."""
    buffers = dict(network.named_buffers())
    for name in shapes.keys() & buffers.keys():  # weights of another model are refused when they are loaded
        owner, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(owner), attribute, torch.zeros(shapes[name], dtype=buffers[name].dtype))


def _shapes(network: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def _digest(path: str) -> str:
    """Of the file's bytes; nothing for no file.

    Raises:
        ModelError: there is no such file.
    """
    if not path:
        return ""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}). Give the path of a file with timm's weights as "
            "backbone_weights under [detector] of the pipeline file."
        ) from error


def _facts(folder: Path) -> dict[str, Any]:
    """What the fit noted beside the weights; nothing where it is missing or damaged."""
    try:
        return dict(json.loads((folder / FACTS).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


_EFFICIENT_AD = "efficient_ad"
_FEWEST_TILES = 2
