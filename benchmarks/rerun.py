"""A second `run` over finished slides: how long it takes to find that there is nothing to do.

    python benchmarks/rerun.py [--slides N] [--repeats N]

The whole command is timed, from the shell. One small slide is made, copied under as many names, and run once.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from wsi_anomaly.synthetic import write_slide

PIPELINE = """
name = "rerun"
[tiles]
tile_px = 64
stride_px = 64
[detector]
name = "autoencoder"
channels = [8, 8]
[detector.training]
max_epochs = 1
"""


def main() -> None:
    """Print the seconds of the first run and of the runs after it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder, arguments.slides)
        first, *later = (
            seconds(folder, "run", "slides", "-m", "model", "-o", "results") for _ in range(arguments.repeats + 1)
        )
    table = Table("slides", "first run, s", "later runs, s (median)", "least", "most")
    table.add_row(
        str(arguments.slides),
        f"{first:.1f}",
        f"{statistics.median(later):.2f}",
        f"{min(later):.2f}",
        f"{max(later):.2f}",
    )
    Console().print(table)


def make(folder: Path, slides: int) -> None:
    """Slides and a model."""
    (folder / "slides").mkdir()
    (folder / "rerun.toml").write_text(PIPELINE)
    write_slide(folder / "slides" / "slide_000.tif", seed=1, size_px=(1024, 1024))
    for number in range(1, slides):
        shutil.copy(folder / "slides" / "slide_000.tif", folder / "slides" / f"slide_{number:03}.tif")
    seconds(folder, "fit", "slides/slide_000.tif", "-o", "model", "-p", "rerun.toml")


def seconds(folder: Path, *arguments: str) -> float:
    """How long a command takes."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "wsi_anomaly", *arguments, "--quiet"], cwd=folder, check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
