"""A latent diffusion network as `Restorer` wants it: VAE, UNet, text encoder and guidance. Loads and trains nothing."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Float32, UInt8

from wsi_anomaly.detectors.diffusion.backbone import Backbone, decode, encode, quiet_libraries
from wsi_anomaly.detectors.diffusion.conditioning import PromptEncoder
from wsi_anomaly.detectors.diffusion.schedule import NoiseSchedule
from wsi_anomaly.detectors.protocol import Prompt
from wsi_anomaly.devices import intensities

Precision = Literal["fp32", "fp16", "bf16"]
Latents = Float32[torch.Tensor, "tile channel y_latent x_latent"]
Texts = Float[torch.Tensor, "text token d"]
"""One for each tile; with guidance as many empty ones before them."""

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class LatentDiffusion:
    """Stable Diffusion, put where it computes. Latents are float32 whatever the network computes in."""

    def __init__(self, backbone: Backbone, device: torch.device, *, precision: Precision, guidance: float) -> None:
        dtype = _TYPES[precision] if device.type == "cuda" else torch.float32  # slower in anything else on a CPU
        self.schedule = NoiseSchedule.from_config(backbone.schedule_config)
        with quiet_libraries():
            self.vae = backbone.vae.to(device, dtype)
            self.unet = backbone.unet.to(device, dtype, memory_format=torch.channels_last)
        # transformers types `to` as if it were a function.
        self._prompts = PromptEncoder(backbone.tokenizer, cast(Any, backbone.text_encoder).to(device))
        self._guidance = guidance

    @property
    def passes(self) -> int:
        """With guidance, the empty prompt is asked too."""
        return 1 if self._guidance == 1 else 2

    def compile(self) -> None:
        """Compile the network at its first call. Inputs must keep their shape: another one compiles again."""
        self.unet = torch.compile(self.unet, fullgraph=True)

    def encode(self, pixels: UInt8[torch.Tensor, "tile y x rgb"]) -> Latents:
        """The mode of the VAE's posterior, scaled: nothing is drawn."""
        return encode(self.vae, intensities(pixels) * 2 - 1).float()

    def decode(self, latents: Latents) -> Float32[torch.Tensor, "tile rgb y x"]:
        """Tiles as intensities about [0, 1], not clipped."""
        return (decode(self.vae, latents).float() + 1) / 2

    def condition(self, prompts: Sequence[Prompt]) -> Texts:
        """Text embeddings; with guidance those of the empty prompt before them."""
        texts = self._prompts.encode(prompts)
        if self._guidance != 1:
            texts = torch.cat([self._prompts.empty.expand_as(texts), texts])
        return texts.to(self.unet.dtype)

    def noise(self, latents: Latents, t: int, condition: Texts) -> Latents:
        """The noise that the network sees; with guidance moved away from what it sees under the empty prompt.

        Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022), in the form without + (1 + g) - g: 1 is none.
        """
        if self._guidance == 1:
            return self._predicted(latents, t, condition)
        plain, prompted = self._predicted(torch.cat([latents, latents]), t, condition).chunk(2)
        return plain + self._guidance * (prompted - plain)

    def _predicted(self, latents: Latents, t: int, texts: Texts) -> Latents:
        timesteps = torch.full((len(latents),), t, device=latents.device)
        inputs = latents.to(self.unet.dtype, memory_format=torch.channels_last)
        output = self.unet(inputs, timesteps, encoder_hidden_states=texts, return_dict=False)[0]
        return self.schedule.noise(output, latents, t)
