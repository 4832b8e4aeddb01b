"""`reference.json`: statistics of the scores of normal tissue that the detector did not learn from."""

import hashlib
import json
from pathlib import Path
from typing import Literal

from wsi_anomaly.errors import MissingOutputError
from wsi_anomaly.imaging.zscore import ScoreReference
from wsi_anomaly.options import Options, parse_options
from wsi_anomaly.storage.record import write_json

Source = Literal[
    "held-out normal slides",
    "held-out blocks of one normal slide",
    "held-out normal tiles",
    "the cohort under test",
]


class Reference(Options):
    """What z-scores are measured against."""

    source: Source
    slides: int
    """How many there were; 0 where there were tiles of unknown slides."""
    scores: dict[str, ScoreReference]

    @property
    def digest(self) -> str:
        """Equal digests mean equal z-scores."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def read_reference(path: Path) -> Reference:
    """The reference in a file.

    Raises:
        MissingOutputError: there is none.
        OptionsError: it is not a reference.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingOutputError(f"{path}: there is no reference. Run: wsi-anomaly calibrate") from error
    except ValueError as error:
        raise MissingOutputError(f"{path}: is not JSON ({error}). Run: wsi-anomaly calibrate") from error
    return parse_options(Reference, content, where=str(path))


def write_reference(path: Path, reference: Reference) -> None:
    """Write `reference.json`."""
    write_json(path, reference.model_dump())
