"""Throughput of likelihood regret: encoders fitted side by side, against one crop after the other.

    python benchmarks/vae.py [--crop-px N] [--width N] [--latents N] [--crops N] [--steps N] [--samples N] [--device D]

The network has random weights: speed does not depend on them. One by one, a copy of the encoder is fitted to each crop
with an Adam of its own, and draws are decoded for one crop, as in the released code of the method. On a CPU the seconds
are those that the process had, so that others on the machine do not count.
"""

import argparse
import copy
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from wsi_anomaly.detectors.diffusion.noise import tile_noise
from wsi_anomaly.detectors.vae import PORTION_CROPS
from wsi_anomaly.detectors.vae_network import Posterior, VaeNetwork, evidence
from wsi_anomaly.detectors.vae_scores import RegretOptions, adapted, unlikeliness
from wsi_anomaly.devices import reproducible, resolve_device
from wsi_anomaly.testing import smooth_tiles

Fit = Callable[[VaeNetwork, torch.Tensor, torch.Tensor, RegretOptions], Posterior]


def main() -> None:
    """Print one row a way of fitting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop-px", type=int, default=8)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--crops", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = resolve_device(given.device)
    torch.set_num_threads(1)
    network = VaeNetwork(given.crop_px, given.width, given.latents, generator=torch.Generator().manual_seed(0))
    network = network.to(device).eval().requires_grad_(requires_grad=False)
    crops = torch.from_numpy(smooth_tiles(given.crops, given.crop_px, seed=0)).to(device)
    seeds = np.arange(given.crops).astype(np.uint64)
    fitting, looking = (
        torch.from_numpy(tile_noise(seeds, (count, given.latents), draw=draw)).to(device)
        for draw, count in enumerate((given.steps, given.samples))
    )
    table = Table("encoders", "crops/s", "regret of the first crop, nats")
    ways: list[tuple[str, int, Fit]] = [("one by one", 1, alone), ("side by side", PORTION_CROPS, adapted)]
    for name, portion, fit in ways:
        regret(network, crops[:portion], fitting[:portion, :2], looking[:portion], fit)
        started = clock(device)
        parts = [
            regret(network, *values, fit)
            for values in zip(crops.split(portion), fitting.split(portion), looking.split(portion), strict=True)
        ]
        table.add_row(name, f"{given.crops / (clock(device) - started):.2f}", f"{torch.cat(parts)[0].item():.5f}")
    Console().print(table)


def regret(
    network: VaeNetwork, crops: torch.Tensor, fitting: torch.Tensor, looking: torch.Tensor, fit: Fit
) -> torch.Tensor:
    """Of some crops at once, in nats."""
    options = RegretOptions(steps=fitting.shape[1])
    with torch.no_grad(), reproducible():
        before = unlikeliness(network, network.posterior(crops), looking, crops)
        return before - unlikeliness(network, fit(network, crops, fitting, options), looking, crops)


def alone(network: VaeNetwork, crops: torch.Tensor, draws: torch.Tensor, options: RegretOptions) -> Posterior:
    """The posterior of one crop by a copy of the encoder that was fitted to it."""
    own = copy.deepcopy(network)
    own.encoder.requires_grad_()
    optimizer = torch.optim.Adam(own.encoder.parameters(), options.learning_rate, weight_decay=options.weight_decay)
    with torch.enable_grad():
        for noise in draws.unbind(1):
            optimizer.zero_grad()
            (-evidence(own, own.posterior(crops), noise, crops).sum()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return own.posterior(crops)


def clock(device: torch.device) -> float:
    """Seconds, when all work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
