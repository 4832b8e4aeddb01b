"""AnoPILaD: what a latent diffusion network, steered by a tile's own keywords, cannot rebuild as normal is abnormal.

Kim et al., "AnoPILaD" (MICCAI 2025): Stable Diffusion, taught normal tissue by LoRA, noises the latents of a tile and
takes the noise away under the prompt of the five keywords nearest to the tile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field, PrivateAttr
from scipy.special import ndtr

from wsi_anomaly.detectors.diffusion.backbone import Backbone, digest, load_backbone
from wsi_anomaly.detectors.diffusion.base_files import DEFAULT_BASE
from wsi_anomaly.detectors.diffusion.latent import LatentDiffusion, Precision
from wsi_anomaly.detectors.diffusion.latents import LatentCache, latent_cache, posterior_moments
from wsi_anomaly.detectors.diffusion.learner import DiffusionLearner, DiffusionTrainingOptions, Draws
from wsi_anomaly.detectors.diffusion.lora import LORA_WEIGHTS, LoraOptions, add_lora, load_lora, save_lora
from wsi_anomaly.detectors.diffusion.noise import GaussianNoise, tile_noise
from wsi_anomaly.detectors.diffusion.restoring import Restorer
from wsi_anomaly.detectors.diffusion.samplers import Plms, SamplerOptions
from wsi_anomaly.detectors.diffusion.scoring import SEEN, DiffusionScorer, ScoreName, judging, names_of
from wsi_anomaly.detectors.diffusion.training import train_steps
from wsi_anomaly.detectors.diffusion.walk_norms import WalkNormOptions, WalkNorms
from wsi_anomaly.detectors.perceptual import Lpips, load_lpips, note_lpips, require_noted
from wsi_anomaly.detectors.protocol import Perception, Prompt, TileBatch, TileSource
from wsi_anomaly.detectors.residuals import mse
from wsi_anomaly.detectors.training import fit_identity
from wsi_anomaly.detectors.weights import read_digest, write_digest
from wsi_anomaly.devices import CHUNK_TILES, resolve_device
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.options import Options

BASE = "base.json"
"""Beside the adapter: the digest of the base that it was taught on."""
PORTION_CUDA = 64
"""How many tiles a CUDA device restores at once, unless its memory is too small."""


class AnoPiladTraining(DiffusionTrainingOptions):
    """How the adapter learns."""

    caption_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of tiles that are learnt under the empty prompt; what guidance needs. The released code: 0.4."""
    input_perturbation: float = Field(0.0, ge=0)
    """Further noise on the network's input that it is not to predict. The released code: 0.1."""


