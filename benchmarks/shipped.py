"""How long a slide takes with the model that comes with the package, how much memory, and how well it finds disease.

    python benchmarks/shipped.py [--side-px 9472] [--slides 24] [--slide-px 4096] [--tiles 600] [--work FOLDER]

Prints the wall time and the peak memory (of the largest process) of `wsi-anomaly run` over one made-up slide, by stage
from its log; the AUROC of each score on held-out made-up tiles of each kind against normal ones, artefacts apart; and,
over whole held-out slides, normal and diseased in turn, the AUROC of Z_MAX and Z_99 with erosion and without.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from platformdirs import user_cache_path
from sklearn.metrics import roc_auc_score

from wsi_anomaly.cohort import read_cohort
from wsi_anomaly.detectors.protocol import TileBatch
from wsi_anomaly.execution import Resources
from wsi_anomaly.imaging.heatmap import slide_scores
from wsi_anomaly.pipeline.prompting import build_prompter
from wsi_anomaly.pipeline.running import fitted_detector, pipeline_of, run
from wsi_anomaly.shipped import model_place
from wsi_anomaly.stages.prompt import describe_tiles
from wsi_anomaly.storage.arrays import read_array
from wsi_anomaly.storage.layout import RunFolder
from wsi_anomaly.storage.model import Model, read_model
from wsi_anomaly.synthetic import synthetic_tiles, write_slide

DISEASE = ("metastasis", "micrometastasis", "isolated_tumour_cells", "necrosis", "fibrosis", "mucin")
ARTEFACTS = ("fold", "pen", "bubble", "out_of_focus")
SEED = 31_000
"""Far from those of the tiles that were learnt from."""
BATCH_TILES = 32


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side-px", type=int, default=9472)
    parser.add_argument("--slides", type=int, default=24)
    parser.add_argument("--slide-px", type=int, default=4096)
    parser.add_argument("--tiles", type=int, default=600)
    parser.add_argument("--work", type=Path, default=user_cache_path("wsi-anomaly") / "shipped")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    model = read_model(model_place(None))
    if given.side_px:
        print(speed(given.work, given.side_px))
    if given.tiles:
        print(tiles_found(model, given.tiles))
    if given.slides:
        print(slides_found(model, given.work, given.slides, given.slide_px))


def speed(work: Path, side_px: int) -> str:
    """Of the command over one slide, from nothing."""
    slide, out = work / f"slide-{side_px}.tif", work / f"timed-{side_px}-{time.time_ns()}"
    if not slide.exists():
        write_slide(slide, seed=SEED, size_px=(side_px, side_px), anomalies=["metastasis"], varied=True)
    command = [sys.executable, "-m", "wsi_anomaly", "run", str(slide), "--out", str(out), "--device", "cpu"]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--quiet"])
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    folder = next((out / "slides").iterdir())
    tiles = json.loads((folder / "scores.zarr" / "zarr.json").read_text())
    count = len(np.loadtxt(next(folder.glob("*.tiles.csv")), delimiter=",", skiprows=1, usecols=0))
    calls = tiles["attributes"]["network_calls"]
    return (
        f"exit status {status}; {count:,} tiles in {seconds:.0f} s: {1000 * seconds / count:.0f} s for 1,000 tiles; "
        f"peak of the largest process {used.ru_maxrss / 1024:.0f} MiB; network calls a tile {calls}\n"
    )


def tiles_found(model: Model, number: int) -> str:
    """AUROC of each kind against normal tissue, by score."""
    pipeline, here = pipeline_of(model), Resources(device="cpu", offline=True)
    scorer, names = fitted_detector(model, pipeline, here).load()
    prompter = build_prompter(pipeline.prompt, here)
    kinds = ("normal", *DISEASE, *ARTEFACTS)
    tiles = list(synthetic_tiles(SEED, number, kinds=kinds))
    scores = []
    for start in range(0, len(tiles), BATCH_TILES):
        pixels = np.stack([tile for tile, _ in tiles[start : start + BATCH_TILES]])
        seeds = np.arange(start, start + len(pixels), dtype=np.uint64)
        scores.append(scorer.score(TileBatch(pixels, seeds, *describe_tiles(prompter, pixels))))
    table = np.concatenate(scores)
    shown = [_kind(truth) for _, truth in tiles]
    normal = np.array([kind == "normal" for kind in shown])
    lines = [f"| against normal tiles | {' | '.join(names)} | tiles |", f"|---|{'---:|' * (len(names) + 1)}"]
    for kind in ("metastasis, micrometastasis", *DISEASE, *ARTEFACTS):
        chosen = np.array([name in kind.split(", ") for name in shown])
        if chosen.any():
            values = [roc_auc_score(chosen[normal | chosen], column[normal | chosen]) for column in table.T]
            lines.append(f"| {kind} | {' | '.join(f'{value:.3f}' for value in values)} | {chosen.sum()} |")
    return "\n".join([*lines, f"| normal | {' | '.join('' for _ in names)} | {normal.sum()} |", ""])


def slides_found(model: Model, work: Path, number: int, side_px: int) -> str:
    """AUROC of whole slides, half of them with a metastasis or a micrometastasis."""
    folder, out = work / f"slides-{side_px}", work / f"results-{side_px}"
    folder.mkdir(exist_ok=True)
    planted = [() if n % 2 == 0 else (("metastasis",) if n % 4 == 1 else ("micrometastasis",)) for n in range(number)]
    for n, kinds in enumerate(planted):
        path = folder / f"slide_{n:02}.tif"
        if not path.exists():
            write_slide(path, seed=SEED + 1 + n, size_px=(side_px, side_px), anomalies=kinds, varied=True)
    slides = read_cohort([folder])[:number]
    run(slides, model, out, resources=Resources(device="cpu"), listener=lambda _: None)
    sick = [bool(kinds) for kinds in planted]
    lines = []
    for name in ("z_eroded", "z"):
        maps = [read_array(RunFolder(out).slide(slide.slide_id).heatmap, name) for slide in slides]
        z_max, z_99 = (roc_auc_score(sick, values) for values in zip(*map(slide_scores, maps), strict=True))
        lines.append(f"{name}: AUROC of Z_MAX {z_max:.3f}, of Z_99 {z_99:.3f}")
    return f"{number} slides of {side_px} px; " + "; ".join(lines)


def _kind(truth) -> str:  # noqa: ANN001 - a Truth
    """The one thing that the tile holds besides normal tissue."""
    return next(iter([*truth.anomalies, *truth.artefacts]), "normal")


if __name__ == "__main__":
    main()
