"""Teach a small Stable Diffusion from nothing: first its VAE, then UNet and text encoder. Draws no tiles.

    python training/diffusion.py vae --tiles FOLDER --out FOLDER [--steps 6000] [--batch-size 16] [...]
    python training/diffusion.py base --tiles FOLDER --vae FOLDER --out FOLDER [--steps 12000] [--half] [...]

Both: [--start FOLDER] [--learning-rate 1e-3] [--seed 0] [--device auto] [--size small|tiny]. --start goes on from
what a finished training left. Each tile is learnt under its own prompt, one in ten under none.
A killed training goes on when the command is run again. OUT of `vae` gets the VAE, its history and pictures; OUT of
`base` gets a whole folder of diffusers, with --half in half precision, and OUT/training history and pictures: loss.png,
and samples.png with some tiles as the model restores them from noise.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from shutil import copyfileobj
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from rich.console import Console
from safetensors.torch import load_file, save
from scipy.special import ndtr
from vae import COLOUR_WEIGHT, Latents, PerTile, Size, learn_vae, load_vae, vae_digest

from wsi_anomaly.torchvision_shim import make_importable

make_importable()

from diffusers import UNet2DConditionModel  # noqa: E402
from tiles import LessonTiles  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from wsi_anomaly.detectors.diffusion.backbone import Backbone, digest, load_backbone, quiet_libraries, write_backbone  # noqa: E402
from wsi_anomaly.detectors.diffusion.latent import LatentDiffusion  # noqa: E402
from wsi_anomaly.detectors.diffusion.latents import LatentCache, latent_cache, posterior_moments  # noqa: E402
from wsi_anomaly.detectors.diffusion.learner import DiffusionLearner, DiffusionTrainingOptions, Draws  # noqa: E402
from wsi_anomaly.detectors.diffusion.noise import GaussianNoise, tile_noise  # noqa: E402
from wsi_anomaly.detectors.diffusion.random_backbone import random_backbone  # noqa: E402
from wsi_anomaly.detectors.diffusion.restoring import Restorer  # noqa: E402
from wsi_anomaly.detectors.diffusion.samplers import UniPc  # noqa: E402
from wsi_anomaly.detectors.diffusion.schedule import NoiseSchedule  # noqa: E402
from wsi_anomaly.detectors.diffusion.scoring import DiffusionScorer  # noqa: E402
from wsi_anomaly.detectors.diffusion.training import train_steps  # noqa: E402
from wsi_anomaly.detectors.protocol import Prompt, TileBatch, TileSource  # noqa: E402
from wsi_anomaly.detectors.residuals import mse  # noqa: E402
from wsi_anomaly.detectors.training import fit_identity  # noqa: E402
from wsi_anomaly.detectors.weights import write_whole  # noqa: E402
from wsi_anomaly.devices import CHUNK_TILES, resolve_device  # noqa: E402
from wsi_anomaly.errors import WsiAnomalyError  # noqa: E402
from wsi_anomaly.options import parse_options  # noqa: E402
from wsi_anomaly.prompts.building import JOINER, PREFIX  # noqa: E402
from wsi_anomaly.prompts.keywords import load_keywords, load_templates  # noqa: E402
from wsi_anomaly.synthetic.vocabulary import vocabulary  # noqa: E402

KEYWORDS = "lymph_node"
CAPTION_DROPOUT = 0.1
"""Share of tiles that are learnt under the empty prompt, which guidance and weights of prompts start from."""
SHOWN_FROM_T = 674


def main(arguments: Sequence[str] | None = None) -> None:
    """Learn, and leave the model."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("wsi_anomaly").setLevel(logging.INFO)
    try:
        tiles, options = LessonTiles(given.tiles), _options(given)
        if given.part == "vae":
            how = {"size": given.size, "start": given.start, "colour_weight": given.colour_weight}
            learn_vae(tiles, given.out, options, **how, device=given.device)
        else:
            learn_base(tiles, given.vae, given.out, options, size=given.size, start=given.start, device=given.device)
            publish(given.out / "training" / "model", given.out, half=given.half)
    except WsiAnomalyError as error:
        raise SystemExit(f"error: {error}") from error
    Console().print(f"The model is in {given.out}", highlight=False)


