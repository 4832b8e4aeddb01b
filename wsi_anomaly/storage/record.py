"""Safety and resume: what made an output, whether it is still current, and that it is whole.

A stage works in the folder `<stage>.partial`. When it is done, its outputs move to their names and then, last, its
record is put in place by one rename. A name without `.partial` is complete; a stage without a record has not run. The
record's digest covers all that changes the result (stage, format version, options, digests of the inputs) and nothing
else, so that a changed option makes everything downstream stale by itself.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from wsi_anomaly import __version__
from wsi_anomaly.errors import MissingOutputError, OutputError
from wsi_anomaly.storage.lock import locked

_RECORDS = "records"
_RECIPE = "recipe.json"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what an output holds."""

    stage: str
    format_version: int
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Equal digests mean equal outputs."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "stage": self.stage,
            "format_version": self.format_version,
            "options": dict(self.options),
            "inputs": dict(self.inputs),
        }


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a finished stage."""

    digest: str
    outputs: tuple[str, ...]
    facts: Mapping[str, Any]
    """A few plain figures (how many tiles, Z_MAX, ...), so that nobody opens an array for them."""
    recipe: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Work:
    """A stage at work: put outputs under `folder` and figures into `facts`."""

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)


def find_record(folder: Path, stage: str) -> Record | None:
    """The record of a stage, None where it has not finished or one of its outputs has been deleted."""
    try:
        content = json.loads(_record_path(folder, stage).read_text(encoding="utf-8"))
        record = Record(content["digest"], tuple(content["outputs"]), content["facts"], content["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if all((folder / name).exists() for name in record.outputs) else None


def read_record(folder: Path, stage: str) -> Record:
    """The record of a stage that must have run.

    Raises:
        MissingOutputError: it has not.
    """
    record = find_record(folder, stage)
    if record is None:
        raise MissingOutputError(f"{folder.name}: the stage '{stage}' has not run. Run: wsi-anomaly {stage} --help")
    return record


def current_record(folder: Path, recipe: Recipe) -> Record | None:
    """The record of the stage where its outputs are what `recipe` would make again."""
    record = find_record(folder, recipe.stage)
    return record if record is not None and record.digest == recipe.digest else None


@contextlib.contextmanager
def writing(folder: Path, recipe: Recipe, *, resume: bool = False) -> Iterator[Work]:
    """Make a stage's outputs: whole, or not at all.

    Whatever lies in the yielded folder when the block ends becomes an output of that name in `folder`. With `resume`,
    what an interrupted attempt at the same recipe left is still there to go on from.

    Raises:
        LockedOutputError: another process is making the same outputs.
        OutputError: the folder cannot be written, or the disk is full.
    """
    partial = folder / f"{recipe.stage}.partial"
    with writable(folder), locked(folder / f"{recipe.stage}.lock"):
        if not (resume and _attempted(partial) == recipe.digest):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_json(partial / _RECIPE, {"digest": recipe.digest})
        work = Work(partial)
        try:
            yield work
        except BaseException:
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        _publish(folder, recipe, work)


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turn what the operating system says of an output folder into an error with a remedy."""
    try:
        yield
    except OSError as error:
        remedy = "Free some space" if error.errno in _FULL else "Check its permissions, or choose another output folder"
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}. {remedy} and run again.") from error


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one step: readers see the old content or the new, never a part."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old content or the new, never a part."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def remove(path: Path) -> None:
    """Remove a file or folder where there is one."""
    if path.is_dir():
        # Out of the way first: a half-deleted folder must not stand under a finished name.
        doomed = path.with_name(f"{path.name}.doomed.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def _record_path(folder: Path, stage: str) -> Path:
    return folder / _RECORDS / f"{stage}.json"


def _attempted(partial: Path) -> str | None:
    try:
        return str(json.loads((partial / _RECIPE).read_text(encoding="utf-8"))["digest"])
    except (OSError, ValueError, KeyError):
        return None


def _publish(folder: Path, recipe: Recipe, work: Work) -> None:
    record = _record_path(folder, recipe.stage)
    record.parent.mkdir(exist_ok=True)
    _withdraw(folder, recipe.stage)
    (work.folder / _RECIPE).unlink()
    names = sorted(path.name for path in work.folder.iterdir())
    for name in names:
        remove(folder / name)
        (work.folder / name).rename(folder / name)
    write_json(
        record,
        {
            "digest": recipe.digest,
            "package_version": __version__,
            "recipe": recipe.as_dict(),
            "outputs": names,
            "facts": work.facts,
        },
    )
    work.folder.rmdir()


def _withdraw(folder: Path, stage: str) -> None:
    """Forget an earlier record and remove its outputs, which the new ones may no longer replace one by one."""
    record = find_record(folder, stage)
    _record_path(folder, stage).unlink(missing_ok=True)
    for name in record.outputs if record else ():
        remove(folder / name)
