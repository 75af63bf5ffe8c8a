"""What identifies the content of images: the SHA-256 of each one's bytes, computed once and kept by file and time.

SHA-256 because processors have instructions for it: twice as fast here as BLAKE2.
"""

from __future__ import annotations

import hashlib
import math
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from coss_eval.data.choose import Bools, Ints
from coss_eval.data.decode import UNREADABLE
from coss_eval.data.sources import Source
from coss_eval.runtime.disk import cache_folder, replacing

Hashes = NDArray[np.uint8]  # (N, LENGTH)
Signatures = NDArray[np.uint64]  # (N,)
T = TypeVar("T")

LENGTH = 16  # bytes of a digest
SETTLED = 2.0  # seconds: a file changed more recently may change again without another time stamp, and is read again
THREADS = 8  # reading and hashing release the interpreter; more help where files lie on a network
_CHUNK = 256  # images a thread takes at once


def digest(content: bytes | memoryview) -> bytes:
    """LENGTH bytes."""
    return hashlib.sha256(content).digest()[:LENGTH]


class Digests:
    """The digests of a source's images, each read once, and again only where its file has changed since.

    Kept in the user's cache directory by path, size, time of change and inode: what cannot be kept is read again.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._values: Hashes = np.zeros((len(source), LENGTH), np.uint8)
        self._known: Bools = np.zeros(len(source), bool)
        self._states: Signatures = np.zeros(len(source), np.uint64)  # of the files when they were read

    def of(self, indices: Ints) -> Hashes:
        """uint8 (N, LENGTH); of an image without bytes the digest of none."""
        missing = np.unique(indices[~self._known[indices]])
        if len(missing):
            self._values[missing] = self._find(missing)
            self._known[missing] = True
        return self._values[indices]

    def known(self, indices: Ints) -> bool:
        """Whether all of these have been asked for before."""
        return bool(self._known[indices].all())

    def changed(self, indices: Ints) -> int | None:
        """The first of these whose file is not what it was when its digest was taken; None where all are."""
        known = np.unique(indices[self._known[indices]])
        other = known[self._states_now(known) != self._states[known]] if len(known) else known
        return int(other[0]) if len(other) else None

    def _states_now(self, indices: Ints) -> Signatures:
        parts = _in_threads(lambda part: self._source.signatures(part, math.inf), indices, self._source.parallel)
        return np.concatenate(list(parts))

    def _find(self, indices: Ints) -> Hashes:
        self._states[indices] = self._states_now(indices)
        signatures = np.concatenate(list(_in_threads(self._signatures, indices, self._source.parallel)))
        kept_signatures, kept = load(self._source.place)
        values, unread = _look_up(signatures, kept_signatures, kept)
        if unread.any():
            parts = list(_in_threads(self._read, indices[unread], self._source.parallel))
            values[unread] = np.concatenate([part for part, _ in parts])
            new = np.flatnonzero(unread)[np.concatenate([whole for _, whole in parts])]
            new = new[signatures[new] != 0]
            if len(new):
                save(
                    self._source.place,
                    np.concatenate((signatures[new], kept_signatures)),
                    np.concatenate((values[new], kept)),
                )
        return values

    def _signatures(self, indices: Ints) -> Signatures:
        return self._source.signatures(indices, time.time() - SETTLED)

    def _read(self, indices: Ints) -> tuple[Hashes, Bools]:
        """The digests, and which of them are of a whole file: what could not be opened now may be there later."""
        found, whole = np.zeros((len(indices), LENGTH), np.uint8), np.ones(len(indices), bool)
        for row, index in enumerate(indices.tolist()):
            try:
                with self._source.open(index) as stream:
                    content = stream.read()
            except UNREADABLE:
                content, whole[row] = b"", False
            found[row] = np.frombuffer(digest(content), np.uint8)
        return found, whole


def digest_rows(rows: NDArray[np.uint8]) -> Hashes:
    """uint8 (N, LENGTH) of the pixels of each of N images, whatever the layout of ``rows`` (N, ...) in memory."""
    joined = b"".join(digest(np.ascontiguousarray(row).data.cast("B")) for row in rows)
    return np.frombuffer(joined, np.uint8).reshape(-1, LENGTH)


def load(place: str) -> tuple[Signatures, Hashes]:
    """The signatures, sorted, and digests kept for a place; none where they are absent or damaged."""
    try:
        with np.load(_file(place), allow_pickle=False) as arrays:  # zipfile compares the checksums
            signatures, digests = arrays["signatures"], arrays["digests"]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
        return np.zeros(0, np.uint64), np.zeros((0, LENGTH), np.uint8)
    return signatures, digests


def save(place: str, signatures: Signatures, digests: Hashes) -> None:
    """Keep these for a place; a cache that cannot be written only costs time.

    Of two processes that save at once one loses its own; it reads those images again another time.
    """
    signatures, first = np.unique(signatures, return_index=True)
    target = _file(place)
    with suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, signatures=signatures, digests=digests[first])


def _file(place: str) -> Path:
    return cache_folder() / f"digests-{hashlib.sha256(place.encode()).hexdigest()[:32]}.npz"


def _look_up(wanted: Signatures, signatures: Signatures, digests: Hashes) -> tuple[Hashes, Bools]:
    """The digests of ``wanted``, and which of them are not among ``signatures`` (sorted)."""
    if not len(signatures):
        return np.zeros((len(wanted), LENGTH), np.uint8), np.ones(len(wanted), bool)
    places = np.searchsorted(signatures, wanted).clip(max=len(signatures) - 1)
    unread: Bools = (signatures[places] != wanted) | (wanted == 0)
    return digests[places].copy(), unread


def _in_threads(work: Callable[[Ints], T], indices: Ints, parallel: bool) -> Iterator[T]:
    """``work`` on ``indices`` in pieces, in order; in threads where the source allows several at once."""
    parts = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]
    if not parallel or len(parts) == 1:
        yield from map(work, parts)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(work, parts)
