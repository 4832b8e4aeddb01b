"""MSMA: a tile in which a diffusion network sees other amounts of noise than in normal tiles is abnormal.

Mahmood, Oliva and Styner, "Multiscale Score Matching for Out-of-Distribution Detection" (ICLR 2021).
"""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, PrivateAttr, field_validator

from wsi_anomaly.detectors.density import DensityName, fit_density, load_density, require_items, save_density
from wsi_anomaly.detectors.diffusion.backbone import digest, load_backbone
from wsi_anomaly.detectors.diffusion.base_files import DEFAULT_BASE
from wsi_anomaly.detectors.diffusion.latent import LatentDiffusion, Precision
from wsi_anomaly.detectors.diffusion.pixel import PixelDiffusion
from wsi_anomaly.detectors.diffusion.pixel_base import load_pixel_base
from wsi_anomaly.detectors.ncsn import NcsnOptions, fit_ncsn, load_ncsn
from wsi_anomaly.detectors.norm_fits import SomeTiles, gathered, held_out_tiles, is_noted, read_note, write_note
from wsi_anomaly.detectors.norm_scorer import NormScorer
from wsi_anomaly.detectors.protocol import TileSource
from wsi_anomaly.detectors.sampling import even_sample
from wsi_anomaly.detectors.score_norms import ScoreNorms, levels_of
from wsi_anomaly.detectors.training import fit_identity
from wsi_anomaly.devices import resolve_device
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.options import Options

NetworkName = Literal["ncsn", "latent", "pixel"]


