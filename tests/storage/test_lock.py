import dataclasses
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from wsi_anomaly.errors import LockedOutputError
from wsi_anomaly.storage.lock import SILENCE_S, Owner, locked


def leave_lock(path: Path, owner: Owner, *, silent_s: float = 0.0) -> None:
    """A lock file as another process would leave it."""
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    then = time.time() - silent_s
    os.utime(path, (then, then))


def test_a_lock_is_gone_when_the_block_ends(tmp_path: Path) -> None:
    """Also when it ends with an error."""
    with pytest.raises(RuntimeError), locked(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_recycled_process_number_does_not_hold_a_lock(tmp_path: Path) -> None:
    """The owner's start time must match too."""
    leave_lock(tmp_path / "lock", dataclasses.replace(Owner.me(), started=1.0))
    with locked(tmp_path / "lock"):
        pass


def test_another_host_holds_its_lock_while_it_shows_signs_of_life(tmp_path: Path) -> None:
    """Its processes cannot be asked after."""
    leave_lock(tmp_path / "lock", Owner("elsewhere", "", 1, 0.0, "x"))
    with pytest.raises(LockedOutputError, match="elsewhere"), locked(tmp_path / "lock"):
        pass


def test_the_lock_of_a_silent_host_is_taken_over(tmp_path: Path) -> None:
    """A crashed node must not block a folder for ever."""
    leave_lock(tmp_path / "lock", Owner("elsewhere", "", 1, 0.0, "x"), silent_s=2 * SILENCE_S)
    with locked(tmp_path / "lock"):
        assert json.loads((tmp_path / "lock").read_text())["host"] == socket.gethostname()


def test_a_living_process_of_this_host_holds_its_lock(tmp_path: Path) -> None:
    """However old it looks by other means."""
    leave_lock(tmp_path / "lock", Owner.me(), silent_s=2 * SILENCE_S)
    with pytest.raises(LockedOutputError), locked(tmp_path / "lock"):
        pass


def test_a_process_of_another_container_is_not_taken_for_dead(tmp_path: Path) -> None:
    """It may have our host's name and a process number that means nothing here."""
    leave_lock(tmp_path / "lock", dataclasses.replace(Owner.me(), world="pid:[1]", pid=2**22 - 1))
    with pytest.raises(LockedOutputError), locked(tmp_path / "lock"):
        pass


def test_an_unreadable_fresh_lock_is_respected(tmp_path: Path) -> None:
    """Its owner may be about to write its name."""
    (tmp_path / "lock").touch()
    with pytest.raises(LockedOutputError), locked(tmp_path / "lock"):
        pass


def test_of_many_claimants_to_an_abandoned_lock_never_two_hold_it(tmp_path: Path) -> None:
    """Taking over is a race that one wins."""
    inside: list[int] = []
    most: list[int] = []

    def claim(_: int) -> bool:
        try:
            with locked(tmp_path / "lock"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()
        except LockedOutputError:
            return False
        return True

    for _ in range(20):
        leave_lock(tmp_path / "lock", Owner("elsewhere", "", 1, 0.0, "x"), silent_s=2 * SILENCE_S)
        with ThreadPoolExecutor(8) as pool:
            assert any(pool.map(claim, range(8)))
    assert max(most) == 1
