"""Throughput of latent diffusion: the three profiles of AnoPILaD beside the machine's limit and a plain loop.

    python benchmarks/diffusion.py [--size sd15|tiny] [--tiles N] [--device cuda|cpu] [--profiles NAME ...]

The network has random weights: speed does not depend on them. The limit is what the counted operations of a tile would
take at the rate that large bf16 (on a CPU: fp32) matrix products reach on this machine. The plain loop restores as the
released code of AnoPILaD does: fp16 autocast, 16 tiles at once, guidance 7.5 by two predictions, DDIM. Goals on one
H200: the paper's profile at 40 % of its limit, the fast one at ten times the tiles/s of the plain loop.
"""

import argparse
import tempfile
import time
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.devices import resolve_device
from wsi_anomaly.options import parse_options
from wsi_anomaly.plugins import DETECTORS, load_plugin
from wsi_anomaly.testing import TilesInMemory, smooth_tiles

AnoPilad = load_plugin(DETECTORS, "anopilad")
PROFILES = ("anopilad", "anopilad-released", "anopilad-fast")
PLAIN_BATCH, PLAIN_GUIDANCE, PLAIN_STEPS, START = 16, 7.5, 100, 674


def main() -> None:
    """Print one row a profile, and one for the plain loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("sd15", "tiny"), default="sd15")
    parser.add_argument("--tiles", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--profiles", nargs="*", default=PROFILES)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    tile_px = 256 if arguments.size == "sd15" else 64
    with tempfile.TemporaryDirectory() as scratch:
        base, adapter = model(Path(scratch), arguments.size, tile_px)
        rate = matrix_rate(device)
        print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}: {rate / 1e12:.1f} TFLOP/s")
        table = Table("profile", "network calls", "TFLOP/tile", "limit, tiles/s", "tiles/s", "share", "GiB")
        batch = described(smooth_tiles(arguments.tiles, tile_px, seed=0))
        for name in arguments.profiles:
            scorer = detector(name, base).load(adapter, device=device.type)
            add_row(table, name, scorer, batch, rate=rate, device=device)
        plain = detector("anopilad-released", base).load(adapter, device=device.type).restorer.network
        started = clock(device)
        plain_loop(plain, batch, device)
        table.add_row("plain loop", "2 x 68", "", "", f"{len(batch) / (clock(device) - started):.2f}", "", "")
    Console().print(table)


def add_row(table: Table, name: str, scorer: Any, batch: TileBatch, *, rate: float, device: torch.device) -> None:
    """Measure one profile; the first portion warms up, and is compiled where the profile says so."""
    portion = scorer.restorer.portion
    scorer.score(described(smooth_tiles(portion, batch.pixels.shape[1], seed=1)))
    operations = counted(scorer, batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = clock(device)
    scorer.score(batch)
    speed = len(batch) / (clock(device) - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    calls = scorer.facts["network_calls"][0]
    limit = rate / operations
    cells = (f"{operations / 1e12:.3f}", f"{limit:.2f}", f"{speed:.2f}", f"{speed / limit:.2f}", f"{peak:.1f}")
    table.add_row(name, str(calls), *cells)


def counted(scorer: Any, batch: TileBatch) -> float:
    """Floating point operations of a tile: one encoding, and the network as often as the profile asks it."""
    network, calls = scorer.restorer.network, scorer.restorer.trajectories[0].calls
    device = scorer.restorer.device
    pixels = torch.from_numpy(batch.pixels[:1]).to(device)
    with torch.inference_mode(), FlopCounterMode(display=False) as encoding:
        latents = network.encode(pixels)
    condition = network.condition(batch.prompts[:1])
    compiled, network.unet = network.unet, getattr(network.unet, "_orig_mod", network.unet)
    with torch.inference_mode(), FlopCounterMode(display=False) as one_call:  # with guidance, both of its passes
        network.noise(latents, START, condition)
    network.unet = compiled
    return float(encoding.get_total_flops() + calls * one_call.get_total_flops())


def plain_loop(network: Any, batch: TileBatch, device: torch.device) -> None:
    """Restore as a plain script would: no fixed portions, no fused projections' luck, one noise for all tiles."""
    schedule, stride = network.schedule, 1000 // PLAIN_STEPS
    timesteps = [t for t in range(1 + (PLAIN_STEPS - 1) * stride, 0, -stride) if t <= START]
    autocast = torch.autocast(device.type, torch.float16 if device.type == "cuda" else torch.bfloat16)
    network.unet.float()
    network.vae.float()
    with torch.inference_mode(), autocast if device.type == "cuda" else torch.inference_mode():
        for start in range(0, len(batch), PLAIN_BATCH):
            part = slice(start, start + PLAIN_BATCH)
            clean = network.encode(torch.from_numpy(batch.pixels[part]).to(device))
            latents = schedule.noised(clean, torch.randn_like(clean[:1]).expand_as(clean), START)
            texts = network.condition(batch.prompts[part]).float()
            empty, prompted = texts.chunk(2)
            for t, to in zip(timesteps, [*timesteps[1:], -1], strict=True):
                step = torch.full((len(latents),), t, device=device)
                plain, guided = (
                    network.unet(latents, step, encoder_hidden_states=text).sample.float() for text in (empty, prompted)
                )
                noise = plain + PLAIN_GUIDANCE * (guided - plain)
                latents = schedule.noised(schedule.clean(latents, noise, t), noise, to)
            network.decode(latents)


def model(scratch: Path, size: str, tile_px: int) -> tuple[Path, Path]:
    """A base of random weights with an adapter that one step has taught."""
    from wsi_anomaly.detectors.diffusion.random_backbone import write_random_backbone

    write_random_backbone(scratch / "base", size=size, texts=("tissue",))
    options = {"base": str(scratch / "base"), "training": {"steps": 1, "batch_size": 1}}
    parse_options(AnoPilad, options, where="benchmark").fit(
        TilesInMemory(smooth_tiles(1, tile_px, seed=0)), scratch / "adapter", device="auto"
    )
    return scratch / "base", scratch / "adapter"


def detector(profile: str, base: Path) -> Any:
    """As the pipeline file has it."""
    options = tomllib.loads((files("wsi_anomaly") / "pipelines" / f"{profile}.toml").read_text())["detector"]
    del options["name"]
    return parse_options(AnoPilad, options | {"base": str(base)}, where=profile)


def described(tiles: np.ndarray) -> TileBatch:
    """All under one prompt: text embeddings are remembered, and not measured here."""
    prompt = (("a histopathological photograph of", 1.0), ("germinal center", 1.07))
    return TileBatch(tiles, np.arange(len(tiles), dtype=np.uint64), (prompt,) * len(tiles))


def matrix_rate(device: torch.device) -> float:
    """Operations per second of a large matrix product, the best of five."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(5):
        started = clock(device)
        left @ right
        times.append(clock(device) - started)
    return 2 * size**3 / min(times)


def clock(device: torch.device) -> float:
    """Seconds, when the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