class Msma(Options):
    """Learns how much noise a diffusion network sees in normal tiles, level by level; other amounts are abnormal."""

    score_names: ClassVar[tuple[str, ...]] = ("msma",)
    paper: ClassVar[str] = "Mahmood et al., ICLR 2021"
    needs: ClassVar[tuple[str, ...]] = ()
    caution: ClassVar[str] = "can rank tumour below normal tissue after little training"

    network: NetworkName = "ncsn"
    """"ncsn": a small one of its own, which `fit` trains. "latent": a Stable Diffusion under each tile's prompt, or the
    empty one, and "pixel": a DDPM. These two stay as they are: only the density is fitted."""
    base: str = ""
    """Of "latent" and "pixel": a folder as diffusers saves it, or a repository of the hub; empty for a public one."""
    precision: Precision = "fp16"
    """Of "latent" and "pixel" on CUDA; a CPU computes in fp32, and so does "ncsn"."""
    ncsn: NcsnOptions = NcsnOptions()
    """Its noise levels are, as nearly as they have such, those of "latent" and "pixel" too."""
    density: DensityName = "gmm"
    """How unlikely the amounts of a tile are: mixture of Gaussians, spline flow, or distance to the 5th neighbour."""
    held_out_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the tiles that "ncsn" does not learn from, so that the density can."""
    most_tiles: PositiveInt = 5000
    """How many tiles the density is fitted on, at most, taken evenly from the slides."""
    _offline: bool = PrivateAttr(default=False)

    @field_validator("base")
    @classmethod
    def _is_of_use(cls, value: str, info: object) -> str:
        if value and getattr(info, "data", {}).get("network") == "ncsn":
            raise ValueError('network = "ncsn" has no base. Leave it out, or set network = "latent" or "pixel"')
        return value

    def on_base(self, place: str, *, offline: bool) -> "Msma":
        """The same detector with its base at another place ("" for the same); `offline` forbids to fetch it.

        Raises:
            OptionsError: a place is given, but the network is one of its own.
        """
        if place and self.network == "ncsn":
            raise OptionsError(
                f"base model at {place}: this pipeline's 'msma' learns its own network and has no base. To use one, "
                'set network = "latent" or "pixel" under [detector] of the pipeline file.'
            )
        moved = self.model_copy(update={"base": place or self.base})
        moved._offline = offline  # noqa: SLF001 - a copy of its own class
        return moved

    def fit(self, tiles: TileSource, checkpoint: Path, *, device: str) -> None:
        """Teach "ncsn" normal tissue, and fit the density to what the network sees in other normal tiles.

        Goes on from an unfinished fit with the same options, base and tiles.

        Raises:
            CohortError: there are too few tiles.
            ModelError: the base cannot be had or is of another family, or training diverged.
            OptionsError: the device does not exist or is too small for one tile, or tiles do not fit the network.
        """
        place, seed = resolve_device(device), self.ncsn.training.seed
        learnt, judged = self._parts(tiles)
        require_items(self.density, len(judged), total=len(learnt) + len(judged))
        made_of = self._made_of()
        recipe = {"detector": self.model_dump(mode="json", exclude={"base", "precision"}), **made_of}
        identity = fit_identity(tiles, recipe)
        if is_noted(checkpoint, identity):
            return
        if self.network == "ncsn":
            fit_ncsn("msma", self.ncsn, learnt, folder=checkpoint, device=place)
        norms = self._norms(checkpoint, place)
        vectors = gathered(judged, norms.vectors, folder=checkpoint, identity=identity)
        save_density(fit_density(self.density, vectors, seed=seed), checkpoint)
        write_note(checkpoint, "msma", identity=identity, **made_of)

    def load(self, checkpoint: Path, *, device: str) -> NormScorer:
        """The scorer that `fit` left in `checkpoint`, on the base that it was fitted with.

        Raises:
            ModelError: the fit is missing, damaged or another detector's, or the base is missing or not that of it.
            OptionsError: the device does not exist.
        """
        place = resolve_device(device)
        note = read_note(checkpoint, "msma")
        if faults := [
            f"{name} is {note.get(name)!r}, not {here!r}"
            for name, here in self._made_of().items()
            if note.get(name) != here
        ]:
            raise ModelError(
                f"{checkpoint}: was fitted with another network: {'; '.join(faults)}. Use the options of the fit, give "
                "the place of its base with --base-weights, or fit again."
            )
        density = load_density(checkpoint)
        if density.name != self.density:
            raise ModelError(
                f"{checkpoint}: holds the density '{density.name}', and the options ask for '{self.density}'. Use the "
                "options that the model was fitted with, or fit it again."
            )
        return NormScorer(self._norms(checkpoint, place), density)

    def _parts(self, tiles: TileSource) -> tuple[SomeTiles, SomeTiles]:
        """Tiles for the network and tiles for the density; a public base has seen none of them."""
        seed = self.ncsn.training.seed
        if self.network == "ncsn":
            return held_out_tiles(tiles, self.held_out_fraction, most=self.most_tiles, seed=seed)
        chosen = even_sample(tiles.slides, self.most_tiles, seed=seed)
        return SomeTiles(tiles, chosen[:0]), SomeTiles(tiles, chosen)

    def _norms(self, checkpoint: Path, place: torch.device) -> ScoreNorms:
        if self.network == "ncsn":
            own = load_ncsn("msma", self.ncsn, checkpoint, device=place)
            return ScoreNorms(own, tuple(reversed(range(self.ncsn.levels))), place)
        network = self._base_network(place)
        options = self.ncsn
        timesteps = levels_of(
            network.schedule, options.levels, most_sigma=options.most_sigma, least_sigma=options.least_sigma
        )
        return ScoreNorms(network, timesteps, place)

    def _base_network(self, place: torch.device) -> LatentDiffusion | PixelDiffusion:
        if self.network == "pixel":
            model, _ = load_pixel_base(self._base_place(), offline=self._offline)
            return PixelDiffusion(model, place, precision=self.precision)
        backbone = load_backbone(self._base_place(), offline=self._offline)
        return LatentDiffusion(backbone, place, precision=self.precision, guidance=1.0)

    def _base_place(self) -> str:
        return self.base or _BASES[self.network]

    def _made_of(self) -> dict[str, str]:
        """What a fit belongs to besides its options and tiles."""
        facts = {"network": self.network, "base": self._base_digest()}
        return facts if self.network == "ncsn" else facts | {"noise_levels": _LEVELS}

    def _base_digest(self) -> str:
        """Empty where there is no base."""
        if self.network == "ncsn":
            return ""
        if self.network == "pixel":
            return load_pixel_base(self._base_place(), offline=self._offline)[1]
        return digest(self._base_place(), offline=self._offline)


_LEVELS = "nearest timesteps"
"""Which timesteps of a base stand for the noise levels. Change it with `levels_of`: other ones are other vectors."""
_BASES = {"latent": DEFAULT_BASE, "pixel": "google/ddpm-celebahq-256"}
