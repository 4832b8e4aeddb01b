"""A folder, files or a CSV -> the slides to work on. Opens no slide; of a DICOM file it reads the series, no pixels.

Messages give file names and paths relative to what the user named: the folders above may be named after patients.
"""

import csv
import io
import logging
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from wsi_anomaly.errors import CohortError
from wsi_anomaly.options import nearest

SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn"),
    *(".mrxs", ".svslide", ".bif", ".czi", ".dcm"),
)
COLUMNS = ("slide_id", "path", "mpp", "split", "annotation", "mask")
Split = Literal["train", "reference", "test"]

_log = logging.getLogger(__name__)
_CSV_SUFFIXES = (".csv", ".tsv")
_MPP_RANGE = (0.01, 100.0)
_PIXEL_SIZES = "microns per pixel from 0.01 to 100, such as 0.25"
_NOT_IN_A_FOLDER_NAME = re.compile(r'[/\\:<>"|?*\x00-\x1f\x7f-\x9f]')


@dataclass(frozen=True, slots=True)
class CohortSlide:
    """One slide of a run and what the user says about it."""

    slide_id: str
    """Its name in the cohort: unique whatever the case of letters, and safe as the name of a folder."""
    path: Path
    mpp: float | None = None
    """Microns per pixel at level 0 that the user states; None leaves it to the file."""
    split: Split | None = None
    annotation: Path | None = None
    mask: Path | None = None


def read_cohort(sources: Sequence[Path], *, mpp: float | None = None) -> tuple[CohortSlide, ...]:
    """The slides that CSV tables, folders (searched recursively) and slide files name, tables first, each file once.

    A table is UTF-8 with the columns `slide_id, path, mpp, split, annotation, mask`, separated by comma, semicolon or
    tab; only `path` is required, and paths are relative to the table. What a table says of a slide holds wherever else
    the slide is named. A slide without a `slide_id` is called after its file, and after its path below the common
    folder of all sources where that is not unique. `mpp` is for the slides that no table gives one.

    Raises:
        CohortError: a source does not exist, a folder holds no slide, or a table has faulty rows (all are listed).
    """
    if mpp is not None and not _is_pixel_size(mpp):
        raise CohortError(f"mpp {mpp:g} is no size of a pixel: give {_PIXEL_SIZES}")
    listed: list[CohortSlide] = []
    found: list[Path] = []
    for source in sources:
        if source.is_file() and source.suffix.lower() in _CSV_SUFFIXES:
            listed += _read_table(source)
        else:
            found += _find_slides(source)
    known = {slide.path.resolve() for slide in listed}
    new = {path.resolve(): path for path in reversed(_one_file_a_series(found))}  # the first name of a file counts
    slides = listed + [CohortSlide("", path) for real, path in reversed(new.items()) if real not in known]
    if not slides:
        raise CohortError("no slides: name a folder, slide files or a CSV with the column path")
    named = _named(slides, _common_folder([*sources, *(slide.path for slide in slides)]))
    return tuple(slide if slide.mpp else replace(slide, mpp=mpp) for slide in named)


