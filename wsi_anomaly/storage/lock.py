"""One writer per output: lock files that name their owner and outlive no crash.

A lock is a file made with O_CREAT|O_EXCL, so that exactly one process can make it, on network drives too. Its owner
refreshes it while it works. It is taken over when its owner is gone: a dead process on this host, or one on another
host that has given no sign of life for `SILENCE_S`.
"""

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from wsi_anomaly.errors import LockedOutputError

HEARTBEAT_S = 15.0
SILENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Owner:
    """A process on a host; `token` tells two holders within one process apart."""

    host: str
    world: str
    """Containers of one host may share its name, but number their processes each for itself."""
    pid: int
    started: float
    token: str

    @classmethod
    def me(cls) -> "Owner":
        """The process that asks."""
        pid = os.getpid()
        return cls(socket.gethostname(), _world(), pid, psutil.Process(pid).create_time(), uuid.uuid4().hex)

    def is_here(self) -> bool:
        """Whether this process can tell if the owner lives."""
        return (self.host, self.world) == (socket.gethostname(), _world())

    def runs_here(self) -> bool:
        """Whether it is a living process of this host (a recycled process number does not count)."""
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.started) < 1.0)
        except psutil.NoSuchProcess:
            return False


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`.

    Raises:
        LockedOutputError: another living process holds it.
        OSError: the folder cannot be written.
    """
    owner = Owner.me()
    while not _created(path, owner):
        _remove_if_abandoned(path)
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()
        if _owner_of(path) == owner:
            path.unlink(missing_ok=True)


def _created(path: Path, owner: Owner) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(asdict(owner), file)
    return True


def _owner_of(path: Path) -> Owner | None:
    """None for a lock that is gone, or whose owner died before it could write its name."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _remove_if_abandoned(path: Path) -> None:
    try:
        silence_s = _now(path.parent) - path.stat().st_mtime
    except FileNotFoundError:
        return  # released meanwhile
    owner = _owner_of(path)
    gone = not owner.runs_here() if owner and owner.is_here() else silence_s > SILENCE_S
    if not gone:
        raise LockedOutputError(
            f"{path.parent.name}: {_name(owner)} is writing here. Wait for it to finish, or choose another "
            f"output folder. (If that process is dead, the lock is released after {SILENCE_S:.0f} s.)"
        )
    # Renaming first makes one of several claimants the winner; the others see that the file has gone.
    grave = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(grave)
        if _owner_of(grave) == owner:
            grave.unlink()
        else:  # between our look and our rename someone else took it over: give it back
            grave.rename(path)


def _world() -> str:
    try:
        return Path("/proc/self/ns/pid").readlink().name
    except OSError:
        return ""  # no such thing on this system


def _name(owner: Owner | None) -> str:
    return f"process {owner.pid} on {owner.host}" if owner else "another process"


def _now(folder: Path) -> float:
    """The time by the clock that stamps files in `folder`: hosts of a shared drive may disagree with it."""
    probe = folder / f".clock.{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)
