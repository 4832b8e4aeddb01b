"""Tiles a second of the made-up tissue, as models learn from it: stain, scanner and JPEG of their own for every slide.

    python benchmarks/synthetic.py [--tiles N] [--processes N]
    python benchmarks/synthetic.py --sheet docs/pictures/synthetic.png --real ../shared/data

Each process draws its own stream, slides included, after a first tile of every kind has filled the caches. The target
is 20 normal tiles of 256 px a second on two cores. With `--sheet`, instead, a picture of real tiles above made-up ones;
the real ones are those of PatchCamelyon and two regions of Camelyon17, both CC0.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from scipy.ndimage import uniform_filter

from wsi_anomaly.synthetic import (
    AnomalyKind,
    ArtefactKind,
    TileKind,
    VirtualSlide,
    draw_region,
    draw_slide,
    synthetic_tiles,
)
from wsi_anomaly.synthetic.structures import MAP_STEP_PX, Structure

WIDTH_PX, SIDE_PX, HEADING_PX = 960, 120, 16
SLIDES: tuple[tuple[int, tuple[AnomalyKind, ...]], ...] = (
    (3, ()),
    (33, ("metastasis", "isolated_tumour_cells")),
    (5, ("necrosis", "fibrosis", "mucin")),
)
DISEASES: tuple[TileKind, ...] = get_args(AnomalyKind)
FAULTS: tuple[TileKind, ...] = get_args(ArtefactKind)
STREAMS: dict[str, tuple[TileKind, ...]] = {
    "normal": ("normal",),
    "disease": DISEASES,
    "artefacts": FAULTS,
}


def main() -> None:
    """Print tiles per second for each stream."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=288, help="in each process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--real", type=Path)
    arguments = parser.parse_args()
    if arguments.sheet:
        write_sheet(arguments.sheet, arguments.real)
        return
    table = Table("stream", "processes", "tiles", "tiles/s together")
    with ProcessPoolExecutor(arguments.processes) as pool:
        for name, kinds in STREAMS.items():
            seeds = range(arguments.processes)
            done = list(pool.map(seconds, seeds, [arguments.tiles] * len(seeds), [kinds] * len(seeds)))
            tiles = arguments.tiles * len(seeds)
            table.add_row(name, str(arguments.processes), str(tiles), f"{tiles / max(done):.1f}")
    Console().print(table)


def seconds(seed: int, tiles: int, kinds: tuple[TileKind, ...]) -> float:
    """How long one process takes for its tiles."""
    for _ in synthetic_tiles(seed + 1000, len(kinds), kinds=kinds):
        pass
    started = time.perf_counter()
    for _ in synthetic_tiles(seed, tiles, kinds=kinds):
        pass
    return time.perf_counter() - started


def write_sheet(path: Path, real: Path) -> None:
    """Write the picture: rows of tiles under their headings."""
    rows: list[tuple[str, list[tuple[str, np.ndarray]]]] = [
        ("real, normal: PatchCamelyon, 0.97 um/px", pcam(real, "test_normal")),
        ("made up, normal, 0.97 um/px", coarse(("normal",))),
        ("real, tumour: PatchCamelyon, 0.97 um/px", pcam(real, "test_tumor")),
        ("made up, metastases, 0.97 um/px", coarse(("metastasis", "micrometastasis"))),
        ("real: Camelyon17 regions, 0.5 um/px", regions(real)),
        *structures(),
    ]
    sheet = Image.new("RGB", (WIDTH_PX, sum(HEADING_PX + row[0][1].shape[0] for _, row in rows)), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for heading, row in rows:
        pen.text((4, top + 2), heading, "black")
        left = 0
        for name, tile in row:
            sheet.paste(Image.fromarray(tile), (left, top + HEADING_PX))
            if name:
                pen.text((left + 4, top + HEADING_PX + 2), name, "black", stroke_width=2, stroke_fill="white")
            left += tile.shape[1]
        top += HEADING_PX + row[0][1].shape[0]
    # Few colours, as a picture in a repository should be small.
    sheet.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def pcam(real: Path, folder: str) -> list[tuple[str, np.ndarray]]:
    """Ten tiles of PatchCamelyon, each from another part of the folder."""
    paths = sorted((real / "tiles" / "pcam" / folder).iterdir())
    return [("", np.asarray(Image.open(paths[i * len(paths) // 10]).convert("RGB"))) for i in range(10)]


def coarse(kinds: tuple[TileKind, ...]) -> list[tuple[str, np.ndarray]]:
    """Ten tiles from ten slides at the scale of PatchCamelyon."""
    tiles = [next(iter(synthetic_tiles(seed, 1, tile_px=192, kinds=kinds[seed % len(kinds) :]))) for seed in range(10)]
    return [("", np.asarray(Image.fromarray(pixels).reduce(2))) for pixels, _ in tiles]


def regions(real: Path) -> list[tuple[str, np.ndarray]]:
    """Four crops of each Camelyon17 region, at 0.5 µm/px."""
    tiles = []
    for path in sorted((real / "regions").glob("*.jpeg")):
        region = np.asarray(Image.open(path).convert("RGB").reduce(2))
        corners = ((100, 500), (100, 650), (600, 100), (800, 700))
        tiles += [("", region[row : row + SIDE_PX, column : column + SIDE_PX]) for row, column in corners]
    return tiles


def structures() -> list[tuple[str, list[tuple[str, np.ndarray]]]]:
    """Where each structure is at its purest, then each artefact, at 0.5 µm/px."""
    tiles: dict[str, np.ndarray] = {}
    for seed, kinds in SLIDES:
        slide = draw_slide(seed, anomalies=kinds, varied=True)
        for structure in Structure:
            if structure.is_abnormal == bool(kinds) and structure in slide.anatomy.structures and structure:
                tiles.setdefault(structure.name.lower(), around(slide, purest(slide, structure)))
    for seed, kind in enumerate(get_args(ArtefactKind)):
        slide = draw_slide(seed + 20, artefacts=(kind,), varied=True)
        line = np.array(slide.artefacts[0].outline_level0_px.exterior.coords).astype(int)
        depth_px = slide.anatomy.depth_px[tuple(np.clip(line.T[::-1] // MAP_STEP_PX, 0, 511))]
        tiles[f"artefact: {kind}"] = around(slide, tuple(line[depth_px.argmax()].tolist()))
    named, across = list(tiles.items()), WIDTH_PX // SIDE_PX
    rows = [named[i : i + across] for i in range(0, len(named), across)]
    return [("made up, 0.5 um/px" if i == 0 else "", row) for i, row in enumerate(rows)]


def purest(slide: VirtualSlide, structure: Structure) -> tuple[int, int]:
    """The place, (x, y), with the most of a structure close by, and among those the one with the most of it around."""
    here = (slide.anatomy.structures == structure).astype(np.float32)
    row, column = np.unravel_index((uniform_filter(here, 5) + uniform_filter(here, 15)).argmax(), here.shape)
    return int(column) * MAP_STEP_PX, int(row) * MAP_STEP_PX


def around(slide: VirtualSlide, centre_px: tuple[int, int]) -> np.ndarray:
    """The pixels around a place."""
    return draw_region(slide, (centre_px[0] - SIDE_PX // 2, centre_px[1] - SIDE_PX // 2), (SIDE_PX, SIDE_PX))


if __name__ == "__main__":
    main()
