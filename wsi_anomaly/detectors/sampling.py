"""Which tiles a detector learns from where it cannot take all of them: as many of each slide. Reads no tiles."""

import logging

import numpy as np
from jaxtyping import Int64

log = logging.getLogger(__name__)


def even_sample(slides: Int64[np.ndarray, " tile"], most: int, *, seed: int) -> Int64[np.ndarray, " _"]:
    """Positions of at most `most` tiles, ascending, as evenly over the slides as these are large; says how many.

    A slide with fewer tiles than its part gives all, and the others share the rest. All tiles where there is room.
    """
    if len(slides) <= most:
        log.info("using all %d tiles", len(slides))
        return np.arange(len(slides))
    order = np.random.default_rng(seed).permutation(len(slides))
    # The place of each tile in its slide's own order: first all first ones are taken, then all second ones.
    by_slide = order[np.argsort(slides[order], kind="stable")]
    sizes = np.unique(slides, return_counts=True)[1]
    rank = np.empty(len(slides), np.int64)
    rank[by_slide] = np.concatenate([np.arange(size) for size in sizes])
    chosen = np.sort(order[np.argsort(rank[order], kind="stable")][:most])
    log.info("using %d of %d tiles, taken evenly from %d slides", most, len(slides), len(sizes))
    return chosen
