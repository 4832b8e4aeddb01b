"""A folder -> the slide files in it. Of a DICOM file it reads the series, no pixels; knows no table.

Messages give file names and paths relative to what the user named: the folders above may be named after patients.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from wsi_anomaly.errors import CohortError

SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn"),
    *(".mrxs", ".svslide", ".bif", ".czi", ".dcm"),
)
TABLE_SUFFIXES = (".csv", ".tsv")

_log = logging.getLogger(__name__)


def find_slides(source: Path) -> list[Path]:
    """The file itself, or the slides in the folder and below it in the order of their names."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CohortError(f"{source.name or source}: no such file or folder")
    files = sorted(_walk(source, seen=set()))
    slides = [path for path in files if path.suffix.lower() in SLIDE_SUFFIXES]
    if not slides:
        tables = [str(path.relative_to(source)) for path in files if path.suffix.lower() in TABLE_SUFFIXES]
        hint = f"; to run the slides of a table, name the table itself: {', '.join(tables)}" if tables else ""
        raise CohortError(f"{source.name or source}: no slides in this folder ({' '.join(SLIDE_SUFFIXES)}){hint}")
    return slides


def _walk(folder: Path, *, seen: set[Path]) -> Iterator[Path]:
    """Every file in and below the folder that is not hidden; a folder that links lead to twice is walked once."""

    def tell(error: OSError) -> None:
        _log.warning("%s is left out: %s", os.path.relpath(error.filename, folder), error.strerror)

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=tell):
        real = Path(parent).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # The dot also keeps out the "._name" shadows that macOS leaves on foreign disks.
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def one_file_a_series(paths: Sequence[Path]) -> list[Path]:
    """The paths, of DICOM files in one folder with one series (the levels of one slide) only the first."""
    in_folder = Counter(path.parent for path in paths if path.suffix.lower() == ".dcm")
    kept: list[Path] = []
    seen: set[tuple[Path, str]] = set()
    for path in paths:
        if path.suffix.lower() == ".dcm" and in_folder[path.parent] > 1:
            series = _series(path)
            if series and (path.parent, series) in seen:
                continue
            seen.add((path.parent, series))
        kept.append(path)
    return kept


def _series(path: Path) -> str:
    """The SeriesInstanceUID, or "" where there is none to be read: such a file fails later, by itself and by name."""
    from pydicom import dcmread

    try:
        header = dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
        return str(header.get("SeriesInstanceUID", ""))
    except Exception:  # noqa: BLE001 - damaged headers raise errors of many kinds
        return ""
