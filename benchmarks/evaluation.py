"""The command `evaluate` over a cohort of result folders: seconds, processor time and peak memory, and where they go.

    python benchmarks/evaluation.py [--slides N] [--tiles N] [--work FOLDER]

The folders are made by the project's own writers: tiles (places without pixels), scores, heat map and overview. A third
of the slides has outlines in an XML file of ASAP, around which z is higher. They stay in `--work` and are used again.
Then the same work is done once more in this process under the profiler, which takes longer, and tells the phases.
"""

import argparse
import cProfile
import os
import pstats
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int32
from rich.console import Console
from rich.progress import track
from rich.table import Table

from wsi_anomaly.annotations import read_annotation
from wsi_anomaly.annotations.coverage import area_fractions
from wsi_anomaly.annotations.frame import Frame
from wsi_anomaly.imaging.geometry import Grid
from wsi_anomaly.imaging.heatmap import erode, on_grid
from wsi_anomaly.storage.arrays import write_arrays
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.record import Recipe, find_record, writing
from wsi_anomaly.storage.tiles import TilePlaces, TileStatus, TileWriter

TILE_PX, TILE_MPP, DOWNSAMPLE, OVERVIEW_DOWNSAMPLE = 256, 0.5, 2.0, 64
PHASES = {
    "find slides": "mapped_slides",
    "read what is known of slides": "gather",
    "- of which read annotations": "read_annotation",
    "- of which shares of tiles": "abnormal_fraction",
    "tiles: ranking": "rank_tiles",
    "tiles: intervals": "tile_intervals",
    "slides: intervals": "slide_intervals",
    "segmentation": "segment",
    "segmentation: intervals": "segmentation_intervals",
    "lesions": "lesion_level",
    "controls": "control_warnings",
    "tables and figures": "write_outputs",
}
"""And the function of each."""


