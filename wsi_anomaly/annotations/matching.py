"""A folder or a CSV of annotations -> which belongs to which slide. Opens no annotation."""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsi_anomaly.annotations.annotation import SUFFIXES
from wsi_anomaly.annotations.labels import SlideLabel, TruthRow, read_truth
from wsi_anomaly.errors import AnnotationError

_TABLES = (".csv", ".tsv")
_WORDS = r"(?:evaluation[ _.-]*|tumou?r[ _.-]*)?(?:masks?|annotations?|labels?|outlines?)"
_DECORATED = re.compile(rf"^(?:{_WORDS}[ _.-]+)?(?P<id>.+?)(?:[ _.-]+{_WORDS})?$")
_SLIDE_SUFFIX = re.compile(r"(?:\.ome)?(?:\.(?:svs|tiff?|ndpi|mrxs|scn|bif|vms|vmu|svslide|czi|dcm|ome))?$")


@dataclass(frozen=True, slots=True)
class Matched:
    """What is known of each slide of a run; both mappings have every slide_id."""

    annotations: Mapping[str, Path | None]
    labels: Mapping[str, SlideLabel | None]
    unmatched: tuple[str, ...]
    """File names, or slide_ids of the CSV, that belong to no slide."""
    missing: tuple[str, ...]
    """The slides of which neither an annotation nor a label is there."""


def find_annotations(place: Path, slide_ids: Sequence[str], *, not_read: Sequence[str] = ()) -> Matched:
    """The annotations and labels of the slides, from a folder of files or a CSV as `read_truth` reads it.

    Files are named after their slide, in letters of any case: `<slide_id>.xml`, also with a word before or behind
    (`tumor_001_mask.tif`, `mask_tumor_001.jpg`) or with the suffix of the slide (`tumor_001.svs.geojson`). Folders in
    the folder are not searched. `not_read` are columns that the CSV may have besides.

    Raises:
        AnnotationError: there is no such place, several files belong to one slide, the table has faults, or nothing
            belongs to any slide.
    """
    if place.is_dir():
        rows, unmatched = _from_folder(place, slide_ids)
    elif place.suffix.lower() in _TABLES and place.is_file():
        rows, unmatched = _from_table(place, slide_ids, not_read)
    else:
        raise AnnotationError(f"{place.name or place}: no folder of annotations and no CSV; name one of them")
    if not rows:
        raise AnnotationError(
            f"{place.name}: nothing in it belongs to a slide of this run ({_some(slide_ids)}). "
            + (f"It has {_some(unmatched)}: name" if unmatched else f"Put files ({', '.join(SUFFIXES)}) there, named")
            + " them after the slide_ids of slides.csv."
        )
    return Matched(
        annotations={slide_id: rows[slide_id].annotation if slide_id in rows else None for slide_id in slide_ids},
        labels={slide_id: rows[slide_id].label if slide_id in rows else None for slide_id in slide_ids},
        unmatched=tuple(unmatched),
        missing=tuple(slide_id for slide_id in slide_ids if rows.get(slide_id, _NOTHING) == _NOTHING),
    )


_NOTHING = TruthRow(None, None)


def _from_folder(folder: Path, slide_ids: Sequence[str]) -> tuple[dict[str, TruthRow], list[str]]:
    known = {_key(slide_id): slide_id for slide_id in slide_ids}
    files: dict[str, list[Path]] = {}
    unmatched: list[str] = []
    for path in sorted(folder.iterdir()):
        stem = _stem(path.name)
        # The dot also keeps out the "._name" shadows that macOS leaves on foreign disks.
        if stem is None or path.name.startswith(".") or not path.is_file():
            continue
        slide_id = _slide_of(stem, known)
        if slide_id is None:
            unmatched.append(path.name)
        else:
            files.setdefault(slide_id, []).append(path)
    several = [f"{', '.join(path.name for path in paths)} ({i})" for i, paths in files.items() if len(paths) > 1]
    if several:
        raise AnnotationError(
            f"{folder.name}: several files for one slide: {'; '.join(several)}. Leave one of each, or say in a CSV "
            "which: slide_id, annotation"
        )
    return {slide_id: TruthRow(paths[0], None) for slide_id, paths in files.items()}, unmatched


def _from_table(
    table: Path, slide_ids: Sequence[str], not_read: Sequence[str]
) -> tuple[dict[str, TruthRow], list[str]]:
    known = {_key(slide_id): slide_id for slide_id in slide_ids}
    rows: dict[str, TruthRow] = {}
    unmatched: list[str] = []
    for name, row in read_truth(table, not_read=not_read).items():
        slide_id = _slide_of(name, known)
        if slide_id is None:
            unmatched.append(name)
        elif slide_id in rows:
            raise AnnotationError(f"{table.name}: several rows for the slide {slide_id}; leave one")
        else:
            rows[slide_id] = row
    return rows, unmatched


def _slide_of(name: str, known: Mapping[str, str]) -> str | None:
    return next((known[candidate] for candidate in _candidates(_key(name)) if candidate in known), None)


def _candidates(name: str) -> Iterator[str]:
    """The name itself, then without what may stand around a slide_id."""
    decorated = _DECORATED.match(name)
    for candidate in (name, decorated["id"] if decorated else name):
        yield candidate
        yield _SLIDE_SUFFIX.sub("", candidate)


def _stem(name: str) -> str | None:
    """The file name without the suffix of an annotation; None where it has none."""
    suffix = max((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), key=len, default=None)
    return name[: -len(suffix)] if suffix else None


def _key(name: str) -> str:
    """What two names have in common that some file system takes for the same."""
    return unicodedata.normalize("NFC", name).casefold()


def _some(names: Sequence[str]) -> str:
    return ", ".join([*sorted(names)[:3], *(["..."] if len(names) > 3 else [])])  # noqa: PLR2004
