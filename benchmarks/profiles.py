"""How well the fast profile of AnoPILaD ranks tiles as the paper's does, and how often each asks the network.

    python benchmarks/profiles.py [--tiles FOLDER] [--count N] [--steps N] [--base FOLDER --adapter FOLDER]

Goal: Spearman's rank correlation with the paper profile at least 0.99 at no more than a fifth of its network calls.
Without --base a small Stable Diffusion is made of random weights, and all of its UNet is taught the first half of the
tiles in so many steps, so that there is something to rank by; with --base and --adapter (what `fit` leaves in
`detector/`) real weights are compared. --tiles is searched for pictures; without it the tiles are made up.
"""

import argparse
import tempfile
import time
import tomllib
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.options import parse_options
from wsi_anomaly.plugins import DETECTORS, load_plugin
from wsi_anomaly.prompts.keywords import load_keywords
from wsi_anomaly.testing import TilesInMemory, odd_tiles, smooth_tiles

AnoPilad = load_plugin(DETECTORS, "anopilad")
PROFILES = ("anopilad", "anopilad-released", "anopilad-fast")
TILE_PX = 64
KEYWORDS = load_keywords("lymph_node").texts(include_abnormal=False)


def main() -> None:
    """Print one row a profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    tiles = pictures(arguments.tiles, arguments.count) if arguments.tiles else made_up(arguments.count)
    with tempfile.TemporaryDirectory() as scratch:
        base, adapter = arguments.base, arguments.adapter
        if base is None:
            base, adapter = taught(Path(scratch), tiles[: len(tiles) // 2], arguments.steps)
        compare(tiles, base, adapter, arguments.device)


def compare(tiles: np.ndarray, base: Path, adapter: Path, device: str) -> None:
    """Score all tiles by each profile."""
    batch = described(tiles)
    table = Table("profile", "sampler", "network calls", "Spearman with the paper profile", "tiles/s")
    paper: np.ndarray | None = None
    for name in PROFILES:
        options = tomllib.loads((files("wsi_anomaly") / "pipelines" / f"{name}.toml").read_text())["detector"]
        del options["name"]
        detector = parse_options(AnoPilad, options | {"base": str(base)}, where=name)
        scorer = detector.load(adapter, device=device)
        started = time.perf_counter()
        scores = scorer.score(batch)[:, 0]
        speed = len(tiles) / (time.perf_counter() - started)
        paper = scores if paper is None else paper
        calls = scorer.facts["network_calls"][0]
        rank = spearmanr(paper, scores).statistic
        table.add_row(name, detector.sampler.name, str(calls), f"{rank:.4f}", f"{speed:.2f}")
    Console().print(table)


def described(tiles: np.ndarray) -> TileBatch:
    """With a prompt for each tile; which one does not matter here."""
    random = np.random.default_rng(0)
    prompts = tuple((("a histopathological photograph of", 1.0), (str(random.choice(KEYWORDS)), 1.05)) for _ in tiles)
    return TileBatch(tiles, np.arange(len(tiles), dtype=np.uint64), prompts)


def pictures(folder: Path, count: int) -> np.ndarray:
    """The middle of so many pictures below a folder, evenly chosen."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in {".png", ".jpg", ".jpeg", ".tif"})
    chosen = [paths[index] for index in np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int)]
    tiles = []
    for path in np.random.default_rng(0).permutation(np.array(chosen, object)):
        picture = Image.open(path).convert("RGB")
        left, top = (picture.width - TILE_PX) // 2, (picture.height - TILE_PX) // 2
        tiles.append(np.asarray(picture.crop((left, top, left + TILE_PX, top + TILE_PX))))
    return np.stack(tiles)


def made_up(count: int) -> np.ndarray:
    """Smooth tiles, a quarter of them with something odd."""
    return np.concatenate([smooth_tiles(count - count // 4, TILE_PX, seed=0), odd_tiles(count // 4, TILE_PX, seed=0)])


def taught(scratch: Path, tiles: np.ndarray, steps: int) -> tuple[Path, Path]:
    """A small base whose whole UNet has seen the tiles, and an adapter that adds next to nothing."""
    from wsi_anomaly.detectors.diffusion import random_backbone
    from wsi_anomaly.detectors.diffusion.backbone import encode, load_backbone
    from wsi_anomaly.detectors.diffusion.schedule import NoiseSchedule
    from wsi_anomaly.devices import to_tensor

    random_backbone.write_random_backbone(scratch / "base", size="tiny", texts=KEYWORDS)
    backbone = load_backbone(str(scratch / "base"), offline=True)
    schedule = NoiseSchedule.from_config(backbone.schedule_config)
    latents = encode(backbone.vae, to_tensor(tiles, torch.device("cpu")) * 2 - 1)
    texts = torch.zeros(1, 77, backbone.unet.config.cross_attention_dim)
    backbone.unet.requires_grad_(requires_grad=True).train()
    optimizer = torch.optim.AdamW(backbone.unet.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randint, generator=generator)
    for step in range(steps):
        chosen = latents[draw(len(latents), (32,))]
        noise, t = torch.randn(chosen.shape, generator=generator), draw(len(schedule), (len(chosen),))
        noised = schedule.noised(chosen, noise, t)
        output = backbone.unet(noised, t, encoder_hidden_states=texts.expand(len(chosen), -1, -1)).sample
        loss = torch.nn.functional.mse_loss(output, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.4f}")
    backbone.unet.eval().save_pretrained(scratch / "base" / "unet")
    one_step: dict[str, Any] = {"steps": 1, "batch_size": 1, "learning_rate": 1e-8}
    detector = parse_options(AnoPilad, {"base": str(scratch / "base"), "training": one_step}, where="benchmark")
    detector.fit(TilesInMemory(tiles[:2]), scratch / "adapter", device="cpu")
    return scratch / "base", scratch / "adapter"


if __name__ == "__main__":
    main()