def main() -> None:
    """Make what is missing, run the command, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=400)
    parser.add_argument("--tiles", type=int, default=20_000)
    parser.add_argument("--work", type=Path, default=Path("evaluation-benchmark"))
    arguments = parser.parse_args()
    folder = arguments.work / f"{arguments.slides}x{arguments.tiles}"
    run, annotations = RunFolder(folder / "results"), folder / "annotations"
    annotations.mkdir(parents=True, exist_ok=True)
    for number in track(range(arguments.slides), "Making result folders"):
        make_slide(run.slide(f"slide_{number:03}"), annotations, number, arguments.tiles)
    print_costs(run, annotations)
    print_phases(run, annotations)


def print_costs(run: RunFolder, annotations: Path) -> None:
    """Of the whole command in a process of its own; its peak is at least that of this process, which is small."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "wsi_anomaly", "evaluate", str(run.root), "--annotations", str(annotations)]
    subprocess.run([*command, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    table = Table("wall, s", "processor, s", "peak, MiB", "cores")
    table.add_row(f"{wall:.1f}", f"{used:.1f}", f"{after.ru_maxrss / 1024:.0f}", str(os.cpu_count()))
    Console().print(table)


def print_phases(run: RunFolder, annotations: Path) -> None:
    """Of the stage in this process, under the profiler; then its slowest functions."""
    from wsi_anomaly.stages.evaluate import evaluate

    profile = cProfile.Profile()
    profile.runcall(evaluate, [run], annotations=annotations)
    stats = pstats.Stats(profile)
    seconds: dict[str, float] = {}
    for (_, _, name), (_, _, _, cumulative, _) in stats.stats.items():  # type: ignore[attr-defined]
        seconds[name] = max(cumulative, seconds.get(name, 0.0))
    table = Table("phase", "s, profiled")
    for phase, name in PHASES.items():
        table.add_row(phase, f"{seconds.get(name, 0.0):.1f}")
    Console().print(table)
    stats.sort_stats("tottime").print_stats(25)


def make_slide(folder: SlideFolder, annotations: Path, number: int, tiles: int) -> None:
    """The outputs of the stages up to `heatmap`; on every third slide also outlines."""
    if find_record(folder.root, "heatmap"):
        return
    random = np.random.default_rng(number)
    columns = max(4, int((tiles * 1.6) ** 0.5))
    rows = -(-int(tiles * 1.6) // columns)
    size = (int(columns * TILE_PX * DOWNSAMPLE), int(rows * TILE_PX * DOWNSAMPLE))
    grid = Grid.over((0, 0, *size), downsample=(DOWNSAMPLE, DOWNSAMPLE), tile_px=TILE_PX, stride_px=TILE_PX)
    cells = _tissue(grid, tiles)
    origins = grid.origins(cells)
    z = random.normal(0, 1, len(cells))
    if number % 3 == 0:
        path = annotations / f"{folder.slide_id}.xml"
        path.write_text(_outlines(random, size))
        annotation = read_annotation(path, frame=Frame(size, (0, 0, *size)))
        z += 2 * area_fractions(annotation.abnormal, np.hstack([origins, origins + int(TILE_PX * DOWNSAMPLE)]))
    _write(folder, TilePlaces(origins, cells, np.ones(len(cells), np.float32)), grid, z, size)


def _tissue(grid: Grid, tiles: int) -> Int32[np.ndarray, "tile rowcol"]:
    """The cells in a round piece of tissue."""
    cells = grid.cells()
    distance = np.hypot(*((cells + 0.5) / grid.shape - 0.5).T)
    return cells[np.sort(np.argsort(distance, kind="stable")[:tiles])]


def _outlines(random: np.random.Generator, size_px: tuple[int, int]) -> str:
    """An XML file with up to a dozen blobs, each of a few hundred to a few thousand corners, and a hole."""
    lines = ["<ASAP_Annotations><Annotations>"]
    for _ in range(int(random.integers(2, 12))):
        centre = random.uniform(0.3, 0.7, 2) * size_px
        radius, corners = float(np.exp(random.uniform(np.log(100), np.log(10_000)))), int(random.integers(300, 4000))
        lines.append(_annotation("Tumor", centre, radius, corners, random))
        if radius > 4000:  # noqa: PLR2004
            lines.append(_annotation("Exclusion", centre, radius / 4, 300, random))
    groups = "".join(f'<Group Name="{name}" PartOfGroup="None" />' for name in ("Tumor", "Exclusion"))
    lines.append(f"</Annotations><AnnotationGroups>{groups}</AnnotationGroups></ASAP_Annotations>")
    return "\n".join(lines)


def _annotation(
    group: str, centre: Float64[np.ndarray, " xy"], radius: float, corners: int, random: np.random.Generator
) -> str:
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    waves = sum(random.normal(0, 0.2 / n) * np.sin(n * angle + random.uniform(0, 6)) for n in range(1, 12))
    points = centre + (radius * np.exp(waves))[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
    listed = "".join(f'<Coordinate Order="{i}" X="{x:.2f}" Y="{y:.2f}" />' for i, (x, y) in enumerate(points))
    return f'<Annotation Name="A" Type="Polygon" PartOfGroup="{group}"><Coordinates>{listed}</Coordinates></Annotation>'


def _write(
    folder: SlideFolder, places: TilePlaces, grid: Grid, z: Float64[np.ndarray, " tile"], size_px: tuple[int, int]
) -> None:
    overview_shape = (size_px[1] // OVERVIEW_DOWNSAMPLE, size_px[0] // OVERVIEW_DOWNSAMPLE)
    slide = {
        "slide_id": folder.slide_id,
        "size_level0_px": list(size_px),
        "bounds_level0_px": [0, 0, *size_px],
        "mpp": [TILE_MPP / DOWNSAMPLE] * 2,
        "overview_downsample": [float(OVERVIEW_DOWNSAMPLE)] * 2,
    }
    tile_facts = {"tile_px": TILE_PX, "tile_mpp": TILE_MPP, "stride_px": TILE_PX, "grid": asdict(grid)}
    with writing(folder.root, Recipe("mask", 1)) as work:
        tissue = np.zeros(overview_shape, bool)
        overview = np.full((*overview_shape, 3), 230, np.uint8)
        write_arrays(work.folder / folder.tissue.name, {"tissue": tissue, "overview": overview}, slide)
    with writing(folder.root, Recipe("tile", 1)) as work:
        path = work.folder / folder.tiles.name
        with TileWriter(path, places, tile_px=TILE_PX, attributes=slide | tile_facts) as writer:
            writer.append([], [TileStatus.OK] * len(places))  # places without a chunk read as black
    with writing(folder.root, Recipe("score", 1)) as work:
        scores = {"scores": z[:, None].astype(np.float32), "status": np.zeros(len(z), np.uint8)}
        write_arrays(work.folder / folder.scores.name, scores, {"detector": "made-up", "score_names": ["made-up"]})
    with writing(folder.root, Recipe("heatmap", 1)) as work:
        on_cells = on_grid(z, places.cells, grid.shape)
        maps = {"z": on_cells, "z_eroded": erode(on_cells), "z_tile": z}
        write_arrays(work.folder / folder.heatmap.name, maps, tile_facts)


if __name__ == "__main__":
    main()
