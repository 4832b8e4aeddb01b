"""Which tiles a detector learns from where it cannot take all of them: as many of each slide. Reads no tiles."""

import logging

import numpy as np
from jaxtyping import Int64

log = logging.getLogger(__name__)


def even_sample(groups: Int64[np.ndarray, " tile"], most: int, *, seed: int) -> Int64[np.ndarray, " _"]:
    """Positions of at most `most` tiles, ascending, as evenly over the groups as these are large; says how many.

    A group with fewer tiles than its part gives all, and the others share the rest. All tiles where there is room.
    """
    if len(groups) <= most:
        log.info("learning from all %d tiles", len(groups))
        return np.arange(len(groups))
    order = np.random.default_rng(seed).permutation(len(groups))
    # The place of each tile in its group's own order: first all first ones are taken, then all second ones.
    by_group = order[np.argsort(groups[order], kind="stable")]
    sizes = np.unique(groups, return_counts=True)[1]
    rank = np.empty(len(groups), np.int64)
    rank[by_group] = np.concatenate([np.arange(size) for size in sizes])
    chosen = np.sort(order[np.argsort(rank[order], kind="stable")][:most])
    log.info("learning from %d of %d tiles, taken evenly from %d groups", most, len(groups), len(sizes))
    return chosen
