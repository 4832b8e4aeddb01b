"""What slides are called: unique names that are safe as folders. Opens nothing."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from wsi_anomaly.cohort.slide import CohortSlide
from wsi_anomaly.errors import CohortError

_NOT_IN_A_FOLDER_NAME = re.compile(r'[/\\:<>"|?*\x00-\x1f\x7f-\x9f]')


def common_folder(paths: Sequence[Path]) -> Path:
    """The deepest folder that holds all of the paths (for a single folder: that folder)."""
    try:
        return Path(os.path.commonpath([_absolute(path if path.is_dir() else path.parent) for path in paths]))
    except ValueError:  # they lie on two drives
        return Path()


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links to where the user has no names


def named(slides: Sequence[CohortSlide], root: Path) -> list[CohortSlide]:
    """The slides, where those without a slide_id have one."""

    def below_root(path: Path) -> Path:
        whole = _absolute(path)
        return whole.relative_to(root) if whole.is_relative_to(root) else Path(path.name)

    def by_folders(path: Path) -> str:
        return "__".join([*below_root(path).parts[:-1], _stem(path)])

    def by_folders_and_suffix(path: Path) -> str:
        return "__".join(below_root(path).parts)

    ids = [slide.slide_id or folder_name(_stem(slide.path)) for slide in slides]
    for name in (by_folders, by_folders_and_suffix):
        ids = _renamed(slides, ids, name)
    repeated = _repeated(ids)
    clashes = [f"{slide.path.name} ({i})" for slide, i in zip(slides, ids, strict=True) if key_of(i) in repeated]
    if clashes:
        raise CohortError(
            f"slides with the same slide_id: {', '.join(clashes)}; name them in a CSV with slide_id, path"
        )
    return [replace(slide, slide_id=i) for slide, i in zip(slides, ids, strict=True)]


def _renamed(slides: Sequence[CohortSlide], ids: Sequence[str], name: Callable[[Path], str]) -> list[str]:
    """The ids, where those that clash and were not given by the user are made by `name`."""
    repeated = _repeated(ids)
    return [
        i if slide.slide_id or key_of(i) not in repeated else folder_name(name(slide.path))
        for slide, i in zip(slides, ids, strict=True)
    ]


def _repeated(ids: Sequence[str]) -> set[str]:
    return {key for key, count in Counter(map(key_of, ids)).items() if count > 1}


def key_of(slide_id: str) -> str:
    """What two ids have in common where some file system takes them for the same folder."""
    return unicodedata.normalize("NFC", slide_id).casefold()


def _stem(path: Path) -> str:
    """The file name without suffix; `.ome.tiff` is one suffix."""
    return re.sub(r"\.ome$", "", path.stem, flags=re.IGNORECASE)


def folder_name(text: str) -> str:
    """The text as the name of a folder on every system: no separators, no control characters, no dot at either end."""
    return _NOT_IN_A_FOLDER_NAME.sub("_", text).lstrip(". ").rstrip(". ") or "slide"