def learn_base(
    tiles: TileSource,
    vae: Path,
    out: Path,
    options: DiffusionTrainingOptions,
    *,
    size: Size = "small",
    start: Path | None = None,
    device: str,
) -> None:
    """Teach UNet and text encoder, new ones or those of a base, on the latents of a VAE.

    They are left, with the VAE, in `out`/training/model.

    That is a whole folder of diffusers. Goes on from an unfinished training with the same arguments and tiles; a
    finished one is left as it is.

    Raises:
        CohortError: there are no tiles.
        OptionsError: the device does not exist or has too little memory for one tile.
        ModelError: there is no VAE, no base at `start`, or training diverged.
    """
    place, folder = resolve_device(device), out / "training"
    beginning = load_backbone(str(start), offline=True) if start else _new_backbone(size, seed=options.seed)
    backbone = replace(beginning, vae=load_vae(vae))
    network = LatentDiffusion(backbone, place, precision="fp32", guidance=1.0)
    ends = tiles.read(np.array([0, len(tiles) - 1]))
    sizes = {"unet": _SIZES[size], "text_encoder": _TEXT_ENCODER, "vocabulary": backbone.tokenizer.get_vocab()}
    if start:
        sizes |= {"start": digest(str(start), offline=True)}
    recipe = {**sizes, "vae": vae_digest(vae), "dropout": CAPTION_DROPOUT, "prompts": ends.prompts}
    side = ends.pixels.shape[1] // backbone.downsampling
    shape = (backbone.vae.config.latent_channels, side, side)
    with latent_cache(folder, shape, tiles=len(tiles), identity=fit_identity(tiles, recipe)) as cache:
        predictor = _Predictor(backbone.unet, backbone.text_encoder).requires_grad_().train()
        lesson = _Lesson(predictor, backbone, network.schedule, tiles, cache, place)
        learner = DiffusionLearner(
            network=predictor,
            timesteps=len(network.schedule),
            loss=lesson.loss,
            rebuild=lesson.restored,
            save=lambda place: write_backbone(backbone, place / "model"),
            weights=_UNET_WEIGHTS,
            recipe=recipe,
            read=lesson.read,
        )
        train_steps(learner, tiles, options, folder=folder, device=device)


def publish(model: Path, out: Path, *, half: bool) -> None:
    """Copy a finished model file by file, with `half` its weights in half precision."""
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        target = out / path.relative_to(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = _halved(path) if half and path.suffix == ".safetensors" else path.read_bytes()
        write_whole(target, partial(copyfileobj, BytesIO(content)))


class _Predictor(torch.nn.Module):
    """What is learnt: the UNet and the text encoder that it listens to."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(
        self, noised: Latents, timesteps: Int64[torch.Tensor, " tile"], tokens: Int64[torch.Tensor, "tile token"]
    ) -> Latents:
        """The noise in latents, under the texts of these tokens."""
        texts = self.text_encoder(tokens).last_hidden_state
        noise: torch.Tensor = self.unet(noised, timesteps, encoder_hidden_states=texts, return_dict=False)[0]
        return noise


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What is asked in each step: the noise in noised latents, under the tile's own prompt."""

    predictor: _Predictor
    backbone: Backbone
    schedule: NoiseSchedule
    tiles: TileSource
    cache: LatentCache
    device: torch.device

    def read(self, positions: Int64[np.ndarray, " tile"]) -> TileBatch:
        """Prompts alone (tiles of 0 x 0 px): pixels are only asked for where latents are not known yet."""
        prompts = self.cache.prompts(positions) or self.tiles.read(positions).prompts
        return TileBatch(np.zeros((len(positions), 0, 0, 3), np.uint8), np.zeros(len(positions), np.uint64), prompts)

    def loss(self, batch: TileBatch, positions: Int64[np.ndarray, " tile"], draws: Draws) -> PerTile:
        """The mean squared error of each tile (Ho et al., "Denoising Diffusion Probabilistic Models", eq. 14)."""
        clean = self._latents(batch, positions, draws)
        noise = torch.from_numpy(tile_noise(draws.seeds, tuple(clean.shape[1:]), draw=_ADDED)).to(self.device)
        timesteps = torch.from_numpy(draws.timesteps).to(self.device)
        noised = self.schedule.noised(clean, noise, timesteps)
        tokens = tokens_of(self.backbone.tokenizer, _some_dropped(batch.prompts, draws)).to(self.device)
        return mse(self.predictor(noised, timesteps, tokens), self.schedule.target(clean, noise, timesteps))

    def restored(self, batch: TileBatch) -> UInt8[np.ndarray, "tile y x rgb"]:
        """Tiles from much noise under their own prompts."""
        # Anew for each picture: it remembers texts as they were.
        network = LatentDiffusion(self.backbone, self.device, precision="fp32", guidance=1.0)
        restorer = Restorer(
            network, UniPc(), (SHOWN_FROM_T,), make_noise=GaussianNoise(), device=self.device, portion=CHUNK_TILES
        )
        return DiffusionScorer(restorer, ("mse_latent",)).reconstruct(batch)

    def _latents(self, batch: TileBatch, positions: Int64[np.ndarray, " tile"], draws: Draws) -> Latents:
        """Drawn from the VAE's posterior, whose mean and deviation are computed once."""

        def encode(missing: Int64[np.ndarray, " missing"]) -> np.ndarray:
            return posterior_moments(self.backbone.vae, self.tiles.read(positions[missing]).pixels, self.device)

        mean, deviation = np.moveaxis(self.cache.moments(positions, batch.prompts, encode), 1, 0)
        drawn = mean + deviation * tile_noise(draws.seeds, mean.shape[1:], draw=_POSTERIOR)
        return torch.from_numpy(drawn).to(self.device)


def tokens_of(tokenizer: CLIPTokenizer, prompts: Sequence[Prompt]) -> Int64[torch.Tensor, "tile token"]:
    """The fragments of each prompt as one text, without weights; filled up and cut as Stable Diffusion does."""
    texts = [" ".join(text for text, _ in prompt) for prompt in prompts]
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=_CONTEXT, return_tensors="pt")
    tokens: torch.Tensor = encoded.input_ids
    return tokens


