"""A file written whole or not at all, a lock that dies with its process, and where the caches lie."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, ClassVar

MOST_TEXT = 2**26  # bytes of a text file that is read whole: lists of a million images have 50 MB


def cache_folder() -> Path:
    """COSS_CACHE_DIR, else coss-eval in the user's cache directory."""
    own = os.environ.get("COSS_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coss-eval"


def open_regular(path: str | Path, most: int | None = None) -> BinaryIO:
    """A file to read from, if it is one: a pipe or a device would be waited for, or read, without end.

    Raises OSError, also for one of more than ``most`` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and (most is None or status.st_size <= most):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    raise OSError(errno.EFBIG, f"{status.st_size:,} bytes are larger than what is read of such a file", str(path))


def read_text(path: Path) -> str:
    """The text of a regular file of up to MOST_TEXT bytes, in UTF-8. Raises OSError or ValueError."""
    with open_regular(path, MOST_TEXT) as file:
        return file.read(MOST_TEXT).decode("utf-8")


def write_atomically(target: Path, content: bytes) -> None:
    """Replace ``target`` by ``content``: temporary file beside it, fsync, rename, fsync of the folder; or OSError."""
    with replacing(target) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary file beside ``target`` to be written; it takes the target's place if nothing is raised."""
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.tmp")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder, and what was removed from it, on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, stem: str) -> None:
    """Drop temporary files of ``stem`` that a killed process left; only for who has the right to write ``stem``."""
    for leftover in folder.glob(f".{stem}.*.tmp"):
        leftover.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """``path``, or the first of path.1, path.2 ... that is free: what was kept aside is never overwritten."""
    candidate, number = path, 0
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


class Lock:
    """An exclusive lock on a file of its own, dropped by the kernel when the process ends, however it ends.

    The file names the holder's pid and host and is removed on release.
    """

    # A forked child (a data loader's worker) inherits the descriptors and would keep a lock alive after its
    # parent was killed, so it closes them.
    _held: ClassVar[set[int]] = set()

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self._held.add(descriptor)

    @classmethod
    def take(cls, path: Path, *, wait: bool = False) -> Lock | None:
        """The lock, or None while another process (or thread) holds it; ``wait`` waits instead. Raises OSError."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, path):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
                    return cls(path, descriptor)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its holder removed the file between our open and our lock: try again

    def release(self) -> None:
        if self._descriptor not in self._held:
            return  # a fork of the holder: the lock is its parent's
        self.path.unlink(missing_ok=True)  # while it is locked, so that nobody can hold a file without a name
        self._held.discard(self._descriptor)
        os.close(self._descriptor)

    @classmethod
    def _forget(cls) -> None:
        while cls._held:
            os.close(cls._held.pop())


os.register_at_fork(after_in_child=Lock._forget)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
