"""Noise schedules: how much signal and noise there is at each timestep. Closed forms only: no network, no sampler."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from pydantic import BaseModel, Field, ValidationError

from wsi_anomaly.errors import ModelError, OptionsError

BetaKind = Literal["scaled_linear", "linear", "squaredcos_cap_v2"]
Prediction = Literal["epsilon", "v_prediction"]
Latents = Float[torch.Tensor, "tile ..."]
"""What is noised: the latents of an autoencoder, or pixels in [-1, 1]."""
Timesteps = int | Int64[torch.Tensor, " tile"]
"""One timestep for all tiles, or one for each."""

CLEAN = -1
"""The timestep before the first: no noise at all."""


@dataclass(frozen=True, slots=True, eq=False)
class NoiseSchedule:
    """z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) noise (Ho et al., "Denoising Diffusion Probabilistic Models", eq. 4).

    Kept on the host in float64. With one timestep for all tiles its numbers reach a tensor as Python floats, so that
    nothing waits for the GPU.
    """

    alphas_cumprod: Float64[np.ndarray, " t"]
    """a_t: the share of the variance that is signal, falling with t."""
    prediction: Prediction = "epsilon"
    """What the network was trained to tell: the noise, or the velocity sqrt(a_t) noise - sqrt(1 - a_t) z_0 (Salimans
    and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", appendix D)."""

    @classmethod
    def from_betas(
        cls, kind: BetaKind, beta_start: float, beta_end: float, *, steps: int, prediction: Prediction = "epsilon"
    ) -> "NoiseSchedule":
        """The schedule whose beta_t, the share of noise that step t adds, follows a curve from start to end.

        "linear" is that of Ho et al.; "scaled_linear", linear in sqrt(beta), that of latent diffusion;
        "squaredcos_cap_v2" the cosine of Nichol and Dhariwal (eq. 17), which has no start and end.

        Raises:
            OptionsError: a beta is not above 0 and below 1.
        """
        return cls(_alphas_cumprod(_betas(kind, beta_start, beta_end, steps)), prediction)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, where: str = "scheduler/scheduler_config.json"
    ) -> "NoiseSchedule":
        """The schedule that a network was trained with, from the scheduler configuration of diffusers beside it.

        What the configuration says of sampling (spacing, offset, last alpha) is not read: the sampler decides it.

        Raises:
            ModelError: it is a schedule or a kind of prediction that is not known here. `where` names the file.
        """
        try:
            read = _Config.model_validate(dict(config))
            betas = _betas(read.beta_schedule, read.beta_start, read.beta_end, read.num_train_timesteps)
            trained = np.array(betas if read.trained_betas is None else read.trained_betas, np.float64)
            return cls(_alphas_cumprod(trained), read.prediction_type)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].lower()}" for fault in error.errors()]
            raise ModelError(
                f"{where}: not a noise schedule that can be used ({'; '.join(faults)}). Give a model that predicts "
                "noise or velocity on a discrete schedule, such as Stable Diffusion 1.x or 2.x."
            ) from error
        except OptionsError as error:
            raise ModelError(f"{where}: {error}") from error

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def alpha_cumprod(self, t: int) -> float:
        """The share of signal at timestep `t`; 1 at `CLEAN`."""
        return 1.0 if t == CLEAN else float(self.alphas_cumprod[t])

    def snr(self, t: int) -> float:
        """Variance of the signal over variance of the noise. Compare timesteps of different schedules by it."""
        share = self.alpha_cumprod(t)
        return math.inf if t == CLEAN else share / (1 - share)

    def noised(self, clean: Latents, noise: Latents, t: Timesteps) -> Latents:
        """What the forward process makes of clean latents in one go."""
        signal, spread = self._weights(t, clean)
        return signal * clean + spread * noise

    def clean(self, latents: Latents, noise: Latents, t: int) -> Latents:
        """The clean latents, if `noise` is what is in `latents` (Tweedie's estimate, if it is the expected noise)."""
        signal, spread = self._weights(t, latents)
        return latents / signal - (spread / signal) * noise

    def noise(self, output: Latents, latents: Latents, t: Timesteps) -> Latents:
        """The noise that a network's output tells of, in the precision of the latents."""
        output = output.to(latents.dtype)
        if self.prediction == "epsilon":
            return output
        signal, spread = self._weights(t, latents)
        return signal * output + spread * latents

    def target(self, clean: Latents, noise: Latents, t: Timesteps) -> Latents:
        """What the network should have put out for `noised(clean, noise, t)`."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._weights(t, clean)
        return signal * noise - spread * clean

    def _weights(self, t: Timesteps, like: Latents) -> tuple[Any, Any]:
        """Those of signal and noise: floats for one timestep, else tensors that broadcast over the tiles."""
        if isinstance(t, int):
            share = self.alpha_cumprod(t)
            return math.sqrt(share), math.sqrt(1 - share)
        shares = torch.from_numpy(self.alphas_cumprod).to(t.device)[t].view(-1, *[1] * (like.ndim - 1))
        return shares.sqrt().to(like), (1 - shares).sqrt().to(like)


class _Config(BaseModel):
    """The part of a diffusers scheduler configuration that training fixed; defaults are those of diffusers."""

    beta_schedule: BetaKind
    beta_start: float = 0.0001
    beta_end: float = 0.02
    num_train_timesteps: int = Field(1000, ge=1)
    trained_betas: list[float] | None = None
    prediction_type: Prediction = "epsilon"
    rescale_betas_zero_snr: Literal[False] = False
    use_flow_sigmas: Literal[False] = False


def _betas(kind: BetaKind, start: float, end: float, steps: int) -> Float64[np.ndarray, " t"]:
    if kind == "linear":
        return np.linspace(start, end, steps)
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    signal = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - signal[1:] / signal[:-1], 0.999)


def _alphas_cumprod(betas: Float64[np.ndarray, " t"]) -> Float64[np.ndarray, " t"]:
    if not len(betas) or not np.all((betas > 0) & (betas < 1)):
        raise OptionsError("a noise schedule needs at least one beta, and each beta above 0 and below 1")
    return np.cumprod(1 - betas)
