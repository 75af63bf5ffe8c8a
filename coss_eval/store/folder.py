"""A results folder that several processes write: files whole or not at all, under its lock."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coss_eval.errors import CossError
from coss_eval.runtime.disk import Lock, free_name, write_atomically
from coss_eval.store.runs import RESULTS, Runs, Stamp


@dataclass(frozen=True)
class Opened:
    """A file that is there: ``read`` gives at most so many bytes of it; ``stamp`` tells it from others."""

    stamp: Stamp
    read: Callable[[int], bytes]


class NoRoom(CossError):
    """The disk, or what a person may use of it, is full: nothing more can be stored."""


class ResultsFolder:
    """Making one touches no disk; the first write does. What cannot be written is a CossError that says what to do.

    The folder <out>/<run>/results of a packed run (see ``runs``) is read from the pack; a write unpacks the run first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        run = path.absolute().parent
        self._runs, self._run = (Runs(run.parent) if path.absolute().name == RESULTS else None), run.name

    @property
    def is_packed(self) -> bool:
        """Whether it is read from the pack of a study."""
        return self._runs is not None and self._runs.is_packed(self._run)

    @property
    def is_there(self) -> bool:
        """Whether it is on the disk, or a packed run has results."""
        return self.path.is_dir() or (self._runs is not None and self._run in self._runs.evaluated())

    @contextmanager
    def opened(self, name: str) -> Iterator[Opened]:
        """A file of the folder, read when asked for. Raises FileNotFoundError and NotADirectoryError."""
        runs, run, inside = self._runs, self._run, f"{RESULTS}/{name}"
        if runs is not None and runs.is_packed(run):
            yield Opened(runs.stamp(run, inside), lambda most: runs.read(run, inside)[:most])
            return
        with (self.path / name).open("rb") as file:
            stat = os.fstat(file.fileno())
            stamp = stat.st_ino, stat.st_mtime_ns, stat.st_size
            yield Opened(stamp, lambda most: file.read(min(most, stat.st_size + 1)))  # read takes what it is asked for

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The store's own lock, waited for: nobody packs, writes or begins a claim meanwhile."""
        lock = None
        while lock is None or self.is_packed:  # packed as a run of a study while its lock was waited for
            if lock is not None:
                lock.release()
            lock = self.lock(self.inside() / "run.lock", wait=True)
        try:
            yield
        finally:
            lock.release()

    def inside(self, name: str = "") -> Path:
        """The folder, or one in it, which is made where it is not there."""
        if self._runs is not None and self.is_packed:
            with self._runs.locked():
                self._runs.unpack(self._run)
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
        except FileNotFoundError as error:
            if wait:  # its folder was packed with the others of a study
                return None
            raise CossError(f"cannot lock {path}: {error.strerror}; give another --out") from error
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
