"""Throughput of likelihood regret: encoders fitted side by side, against one crop after the other.

    python benchmarks/vae.py [--crop-px N] [--width N] [--latents N] [--crops N] [--steps N] [--samples N]
        [--threads N] [--device D]

The network learns for a moment first, so that there is something to regret. One by one, a copy of the encoder is fitted
to each crop with an Adam of its own through the layers as they are, and all draws of a crop are decoded at once, as in
the released code of the method; "side by side, alone" is our way given one crop at a time. With one thread of a CPU
the seconds are those that the process had, so that others on the machine do not count. Larger crops gain less: most of
their time is the arithmetic of the 768 output channels, which no company saves; more threads gain more, for one crop
has too little work to share.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from wsi_anomaly.detectors.diffusion.noise import tile_noise
from wsi_anomaly.detectors.vae import PORTION_CROPS
from wsi_anomaly.detectors.vae_network import Posterior, VaeNetwork, evidence, negative_evidence
from wsi_anomaly.detectors.vae_scores import RegretOptions, adapted, unlikeliness
from wsi_anomaly.devices import reproducible, resolve_device
from wsi_anomaly.testing import smooth_tiles

Regret = Callable[[VaeNetwork, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    """Print one row a way of fitting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop-px", type=int, default=8)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--crops", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = resolve_device(given.device)
    torch.set_num_threads(given.threads)
    network = VaeNetwork(given.crop_px, given.width, given.latents, generator=torch.Generator().manual_seed(0))
    learn(network, given.crop_px)
    network = network.to(device).eval().requires_grad_(requires_grad=False)
    crops = torch.from_numpy(smooth_tiles(given.crops, given.crop_px, seed=0)).to(device)
    seeds = np.arange(given.crops).astype(np.uint64)
    fitting, looking = (
        torch.from_numpy(tile_noise(seeds, (count, given.latents), draw=draw)).to(device)
        for draw, count in enumerate((given.steps, given.samples))
    )
    table = Table("encoders", "crops/s", "times one by one", "mean regret, nats", "largest difference, nats")
    ways: list[tuple[str, int, Regret]] = [
        ("one by one", 1, one_by_one),
        ("side by side, alone", 1, side_by_side),
        ("side by side", PORTION_CROPS, side_by_side),
    ]
    speeds, regrets = [], []
    for name, portion, regret in ways:
        regret(network, crops[:portion], fitting[:portion, :2], looking[:portion])
        started = clock(device)
        parts = zip(*(torch.split(values, portion) for values in (crops, fitting, looking)), strict=True)
        regrets.append(torch.cat([regret(network, *part) for part in parts]))
        speeds.append(given.crops / (clock(device) - started))
        speed, mean, difference = speeds[-1], regrets[-1].mean().item(), (regrets[-1] - regrets[0]).abs().max().item()
        table.add_row(name, f"{speed:.2f}", f"{speed / speeds[0]:.1f}", f"{mean:.4f}", f"{difference:.5f}")
    Console().print(table)


def learn(network: VaeNetwork, crop_px: int) -> None:
    """A few steps."""
    crops = torch.from_numpy(smooth_tiles(32, crop_px, seed=1))
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(50):
        optimizer.zero_grad()
        negative_evidence(network, crops, generator).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def side_by_side(
    network: VaeNetwork, crops: torch.Tensor, fitting: torch.Tensor, looking: torch.Tensor
) -> torch.Tensor:
    """The regret of some crops at once, in nats."""
    options = RegretOptions(steps=fitting.shape[1])
    with torch.no_grad(), reproducible():
        before = unlikeliness(network, network.posterior(crops), looking, crops)
        return before - unlikeliness(network, adapted(network, crops, fitting, options), looking, crops)


def one_by_one(network: VaeNetwork, crop: torch.Tensor, fitting: torch.Tensor, looking: torch.Tensor) -> torch.Tensor:
    """The regret of one crop by a copy of the encoder that is fitted to it, in nats."""
    options, own = RegretOptions(), copy.deepcopy(network)
    own.encoder.requires_grad_()
    optimizer = torch.optim.Adam(own.encoder.parameters(), options.learning_rate, weight_decay=options.weight_decay)
    with reproducible():
        before = bound(network, crop, looking)
        for noise in fitting.unbind(1):
            optimizer.zero_grad()
            (-evidence(own, own.posterior(crop), noise, crop).sum()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return before - bound(own, crop, looking)


@torch.no_grad()
def bound(network: VaeNetwork, crop: torch.Tensor, looking: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of one crop, by all draws at once."""
    draws = looking.shape[1]
    posterior = Posterior(*(values.expand(draws, -1) for values in network.posterior(crop)))
    each = unlikeliness(network, posterior, looking.transpose(0, 1), crop.expand(draws, -1, -1, -1))
    return (math.log(draws) - (-each).logsumexp(0))[None]


def clock(device: torch.device) -> float:
    """Seconds, when all work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


if __name__ == "__main__":
    main()
