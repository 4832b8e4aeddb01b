"""From restored tiles to scores, maps and pictures: what every diffusion detector does alike."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from wsi_anomaly.detectors.density import Density
from wsi_anomaly.detectors.diffusion.restoring import Images, Restorer
from wsi_anomaly.detectors.diffusion.walk_norms import surprise, vectors
from wsi_anomaly.detectors.perceptual import Lpips
from wsi_anomaly.detectors.protocol import Perception, TileBatch
from wsi_anomaly.detectors.residuals import SQUARED_ERROR, ms_ssim, mse, squared_error_map
from wsi_anomaly.devices import to_pixels, to_tensor

ScoreName = Literal["mse_latent", "mse_pixel", "ms_ssim", "lpips", "embedding", "keyword_shift", "msma"]
"""`embedding`: one minus the cosine of tile and reconstruction, as the image-text model sees them. `keyword_shift`: how
near the tile is to the keywords of abnormal tissue, less `SHARE_OF_REBUILT` of how near its reconstruction is.
`msma`: how unlikely the amounts of noise are that the network sees on the way, guided ones where there is guidance."""
SEEN: tuple[ScoreName, ...] = ("embedding", "keyword_shift")
"""Those that need the image-text model."""
SHARE_OF_REBUILT = 0.5
"""A reconstruction is one draw of many and blurred: all of its nearness would add more noise than it takes away. Of 1,
0.75, 0.5 and 0.25 this and 0.25 did best on real tiles (benchmarks/RESULTS.md)."""
PixelScore = Callable[[Images, Images], Float32[torch.Tensor, " tile"]]

log = logging.getLogger(__name__)


def names_of(scores: Sequence[ScoreName], starts: Sequence[int]) -> tuple[str, ...]:
    """Each score at each starting timestep; the timestep is left out where there is one only."""
    if len(starts) == 1:
        return tuple(scores)
    return tuple(f"{score} t{start}" for start in starts for score in scores)


@dataclass(frozen=True, slots=True)
class DiffusionScorer:
    """A detector that is ready: scores, maps and reconstructions of tiles."""

    restorer: Restorer
    scores: tuple[ScoreName, ...]
    lpips: Lpips | None = None
    perception: Perception | None = None
    """For the scores of `SEEN`."""
    densities: tuple[Density, ...] = ()
    """For the score `msma`: one for each starting timestep."""
    map_meaning: ClassVar[str] = f"{SQUARED_ERROR} and starting timesteps"

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the walks do, and the sha256 of LPIPS' weights where they decide a score.

        Of each walk: timestep, its place on the sampler's grid, signal-to-noise ratio of what is added there, and how
        often a tile goes through the network.
        """
        walks, passes = self.restorer.trajectories, self.restorer.network.passes
        return {
            "timesteps": [walk.start for walk in walks],
            "grid_index": [walk.index for walk in walks],
            "snr": [walk.snr / self.restorer.noise_variance for walk in walks],
            "network_calls": [walk.calls * passes for walk in walks],
            **({"lpips_digest": self.lpips.digest} if self.lpips else {}),
        }

    def score(self, batch: TileBatch) -> Float32[np.ndarray, "tile score"]:
        """One column for each of `names_of`; NaN for a tile whose reconstruction holds no number."""
        starts = range(len(self.restorer.restore(batch).after))
        comparisons = [_Comparison(self, batch, start) for start in starts]
        columns = [self._score(name, comparison) for comparison in comparisons for name in self.scores]
        table = np.stack(columns, axis=1)
        if failed := int((~np.isfinite(table)).any(axis=1).sum()):
            log.warning("%d tiles could not be restored: the network's output is no number", failed)
        return table

    def score_map(self, batch: TileBatch) -> Float32[np.ndarray, "tile y x"]:
        """The squared error of each pixel, averaged over its colours and over the starting timesteps."""
        restored = self.restorer.restore(batch)
        images = to_tensor(batch.pixels, torch.device("cpu"))
        maps = [
            self.restorer.in_portions(lambda a, b: squared_error_map(a, self.decoded(b)), images, after)
            for after in restored.after
        ]
        return np.asarray(np.mean(maps, axis=0), np.float32)

    def reconstruct(self, batch: TileBatch) -> UInt8[np.ndarray, "tile y x rgb"]:
        """Each tile as it comes back from the first of the starting timesteps."""
        return _Comparison(self, batch, 0).pixels

    def _score(self, name: ScoreName, compared: "_Comparison") -> Float32[np.ndarray, " tile"]:
        if name == "mse_latent":
            return self.restorer.in_portions(mse, compared.restored.before, compared.after)
        if name == "msma":
            return compared.surprise()
        if name in SEEN:
            return compared.seen_apart(name)
        images = to_tensor(compared.batch.pixels, torch.device("cpu"))
        return self.restorer.in_portions(self._pixel_score(name), images, torch.from_numpy(compared.images))

    def _pixel_score(self, name: ScoreName) -> PixelScore:
        if name == "lpips":
            assert self.lpips is not None, "loaded with the detector"  # noqa: S101 - for the type checker
            return self.lpips
        return mse if name == "mse_pixel" else ms_ssim

    def decoded(self, latents: torch.Tensor) -> Images:
        """Latents as intensities in [0, 1]."""
        return self.restorer.network.decode(latents).float().clamp(0, 1)


