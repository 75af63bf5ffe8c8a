"""Work that goes on in a thread or in other processes while the caller is at something else."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


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


def obey_parent_alone(_worker: int = 0) -> None:
    """Have this process leave signals that stop to the one that started it, for a DataLoader's ``worker_init_fn``.

    Ctrl-C, torchrun and schedulers send them to all processes of a group, and a run needs its workers until it has
    saved. SIGTERM ends a worker where its parent sends it (elsewhere than on Linux nobody knows who did: always).
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait(sender: int | None) -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
            pass
        os._exit(0)

    Thread(target=wait, args=(parent.pid,), name="waits for the end", daemon=True).start()
