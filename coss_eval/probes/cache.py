"""Arrays kept in the user's cache directory: written whole or not at all, checked when read, bounded in size.

Nothing here is needed for a result: what is missing or damaged is computed again.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coss_eval.errors import UsageError
from coss_eval.runtime.disk import cache_folder
from coss_eval.store import canonical_json

Arrays = Mapping[str, NDArray[Any]]

DEFAULT_GB = 8.0
DAMAGED = (OSError, EOFError, KeyError, ValueError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)
"""What zipfile and NumPy raise for files that are absent or not what was written."""
ABANDONED = 24 * 3600  # seconds after which a temporary file belongs to nobody any more


def key(kind: str, protocol: Mapping[str, Any]) -> str:
    """The name of what depends on all of ``protocol`` (JSON) and on nothing else: "features-0123..."."""
    return f"{kind}-{hashlib.blake2b(canonical_json(protocol).encode(), digest_size=20).hexdigest()}"


def load(name: str, entries: Sequence[str]) -> dict[str, NDArray[Any]] | None:
    """The arrays ``entries`` saved under ``name``; None where there are none or their checksums do not fit."""
    path = folder() / f"{name}.npz"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        with np.load(path, allow_pickle=False) as arrays:
            found = {entry: arrays[entry] for entry in entries}
        os.utime(path)  # the least recently used go first
    except DAMAGED:
        return None
    return found


def save(name: str, arrays: Arrays) -> None:
    """Keep ``arrays`` under ``name``, and drop the least recently used beyond the limit (COSS_CACHE_GB, default 8).

    What alone exceeds the limit is not kept. A cache that cannot be written is no failure: a warning says so.
    """
    limit = limit_bytes()
    if sum(array.nbytes for array in arrays.values()) > limit:
        return
    target = folder() / f"{name}.npz"
    temporary = target.with_name(f".{name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        _evict(target.parent, limit)
    except OSError as error:
        warnings.warn(f"the cache {target.parent} cannot be written ({error.strerror}); going on", stacklevel=2)


def folder() -> Path:
    """COSS_CACHE_DIR, else coss-eval in the user's cache directory."""
    return cache_folder()


def limit_bytes() -> int:
    given = os.environ.get("COSS_CACHE_GB", str(DEFAULT_GB))
    try:
        limit = int(float(given) * 2**30)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise UsageError(f"COSS_CACHE_GB must be a number of gigabytes, 0 or more, got {given!r}")
    return limit


def _evict(cache: Path, limit: int) -> None:
    total = 0
    for path, status in sorted(_files(cache, "*.npz"), key=lambda found: found[1].st_mtime_ns, reverse=True):
        total += status.st_size
        if total > limit:
            path.unlink(missing_ok=True)
    for path, status in _files(cache, ".*.tmp"):
        if time.time() - status.st_mtime > ABANDONED:
            path.unlink(missing_ok=True)


def _files(cache: Path, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
    """Files with their status; one that another process removes meanwhile is passed over."""
    for path in cache.glob(pattern):
        try:
            yield path, path.stat()
        except FileNotFoundError:
            continue
