"""What is known of the tiles of a slide beside their pixels: prompts, and what the cohort's table says of the slide."""

import json
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from wsi_anomaly.storage.cohort_values import categories_of, read_cohort_values
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.prompts import Fragments, NoPrompts, PromptStore
from wsi_anomaly.storage.record import read_record


class Described(NamedTuple):
    """Of some tiles, in the order in which detectors take it."""

    prompts: tuple[Fragments, ...]
    embeddings: Float32[np.ndarray, "tile d"] | None
    keyword_scores: Float32[np.ndarray, "tile keyword"] | None
    categories: Int64[np.ndarray, "tile variable"] | None


class Descriptions:
    """Those of one slide, for reading."""

    def __init__(self, folder: SlideFolder, *, prompted: bool) -> None:
        """`prompted`: whether the stage `prompt` has run, and what it left is asked for.

        Raises:
            OutputError: what is kept of the cohort's table is damaged.
        """
        self._prompts = PromptStore(folder.prompts) if prompted else NoPrompts()
        self._values = read_cohort_values(folder.cohort_values)

    def read(self, indices: Int64[np.ndarray, " tile"]) -> Described:
        """Of some tiles, in the order of `indices`."""
        prompts, embeddings, keyword_scores = self._prompts.read(indices)
        return Described(prompts, embeddings, keyword_scores, categories_of(self._values, len(indices)))


def description_digests(folder: SlideFolder, *, prompted: bool) -> dict[str, str]:
    """What stands for all of it in a recipe; nothing where there is nothing.

    Raises:
        MissingOutputError: the stage `prompt` has not run where it is needed.
    """
    values = read_cohort_values(folder.cohort_values)
    digests = {"prompts": read_record(folder.root, "prompt").digest} if prompted else {}
    return digests | ({"cohort": json.dumps(values)} if values else {})
