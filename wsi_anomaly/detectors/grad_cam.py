"""Where in a tile a density finds what is unlikely: Grad-CAM through a diffusion network. Scores nothing.

Selvaraju et al., "Grad-CAM" (ICCV 2017): each channel of a layer counts as much as the value in question rises with its
mean. Here the value is -log p of the tile's score norms, and the maps of all noise levels are added up.
"""

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch.nn.functional import interpolate

from wsi_anomaly.detectors.density import Density
from wsi_anomaly.detectors.diffusion.pixel import PixelDiffusion
from wsi_anomaly.devices import reproducible


def grad_cams(
    network: PixelDiffusion,
    timesteps: tuple[int, ...],
    density: Density,
    pixels: UInt8[np.ndarray, "tile y x rgb"],
) -> Float32[np.ndarray, "tile y x"]:
    """What in the network's middle, upsampled to pixels, raises -log p of each tile, 0 where nothing does.

    The density must be one that has a gradient. Tiles are taken one by one.
    """
    maps = np.zeros(pixels.shape[:3], np.float32)
    with torch.enable_grad(), reproducible():
        for place, tile in enumerate(pixels):
            maps[place] = _grad_cam(network, timesteps, density, tile)
    return maps


def _grad_cam(
    network: PixelDiffusion, timesteps: tuple[int, ...], density: Density, tile: UInt8[np.ndarray, "y x rgb"]
) -> Float32[np.ndarray, "y x"]:
    activations: list[torch.Tensor] = []
    times = torch.tensor(timesteps, device=network.unet.device)
    clean = network.encode(torch.from_numpy(tile[None]).to(times.device))
    copies = clean.expand(len(times), -1, -1, -1)
    level_tiles = network.schedule.noised(copies, torch.zeros_like(copies), times)
    level_tiles.requires_grad_()  # the weights are frozen, and something must be differentiated
    hook = network.unet.mid_block.register_forward_hook(lambda _, __, output: activations.append(output))
    try:
        output = network.output(level_tiles, times)
    finally:
        hook.remove()
    seen = network.schedule.noise(output, level_tiles, times).double()
    surprise = density.of(seen.square().sum(dim=(1, 2, 3)).sqrt()[None].cpu())
    (gradient,) = torch.autograd.grad(surprise.sum(), activations[0])
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    cam = (weights * activations[0]).sum(dim=1).relu().sum(dim=0).float()  # what lowers it at one level hides no other
    size_px = (tile.shape[0], tile.shape[1])
    return interpolate(cam[None, None], size_px, mode="bilinear").detach()[0, 0].cpu().numpy()