def _some_dropped(prompts: Sequence[Prompt], draws: Draws) -> list[Prompt]:
    lots = ndtr(tile_noise(draws.seeds, (1,), draw=_DROPPING)[:, 0])  # a normal value's share is even in [0, 1]
    return [prompt if lot >= CAPTION_DROPOUT else () for prompt, lot in zip(prompts, lots, strict=True)]


def _texts() -> list[str]:
    """All words that prompts are made of."""
    keywords = load_keywords(KEYWORDS).texts(include_abnormal=True)
    names = [known.words for known in vocabulary().values()]
    return [PREFIX, JOINER, *keywords, *names, *(template.replace("{}", "") for template in load_templates())]


def _new_backbone(size: Size, *, seed: int) -> Backbone:
    """UNet and text encoder as layers are drawn, to be learnt."""
    small = random_backbone("tiny", texts=_texts())  # for its tokenizer and schedule
    marks = {f"{mark}_token_id": getattr(small.tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    text_config = CLIPTextConfig(**_TEXT_ENCODER, vocab_size=len(small.tokenizer), **marks)
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, text_encoder = UNet2DConditionModel(**_SIZES[size]), CLIPTextModel(text_config)
    return replace(small, unet=unet, text_encoder=text_encoder)


def _halved(path: Path) -> bytes:
    return save({name: tensor.half() for name, tensor in load_file(path).items()}, {"format": "pt"})


def _options(given: argparse.Namespace) -> DiffusionTrainingOptions:
    table = {
        "steps": given.steps,
        "batch_size": given.batch_size,
        "learning_rate": given.learning_rate,
        "learning_rate_decay": "cosine",
        "ema_decay": 0.999,
        "precision": "fp32",
        "save_every": 200,
        "picture_every": 1000,
        "seed": given.seed,
    }
    return parse_options(DiffusionTrainingOptions, table, where="command line")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, steps, batch_size in (("vae", 6_000, 16), ("base", 12_000, 32)):
        part = parts.add_parser(name)
        part.add_argument("--tiles", type=Path, required=True)
        part.add_argument("--out", type=Path, required=True)
        part.add_argument("--start", type=Path, help="go on from what this finished training left")
        part.add_argument("--learning-rate", type=float, default=1e-3)
        for flag, default in (("--steps", steps), ("--batch-size", batch_size), ("--seed", 0)):
            part.add_argument(flag, type=int, default=default)
        part.add_argument("--device", default="auto")
        part.add_argument("--size", choices=_SIZES, default="small")
    parts.choices["vae"].add_argument("--colour-weight", type=float, default=COLOUR_WEIGHT)
    part.add_argument("--vae", type=Path, required=True)
    part.add_argument("--half", action="store_true")
    return parser


_CONTEXT = 77
_UNET_WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"
_POSTERIOR, _ADDED, _DROPPING = range(3)
"""Draws of one tile in one step that must differ."""
_TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "projection_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": _CONTEXT,
}
_UNET: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": None,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 128,
}
_SIZES: dict[Size, dict[str, Any]] = {
    # Diffusers takes attention_head_dim for the number of heads: they are 8 and 16 wide.
    "small": _UNET | {"sample_size": 32, "block_out_channels": (24, 40, 80, 160), "attention_head_dim": 5},
    "tiny": _UNET | {"sample_size": 8, "block_out_channels": (8, 16, 16, 16), "attention_head_dim": 2},
}

if __name__ == "__main__":
    main()
