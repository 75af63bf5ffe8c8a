"""Work that goes on in a thread while the caller is at something else."""

from __future__ import annotations

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
