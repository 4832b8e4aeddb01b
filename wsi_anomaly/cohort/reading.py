"""Tables, folders and files that the user names -> the slides to work on, each once."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from wsi_anomaly.cohort.files import TABLE_SUFFIXES, find_slides, one_file_a_series
from wsi_anomaly.cohort.naming import common_folder, named
from wsi_anomaly.cohort.slide import PIXEL_SIZES, CohortSlide, is_pixel_size
from wsi_anomaly.cohort.table import read_table
from wsi_anomaly.errors import CohortError


def read_cohort(
    sources: Sequence[Path], *, mpp: float | None = None, columns: Sequence[str] = ()
) -> tuple[CohortSlide, ...]:
    """The slides that CSV tables, folders (searched recursively) and slide files name, tables first, each file once.

    A table is UTF-8 with the columns `slide_id, path, mpp, split, annotation, mask`, separated by comma, semicolon or
    tab; only `path` is required, and paths are relative to the table. A column `label` may stand there too and is not
    read. What a table says of a slide holds wherever else the slide is named. A slide without a `slide_id` is called
    after its file, and after its path below the common folder of all sources where that is not unique. `mpp` is for the
    slides that no table gives one. `columns` are those that a detector looks at: then every slide must be in a table
    that has them.

    Raises:
        CohortError: a source does not exist, a folder holds no slide, a table has faulty rows (all are listed), or
            `columns` are asked for and a slide is in no table.
    """
    if mpp is not None and not is_pixel_size(mpp):
        raise CohortError(f"mpp {mpp:g} is no size of a pixel: give {PIXEL_SIZES}")
    listed: list[CohortSlide] = []
    found: list[Path] = []
    for source in sources:
        if source.is_file() and source.suffix.lower() in TABLE_SUFFIXES:
            listed += read_table(source, columns)
        else:
            found += find_slides(source)
    known = {slide.path.resolve() for slide in listed}
    new = {path.resolve(): path for path in reversed(one_file_a_series(found))}  # the first name of a file counts
    slides = listed + [CohortSlide("", path) for real, path in reversed(new.items()) if real not in known]
    if columns and new.keys() - known:
        raise CohortError(
            f"{min(path.name for real, path in new.items() if real not in known)}: is in no table, and the detector "
            f"looks at the cohort's columns {', '.join(columns)}. Name all in a CSV with the columns "
            f"{', '.join(['path', *columns])}."
        )
    if not slides:
        raise CohortError("no slides: name a folder, slide files or a CSV with the column path")
    called = named(slides, common_folder([*sources, *(slide.path for slide in slides)]))
    return tuple(slide if slide.mpp else replace(slide, mpp=mpp) for slide in called)
