"""What a user sees while work goes on: progress bars, messages, and a log file of JSON lines."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from wsi_anomaly import execution
from wsi_anomaly.errors import OutputError

stdout = Console()
stderr = Console(stderr=True)


@contextlib.contextmanager
def session(*, slides: int, quiet: bool, log_file: Path | None) -> Iterator["StageBars"]:
    """Show progress and messages while the block runs."""
    handlers: list[logging.Handler] = [_screen(quiet=quiet)]
    if log_file:
        handlers.append(_json_lines(log_file))
    logger = logging.getLogger("wsi_anomaly")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = handlers
    progress = Progress(
        TextColumn("[bold]{task.description:<8}"),
        BarColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=stderr,
        disable=quiet or not stderr.is_terminal,
    )
    try:
        with progress:
            yield StageBars(progress, slides)
    finally:
        for handler in handlers:
            handler.close()
        logger.handlers = []
        logger.propagate = True


class StageBars:
    """One progress bar for each stage that runs: slides and tiles done, rate, time left."""

    def __init__(self, progress: Progress, slides: int) -> None:
        self._progress = progress
        self._slides = slides
        self._bars: dict[str, _Bar] = {}
        self._lock = threading.Lock()

    def __call__(self, progress: execution.Progress) -> None:
        """Hear how far one stage is with one slide."""
        with self._lock:
            if progress.stage not in self._bars:
                total = None if progress.stage == "fit" else self._slides
                task = self._progress.add_task(progress.stage, total=total, counts="")
                self._bars[progress.stage] = _Bar(task, total)
            bar = self._bars[progress.stage]
            bar.hear(progress)
            self._progress.update(bar.task, completed=bar.slides_done, total=bar.total, counts=bar.counts())


class _Bar:
    """What one stage has done so far."""

    def __init__(self, task: TaskID, total: int | None) -> None:
        self.task = task
        self.total = total
        self._started = self._latest = time.monotonic()
        self._finished: set[str] = set()
        self._tiles: dict[str, tuple[int, int]] = {}

    @property
    def slides_done(self) -> float:
        """With the share of the slides that are being worked on."""
        running = {slide: counts for slide, counts in self._tiles.items() if slide not in self._finished}
        return float(len(self._finished)) + sum(done / total for done, total in running.values() if total)

    def hear(self, progress: execution.Progress) -> None:
        """Take in a report."""
        if progress.finished:
            self._finished.add(progress.slide_id)
            self.total = self.total or 1
        else:
            self._tiles[progress.slide_id] = (progress.tiles_done, progress.tiles_total)
            self._latest = time.monotonic()

    def counts(self) -> str:
        """Slides and tiles done, and the rate."""
        tiles = sum(done for done, _ in self._tiles.values())
        rate = tiles / max(self._latest - self._started, 1.0)  # over a second at least: the first report is no rate
        slides = f"{len(self._finished)}/{self.total} slides  " if self.total and self.total > 1 else ""
        return f"{slides}{tiles:,} tiles  {rate:,.0f}/s" if tiles else slides


def _screen(*, quiet: bool) -> logging.Handler:
    handler = RichHandler(console=stderr, show_time=False, show_path=False, markup=False, rich_tracebacks=False)
    handler.setLevel(logging.ERROR if quiet else logging.INFO)
    return handler


def _json_lines(path: Path) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--log-file {path}: cannot be written: {error.strerror}. Choose another place.") from error
    handler.setFormatter(_JsonFormatter())
    return handler


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)
