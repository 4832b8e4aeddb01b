"""How often each keyword was chosen over a cohort: a table, and a chart of training beside tested tissue."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from wsi_anomaly.prompts.keywords import Keyword
from wsi_anomaly.reporting.keyword_chart import write_keyword_chart
from wsi_anomaly.stages.fit import Split
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.prompts import PromptStore
from wsi_anomaly.storage.record import write_text

COLUMNS = ("keyword", "category", "group", "tiles", "of_tiles", "share")


@dataclass(frozen=True, slots=True)
class Frequency:
    """How many of some tiles have each keyword in their prompt."""

    of_tiles: int
    tiles: Mapping[str, int]

    def share(self, keyword: str) -> float:
        """Of the tiles, 0 to 1."""
        return self.tiles.get(keyword, 0) / self.of_tiles if self.of_tiles else 0.0


def frequency_of(slides: Sequence[SlideFolder]) -> Frequency:
    """Over all described tiles of some slides."""
    return _count([(slide, None) for slide in slides])


def frequency_of_training(split: Split) -> Frequency:
    """Over the tiles that a detector learns from."""
    return _count([(part.folder, part.tiles) for part in split.train])


def write_keyword_frequency(run: RunFolder, keywords: Sequence[Keyword], groups: Mapping[str, Frequency]) -> None:
    """The table and the chart of a run folder. Groups without tiles are left out."""
    groups = {name: group for name, group in groups.items() if group.of_tiles}
    if not groups:
        return
    _write_table(run.keyword_table, keywords, groups)
    texts = [keyword.text for keyword in keywords]
    write_keyword_chart(
        run.keyword_chart,
        {name: np.array([group.share(text) for text in texts]) for name, group in groups.items()},
        texts,
        categories=[keyword.category for keyword in keywords],
        counts={name: group.of_tiles for name, group in groups.items()},
    )


def read_keyword_frequency(table: Path) -> dict[str, Frequency]:
    """The groups of a table; none where there is no table."""
    if not table.exists():
        return {}
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        name: Frequency(
            max(int(row["of_tiles"]) for row in rows if row["group"] == name),
            {row["keyword"]: int(row["tiles"]) for row in rows if row["group"] == name},
        )
        for name in dict.fromkeys(row["group"] for row in rows)
    }


def _count(parts: Sequence[tuple[SlideFolder, Bool[np.ndarray, " _"] | None]]) -> Frequency:
    tiles: dict[str, int] = {}
    of_tiles = 0
    for slide, chosen in parts:
        store = PromptStore(slide.prompts)
        keyword = store.keyword if chosen is None else store.keyword[chosen]
        described = keyword[(keyword >= 0).any(axis=1)]
        of_tiles += len(described)
        counts = np.bincount(described[described >= 0], minlength=len(store.keywords))
        for text, count in zip(store.keywords, counts.tolist(), strict=True):
            tiles[text] = tiles.get(text, 0) + count
    return Frequency(of_tiles, tiles)


def _write_table(path: Path, keywords: Sequence[Keyword], groups: Mapping[str, Frequency]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for keyword in keywords:
        for name, group in groups.items():
            count = group.tiles.get(keyword.text, 0)
            writer.writerow(
                [keyword.text, keyword.category, name, count, group.of_tiles, f"{group.share(keyword.text):.6f}"]
            )
    write_text(path, text.getvalue())