class NormScorer(DiffusionScorer):
    """One that judges how much noise the network sees on the way, among others."""

    def scores_and_vectors(
        self, batch: TileBatch
    ) -> tuple[Float32[np.ndarray, "tile score"], Float32[np.ndarray, "tile call"]]:
        """With the norm of the noise that the network sees in each tile at each call, walk after walk."""
        return self.score(batch), vectors(self.restorer, batch)


def judging(scorer: DiffusionScorer, densities: tuple[Density, ...]) -> DiffusionScorer:
    """The same with what the score `msma` needs, where there is some."""
    if not densities:
        return scorer
    return NormScorer(scorer.restorer, scorer.scores, scorer.lpips, scorer.perception, densities)


class _Comparison:
    """Some tiles and what came back of them from one start: decoded once, and seen once, for all scores."""

    def __init__(self, scorer: DiffusionScorer, batch: TileBatch, start: int) -> None:
        self.batch, self.restored = batch, scorer.restorer.restore(batch)
        self.after = self.restored.after[start]
        self._scorer, self._start = scorer, start

    @cached_property
    def images(self) -> Float32[np.ndarray, "tile rgb y x"]:
        """Reconstructions, as intensities; NaN where the network failed."""
        return self._scorer.restorer.in_portions(self._scorer.decoded, self.after)

    @property
    def pixels(self) -> UInt8[np.ndarray, "tile y x rgb"]:
        """The same as pixels; black where the network failed."""
        return to_pixels(torch.from_numpy(np.nan_to_num(self.images))).numpy()

    def seen_apart(self, name: ScoreName) -> Float32[np.ndarray, " tile"]:
        """How far apart the two are as the image-text model sees them."""
        if not len(self.batch):
            return np.zeros(0, np.float32)
        perception, (before, after) = self._perception, self._seen
        if name == "embedding":
            values: Float32[np.ndarray, " tile"] = np.array(
                [1 - np.dot(a, b) for a, b in zip(before, after, strict=True)], np.float32
            )
        else:
            rebuilt = np.float32(SHARE_OF_REBUILT) * perception.abnormality(after)
            values = np.asarray(perception.abnormality(before) - rebuilt, np.float32)
        values[~np.isfinite(self.images).all(axis=(1, 2, 3))] = np.nan
        return values

    def surprise(self) -> Float32[np.ndarray, " tile"]:
        """How unlikely it is what the network sees on the way."""
        return surprise(self._scorer.densities[self._start], self.restored.norms[self._start].numpy())

    @cached_property
    def _seen(self) -> tuple[Float32[np.ndarray, "tile d"], Float32[np.ndarray, "tile d"]]:
        return self._perception.embed(self.batch.pixels), self._perception.embed(self.pixels)

    @property
    def _perception(self) -> Perception:
        perception = self._scorer.perception
        assert perception is not None, "loaded with the detector"  # noqa: S101 - for the type checker
        return perception
