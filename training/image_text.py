"""Teach a small image-text model of CONCH's class which keywords are true of a tile. Draws no tiles.

    python training/image_text.py --tiles FOLDER --out FOLDER [--start FOLDER] [--steps 4000] [--learning-rate 1e-3]
                                  [--decay cosine|none] [--batch-size 48] [--seed 0] [--device auto]

Every keyword of the list is asked of every tile, in one of the templates at a time, and the answer is known, since the
tiles were made: the sigmoid loss of Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (ICCV 2023), with more
than one true text a tile. Tiles are turned, moved, enlarged and stained anew, so that real ones are no strangers.

A killed training goes on when the command is run again. OUT gets the model (weights in half precision), OUT/training
the history and pictures: loss.png, and samples.png with some tiles as the model sees them.
"""

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiles import LessonTiles
from torch.nn import functional

from wsi_anomaly.torchvision_shim import make_importable

make_importable()

from diffusers.models.embeddings import get_2d_sincos_pos_embed  # noqa: E402

from wsi_anomaly.detectors.diffusion.learner import DiffusionLearner, DiffusionTrainingOptions, Draws  # noqa: E402
from wsi_anomaly.detectors.diffusion.training import train_steps  # noqa: E402
from wsi_anomaly.detectors.protocol import TileBatch  # noqa: E402
from wsi_anomaly.devices import intensities, resolve_device, to_pixels  # noqa: E402
from wsi_anomaly.errors import WsiAnomalyError  # noqa: E402
from wsi_anomaly.prompts.conch import Conch, ConchEmbedder, normalised  # noqa: E402
from wsi_anomaly.prompts.conch_network import ConchNetwork, ConchSizes  # noqa: E402
from wsi_anomaly.prompts.conch_random import write_random_conch  # noqa: E402
from wsi_anomaly.prompts.keywords import load_keywords, load_templates  # noqa: E402
from wsi_anomaly.synthetic import keywords_of  # noqa: E402

KEYWORDS = "lymph_node"
SIZES = ConchSizes(
    embedding=128,
    image_px=96,
    patch_px=8,
    image_width=128,
    image_layers=4,
    image_heads=4,
    pooler_heads=4,
    text_width=128,
    text_layers=2,
    text_heads=4,
    vocabulary=1000,
    context=64,
)
"""A tile of 256 px at 0.5 µm/px is seen at 1.3 µm/px: a token is as large as a cell."""
FIRST_SCALE, FIRST_BIAS = 2.3, -4.0
"""Of the loss: ten times the similarity, and few texts are true."""

Images = Float[torch.Tensor, "tile rgb y x"]


