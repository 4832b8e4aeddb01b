"""How well each installed detector tells tumour from normal lymph node, tile by tile, learnt within a CPU budget.

    python benchmarks/quality.py --tiles FOLDER [--rows FILE] [--only ROW ...] [--budget-minutes N] [--seed N]
                                 [--device cpu|cuda] [--work FOLDER] [--out FILE]

FOLDER holds `pcam/{train_normal,val_normal,test_normal,test_tumor}` and `camelyon16/{normal,tumor}` with PNG files. A
detector learns from `train_normal` alone; `val_normal` is the reference of z-scores; both test sets are scored with
the same model. What is trained, and for how long, says `quality.toml`. Each row runs in a process of its own and is
stopped when it has used the budget. Scores are kept in the work folder: a finished row is not done again with the
same options, seed, device, tiles, base and version. Set OMP_NUM_THREADS=1 where others share the machine.
"""

import argparse
import hashlib
import json
import logging
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_path
from pydantic import Field
from quality_row import REFERENCE, TESTS, Entry, Settings, folders, measured, read_tiles
from quality_table import COSTS, quality_table
from scipy.ndimage import uniform_filter

from wsi_anomaly.errors import OptionsError, WsiAnomalyError
from wsi_anomaly.options import Options, nearest, parse_options
from wsi_anomaly.plugins import DETECTORS, installed
from wsi_anomaly.storage.record import write_json

RESULT, LOG = "result.json", "log.txt"
HOW_TO_READ = """\
AUROC with the 95 % interval of DeLong, AUPR (tumour is positive) with that of 2000 stratified bootstrap samples: both
take tiles as independent, which tiles of one slide are not. No direction is turned round: below 0.5, normal tiles rank
above tumour. Mean z of normal: of the normal test tiles against `val_normal`. Steps are batches learnt from; minutes
(wall and CPU) and peak memory are of the whole row: reading, learning, scoring.
"""


class Entries(Options):
    """The whole file."""

    row: tuple[Entry, ...] = Field(min_length=1)


def main() -> None:
    """Run the rows that are missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=Path, required=True)
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--only", nargs="+", metavar="ROW")
    parser.add_argument("--budget-minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=user_cache_path("wsi-anomaly") / "quality")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    settings = Settings(given.tiles, given.work, given.seed, given.device, given.budget_minutes)
    try:
        entries = chosen(entries_of(given.rows), given.only)
        if given.alone:
            work_alone(next(entry for entry in entries if entry.name == given.only[0]), settings, given.alone)
            return
        results = {entry.name: finished(entry, settings) or run(entry, settings, given.rows) for entry in entries}
        text = report({**baselines(settings), **results}, settings)
    except WsiAnomalyError as error:
        sys.exit(f"error: {error}")
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


def entries_of(path: Path) -> tuple[Entry, ...]:
    """The rows of a file, and one with its defaults for each installed detector that has none."""
    rows = parse_options(Entries, tomllib.loads(path.read_text(encoding="utf-8")), where=path.name).row
    if len({row.name for row in rows}) < len(rows):
        raise OptionsError(f"{path.name}: two rows have the same name. Give each its own: results are kept by name.")
    located = [row.model_copy(update={"base": str(path.parent / row.base)}) if row.base else row for row in rows]
    missing = installed(DETECTORS).keys() - {row.detector.get("name") for row in rows}
    defaults = [Entry(name=f"{name}, defaults", detector={"name": name}) for name in sorted(missing)]
    return (*located, *defaults)


def chosen(entries: Sequence[Entry], names: Sequence[str] | None) -> list[Entry]:
    """Those of these names or of these detectors; all without names."""
    known = {entry.name: entry.detector.get("name", "") for entry in entries}
    for name in names or ():
        if name not in known and name not in known.values():
            raise OptionsError(f"--only: there is no row '{name}' ({nearest(name, known)})")
    return [entry for entry in entries if not names or {entry.name, known[entry.name]} & set(names)]


def finished(entry: Entry, settings: Settings) -> dict[str, Any] | None:
    """What an earlier run left of the same row, if that is within the budget of this one."""
    path = folder_of(entry, settings) / RESULT
    result = json.loads(path.read_text()) if path.exists() else None
    return result if not result or result["cpu_minutes"] <= settings.budget_minutes else over_budget(settings)


def over_budget(settings: Settings) -> dict[str, Any]:
    """In the place of a result."""
    return {"reason": f"stopped: more than the {settings.budget_minutes:g} CPU minutes of the budget"}


def folder_of(entry: Entry, settings: Settings) -> Path:
    """A folder of the row's own, named by all that decides its scores."""
    places = [settings.tiles, *([Path(entry.base)] if entry.base else [])]
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for place in places
        for path in sorted(place.rglob("*"))
        if path.is_file()
    ]
    content = [entry.model_dump(mode="json"), settings.seed, settings.device, version("wsi-anomaly"), files]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return settings.work / f"{re.sub(r'[^a-z0-9]+', '-', entry.name.lower())}-{digest[:12]}"