class AnoPilad(Options):
    """Latent diffusion under each tile's own keywords: what it cannot rebuild as normal is abnormal."""

    paper: ClassVar[str] = "Kim et al., MICCAI 2025"
    needs: ClassVar[tuple[str, ...]] = ("prompts", "GPU")
    caution: ClassVar[str] = "mse_latent and mse_pixel can rank tumour below normal tissue"
    licence_of: ClassVar[str] = "Stable Diffusion 1.x: CreativeML Open RAIL-M; CONCH: CC BY-NC-ND 4.0"

    base: str = Field(DEFAULT_BASE, min_length=1)
    """A Stable Diffusion 1.x or 2.x: a folder as diffusers saves it, a repository of the hub, or what comes with the
    package ("shipped:lymph-node-small/base")."""
    timesteps: tuple[int, ...] = Field((674,), min_length=1)
    """How much noise is added; one walk for each, and one column of scores."""
    sampler: SamplerOptions = Plms()
    guidance: float = Field(1.0, ge=1)
    """1 is none. Above, the network is asked twice, and moved away from what the empty prompt gives."""
    scores: tuple[ScoreName, ...] = Field(("mse_latent",), min_length=1)
    msma: WalkNormOptions = WalkNormOptions()
    """Of the score `msma`."""
    lpips_weights: str = ""
    """The weights of VGG16 and of LPIPS, for the score `lpips`: a file with all of them, or a folder."""
    precision: Precision = "fp16"
    """Of the network on CUDA; a CPU computes in fp32."""
    compiled: bool = False
    """Whether the network is compiled on CUDA: some minutes at the start, faster after."""
    lora: LoraOptions = LoraOptions()
    training: AnoPiladTraining = AnoPiladTraining()
    _offline: bool = PrivateAttr(default=False)
    _perceive: Callable[[], Perception] | None = PrivateAttr(default=None)

    @property
    def score_names(self) -> tuple[str, ...]:
        """Each score at each starting timestep."""
        return names_of(self.scores, self.timesteps)

    def on_base(self, place: str, *, offline: bool) -> "AnoPilad":
        """The same detector with its base at another place; `offline` forbids to fetch it."""
        moved = self.model_copy(update={"base": place or self.base})
        moved._offline = offline  # noqa: SLF001 - a copy of its own class
        return moved

    def perceiving(self, load: Callable[[], Perception]) -> "AnoPilad":
        """The same detector with the image-text model that the scores `embedding` and `keyword_shift` are made with."""
        told = self.model_copy()
        told._perceive = load  # noqa: SLF001 - a copy of its own class
        return told

    def fit(self, tiles: TileSource, checkpoint: Path, *, device: str) -> None:
        """Teach the base normal tissue, each tile under its own prompt, and leave the adapter in `checkpoint`.

        Goes on from an unfinished fit with the same options, base and tiles.

        Raises:
            ModelError: the base cannot be had or is of another family, weights for LPIPS are missing, or training
                diverged.
            OptionsError: the device does not exist or has too little memory for one tile, a start is not within the
                base's schedule, or the tiles have no prompts.
            CohortError: there are too few tiles.
        """
        norms, place = self._norms(), resolve_device(device)
        norms.require(tiles)
        self._learn(tiles, checkpoint, device)
        norms.fit(tiles, checkpoint, lambda: self._restorer(self._trained(checkpoint, place), place))

    def _learn(self, tiles: TileSource, checkpoint: Path, device: str) -> None:
        place = resolve_device(device)
        base_digest = digest(self.base, offline=self._offline)
        backbone = load_backbone(self.base, offline=self._offline)
        # Frozen weights stay in full precision; accelerate computes in the precision of the training options.
        network = LatentDiffusion(backbone, place, precision="fp32", guidance=1.0)
        self._require_starts(network)
        lpips = self._lpips(place)
        add_lora(backbone.unet, self.lora, seed=self.training.seed)
        side_px = tiles.read(np.array([0])).pixels.shape[1] if len(tiles) else 0
        side = side_px // backbone.downsampling
        shape = (backbone.vae.config.latent_channels, side, side)
        with latent_cache(checkpoint, shape, tiles=len(tiles), identity=_seen(tiles, base_digest)) as cache:
            lesson = _Lesson(network, self.training, tiles, cache, place)
            learner = DiffusionLearner(
                network=backbone.unet,
                timesteps=len(network.schedule),
                loss=lesson.loss,
                # Anew for each picture: a scorer remembers what it made of the same tiles before.
                rebuild=lambda batch: self._scorer(network, place, lpips).reconstruct(batch),
                save=partial(_save, backbone, base_digest),
                weights=LORA_WEIGHTS,
                recipe={"base": base_digest, "lora": self.lora.model_dump(mode="json")},
                read=lesson.read,
            )
            train_steps(learner, tiles, self.training, folder=checkpoint, device=device)
        note_lpips(lpips, checkpoint)

    def load(self, checkpoint: Path, *, device: str) -> DiffusionScorer:
        """The scorer whose adapter `fit` left in `checkpoint`, on the base that it was taught on.

        Raises:
            ModelError: the adapter is missing, damaged or newer, or base or LPIPS are missing, or not those of the fit.
            OptionsError: the device does not exist, or a start is not within the base's schedule.
        """
        place = resolve_device(device)
        network = self._trained(checkpoint, place)
        if lpips := self._lpips(place):
            require_noted(lpips, checkpoint, weights=self.lpips_weights)
        return judging(self._scorer(network, place, lpips), self._norms().load(checkpoint))

    def _trained(self, checkpoint: Path, place: torch.device) -> LatentDiffusion:
        """The base with the adapter, for scoring."""
        _require_base(checkpoint, digest(self.base, offline=self._offline))
        backbone = load_backbone(self.base, offline=self._offline)
        load_lora(backbone.unet, checkpoint, fuse=True)
        backbone.unet.fuse_qkv_projections()
        network = LatentDiffusion(backbone, place, precision=self.precision, guidance=self.guidance)
        if self.compiled and place.type == "cuda":
            network.compile()
        return network

    def _lpips(self, place: torch.device) -> Lpips | None:
        return load_lpips(self.lpips_weights, device=place) if "lpips" in self.scores else None

    def _norms(self) -> WalkNorms:
        walk = {"sampler": self.sampler.model_dump_json(), "guidance": f"{self.guidance:g}"}
        wanted, seed = "msma" in self.scores, self.training.seed
        return WalkNorms("anopilad", wanted, self.msma, walk, self.timesteps, weights=LORA_WEIGHTS, seed=seed)

    def _scorer(self, network: LatentDiffusion, place: torch.device, lpips: Lpips | None) -> DiffusionScorer:
        return DiffusionScorer(self._restorer(network, place), self.scores, lpips, self._perception())

    def _restorer(self, network: LatentDiffusion, place: torch.device) -> Restorer:
        return Restorer(
            network,
            self.sampler,
            self.timesteps,
            make_noise=GaussianNoise(),
            device=place,
            portion=PORTION_CUDA if place.type == "cuda" else CHUNK_TILES,
            check=_require_prompts,
        )

    def _perception(self) -> Perception | None:
        if not set(self.scores) & set(SEEN):
            return None
        if self._perceive is None:
            raise OptionsError(
                f"the scores {' and '.join(SEEN)} of 'anopilad' compare tiles as the image-text model sees them, and "
                "there is none. Add a table [prompt] to the pipeline file."
            )
        return self._perceive()

    def _require_starts(self, network: LatentDiffusion) -> None:
        for start in self.timesteps:
            self.sampler.trajectory(network.schedule, start)


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What is asked of the network in training: the noise in noised latents, under the tile's own prompt."""

    network: LatentDiffusion
    options: AnoPiladTraining
    tiles: TileSource
    cache: LatentCache
    device: torch.device

    def read(self, positions: Int64[np.ndarray, " tile"]) -> TileBatch:
        """Tiles without pixels (each of 0 x 0 px) once the cache knows all of these: they are slow to read."""
        prompts = self.cache.prompts(positions)
        if prompts is None:
            batch = self.tiles.read(positions)
            _require_prompts(batch)
            return batch
        return TileBatch(np.zeros((len(positions), 0, 0, 3), np.uint8), np.zeros(len(positions), np.uint64), prompts)

    def loss(
        self, batch: TileBatch, positions: Int64[np.ndarray, " tile"], draws: Draws
    ) -> Float[torch.Tensor, " tile"]:
        """The mean squared error of each tile (Ho et al., "Denoising Diffusion Probabilistic Models", eq. 14)."""
        clean = self._latents(batch, positions, draws)
        noise = self._noise(draws, clean, _ADDED)
        given = noise + self.options.input_perturbation * self._noise(draws, clean, _PERTURBING)
        timesteps = torch.from_numpy(draws.timesteps).to(self.device)
        noised = self.network.schedule.noised(clean, given, timesteps)
        texts = self.network.condition(self._captions(batch, draws))
        output = self.network.unet(noised, timesteps, encoder_hidden_states=texts, return_dict=False)[0].float()
        return mse(output, self.network.schedule.target(clean, noise, timesteps))

    def _latents(
        self, batch: TileBatch, positions: Int64[np.ndarray, " tile"], draws: Draws
    ) -> Float[torch.Tensor, "tile channel y_latent x_latent"]:
        """Drawn from the VAE's posterior, whose mean and deviation are computed once."""

        def encode(missing: Int64[np.ndarray, " missing"]) -> np.ndarray:
            # Without pixels where the cache knew the tiles a moment ago, and the disk has failed since.
            pixels = batch.pixels[missing] if batch.pixels.size else self.tiles.read(positions[missing]).pixels
            return posterior_moments(self.network.vae, pixels, self.device)

        mean, deviation = np.moveaxis(self.cache.moments(positions, batch.prompts, encode), 1, 0)
        drawn = mean + deviation * tile_noise(draws.seeds, mean.shape[1:], draw=_POSTERIOR)
        return torch.from_numpy(drawn).to(self.device)

    def _captions(self, batch: TileBatch, draws: Draws) -> tuple[Prompt, ...]:
        """The tiles' prompts, some of them left out."""
        if not self.options.caption_dropout:
            return batch.prompts
        lots = ndtr(tile_noise(draws.seeds, (1,), draw=_DROPPING)[:, 0])  # a normal value's share is even in [0, 1]
        kept = zip(batch.prompts, lots >= self.options.caption_dropout, strict=True)
        return tuple(prompt if keep else () for prompt, keep in kept)

    def _noise(self, draws: Draws, like: torch.Tensor, draw: int) -> torch.Tensor:
        return torch.from_numpy(tile_noise(draws.seeds, tuple(like.shape[1:]), draw=draw)).to(self.device)


