"""Scores of tiles by how unlikely their score norms are together."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from wsi_anomaly.detectors.density import Density
from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.detectors.score_norms import ScoreNorms


@dataclass(frozen=True, slots=True)
class NormScorer:
    """A fitted network or base, and the density. The scores of a tile do not depend on the other tiles of its batch."""

    norms: ScoreNorms
    density: Density

    def score(self, batch: TileBatch) -> Float32[np.ndarray, "tile 1"]:
        """-log p of the whole tile's amounts of noise, or their distance from normal ones."""
        return self.scores_and_vectors(batch)[0]

    def scores_and_vectors(
        self, batch: TileBatch
    ) -> tuple[Float32[np.ndarray, "tile 1"], Float32[np.ndarray, "tile level"]]:
        """With the norm sigma * ||score|| of each whole tile, from the strongest noise to the weakest."""
        vectors = self.norms.vectors(batch)
        return self.density.anomaly(vectors)[:, None], vectors
