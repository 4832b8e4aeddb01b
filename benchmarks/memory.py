"""Peak memory of the stage `tile` on a made-up slide of 100,000 x 100,000 px, and on one a quarter the size.

    python benchmarks/memory.py [--side PX] [--folder FOLDER]

Each stage runs in a process of its own, whose peak resident memory the operating system tells. The slide is tissue
throughout (one painted field, repeated), at 0.25 µm/px, so that every tile is read, resampled and stored.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fields import repeated, tissue_field
from rich.console import Console
from rich.table import Table

from wsi_anomaly.synthetic import write_pyramid_from_tiles


def main() -> None:
    """Print the peak of each stage for both slides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=100_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--stage", choices=("mask", "tile"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.stage, arguments.folder)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        compare(Path(scratch), arguments.side)


def compare(scratch: Path, side_px: int) -> None:
    """Write both slides, run both stages on each, print the table."""
    field = tissue_field(scratch)
    table = Table("slide", "file", "tiles", "mask, MiB", "tile, MiB", "tile, s")
    for side in (side_px // 2, side_px):
        folder = scratch / str(side)
        folder.mkdir()
        write_pyramid_from_tiles(folder / "slide.tif", repeated(field, side), size_px=(side, side), mpp=0.25)
        peaks, seconds = zip(*(measured(stage, folder) for stage in ("mask", "tile")), strict=True)
        size = f"{(folder / 'slide.tif').stat().st_size / 2**30:.2f} GiB"
        tiles = (folder / "tiles").read_text()
        table.add_row(f"{side:,} px", size, tiles, f"{peaks[0]:.0f}", f"{peaks[1]:.0f}", f"{seconds[1]:.0f}")
    Console().print(table)


def measured(stage: str, folder: Path) -> tuple[float, float]:
    """Peak MiB and seconds of a stage in a process of its own."""
    started = time.perf_counter()
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder)]
    peak_kib = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(peak_kib) / 1024, time.perf_counter() - started


def run_stage(stage: str, folder: Path) -> None:
    """In the other process: run one stage and print the peak, in KiB."""
    from wsi_anomaly.cohort import CohortSlide
    from wsi_anomaly.imaging.tissue import TissueOptions
    from wsi_anomaly.stages.mask import mask_slide
    from wsi_anomaly.stages.tile import TileOptions, tile_slide
    from wsi_anomaly.storage.layout import SlideFolder

    slide, outputs = CohortSlide("slide", folder / "slide.tif"), SlideFolder(folder / "slides" / "slide")
    if stage == "mask":
        mask_slide(slide, outputs, TissueOptions())
    else:
        record = tile_slide(slide, outputs, TileOptions(), threads=2)
        (folder / "tiles").write_text(f"{record.facts['tiles']:,}")
    # Not ru_maxrss: a new process inherits that of the one that started it.
    print(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    main()
