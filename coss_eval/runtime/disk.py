"""A file written whole or not at all, a lock that its process cannot leave behind, and where the caches lie."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
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


NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)  # of file systems that have none
BEAT = 10.0  # seconds between two touches of a lock's file there
SILENT = 120.0  # seconds after which a file that nobody touches is a dead process's: NFS may show a touch 60 s late
ASKED = 0.01  # seconds after which a lock that was only asked about, as by `sweep --list`, is free again
POLL = 0.01, 1.0  # seconds to wait before looking again at a lock that is waited for there: at first, and at most


class Lock:
    """An exclusive lock on a file of its own, which names the holder's pid and host and is removed on release.

    The kernel drops it (flock) when the process ends, however it ends. Where the file system has no flock, as some that
    are shared by machines, who creates the file holds the lock, and a thread touches it every BEAT seconds. A file
    that was not touched for SILENT seconds, by the file system's own clock, is a dead process's and is cleared away.
    All machines have to mount such a folder alike: one that has flock does not see the others' beats.
    """

    # A forked child (a data loader's worker) inherits the descriptors and would keep a lock alive after its
    # parent was killed, so it closes them.
    _held: ClassVar[set[int]] = set()

    def __init__(self, path: Path, descriptor: int, *, beats: bool) -> None:
        self.path, self._descriptor = path, descriptor
        self._held.add(descriptor)
        self._released = Event()
        self._heart = Thread(target=self._beat, name="lock", daemon=True) if beats else None
        if self._heart is not None:
            self._heart.start()

    @classmethod
    def take(cls, path: Path, *, wait: bool = False) -> Lock | None:
        """The lock, or None while another process (or thread) holds it; ``wait`` waits instead. Raises OSError."""
        (pause, longest), refused = POLL, False
        while True:
            descriptor, made = _created_or_opened(path)
            try:
                beats = not _flock(descriptor, wait=wait)
                if (made or not beats) and _is_at(descriptor, path):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
                    return cls(path, os.dup(descriptor), beats=beats)
                # else its holder removed the file between our open and our lock, or it is another's that beats
                if beats and not _cleared(descriptor, path):
                    if not wait:
                        return None
                    time.sleep(pause)
                    pause = min(2 * pause, longest)
            except BlockingIOError:
                if refused:
                    return None
                refused = True
                time.sleep(ASKED)
            finally:
                os.close(descriptor)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with suppress(OSError):  # of a server that is away for a moment: the next beat may come through
                os.utime(self._descriptor)

    def release(self) -> None:
        if self._descriptor not in self._held:
            return  # a fork of the holder: the lock is its parent's
        if self._heart is not None:
            self._released.set()
            self._heart.join()
        if _is_at(self._descriptor, self.path):  # not another's, as after this machine has slept for minutes
            self.path.unlink(missing_ok=True)  # while it is locked, so that nobody can hold a file without a name
        self._held.discard(self._descriptor)
        os.close(self._descriptor)

    @classmethod
    def _forget(cls) -> None:
        while cls._held:
            os.close(cls._held.pop())


os.register_at_fork(after_in_child=Lock._forget)


def lock_holder(path: Path) -> str | None:
    """ "process 12 on host" for who wrote a lock's file; None where there is none, or nothing is in it yet."""
    try:
        with open_regular(path, 4096) as file:
            number, _, host = file.read().decode(errors="replace").strip().partition(" ")
    except OSError:
        return None
    return f"process {number} on {host}" if number and host else None


def _created_or_opened(path: Path) -> tuple[int, bool]:
    """A descriptor of the file, and whether it was made by this very call. Raises OSError, also for a link."""
    while True:
        with suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), True
        with suppress(FileNotFoundError):  # removed between the two: try again
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), False


def _flock(descriptor: int, *, wait: bool) -> bool:
    """Lock the file by the kernel; False where its file system has no such locks.

    Raises BlockingIOError where another holds it and it is not waited for.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return False
    return True


def _cleared(descriptor: int, path: Path) -> bool:
    """Whether the open file is no longer at ``path``: removed by its holder, or by us where nobody touches it.

    Two who want a dead process's lock would remove each other's new one, so only who has the lock "<name>.next" may
    remove anything, and looks once more first. A clock that was set forward or back makes all files look old, or to be
    of the future, until their next beat: hence the wait for one.
    """
    if not _is_at(descriptor, path):
        return True
    if not _is_silent(descriptor, path):
        return False
    right = Lock.take(path.with_name(f"{path.name}.next"))
    if right is None:
        return False
    try:
        seen = os.fstat(descriptor).st_mtime_ns
        time.sleep(1.5 * BEAT)
        if not _is_at(descriptor, path):
            return True
        if os.fstat(descriptor).st_mtime_ns != seen or not _is_silent(descriptor, path):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        right.release()


def _is_silent(descriptor: int, path: Path) -> bool:
    """Whether the open file was last touched more than SILENT seconds from now, both as its file system says it.

    Machines' own clocks differ; a file made just now beside it has the time that counts there.
    """
    touched, clock = os.fstat(descriptor).st_mtime, path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp")
    made = os.open(clock, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        return abs(os.fstat(made).st_mtime - touched) > SILENT
    finally:
        clock.unlink(missing_ok=True)
        os.close(made)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