def _seen(tiles: TileSource, base_digest: str) -> str:
    """Stands for what latents and prompts are made of; looks at the first and the last tile, as `fit_identity` does."""
    if not len(tiles):
        return ""
    ends = tiles.read(np.array([0, len(tiles) - 1])).prompts
    return fit_identity(tiles, {"vae": base_digest, "prompts": ends})


def _save(backbone: Backbone, base_digest: str, folder: Path) -> None:
    save_lora(backbone.unet, folder)
    write_digest(folder / BASE, base_digest)


def _require_base(checkpoint: Path, found: str) -> None:
    wanted = read_digest(checkpoint / BASE)
    if wanted != found:
        raise ModelError(
            f"{checkpoint}: the base model here is not the one that the adapter was taught on (sha256 {found[:12]} "
            f"instead of {wanted[:12]}). Give the place of the right one with --base-weights, or fit again."
        )


def _require_prompts(batch: TileBatch) -> None:
    """A described tile may have an empty prompt; but tiles that nobody described are a mistake."""
    if len(batch) and not any(batch.prompts) and batch.embeddings is None:
        raise OptionsError(
            "the detector 'anopilad' needs the prompt of each tile, and there is none. Add a table [prompt] to the "
            "pipeline file; for a single stage run: wsi-anomaly prompt"
        )


_POSTERIOR, _ADDED, _PERTURBING, _DROPPING = range(4)
"""Draws of one tile in one step that must differ."""