def run(entry: Entry, settings: Settings, rows: Path) -> dict[str, Any]:
    """Do a row in a process of its own: its result, or the reason why there is none."""
    if entry.base and not Path(entry.base).exists():
        return {"reason": f"left out: there is no base model at {Path(entry.base).name}"}
    folder = folder_of(entry, settings)
    folder.mkdir(parents=True, exist_ok=True)
    flags = {
        "--tiles": settings.tiles,
        "--rows": rows,
        "--only": entry.name,
        "--budget-minutes": settings.budget_minutes,
        "--seed": settings.seed,
        "--device": settings.device,
        "--alone": folder,
    }
    command = [sys.executable, __file__, *(str(part) for pair in flags.items() for part in pair)]
    print(f"{entry.name}: {folder / LOG}", file=sys.stderr)
    with (folder / LOG).open("wb") as log:
        status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if status == -signal.SIGXCPU:
        return over_budget(settings)
    if status < 0:
        return {"reason": f"ended by {signal.Signals(-status).name}"}
    if status:
        lines = (folder / LOG).read_text(errors="replace").splitlines()
        return {"reason": lines[-1] if lines else f"failed with exit status {status}"}
    return json.loads((folder / RESULT).read_text())


def work_alone(entry: Entry, settings: Settings, folder: Path) -> None:
    """In the process of a row: learn, score, and leave the result in `folder`."""
    seconds = round(60 * settings.budget_minutes)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
    logging.basicConfig(level=logging.INFO)
    started = time.perf_counter()
    result = measured(entry, settings, folder)
    used = resource.getrusage(resource.RUSAGE_SELF)
    # Not ru_maxrss: a new process inherits that of the one that started it.
    peak_kib = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    result |= {
        "minutes": (time.perf_counter() - started) / 60,
        "cpu_minutes": (used.ru_utime + used.ru_stime) / 60,
        "peak_gib": peak_kib / 2**20,
    }
    write_json(folder / RESULT, result)


def baselines(settings: Settings) -> dict[str, dict[str, Any]]:
    """What two properties of the pixels find without any training, to compare with."""
    tiles = {place: read_tiles(settings.tiles, place)[0] for place in folders()}
    found = {"mean optical density": mean_optical_density, "local standard deviation": local_deviation}
    return {
        name: {"scores": {name: {place: [of(tile) for tile in pixels] for place, pixels in tiles.items()}}}
        for name, of in found.items()
    }


def mean_optical_density(tile: np.ndarray) -> float:
    """How much light the tissue takes: -log10 of the intensity, averaged over pixels and colours."""
    return float(-np.log10((tile + 1.0) / 256).mean())


def local_deviation(tile: np.ndarray) -> float:
    """How much the intensity varies in windows of 9 px (4.5 µm): the mean over the tile of their deviation."""
    grey = tile.mean(axis=2)
    mean, square = uniform_filter(grey, 9), uniform_filter(grey**2, 9)
    return float(np.sqrt(np.maximum(square - mean**2, 0)).mean())


def report(results: dict[str, dict[str, Any]], settings: Settings) -> str:
    """A table for each test set, then how to read them and what they were made with."""
    parts = []
    for number, (test, pair) in enumerate(TESTS.items()):
        sizes = [len(list((settings.tiles / place).glob("*.png"))) for place in pair]
        table = quality_table(results, (REFERENCE, *pair), seed=settings.seed, costs=() if number else tuple(COSTS))
        parts.append(f"{test}: {sizes[0]} normal tiles, {sizes[1]} with tumour\n\n{table}")
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    packages = ", ".join(f"{name} {version(name)}" for name in ("wsi-anomaly", "torch"))
    facts = (
        f"{datetime.now(UTC):%Y-%m-%d}; seed {settings.seed}; device {settings.device}; at most "
        f"{settings.budget_minutes:g} CPU minutes a row; {os.cpu_count()} cores, OMP_NUM_THREADS={threads}; "
        f"{platform.machine()}; Python {platform.python_version()}; {packages}.\n"
    )
    return "\n".join([*parts, HOW_TO_READ, facts])


if __name__ == "__main__":
    main()
