"""A results folder that several processes write: files whole or not at all, under its lock."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coss_eval.errors import CossError
from coss_eval.runtime.disk import Lock, free_name, write_atomically
from coss_eval.store.cells import StoreWarning


class NoRoom(CossError):
    """The disk, or what a person may use of it, is full: nothing more can be stored."""


class ResultsFolder:
    """Making one touches no disk; the first write does. What cannot be written is a CossError that says what to do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The store's own lock, waited for: nobody packs, writes or begins a claim meanwhile."""
        lock = self.lock(self.inside() / "run.lock", wait=True)
        assert lock is not None  # it waits
        try:
            yield
        finally:
            lock.release()

    def inside(self, name: str = "") -> Path:
        """The folder, or one in it, which is made where it is not there."""
        folder = self.path / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, os.strerror(13))
        except OSError as error:
            raise CossError(f"cannot write results into {folder}: {error.strerror}; give another --out") from error
        return folder

    def lock(self, path: Path, *, wait: bool = False) -> Lock | None:
        """The lock that a file is; None where another process holds it, unless it is waited for."""
        try:
            return Lock.take(path, wait=wait)
        except OSError as error:
            raise CossError(f"cannot lock {path}: {error.strerror}; give another --out") from error

    def write(self, target: Path, content: bytes) -> None:
        """All of a file in the folder, or nothing."""
        try:
            write_atomically(self.inside(target.parent.relative_to(self.path).as_posix()) / target.name, content)
        except OSError as error:
            kind = NoRoom if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else CossError
            raise kind(
                f"cannot write {target}: {error.strerror}; what was stored before is intact: make room or give another "
                "--out, then give the same command again"
            ) from error


def keep_aside(path: Path) -> None:
    """Rename a damaged file to <name>.damaged: nothing is lost."""
    os.replace(path, free_name(path.with_name(f"{path.name}.damaged")))


def warn(message: str) -> None:
    """A StoreWarning for the caller's caller."""
    warnings.warn(message, StoreWarning, stacklevel=3)