def _find_slides(source: Path) -> list[Path]:
    """The file itself, or the slides in the folder and below it in the order of their names."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CohortError(f"{source.name or source}: no such file or folder")
    files = sorted(_walk(source, seen=set()))
    slides = [path for path in files if path.suffix.lower() in SLIDE_SUFFIXES]
    if not slides:
        tables = [str(path.relative_to(source)) for path in files if path.suffix.lower() in _CSV_SUFFIXES]
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


def _one_file_a_series(paths: Sequence[Path]) -> list[Path]:
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


def _common_folder(paths: Sequence[Path]) -> Path:
    """The deepest folder that holds all of the paths (for a single folder: that folder)."""
    try:
        return Path(os.path.commonpath([_absolute(path if path.is_dir() else path.parent) for path in paths]))
    except ValueError:  # they lie on two drives
        return Path()


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links to where the user has no names


def _named(slides: Sequence[CohortSlide], root: Path) -> list[CohortSlide]:
    """The slides, where those without a slide_id have one."""

    def below_root(path: Path) -> Path:
        whole = _absolute(path)
        return whole.relative_to(root) if whole.is_relative_to(root) else Path(path.name)

    def by_folders(path: Path) -> str:
        return "__".join([*below_root(path).parts[:-1], _stem(path)])

    def by_folders_and_suffix(path: Path) -> str:
        return "__".join(below_root(path).parts)

    ids = [slide.slide_id or _folder_name(_stem(slide.path)) for slide in slides]
    for name in (by_folders, by_folders_and_suffix):
        ids = _renamed(slides, ids, name)
    repeated = _repeated(ids)
    clashes = [f"{slide.path.name} ({i})" for slide, i in zip(slides, ids, strict=True) if _key(i) in repeated]
    if clashes:
        raise CohortError(
            f"slides with the same slide_id: {', '.join(clashes)}; name them in a CSV with slide_id, path"
        )
    return [replace(slide, slide_id=i) for slide, i in zip(slides, ids, strict=True)]


def _renamed(slides: Sequence[CohortSlide], ids: Sequence[str], name: Callable[[Path], str]) -> list[str]:
    """The ids, where those that clash and were not given by the user are made by `name`."""
    repeated = _repeated(ids)
    return [
        i if slide.slide_id or _key(i) not in repeated else _folder_name(name(slide.path))
        for slide, i in zip(slides, ids, strict=True)
    ]


def _repeated(ids: Sequence[str]) -> set[str]:
    return {key for key, count in Counter(map(_key, ids)).items() if count > 1}


def _key(slide_id: str) -> str:
    """What two ids have in common where some file system takes them for the same folder."""
    return unicodedata.normalize("NFC", slide_id).casefold()


def _stem(path: Path) -> str:
    """The file name without suffix; `.ome.tiff` is one suffix."""
    return re.sub(r"\.ome$", "", path.stem, flags=re.IGNORECASE)


def _folder_name(text: str) -> str:
    """The text as the name of a folder on every system: no separators, no control characters, no dot at either end."""
    return _NOT_IN_A_FOLDER_NAME.sub("_", text).lstrip(". ").rstrip(". ") or "slide"


def _is_pixel_size(mpp: float) -> bool:
    low, high = _MPP_RANGE
    return math.isfinite(mpp) and low <= mpp <= high


def _read_table(table: Path) -> list[CohortSlide]:
    """The slides of a CSV; `slide_id` is "" where the table gives none."""
    rows = _rows(table)
    columns = _columns(table, next(rows, (1, [])))
    slides: list[CohortSlide] = []
    faults: list[str] = []
    first_row: dict[str, int] = {}
    for number, cells in rows:
        row = dict.fromkeys(COLUMNS, "") | dict(zip(columns, cells, strict=False))
        in_row = _row_faults(row, table.parent)
        if len(cells) > len(columns):
            in_row = [f"{len(cells)} cells in {len(columns)} columns"]
        elif row["slide_id"] and (first := first_row.setdefault(_key(row["slide_id"]), number)) != number:
            in_row.append(f"slide_id '{row['slide_id']}' is the one of row {first}")
        faults += [f"row {number}: {fault}" for fault in in_row]
        if not faults:
            slides.append(_slide(row, table.parent))
    if faults:
        raise CohortError("\n  ".join([f"{table.name} has faults; mend them and run again:", *faults]))
    if not slides:
        raise CohortError(f"{table.name}: no slides in this table")
    return slides


def _columns(table: Path, header: tuple[int, list[str]]) -> list[str]:
    number, names = header
    columns = [name.lower() for name in names]
    faults = [f"unknown column '{name}' ({nearest(name, COLUMNS)})" for name in columns if name not in COLUMNS]
    faults += [f"column '{name}' is there twice" for name, count in Counter(columns).items() if count > 1]
    if "path" not in columns:
        faults.append("the column path is missing")
    if faults:
        raise CohortError(f"{table.name}, row {number}: {'; '.join(faults)}")
    return columns


def _rows(table: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, numbered as in a spreadsheet; blanks and empty cells at the end are cut off."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        header = text.lstrip().partition("\n")[0]
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
        for number, row in enumerate(reader, start=1):
            cells = [cell.strip() for cell in row]
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                yield number, cells
    except UnicodeDecodeError as error:
        raise CohortError(f"{table.name}: not UTF-8; save it as 'CSV UTF-8'") from error
    except OSError as error:
        raise CohortError(f"{table.name}: cannot be read ({error.strerror})") from error
    except csv.Error as error:
        raise CohortError(f"{table.name}: not a CSV table ({error})") from error


def _row_faults(row: dict[str, str], folder: Path) -> list[str]:
    faults = []
    for column in ("path", "annotation", "mask"):
        if row[column] and not (folder / row[column]).is_file():
            name = Path(row[column])
            faults.append(f"{column} '{name.name if name.is_absolute() else name}' is no file")
    if not row["path"]:
        faults.append("path is empty")
    if row["slide_id"] and row["slide_id"] != _folder_name(row["slide_id"]):
        faults.append(f"slide_id '{row['slide_id']}' is no name for a folder; use '{_folder_name(row['slide_id'])}'")
    if row["mpp"] and not _is_pixel_size(_number(row["mpp"])):
        faults.append(f"mpp '{row['mpp']}' is no size of a pixel; give {_PIXEL_SIZES}")
    if row["split"] and row["split"] not in get_args(Split):
        faults.append(f"split '{row['split']}' is none of {', '.join(get_args(Split))}")
    return faults


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _slide(row: dict[str, str], folder: Path) -> CohortSlide:
    return CohortSlide(
        slide_id=row["slide_id"],
        path=folder / row["path"],
        mpp=float(row["mpp"]) if row["mpp"] else None,
        split=next((split for split in get_args(Split) if split == row["split"]), None),
        annotation=folder / row["annotation"] if row["annotation"] else None,
        mask=folder / row["mask"] if row["mask"] else None,
    )
