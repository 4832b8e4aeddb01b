"""What became of each slide: keeps `slides.csv` true while slides finish and fail one by one."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from wsi_anomaly.errors import LockedOutputError, MissingOutputError, OutputError, WsiAnomalyError
from wsi_anomaly.storage.layout import RunFolder, SlideFolder
from wsi_anomaly.storage.record import find_record
from wsi_anomaly.storage.slide_table import SlideRow, read_slide_table, write_slide_table

log = logging.getLogger(__name__)


class Ledger:
    """The rows of `slides.csv`, written after each slide.

    `called` says in the log whose ledger it is, where there are several.
    """

    def __init__(self, run: RunFolder, slide_ids: tuple[str, ...], *, called: str = "") -> None:
        self._run = run
        self._called = f"{called}: " if called else ""
        self._earlier = read_slide_table(run.slide_table)
        self._failed: set[str] = set()
        self._seconds = dict.fromkeys(slide_ids, 0.0)
        self._before = {slide_id: _last_digest(run.slide(slide_id)) for slide_id in slide_ids}
        self.rows = {slide_id: self._earlier.get(slide_id, _not_reached(slide_id)) for slide_id in slide_ids}

    @property
    def failed(self) -> tuple[SlideRow, ...]:
        """The slides that could not be finished."""
        return tuple(self.rows[slide_id] for slide_id in self.rows if slide_id in self._failed)

    def is_well(self, slide_id: str) -> bool:
        """Whether nothing has gone wrong with the slide so far."""
        return slide_id not in self._failed

    @contextlib.contextmanager
    def attempt(self, slide_id: str, *, last: bool = True) -> Iterator[None]:
        """Work on a slide: what goes wrong is its own affair, and the others go on.

        Only a failing output folder ends the run, since it would fail every slide.
        """
        started = time.monotonic()
        try:
            yield
        except OutputError as error:
            if not isinstance(error, LockedOutputError | MissingOutputError):
                raise
            self._fail(slide_id, str(error))
        except WsiAnomalyError as error:
            self._fail(slide_id, str(error))
        except Exception as error:
            log.exception("%s%s: this is a bug in wsi-anomaly, please report it", self._called, slide_id)
            self._fail(slide_id, f"internal error: {type(error).__name__}: {error}")
        else:
            self._seconds[slide_id] += time.monotonic() - started
            if last:
                self._finish(slide_id)

    def add_seconds(self, slide_id: str, seconds: float) -> None:
        """Time that another process spent on the slide."""
        self._seconds[slide_id] += seconds

    def write(self) -> None:
        """Write `slides.csv`."""
        write_slide_table(self._run.slide_table, (self._earlier | self.rows).values())

    def _fail(self, slide_id: str, reason: str) -> None:
        one_line = " ".join(reason.split())
        log.error("%s%s", self._called, one_line if slide_id in one_line else f"{slide_id}: {one_line}")
        self._failed.add(slide_id)
        self.rows[slide_id] = SlideRow(slide_id, "failed", one_line)
        self.write()

    def _finish(self, slide_id: str) -> None:
        folder = self._run.slide(slide_id)
        unchanged = self._before[slide_id] is not None and self._before[slide_id] == _last_digest(folder)
        earlier = self._earlier.get(slide_id)
        # How long the slide took when it was really worked on.
        seconds = earlier.seconds if unchanged and earlier else None
        facts: dict[str, Any] = {"seconds": self._seconds[slide_id] if seconds is None else seconds}
        tile, score, heatmap = (find_record(folder.root, stage) for stage in ("tile", "score", "heatmap"))
        if tile:
            facts |= {"tiles": tile.facts["tiles"], "corrupt_tiles": tile.facts["corrupt"]}
        if score:
            facts["failed_tiles"] = score.facts.get("failed", 0)
        if heatmap:
            facts |= {name: value for name, value in heatmap.facts.items() if name in _COLUMNS}
        self.rows[slide_id] = SlideRow(slide_id, "done", **facts)
        self.write()


_COLUMNS = {field.name for field in fields(SlideRow)}


def _last_digest(folder: SlideFolder) -> str | None:
    record = find_record(folder.root, "export")
    return record.digest if record else None


def _not_reached(slide_id: str) -> SlideRow:
    return SlideRow(slide_id, "skipped", "the run ended before it came to this slide")
