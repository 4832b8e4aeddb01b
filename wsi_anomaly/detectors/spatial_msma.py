"""Spatial MSMA: a place of a tile where a network sees other amounts of noise than in normal tissue is abnormal.

Mahmood, thesis, chapters 3 (Grad-CAM of MSMA) and 5 (Spatial-MSMA).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float32
from pydantic import Field, PositiveInt, field_validator
from torch.nn.functional import interpolate

from wsi_anomaly.detectors.density import fit_density, load_density, require_items, save_density
from wsi_anomaly.detectors.diffusion.pixel import PixelDiffusion
from wsi_anomaly.detectors.flow import MOST_STEPS
from wsi_anomaly.detectors.grad_cam import grad_cams
from wsi_anomaly.detectors.ncsn import NcsnOptions, fit_ncsn, load_ncsn
from wsi_anomaly.detectors.norm_fits import SomeTiles, gathered, held_out_tiles, is_noted, read_note, write_note
from wsi_anomaly.detectors.norm_scorer import NormScorer
from wsi_anomaly.detectors.protocol import TileBatch, TileSource
from wsi_anomaly.detectors.residuals import tile_means
from wsi_anomaly.detectors.score_norms import Maps, ScoreNorms, norms_of
from wsi_anomaly.detectors.spatial_flow import SpatialFlow, cells_of, fit_spatial_flow, some_cells
from wsi_anomaly.detectors.training import fit_identity
from wsi_anomaly.detectors.weights import load_weights, save_weights
from wsi_anomaly.devices import resolve_device
from wsi_anomaly.errors import ModelError, OptionsError
from wsi_anomaly.options import Options

FLOW = "flow"
"""The folder of the flow's weights, beside those of the network."""

MapName = Literal["flow", "gradcam"]


