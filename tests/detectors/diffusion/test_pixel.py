"""Facts about the pixel-space network: its sizes, its first weights, what goes in and out, and a whole restoration."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from wsi_anomaly.detectors.diffusion.noise import GaussianNoise, tile_noise
from wsi_anomaly.detectors.diffusion.pixel import (
    NetworkSizes,
    PixelDiffusion,
    PixelModel,
    ScheduleOptions,
    described_model,
    model_from_scratch,
)
from wsi_anomaly.detectors.diffusion.restoring import Restorer
from wsi_anomaly.detectors.diffusion.samplers import Ddim
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.options import parse_options
from wsi_anomaly.testing import batch_of, odd_tiles, smooth_tiles

TINY = NetworkSizes(channels=(8, 16), layers_per_level=1, attention_levels=(1,), head_channels=8, norm_groups=4)
CPU = torch.device("cpu")


def tiny(seed: int = 0) -> PixelModel:
    """A network of two levels with random weights."""
    return model_from_scratch(TINY, ScheduleOptions(), seed=seed)


def test_the_default_network_is_that_of_the_paper() -> None:
    """Six levels for 256 px, two residual blocks each, two heads of attention where the tile is 16 and 8 px wide."""
    with torch.device("meta"):
        unet = model_from_scratch(NetworkSizes(), ScheduleOptions(), seed=0).unet
    assert sum(weights.numel() for weights in unet.parameters()) == 126_804_995
    with_attention = [hasattr(block, "attentions") for block in unet.down_blocks]
    assert with_attention == [False, False, False, False, True, True]
    assert unet.down_blocks[4].attentions[0].heads == 2
    assert [len(block.resnets) for block in unet.down_blocks] == [2] * 6


def test_first_weights_depend_on_the_seed_alone() -> None:
    """The caller's random state neither decides them nor is used up."""
    state = torch.get_rng_state()
    one = tiny(1).unet.conv_in.weight
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(tiny(1).unet.conv_in.weight, one)
    assert not torch.equal(tiny(2).unet.conv_in.weight, one)


def test_a_description_makes_the_same_network_again() -> None:
    """After a way through a text file; and its schedule with it."""
    model = tiny()
    again = described_model(json.loads(json.dumps(model.description)), where="network.json", seed=0)
    assert again.description == model.description
    weights, weights_again = model.unet.state_dict(), again.unet.state_dict()
    assert list(weights) == list(weights_again)
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


@pytest.mark.parametrize("spoilt", [{}, {"unet": {"down_block_types": ["NoBlock"]}, "schedule": {}}, {"unet": 3}])
def test_a_description_of_no_network_is_refused(spoilt: dict[str, Any]) -> None:
    """With the name of the file it is from."""
    with pytest.raises(ModelError, match=r"network\.json: describes no network"):
        described_model(spoilt, where="network.json")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"attention_levels": [6]}, r"attention_levels.*there are levels 0 to 5"),
        ({"attention_levels": [-1]}, r"attention_levels.*there are levels 0 to 5"),
        ({"head_channels": 96}, r"head_channels.*does not divide the 512 channels of the middle, .* 512 divides all"),
        (
            {"channels": [8, 8], "attention_levels": [], "norm_groups": 4, "head_channels": 64},
            r"head_channels' = 64: does not divide the 8 channels of the middle, where attention always is; 8 divides",
        ),
        (
            {"channels": [12, 8], "attention_levels": [0], "norm_groups": 4, "head_channels": 8},
            r"the 12 channels of a level with attention; 4 divides all",
        ),
        ({"norm_groups": 48}, r"norm_groups.*does not divide the 128 channels"),
        ({"channels": []}, "channels"),
    ],
)
def test_sizes_that_make_no_network_are_refused(table: dict[str, Any], said: str) -> None:
    """By the name of the option, before anything is built."""
    with pytest.raises(OptionsError, match=said):
        parse_options(NetworkSizes, table, where="test")


def test_pixels_go_in_from_minus_one_to_one_and_come_back() -> None:
    """Black and white are the ends, and a tile that nobody changed is the same to the last bit of its pixels."""
    network = PixelDiffusion(tiny(), CPU, precision="fp32")
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    encoded = network.encode(pixels)
    assert encoded.min() == -1
    assert encoded.max() == 1
    assert torch.equal((network.decode(encoded) * 255).round().to(torch.uint8), pixels.permute(0, 3, 1, 2))


def test_tiles_that_the_network_cannot_halve_are_refused() -> None:
    """The message says which sizes are possible."""
    network = PixelDiffusion(tiny(), CPU, precision="fp32")
    with pytest.raises(OptionsError, match=r"15 x 16 px: the network needs a multiple of 2 px.*tile_px"):
        network.encode(torch.zeros(1, 16, 15, 3, dtype=torch.uint8))


def test_a_network_of_velocities_tells_noise_too() -> None:
    """As z = sqrt(a) x + sqrt(1 - a) e and v = sqrt(a) e - sqrt(1 - a) x give e = sqrt(a) v + sqrt(1 - a) z."""
    model = tiny()
    velocities = PixelModel(model.unet, {**model.schedule_config, "prediction_type": "v_prediction"})
    network = PixelDiffusion(velocities, CPU, precision="fp32")
    z = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    share = network.schedule.alpha_cumprod(300)
    with torch.inference_mode():
        output = network.output(z, torch.full((2,), 300))
        expected = share**0.5 * output + (1 - share) ** 0.5 * z
        torch.testing.assert_close(network.noise(z, 300, None), expected)


def test_nothing_is_printed_when_a_network_is_put_in_place(capfd: pytest.CaptureFixture[str]) -> None:
    """Diffusers warns of a type that is the same as before."""
    PixelDiffusion(tiny(), CPU, precision="fp16")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("start", "steps"), [(674, 20), (249, 50), (3, 1000)])
def test_a_restored_tile_is_what_diffusers_own_loop_makes_of_it(start: int, steps: int) -> None:
    """Same weights, same noise, and its DDIMScheduler on the grid through the start: equal to a 1e-5th."""
    network = PixelDiffusion(tiny(), CPU, precision="fp32")
    batch = batch_of(np.concatenate([smooth_tiles(3, 16, seed=1), odd_tiles(2, 16, seed=1)]))
    restorer = Restorer(
        network,
        Ddim(steps=steps, snap=False),
        [start],
        make_noise=GaussianNoise(),
        device=CPU,
        portion=8,
    )
    ours = restorer.restore(batch).after[0]

    stride = 1000 // steps
    scheduler = DDIMScheduler(
        1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=True, steps_offset=start % stride
    )
    scheduler.set_timesteps(steps)
    clean = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.from_numpy(tile_noise(batch.seeds, (3, 16, 16), draw=start))
    image = scheduler.add_noise(clean, noise, torch.tensor(start))
    with torch.inference_mode():
        for t in scheduler.timesteps[scheduler.timesteps <= start]:
            image = scheduler.step(network.unet(image, t).sample, t, image).prev_sample
    assert (ours - image).abs().max() < 1e-5 * image.abs().max().clamp(min=1)
