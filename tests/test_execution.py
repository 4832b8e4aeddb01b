import logging
import os
import signal
import threading
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from functools import partial

import pytest

from wsi_anomaly.execution import (
    Progress,
    Resources,
    SerialExecutor,
    in_order,
    listening,
    processes,
    read_ahead,
    report,
)


def tell(number: int) -> int:
    """Work in another process: log, report, return."""
    logging.getLogger("wsi_anomaly.elsewhere").warning("working on %d", number)
    report(Progress("tile", str(number), number, 10))
    return os.getpid()


def fail(_: int) -> None:
    """Work that goes wrong."""
    raise ValueError("wrong")


def test_processes_report_and_log_to_the_process_that_started_them(caplog: pytest.LogCaptureFixture) -> None:
    """A user sees what happens, wherever it happens."""
    heard: list[Progress] = []
    with listening(heard.append), processes(2) as executor:
        pids = {executor.submit(tell, number).result() for number in range(4)}
    assert os.getpid() not in pids
    assert sorted(progress.slide_id for progress in heard) == ["0", "1", "2", "3"]
    assert "working on 3" in caplog.text


def die(number: int) -> int:
    """Work that takes its process with it."""
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_pool_outlives_its_processes() -> None:
    """What comes after a crash is worked on."""
    with processes(2) as executor:
        assert isinstance(executor.submit(die, 0).exception(), BrokenExecutor)
        assert executor.submit(die, 7).result() == 7


def test_one_process_is_this_one() -> None:
    """The shortest call chain."""
    heard: list[Progress] = []
    with listening(heard.append), processes(1) as executor:
        assert executor.submit(tell, 7).result() == os.getpid()
    assert heard == [Progress("tile", "7", 7, 10)]


@pytest.mark.parametrize("count", [1, 2])
def test_this_process_reports_too_and_only_as_long_as_somebody_listens(count: int) -> None:
    """Scoring happens here while slides are read elsewhere."""
    heard: list[Progress] = []
    with listening(heard.append), processes(count):
        report(Progress("score", "a", 1, 2))
    report(Progress("score", "a", 2, 2))
    assert heard == [Progress("score", "a", 1, 2)]


def test_a_serial_executor_hands_errors_on() -> None:
    """As any executor does."""
    assert isinstance(SerialExecutor().submit(fail, 1).exception(), ValueError)


def test_results_come_in_order_and_only_a_few_wait() -> None:
    """Memory does not grow with the number of items."""
    started: list[int] = []

    def note(item: int) -> int:
        started.append(item)
        return item

    with ThreadPoolExecutor(2) as executor:
        for position, (item, future) in enumerate(in_order(partial(executor.submit, note), range(100), ahead=3)):
            assert future.result() == item == position
            assert len(started) <= position + 4


def test_reading_ahead_uses_the_threads_it_is_given() -> None:
    """Two reads wait for each other, which one thread could not do."""
    barrier = threading.Barrier(2, timeout=10)

    def meet(item: int) -> int:
        barrier.wait()
        return item

    assert list(read_ahead(meet, range(4), threads=2)) == [0, 1, 2, 3]


def test_the_next_item_is_read_while_one_is_worked_on() -> None:
    """The second read begins before the first result is done with."""
    second_begins = threading.Event()

    def read(item: int) -> int:
        if item == 1:
            second_begins.set()
        return item

    results = read_ahead(read, range(2))
    next(results)
    assert second_begins.wait(timeout=30)
    assert next(results) == 1


def test_an_abandoned_reader_reads_no_further() -> None:
    """Whoever stops asking leaves no thread behind, and at most one item was read in vain."""
    asked: list[int] = []
    results = read_ahead(asked.append, range(20))
    next(results)
    results.close()
    assert len(asked) <= 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_an_error_while_reading_ahead_reaches_the_caller() -> None:
    """And is not lost in a thread."""
    with pytest.raises(ValueError, match="wrong"):
        list(read_ahead(fail, range(3), threads=2))


def test_workers_are_the_users_or_the_cores() -> None:
    """0 means as many as may be used."""
    assert Resources(workers=3).cores == 3
    assert Resources().cores >= 1
