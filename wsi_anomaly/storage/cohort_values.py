"""`cohort.json`: what the cohort's table says of a slide in the columns that a detector looks at.

Kept beside what the stages leave, so that each of them can be run alone. Where no column is asked for, nothing is.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from wsi_anomaly.errors import OutputError
from wsi_anomaly.storage.record import write_json

UNKNOWN = -1


def write_cohort_values(path: Path, values: Mapping[str, str]) -> None:
    """Keep a slide's values, or remove what an earlier run kept where there are none."""
    if values:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)
    else:
        path.unlink(missing_ok=True)


def read_cohort_values(path: Path) -> dict[str, str]:
    """The values of a slide by column; none where none are kept.

    Raises:
        OutputError: the file is damaged.
    """
    try:
        return {str(name): str(value) for name, value in json.loads(path.read_bytes()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise OutputError(f"{path}: is damaged ({error}). Delete it and run the same command again.") from error


def categories_of(values: Mapping[str, str], tiles: int) -> Int64[np.ndarray, "tile variable"] | None:
    """The values as numbers, for each tile of the slide. A value has the same one everywhere, whatever others are.

    A table's empty cell is `UNKNOWN`.
    """
    if not values:
        return None
    row = np.array([zlib.crc32(value.encode()) if value else UNKNOWN for value in values.values()], np.int64)
    return np.tile(row, (tiles, 1))