class SpatialMsma(Options):
    """Learns how much noise a diffusion network sees at each place of normal tiles, given what it sees around."""

    score_names: ClassVar[tuple[str, ...]] = ("spatial_msma",)
    paper: ClassVar[str] = "Mahmood, PhD thesis, ch. 5"
    needs: ClassVar[tuple[str, ...]] = ()

    map: MapName = "flow"
    """"flow": a conditional flow judges each place, and the score is the mean. "gradcam": a mixture of Gaussians judges
    whole tiles, as in MSMA, and Grad-CAM shows what in the network's middle raises the score. The maps of the flow are
    a little higher at the border of a tile, beyond which the network sees zeros; Grad-CAM points weakly."""
    ncsn: NcsnOptions = NcsnOptions()
    kernel_px: PositiveInt = 3
    """Of the square whose norm stands for its middle."""
    cell_px: PositiveInt = 8
    """Of the square that is judged as one place."""
    flow_steps: PositiveInt = MOST_STEPS
    """How long the flow learns, at most."""
    held_out_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the tiles that the network does not learn from, so that the flow or mixture can."""
    most_tiles: PositiveInt = 2000
    """How many tiles the flow or mixture is fitted on, at most, taken evenly from the slides."""

    @field_validator("kernel_px")
    @classmethod
    def _has_a_middle(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd, so that there is a middle")
        return value

    def fit(self, tiles: TileSource, checkpoint: Path, *, device: str) -> None:
        """Teach the network normal tissue, and the flow or mixture what the network sees in other normal tiles.

        Goes on from an unfinished fit with the same options and tiles.

        Raises:
            CohortError: there are too few tiles.
            ModelError: training diverged.
            OptionsError: the device does not exist or is too small for one tile, or tiles do not fit the network.
        """
        place, seed = resolve_device(device), self.ncsn.training.seed
        learnt, judged = held_out_tiles(tiles, self.held_out_fraction, most=self.most_tiles, seed=seed)
        require_items("gmm", len(judged), total=len(learnt) + len(judged))
        self._require_cells(judged)
        identity = fit_identity(tiles, {"detector": _NAME, **self.model_dump(mode="json")})
        if is_noted(checkpoint, identity):
            return
        fit_ncsn(_NAME, self.ncsn, learnt, folder=checkpoint, device=place)
        norms = self._norms(checkpoint, place)
        if self.map == "flow":
            self._fit_flow(norms, judged, checkpoint, identity)
        else:
            vectors = gathered(judged, norms.vectors, folder=checkpoint, identity=identity)
            save_density(fit_density("gmm", vectors, seed=seed), checkpoint)
        write_note(checkpoint, _NAME, identity=identity, map=self.map)

    def load(self, checkpoint: Path, *, device: str) -> "SpatialMsmaScorer | CamScorer":
        """The scorer that `fit` left in `checkpoint`.

        Raises:
            ModelError: the fit is missing, damaged, of another format, architecture or detector.
            OptionsError: the device does not exist.
        """
        place = resolve_device(device)
        fitted = read_note(checkpoint, _NAME).get("map")
        if fitted != self.map:
            raise ModelError(
                f"{checkpoint}: was fitted for map = '{fitted}', not '{self.map}'. Use the options that the model was "
                "fitted with, or fit it again."
            )
        norms = self._norms(checkpoint, place)
        if self.map == "gradcam":
            return CamScorer(norms, load_density(checkpoint))
        flow = SpatialFlow(self.ncsn.levels)
        load_weights(flow, checkpoint / FLOW, self._flow_architecture())
        return SpatialMsmaScorer(norms, flow.to(place).eval(), self.kernel_px, self.cell_px)

    def _fit_flow(self, norms: ScoreNorms, tiles: SomeTiles, checkpoint: Path, identity: str) -> None:
        def cells(batch: TileBatch) -> Float32[np.ndarray, "tile cell value"]:
            return some_cells(norms.of_maps(self._cells, batch), batch.seeds)

        values = gathered(tiles, cells, folder=checkpoint, identity=identity)
        seed = self.ncsn.training.seed
        flow = fit_spatial_flow(values, tiles.groups, most_steps=self.flow_steps, seed=seed)
        (checkpoint / FLOW).mkdir(exist_ok=True)
        save_weights(flow, checkpoint / FLOW, self._flow_architecture())

    def _cells(self, maps: Maps) -> torch.Tensor:
        return cells_of(maps, kernel_px=self.kernel_px, cell_px=self.cell_px)

    def _norms(self, checkpoint: Path, place: torch.device) -> ScoreNorms:
        network = load_ncsn(_NAME, self.ncsn, checkpoint, device=place)
        return ScoreNorms(network, tuple(reversed(range(self.ncsn.levels))), place)

    def _flow_architecture(self) -> dict[str, Any]:
        sizes = {"levels": self.ncsn.levels, "kernel_px": self.kernel_px, "cell_px": self.cell_px}
        return {"detector": _NAME, "part": FLOW, **sizes}

    def _require_cells(self, tiles: SomeTiles) -> None:
        side_px = min(tiles.read(np.array([0])).pixels.shape[1:3])
        if self.map == "flow" and side_px < self.cell_px:
            raise OptionsError(
                f"cell_px = {self.cell_px} is more than the {side_px} px of a tile. Lower it under [detector] of the "
                "pipeline file."
            )


@dataclass(frozen=True, slots=True)
class SpatialMsmaScorer:
    """A fitted network and flow. The scores of a tile do not depend on the other tiles of its batch."""

    norms: ScoreNorms
    flow: SpatialFlow
    kernel_px: int
    cell_px: int
    map_meaning: ClassVar[str] = "Map: -log p of each place, given what is around it"

    def score(self, batch: TileBatch) -> Float32[np.ndarray, "tile 1"]:
        """The mean of -log p over the places of each tile."""
        return self.scores_and_vectors(batch)[0]

    def scores_and_vectors(
        self, batch: TileBatch
    ) -> tuple[Float32[np.ndarray, "tile 1"], Float32[np.ndarray, "tile level"]]:
        """With the norm sigma * ||score|| of each whole tile, from the strongest noise to the weakest."""

        def seen(maps: Maps) -> torch.Tensor:
            return torch.cat([self._surprise(maps).flatten(1), norms_of(maps)], dim=1)

        values = self.norms.of_maps(seen, batch)
        levels = len(self.norms.timesteps)
        return tile_means(values[:, None, :-levels])[:, None], values[:, -levels:]

    def score_map(self, batch: TileBatch) -> Float32[np.ndarray, "tile y x"]:
        """-log p of each place, given what is around it, interpolated between the middles of the places."""
        size_px = (batch.pixels.shape[1], batch.pixels.shape[2])

        def drawn(maps: Maps) -> torch.Tensor:
            return interpolate(self._surprise(maps)[:, None], size_px, mode="bilinear")[:, 0]

        return self.norms.of_maps(drawn, batch)

    def _surprise(self, maps: Maps) -> Float32[torch.Tensor, "tile row column"]:
        surprise: torch.Tensor = self.flow(cells_of(maps, kernel_px=self.kernel_px, cell_px=self.cell_px))
        return surprise


@dataclass(frozen=True, slots=True)
class CamScorer(NormScorer):
    """A fitted network and mixture. The scores of a tile do not depend on the other tiles of its batch."""

    map_meaning: ClassVar[str] = "Map: Grad-CAM of the score, what of it comes from where in this tile"

    def score_map(self, batch: TileBatch) -> Float32[np.ndarray, "tile y x"]:
        """Grad-CAM of the score: what of it comes from where, on a scale of its own for each tile."""
        network = self.norms.network
        assert isinstance(network, PixelDiffusion)  # noqa: S101 - `load` made it
        return grad_cams(network, self.norms.timesteps, self.density, batch.pixels)


_NAME = "spatial_msma"
