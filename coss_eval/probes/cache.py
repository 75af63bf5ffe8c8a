"""Arrays kept in the user's cache directory: written whole or not at all, checked when read, bounded in size.

Large arrays are mapped when they are read: they take no memory that the system cannot have back. Nothing here is needed
for a result: what is missing or damaged is computed again.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from coss_eval.errors import CossWarning, UsageError
from coss_eval.runtime.disk import cache_folder
from coss_eval.store import canonical_json

Arrays = Mapping[str, NDArray[Any]]

DEFAULT_GB = 8.0
DAMAGED = (OSError, EOFError, KeyError, ValueError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)
"""What zipfile and NumPy raise for files that are absent or not what was written."""
ALIGNED = 64  # bytes
MAPPED = 2**26  # bytes: smaller arrays are read into memory, where nobody can cut them short
ABANDONED = 24 * 3600  # seconds after which a temporary file belongs to nobody any more

_PADDING = 0xD935  # the zip extra field for alignment, as Android's tools write it


def key(kind: str, protocol: Mapping[str, Any]) -> str:
    """The name of what depends on all of ``protocol`` (JSON) and on nothing else: "features-0123..."."""
    return f"{kind}-{hashlib.blake2b(canonical_json(protocol).encode(), digest_size=20).hexdigest()}"


def load(name: str, entries: Sequence[str]) -> dict[str, NDArray[Any]] | None:
    """The arrays ``entries`` saved under ``name``; None where there are none or their checksums do not fit.

    A warning names a file that is there but is not what was written.
    """
    path = folder() / f"{name}.npz"
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("its checksums do not fit")
            found = {entry: _mapped(file, archive.getinfo(f"{entry}.npy")) for entry in entries}
        os.utime(path)  # the least recently used go first
    except OSError:  # none, or none that may be read: ``save`` tells of a folder that is not to be used
        return None
    except DAMAGED as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        warnings.warn(f"cannot use {path} of the cache ({reason}): it is computed again", CossWarning, stacklevel=2)
        return None
    return found


def save(name: str, arrays: Arrays) -> None:
    """Keep ``arrays`` under ``name``, and drop the least recently used beyond the limit (COSS_CACHE_GB, default 8).

    What alone exceeds the limit is not kept: a warning says so. A cache that cannot be written is no failure, either.
    """
    limit, size = limit_bytes(), _bytes(arrays)
    if size > limit:
        if limit:  # 0 asks for no cache
            warnings.warn(
                f"{size / 2**30:.3g} GB of {name.partition('-')[0]} exceed the cache's {limit / 2**30:.3g} GB and are "
                f"not kept for later runs; COSS_CACHE_GB={math.ceil(1.1 * size / 2**30)} would keep them",
                stacklevel=2,
            )
        return
    target = folder() / f"{name}.npz"
    try:
        with _beside(target) as temporary:
            with temporary.open("xb") as file:
                _write(file, arrays)
            temporary.replace(target)
        _evict(target.parent, limit)
    except OSError as error:
        warnings.warn(f"the cache {target.parent} cannot be written ({error.strerror}); going on", stacklevel=2)


def on_disk(name: str, arrays: Arrays) -> dict[str, NDArray[Any]]:
    """The same arrays mapped: from the file that ``save`` made, else from one without a name, which ends with them.

    Small ones are given back as they are; others, too, where there is no room on the disk or no cache is wanted, which
    a limit of 0 says.
    """
    if _bytes(arrays) < MAPPED:
        return dict(arrays)
    if (saved := load(name, list(arrays))) is not None:
        return saved
    if not limit_bytes():
        return dict(arrays)
    try:
        with _beside(folder() / f"{name}.npz") as temporary, temporary.open("xb+") as file:
            _write(file, arrays)
            file.flush()
            with zipfile.ZipFile(file) as archive:
                return {entry: _mapped(file, archive.getinfo(f"{entry}.npy")) for entry in arrays}
    except DAMAGED:
        return dict(arrays)


def holds(name: str) -> bool:
    """Whether something is saved under ``name``."""
    return (folder() / f"{name}.npz").is_file()


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A name for a temporary file, which is removed where it has not become something else."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write(file: BinaryIO, arrays: Arrays) -> None:
    """An .npz as NumPy writes it, but for padding in the entries' headers: their numbers begin at multiples of ALIGNED.

    A zip's local header is 30 bytes, the name and the extra field, in which zipfile puts 20 bytes for large entries.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for entry, array in arrays.items():
            member = zipfile.ZipInfo(f"{entry}.npy")
            ends = file.tell() + 30 + len(member.filename.encode()) + 20 + 4
            member.extra = struct.pack("<HH", _PADDING, -ends % ALIGNED) + bytes(-ends % ALIGNED)
            with archive.open(member, "w", force_zip64=True) as stored:
                np.lib.format.write_array(stored, np.asanyarray(array), allow_pickle=False)  # fills up to 64 bytes


def _mapped(file: BinaryIO, member: zipfile.ZipInfo) -> NDArray[Any]:
    """An array of an .npz: mapped where it is large, so that changes of its values stay in this process.

    A copy where its numbers do not begin where processors want them. Raises one of DAMAGED.
    """
    file.seek(member.header_offset)
    header = file.read(30)
    name, extra = struct.unpack("<HH", header[26:30])
    file.seek(name + extra, os.SEEK_CUR)
    if member.compress_type != zipfile.ZIP_STORED or np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not an array that save wrote")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    order: Literal["F", "C"] = "F" if fortran else "C"
    count = math.prod(shape)
    if dtype.hasobject or count * dtype.itemsize > member.file_size:
        raise ValueError("not an array that save wrote")
    if count * dtype.itemsize < MAPPED:
        return np.fromfile(file, dtype, count).reshape(shape, order=order)
    kind: Any = dtype
    mapped = np.memmap(file, kind, "c", file.tell(), shape, order)
    return mapped if mapped.flags.aligned else np.array(mapped)


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())


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
    kept = [*_files(cache, "*.npz"), *_files(cache, "*.parquet")]
    for path, status in sorted(kept, key=lambda found: found[1].st_mtime_ns, reverse=True):
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