def main() -> None:
    """Learn, and leave the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="go on from this finished model, say with other tiles")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--decay", choices=("cosine", "none"), default="cosine")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = DiffusionTrainingOptions(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        learning_rate_decay=arguments.decay,
        weight_decay=0.05,
        ema_decay=0.995,
        precision="fp32",
        save_every=100,
        picture_every=1000,
        seed=arguments.seed,
    )
    try:
        learn(LessonTiles(arguments.tiles), arguments.out, options, start=arguments.start, device=arguments.device)
    except WsiAnomalyError as error:
        raise SystemExit(f"error: {error}") from error
    Console().print(f"The model is in {arguments.out}", highlight=False)


def learn(
    tiles: LessonTiles,
    out: Path,
    options: DiffusionTrainingOptions,
    *,
    start: Path | None = None,
    device: str,
    sizes: ConchSizes = SIZES,
) -> None:
    """Teach a model of these sizes, or one that has learnt before, and write it as `Conch` reads it.

    Raises:
        ModelError: there is no model at `start`, or it is damaged.
    """
    keywords = load_keywords(KEYWORDS)
    normal, abnormal = ([known.text for known in side] for side in (keywords.normal, keywords.abnormal))
    texts = [*normal, *abnormal]
    model = Conch(weights=str(start or _beginning(out / "training" / "start", sizes, texts, seed=options.seed)))
    embedder = model.load(device=device, offline=True)
    lesson = _Lesson(embedder, truth_of(tiles, normal, abnormal), _tokens(embedder, texts), resolve_device(device))
    learner = DiffusionLearner(
        network=lesson.network,
        timesteps=1,
        loss=lesson.loss,
        rebuild=lesson.seen,
        save=partial(_save, lesson.network),
        weights=WEIGHTS,
        label="as the model may see them",
        recipe={"start": model.digest(offline=True), "keywords": KEYWORDS},
    )
    train_steps(learner, tiles, options, folder=out / "training", device=device)
    for name in ("tokenizer.json", "config.json"):
        (out / name).write_bytes((Path(model.weights) / name).read_bytes())
    (out / WEIGHTS).write_bytes((out / "training" / WEIGHTS).read_bytes())


class _Taught(torch.nn.Module):
    """The model and what only its loss needs."""

    def __init__(self, network: ConchNetwork) -> None:
        super().__init__()
        self.conch = network
        self.bias = torch.nn.Parameter(torch.tensor(FIRST_BIAS))

    def forward(self, images: Images, tokens: Int64[torch.Tensor, "text token"]) -> Float[torch.Tensor, "tile text"]:
        """How sure the model is that each text is true of each tile, as logits."""
        tiles = functional.normalize(self.conch.encode_images(images), dim=-1)
        texts = functional.normalize(self.conch.encode_texts(tokens), dim=-1)
        return tiles @ texts.T * self.conch.logit_scale.exp() + self.bias


class _Lesson:
    """What is asked in each step."""

    def __init__(
        self,
        embedder: ConchEmbedder,
        truth: Float32[np.ndarray, "tile text"],
        tokens: Int64[np.ndarray, "template text token"],
        device: torch.device,
    ) -> None:
        network = embedder.network.train()
        self.network = _Taught(network).to(device)
        self._truth, self._tokens = torch.from_numpy(truth), torch.from_numpy(tokens)
        self._image_px, self._device = embedder.sizes.image_px, device

    def loss(
        self, batch: TileBatch, positions: Int64[np.ndarray, " tile"], draws: Draws
    ) -> Float[torch.Tensor, " tile"]:
        """Of each tile, over all texts. One that is true counts `TRUE_WEIGHT` times: few are."""
        generator = torch.Generator().manual_seed(int(draws.seeds[0] >> 1))
        images = self._images(batch, generator)
        template = torch.randint(len(self._tokens), (self._tokens.shape[1],), generator=generator)
        tokens = self._tokens[template, torch.arange(len(template))]
        logits = self.network(images, tokens.to(self._device))
        answers = self._truth[positions].to(self._device)
        truth = answers.nan_to_num()
        weights = (1 + (TRUE_WEIGHT - 1) * truth) * answers.isfinite()
        return functional.binary_cross_entropy_with_logits(logits, truth, weights, reduction="none").sum(dim=1)

    def seen(self, batch: TileBatch) -> UInt8[np.ndarray, "tile y x rgb"]:
        """The tiles as the model may see them in a step, enlarged to their own size."""
        images = varied(intensities(torch.from_numpy(batch.pixels)), self._image_px, torch.Generator().manual_seed(0))
        return to_pixels(functional.interpolate(images, batch.pixels.shape[1:3], mode="nearest").clamp(0, 1)).numpy()

    def _images(self, batch: TileBatch, generator: torch.Generator) -> Images:
        images = varied(intensities(torch.from_numpy(batch.pixels)), self._image_px, generator)
        return normalised(images).to(self._device)


def varied(images: Images, size_px: int, generator: torch.Generator) -> Images:
    """Tiles as another scanner and another laboratory might show them, at the size that the model sees.

    Turned, mirrored, moved and enlarged up to 1.7 times; then stained anew: light is mixed, deepened and bent in
    optical density, where stains add up (Beer-Lambert); a third of them out of focus.
    """
    count = len(images)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator)

    def even(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator)

    side, angle = SMALLEST_SIDE + (1 - SMALLEST_SIDE) * even(), 2 * torch.pi * even()
    mirror = torch.where(even() < 1 / 2, -1.0, 1.0)
    turn = torch.stack([angle.cos(), -angle.sin() * mirror, angle.sin(), angle.cos() * mirror], dim=1).view(-1, 2, 2)
    shift = (2 * even(2) - 1) * (1 - side)[:, None]
    grid = functional.affine_grid(
        torch.cat([turn * side[:, None, None], shift[:, :, None]], dim=2),
        [count, 3, 2 * size_px, 2 * size_px],
        align_corners=False,
    )
    # Twice as fine, then averaged: or thin chromatin would alias.
    sampled = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    density = -functional.avg_pool2d(sampled, 2).clamp(min=1 / 255).log()
    mixed = torch.einsum("tij,tjyx->tiyx", torch.eye(3) + 0.1 * normal(3, 3), density).clamp(min=1e-4)
    bend, depth = (0.2 * normal(1, 1, 1)).exp(), (1 + 0.25 * normal(1, 1, 1)).clamp(0.5, 1.7)
    stained = depth * mixed**bend * TYPICAL_DENSITY ** (1 - bend) + 0.03 * normal(3, 1, 1)
    light = (-stained.clamp(min=0)).exp()
    blurred = torch.where(even(1, 1, 1) < 1 / 3, functional.avg_pool2d(light, 3, 1, 1), light)
    return blurred + 0.02 * normal(1, 1, 1) * torch.randn(blurred.shape, generator=generator)


def _beginning(folder: Path, sizes: ConchSizes, texts: Sequence[str], *, seed: int) -> Path:
    """A model that knows the words of all texts and nothing else.

    Its places are sines and cosines, so that neighbours are alike from the start; and its scale is that of the loss.
    """
    spoken = [template.format(text) for template in load_templates() for text in texts]
    write_random_conch(folder, sizes, seed=seed, texts=spoken)
    weights = load_file(folder / WEIGHTS)
    places = get_2d_sincos_pos_embed(sizes.image_width, sizes.image_px // sizes.patch_px, output_type="pt")
    weights["visual.trunk.pos_embed"][0, 1:] = 0.2 * places
    weights["logit_scale"].fill_(FIRST_SCALE)
    save_file(weights, folder / WEIGHTS)
    return folder


def truth_of(tiles: LessonTiles, normal: Sequence[str], abnormal: Sequence[str]) -> Float32[np.ndarray, "tile text"]:
    """1 where a text is true of a tile, 0 where not, nan where nobody knows: of real tiles only that no disease is."""
    texts = [*normal, *abnormal]
    columns = {text: column for column, text in enumerate(texts)}
    truth = np.zeros((len(tiles), len(texts)), np.float32)
    for row, shares in enumerate(tiles.shares):
        if shares is None:
            truth[row, : len(normal)] = np.nan
        else:
            truth[row, [columns[text] for text in keywords_of(shares)]] = 1
    return truth


def _tokens(embedder: ConchEmbedder, texts: Sequence[str]) -> Int64[np.ndarray, "template text token"]:
    """Each text in each template, without the columns that are padding everywhere, all but one."""
    tokens = np.stack([embedder.tokens([template.format(text) for text in texts]) for template in load_templates()])
    used = int((tokens != 0).any(axis=(0, 1)).sum())
    return tokens[:, :, : used + 1]


def _save(network: _Taught, folder: Path) -> None:
    weights = {name: tensor.half().contiguous() for name, tensor in network.conch.state_dict().items()}
    save_file(weights, folder / WEIGHTS)


WEIGHTS = "model.safetensors"
TRUE_WEIGHT = 5.0
SMALLEST_SIDE = 0.6
TYPICAL_DENSITY = 0.7

if __name__ == "__main__":
    main()
