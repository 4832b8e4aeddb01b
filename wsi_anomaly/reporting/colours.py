"""The colours of a z-score: one scale for every picture and every QuPath file. Knows no slide, no file, no figure."""

import numpy as np
from jaxtyping import Float, UInt8

Z_SCALE = (0.0, 8.0)
"""The z-scores of the palest and of the darkest colour. Fixed, so that slides can be compared by eye."""

Z_COLOUR_MAP = "YlOrRd"
"""ColorBrewer's yellow to red: its lightness falls steadily, so it reads with any colour vision and in grey print."""


def z_colours(z: Float[np.ndarray, " score"]) -> UInt8[np.ndarray, "score rgb"]:
    """The colour of each z-score; outside the scale that of the nearer end, for NaN the palest."""
    from matplotlib import colormaps

    low, high = Z_SCALE
    position = np.nan_to_num(np.clip((z - low) / (high - low), 0.0, 1.0), nan=0.0)
    return np.asarray(colormaps[Z_COLOUR_MAP](position, bytes=True))[..., :3]
