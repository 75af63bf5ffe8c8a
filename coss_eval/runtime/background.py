"""Work that goes on in a thread or in other processes while the caller is at something else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")

_STOP = (signal.SIGINT, signal.SIGUSR1)  # beside SIGTERM, by which a parent ends its workers


def in_background(items: Iterable[T]) -> Iterator[T]:
    """The same items (none of them None), each made in a thread while the caller works on the one before.

    The thread is a plain one: a process forked in a ThreadPoolExecutor's ends with exit code 1, as it cannot join the
    thread it came from, and torch takes a DataLoader's worker that does so for a crashed one.
    """
    source = iter(items)
    asked: SimpleQueue[Future[T | None] | None] = SimpleQueue()

    def make() -> None:
        while (future := asked.get()) is not None:
            try:
                future.set_result(next(source, None))
            except BaseException as error:  # noqa: BLE001 - the caller's to handle
                future.set_exception(error)

    def ask() -> Future[T | None]:
        asked.put(future := Future[T | None]())
        return future

    thread = Thread(target=make, name="in background", daemon=True)
    thread.start()
    try:
        upcoming = ask()
        while (item := upcoming.result()) is not None:
            upcoming = ask()
            yield item
    finally:
        asked.put(None)
        thread.join()


@contextmanager
def starting_workers() -> Iterator[None]:
    """Processes that are started meanwhile do not run the person's script, and stop for nobody before they are ready.

    Of what starts processes, spawn and forkserver (macOS, Python 3.14) have each run the script, for what it defines;
    one without ``if __name__ == "__main__"`` would begin all over in each. So what workers get cannot be of the
    script's own classes: to pickle it raises PicklingError. A worker that a signal to all of a group ends before it
    has read what it gets would be waited for without end. To be used with ``obey_parent_alone``.
    """
    script, plain = sys.modules["__main__"], multiprocessing.get_start_method() == "fork"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*_STOP, signal.SIGTERM})  # children have it from this thread
    if not plain:
        sys.modules["__main__"] = ModuleType("__main__")  # of no file
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def obey_parent_alone(_worker: int = 0) -> None:
    """Have this process leave signals that stop to the one that started it, for a DataLoader's ``worker_init_fn``.

    Ctrl-C, torchrun and schedulers send them to all processes of a group, and a run needs its workers until it has
    saved. SIGTERM ends a worker where its parent sends it (elsewhere than on Linux nobody knows who did: always).
    """
    for number in _STOP:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait(sender: int | None) -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
            pass
        os._exit(0)

    Thread(target=wait, args=(parent.pid,), name="waits for the end", daemon=True).start()
