"""What may truly be said of a tile whose structures are known: keywords and captions. Knows words, no pixels."""

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np

from wsi_anomaly.synthetic.structures import Structure

NOTICEABLE_SHARE = 0.04
"""A structure that takes less of a tile is not spoken of."""
_MOST_PHRASES = 4
"""CLIP's text encoder sees 77 tokens; the longest keyword takes some 20 of them."""


class Vocabulary(NamedTuple):
    """How one structure is spoken of."""

    words: str
    """A plain name for captions."""
    keywords: tuple[str, ...]
    """Those of the list for lymph nodes that are true where the structure is seen."""


def keywords_of(shares: Mapping[str, float]) -> tuple[str, ...]:
    """The keywords that are true of a tile by the area shares of its structures, those of larger structures first."""
    noticed = _noticed(shares)
    return tuple(dict.fromkeys(keyword for name in noticed for keyword in vocabulary()[name].keywords))


def captions(shares: Mapping[str, float], rng: np.random.Generator) -> str:
    """One of the many true captions of a tile: a few phrases, those of larger structures more often and first."""
    noticed = _noticed(shares)
    weights = np.sqrt([shares[name] for name in noticed])
    count = min(len(noticed), int(rng.integers(1, _MOST_PHRASES + 1)))
    chosen = sorted(rng.choice(len(noticed), size=count, replace=False, p=weights / weights.sum()))
    phrases = [str(rng.choice(_phrases(noticed[i]))) for i in chosen]
    return ", ".join(dict.fromkeys(phrases))


@cache
def vocabulary() -> Mapping[str, Vocabulary]:
    """How each structure is spoken of, by its lower-case name."""
    table = tomllib.loads((files("wsi_anomaly.synthetic") / "structures.toml").read_text(encoding="utf-8"))
    return {
        structure.name.lower(): Vocabulary(entry["words"], tuple(entry.get("keywords", ())))
        for structure in Structure
        for entry in [table[structure.name.lower()]]
    }


def _noticed(shares: Mapping[str, float]) -> list[str]:
    """The structures worth words, the largest first; always one."""
    ordered = sorted(shares, key=lambda name: -shares[name])
    return [name for name in ordered if shares[name] >= NOTICEABLE_SHARE] or ordered[:1]


def _phrases(name: str) -> tuple[str, ...]:
    words, keywords = vocabulary()[name]
    return (words, *keywords)
