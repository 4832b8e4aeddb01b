"""Where work runs: here, in other processes or on a dask cluster, all behind `concurrent.futures.Executor`.

Knows functions and their arguments; knows no slide, stage or file.
"""

import contextlib
import logging
import logging.handlers
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

_PACKAGE = __name__.partition(".")[0]

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one stage is with one slide."""

    stage: str
    slide_id: str
    tiles_done: int = 0
    tiles_total: int = 0
    """0 where nobody knows."""
    finished: bool = False
    """Whether the stage is done with this slide."""


Listener = Callable[[Progress], None]
"""Whoever wants to know how far the work is. Called often, and from several threads."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What may be used. Nothing here changes a result."""

    device: str = "auto"
    workers: int = 0
    """Threads and processes that read slides; 0 means as many as there are cores."""
    batch_size: int = 64
    """Tiles read at once; networks compute in portions of their own."""
    offline: bool = False
    """Ask the network for nothing, not even for weights that are missing."""
    base_weights: str = ""
    """Where a detector's base model lies on this machine, instead of where the pipeline says."""
    image_text_weights: str = ""
    """Where the image-text model's weights lie on this machine, instead of where the pipeline says."""

    @property
    def cores(self) -> int:
        """How many things may be read at once."""
        if self.workers:
            return self.workers
        # A container or a batch system often grants fewer cores than the machine has.
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class SerialExecutor(Executor):
    """Runs each call where and when it is submitted: the shortest call chain, and nothing to start."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:  # noqa: ANN401
        """The finished future of a call."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - a future hands on whatever its call raised
            future.set_exception(error)
        return future


class LastingPool(Executor):
    """A pool of processes that is made anew when one of them dies (killed for its memory, or crashed in a library)."""

    def __init__(self, make: Callable[[], Executor]) -> None:
        self._make = make
        self._pool = make()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:  # noqa: ANN401
        """See `Executor`; calls that were waiting when a process died end with `BrokenExecutor`."""
        try:
            return self._pool.submit(fn, *args, **kwargs)
        except BrokenExecutor:
            self._pool = self._make()
            return self._pool.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - see Executor
        """See `Executor`."""
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


def in_order(
    submit: Callable[[Item], Future[Result]], items: Iterable[Item], *, ahead: int
) -> Iterator[tuple[Item, Future[Result]]]:
    """What `submit` makes of the items, in their order, at most `ahead` of them not yet taken.

    `Executor.map` would start all calls at once and keep every result that nobody has taken.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, submit(item)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def read_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int = 1
) -> Generator[Result, None, None]:
    """`map` over threads, in order: the next results come about while one is worked on, and only a few wait.

    Errors come through. Whoever stops asking leaves no thread behind.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") as executor:
        try:
            for _, future in in_order(lambda item: executor.submit(function, item), items, ahead=threads):
                yield future.result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Whatever is `report`ed inside the block, here or in processes started here, goes to the listener."""
    before, _here.listener = _here.listener, listener
    try:
        yield
    finally:
        _here.listener = before


@contextlib.contextmanager
def processes(count: int) -> Iterator[Executor]:
    """An executor with `count` processes (none for 1), whose log and reports arrive here."""
    if count == 1:
        yield SerialExecutor()
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads may deadlock
    channel = context.Queue()
    thread = threading.Thread(target=_forward, args=(channel,), daemon=True)
    thread.start()
    level = logging.getLogger(_PACKAGE).getEffectiveLevel()
    start = partial(ProcessPoolExecutor, count, mp_context=context, initializer=_connect, initargs=(channel, level))
    try:
        with LastingPool(start) as pool:
            yield pool
    finally:
        channel.put(None)
        thread.join()
        channel.close()


def report(progress: Progress) -> None:
    """Tell the listener of the process that started the work how far it is."""
    if _here.listener is not None:
        _here.listener(progress)


class _Here:
    """To whom this process reports."""

    listener: Listener | None = None


_here = _Here()


def _connect(channel: Any, level: int) -> None:  # noqa: ANN401 - multiprocessing names no queue type
    """In a new process: send log records and progress through the channel."""
    _here.listener = channel.put
    logging.getLogger(_PACKAGE).setLevel(level)
    root = logging.getLogger()
    root.handlers = [logging.handlers.QueueHandler(channel)]


def _forward(channel: Any) -> None:  # noqa: ANN401
    while (message := channel.get()) is not None:
        if isinstance(message, logging.LogRecord):
            logging.getLogger(message.name).handle(message)
        else:
            report(message)
