"""Tiling throughput: the stage `tile` against the same reads done by bare OpenSlide in as many threads.

    python benchmarks/tiling.py [SLIDE] [--threads N] [--repeats N]

Bare means no mask, no resampling, no status, no store: `read_region` alone, at the same places and level, thrown away.
Without a slide, three are made, of a few thousand tiles each, as real ones have: one whose level 0 is at 0.5 µm/px, one
whose level 1 is, and one of 0.35 µm/px, which must be resampled. The two take turns, and the ratio is that of their
medians, so that the machine's load touches both alike.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openslide
from fields import repeated, tissue_field
from rich.console import Console
from rich.table import Table

from wsi_anomaly.cohort import CohortSlide
from wsi_anomaly.imaging.tissue import TissueOptions
from wsi_anomaly.stages.mask import mask_slide
from wsi_anomaly.stages.tile import TileOptions, tile_slide
from wsi_anomaly.storage.layout import SlideFolder
from wsi_anomaly.storage.record import remove
from wsi_anomaly.storage.tiles import TileStore
from wsi_anomaly.synthetic import write_pyramid_from_tiles


def main() -> None:
    """Print tiles per second of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    table = Table("slide", "tiles", "threads", "tile, tiles/s", "bare OpenSlide, tiles/s", "ratio")
    with tempfile.TemporaryDirectory() as scratch:
        slides = [arguments.slide] if arguments.slide else made_slides(Path(scratch))
        for slide in slides:
            table.add_row(*compare(slide, Path(scratch), threads=arguments.threads, repeats=arguments.repeats))
    Console().print(table)


def made_slides(folder: Path) -> list[Path]:
    """Slides that repeat one field of made-up tissue."""
    field = tissue_field(folder)
    slides = {folder / f"mpp_{mpp}.tif": (mpp, side) for mpp, side in ((0.5, 24576), (0.25, 49152), (0.35, 24576))}
    for path, (mpp, side) in slides.items():
        write_pyramid_from_tiles(path, repeated(field, side), size_px=(side, side), mpp=mpp)
    return list(slides)


def compare(path: Path, scratch: Path, *, threads: int, repeats: int) -> list[str]:
    """A row of the table."""
    slide = CohortSlide(path.stem, path)
    folder = SlideFolder(scratch / "slides" / path.stem)
    mask_slide(slide, folder, TissueOptions())
    tile_slide(slide, folder, TileOptions(), threads=threads)
    store = TileStore(folder.tiles)
    bare = reads_of(path, store)

    def forget() -> None:
        for output in (folder.root / "records" / "tile.json", folder.tiles, folder.overview):
            remove(output)

    def tile() -> None:
        tile_slide(slide, folder, TileOptions(), threads=threads)

    def read() -> None:
        with openslide.OpenSlide(path) as opened, ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda place: opened.read_region(*place) and None, bare))

    ours, theirs = alternate(tile, read, before=forget, repeats=repeats)
    rates = [len(store) / ours, len(store) / theirs]
    return [
        path.name,
        str(len(store)),
        str(threads),
        f"{rates[0]:.0f}",
        f"{rates[1]:.0f}",
        f"{rates[0] / rates[1]:.2f}",
    ]


def reads_of(path: Path, store: TileStore) -> list[tuple[tuple[int, int], int, tuple[int, int]]]:
    """What `read_region` is asked for: the same level, and as many of its pixels as the tile covers."""
    level = store.attributes["read_recipe"]["level"]
    with openslide.OpenSlide(path) as opened:
        downsample = opened.level_downsamples[level]
    width, height = (round(side / downsample) for side in store.grid.footprint_level0_px)
    return [((x, y), level, (width, height)) for x, y in store.places.origins.tolist()]


def alternate(
    ours: Callable[[], None], theirs: Callable[[], None], *, before: Callable[[], None], repeats: int
) -> tuple[float, float]:
    """Median seconds of both; what is done before each does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for call, taken in zip((ours, theirs), seconds, strict=True):
            before()
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    main()
