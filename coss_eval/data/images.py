"""The images of a split by index, decoded in a fixed order: kept in memory where they fit, else streamed by workers."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pickle import PicklingError
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from coss_eval.data.batches import Geometry
from coss_eval.data.choose import Bools, Ints
from coss_eval.data.decode import UNREADABLE, Header, Size, Target, decode, header, output_size, reason
from coss_eval.data.digests import Digests, Hashes, digest_rows
from coss_eval.data.sources import Blocks, Source
from coss_eval.errors import CossWarning
from coss_eval.runtime.background import obey_parent_alone, starting_workers

Pixels = NDArray[np.uint8]
T = TypeVar("T")

MEMORY_BYTES = 2**30  # decoded images kept per split
NATIVE_LIMIT = 96  # px: sets whose images all have one size up to this are never resized
READ_ALL_HEADERS = 10_000  # up to so many small images every header is read; else 32 runs of 32
COMMON = 0.9  # share of a set's images that must have one size: strays are fewer, sizes that vary share less
SERIAL_NATIVE, SERIAL_RESIZED = 2_000, 32  # up to so many images, starting workers takes longer than decoding


class Piece(NamedTuple):
    """One chunk of a pass: which of its images could be read, and those as uint8 (good.sum(), 3, H, W)."""

    good: Bools
    pixels: Pixels


class Images(Protocol):
    """Images by index, with their keys (relative paths) and the reasons why some could not be read."""

    @property
    def keys(self) -> pa.StringArray: ...

    @property
    def bad(self) -> dict[int, str]: ...

    @property
    def exif(self) -> bool:
        """Whether images are turned as their EXIF orientation says."""
        ...

    def raw(self, index: int) -> bytes:
        """The stored bytes of one image; empty where there are none."""
        ...

    def digests(self, indices: Ints) -> Hashes:
        """uint8 (N, 16): a hash of each image's stored bytes."""
        ...

    def digests_known(self, indices: Ints) -> bool:
        """Whether they are at hand, so that no file need be read for them."""
        ...

    def changed(self, indices: Ints) -> int | None:
        """The first of these whose file has changed since its digest was taken; None where none has."""
        ...

    def remarks(self, name: str, native: bool) -> list[str]:
        """Lines on how unusual images of the split ``name`` are read, given whether the set stays native."""
        ...

    def common_size(self, limit: int | None = NATIVE_LIMIT) -> Size | None:
        """The (height, width) of at least COMMON of the images where it is small enough to stay native, else None."""
        ...

    def blocks(self, native: Size | None) -> Blocks | None:
        """Which images are read together; None where each is read alone, or where all of that size stay in memory."""
        ...

    def read(self, indices: Ints, target: Target, chunk: int, workers: int | None) -> Iterator[Piece]:
        """The images of ``indices`` in that order, ``chunk`` at a time."""
        ...


class ArrayImages:
    """Images that are an array already, uint8 (N, 3, H, W): digits, CIFAR as torchvision has it."""

    exif = False

    def __init__(self, pixels: Pixels, keys: Sequence[str]) -> None:
        self.keys = pa.array(keys, pa.string())
        self.bad: dict[int, str] = {}
        self._pixels = pixels
        self._digests: Hashes | None = None

    def raw(self, index: int) -> bytes:
        return bytes(self._pixels[index])

    def digests(self, indices: Ints) -> Hashes:
        if self._digests is None:
            self._digests = digest_rows(self._pixels)
        return self._digests[indices]

    def digests_known(self, indices: Ints) -> bool:
        return True

    def changed(self, indices: Ints) -> int | None:
        return None

    def remarks(self, name: str, native: bool) -> list[str]:
        return []

    def common_size(self, limit: int | None = NATIVE_LIMIT) -> Size | None:
        return self._pixels.shape[2], self._pixels.shape[3]

    def blocks(self, native: Size | None) -> Blocks | None:
        return None

    def read(self, indices: Ints, target: Target, chunk: int, workers: int | None) -> Iterator[Piece]:
        for part in _chunks(indices, chunk):
            yield Piece(np.ones(len(part), bool), self._pixels[part])


class EncodedImages:
    """Encoded images, decoded once per target where they fit into MEMORY_BYTES. Not for several threads at once.

    ``sized``: somebody has brought them to their size already, so that they keep it however large it is.
    """

    def __init__(
        self, source: Source, keys: Sequence[str] | pa.StringArray, *, exif: bool = False, sized: bool = False
    ) -> None:
        self.keys = pa.array(keys, pa.string())
        self.bad: dict[int, str] = {}
        self.exif = exif
        self._source, self._sized = source, sized
        self._memory: tuple[Target, _InMemory] | None = None
        self._digests = Digests(source)
        self._headers: dict[int, Header] | None = None
        self._odd = frozenset[int]()  # images of another size than the common one, to be resized

    def raw(self, index: int) -> bytes:
        try:
            with self._source.open(index) as stream:
                return stream.read()
        except UNREADABLE:
            return b""  # counted and named when it is decoded

    def digests(self, indices: Ints) -> Hashes:
        return self._digests.of(indices)

    def digests_known(self, indices: Ints) -> bool:
        return self._digests.known(indices)

    def changed(self, indices: Ints) -> int | None:
        return self._digests.changed(indices)

    def common_size(self, limit: int | None = NATIVE_LIMIT) -> Size | None:
        size, share = _most_common(self.headers())
        if size is None or share < COMMON or (limit is not None and not self._sized and max(size) > limit):
            return None
        self._odd = frozenset(index for index, found in self.headers().items() if found.size != size)
        return size

    def headers(self) -> dict[int, Header]:
        """What those files say that were looked at: all of a set of up to READ_ALL_HEADERS small images."""
        if self._headers is None:
            count = len(self._source)
            self._headers = self._read_headers(_header_sample(count))
            size, share = _most_common(self._headers)
            if size is not None and max(size) <= NATIVE_LIMIT and share > 0.5 and count <= READ_ALL_HEADERS:
                self._headers |= self._read_headers(i for i in range(count) if i not in self._headers)
        return self._headers

    def _read_headers(self, indices: Iterable[int]) -> dict[int, Header]:
        found = {}
        for index in indices:
            try:
                with self._source.open(index) as stream:
                    found[index] = header(stream, exif=self.exif)
            except UNREADABLE:
                continue  # counted and named when it is decoded
        return found

    def remarks(self, name: str, native: bool) -> list[str]:
        headers, lines = self.headers(), []
        size, share = _most_common(headers)
        if size is not None and max(size) <= NATIVE_LIMIT and (native or share > 0.5):
            others = {index: f"{h}x{w}" for index, ((h, w), _) in headers.items() if (h, w) != size}
            named = "; ".join(f"{self.keys[index].as_py()} ({why})" for index, why in list(others.items())[:5])
            named += f"; and {len(others) - 5} more" if len(others) > 5 else ""
            common = f"{size[0]}x{size[1]}"
            if native and others:
                lines.append(f"{len(others)} of the {name} images are not {common} px and are cut to it: {named}")
            elif others:
                lines.append(
                    f"the {name} images are read as of varying sizes, at the model's input size: only "
                    f"{100 * share:.0f} % of them are {common} px (a set stays as it is from {100 * COMMON:.0f} %); "
                    f"others: {named}"
                )
        deep = [index for index, found in headers.items() if found.deep]
        if deep:
            lines.append(
                f"{len(deep)} of the {len(headers):,} {name} images looked at have more than 8 bits of grey, such as "
                f"{self.keys[deep[0]].as_py()}: white is the largest value of their TIFF tag or bit depth, of 32-bit "
                "integers 255 or 65535 (the smaller that holds an image's values), of floats 1"
            )
        return lines

    def blocks(self, native: Size | None) -> Blocks | None:
        in_memory = native is not None and _capacity(native) >= len(self._source)
        return None if in_memory else self._source.blocks

    def read(self, indices: Ints, target: Target, chunk: int, workers: int | None) -> Iterator[Piece]:
        memory = self._memory_of(target)
        parts = _chunks(indices, chunk)
        missing = [part[~memory.holds(part) & ~self._is_bad(part)] for part in parts]
        keep = sum(map(len, missing)) <= memory.room
        work = _Decoder(self._source, target, [part for part in missing if len(part)], self._odd, self.exif)
        decoded = _decode(work, workers)
        for part, new in zip(parts, missing, strict=True):
            if not len(new):
                good = ~self._is_bad(part)
                yield Piece(good, memory.take(part[good]))
                continue
            pixels, failures = next(decoded)
            self.bad |= failures
            new = new[~self._is_bad(new)]
            good = ~self._is_bad(part)
            if keep:  # before they are handed out, as they may be changed there
                memory.add(new, pixels)
            yield Piece(good, memory.merge(part[good], new, pixels))

    def _memory_of(self, target: Target) -> _InMemory:
        if self._memory is None or self._memory[0] != target:
            self._memory = (target, _InMemory(len(self._source), output_size(target)))
        return self._memory[1]

    def _is_bad(self, indices: Ints) -> Bools:
        return np.isin(indices, list(self.bad)) if self.bad else np.zeros(len(indices), bool)


def _capacity(size: Size) -> int:
    """How many decoded images of one size are kept."""
    return MEMORY_BYTES // (3 * size[0] * size[1])


class _InMemory:
    """Decoded images of one target, at most MEMORY_BYTES of them; the system gives the pages as they are filled."""

    def __init__(self, count: int, size: Size) -> None:
        capacity = min(count, _capacity(size))
        self._pixels: Pixels = np.empty((capacity, 3, *size), np.uint8)
        self._row = np.full(count, -1, np.int32)
        self._used = 0

    @property
    def room(self) -> int:
        return len(self._pixels) - self._used

    def holds(self, indices: Ints) -> Bools:
        return self._row[indices] >= 0

    def take(self, indices: Ints) -> Pixels:
        return self._pixels[self._row[indices]]

    def merge(self, indices: Ints, new: Ints, pixels: Pixels) -> Pixels:
        """Pixels of ``indices``, in their order: those of ``new`` as just decoded, the others from here."""
        if len(new) == len(indices):
            return pixels
        merged = np.empty((len(indices), *self._pixels.shape[1:]), np.uint8)
        is_new = np.isin(indices, new)
        merged[is_new] = pixels
        merged[~is_new] = self.take(indices[~is_new])
        return merged

    def add(self, indices: Ints, pixels: Pixels) -> None:
        """Keep these, but for any that another pass has added meanwhile or that no longer fit."""
        fresh = np.flatnonzero(~self.holds(indices))[: self.room]
        rows = np.arange(self._used, self._used + len(fresh))
        self._pixels[rows] = pixels[fresh]
        self._row[indices[fresh]] = rows
        self._used += len(fresh)


class _Decoder(Dataset[tuple[Pixels, dict[int, str]]]):
    """What a worker process gets: the source, and the chunks to decode, each to its good pixels and its failures."""

    def __init__(self, source: Source, target: Target, parts: list[Ints], odd: frozenset[int], exif: bool) -> None:
        self.source, self.target, self.parts, self.odd, self.exif = source, target, parts, odd, exif

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> tuple[Pixels, dict[int, str]]:
        part = self.parts[number]
        pixels = np.empty((len(part), 3, *output_size(self.target)), np.uint8)
        failures: dict[int, str] = {}
        for place in np.argsort(part, kind="stable"):  # in stored order: parquet reads a row group at a time
            index = int(part[place])
            try:
                with self.source.open(index) as stream:
                    pixels[place] = decode(stream, self.target, exif=self.exif, odd=index in self.odd)
            except UNREADABLE as error:
                failures[index] = reason(error)
        return (pixels[~np.isin(part, list(failures))] if failures else pixels), failures


def _decode(work: _Decoder, workers: int | None) -> Iterator[tuple[Pixels, dict[int, str]]]:
    """Each part decoded, in order, however many workers there are."""
    if not work.parts:
        return iter(())
    if workers is None:
        workers = _default_workers(sum(map(len, work.parts)), work.target)
    return in_workers(work, len(work.parts), workers)


def in_workers(work: Dataset[T], items: int, workers: int) -> Iterator[T]:
    """``work[0]`` to ``work[items - 1]`` in order, made by so many processes, or here where there are none."""
    try:
        with starting_workers():
            return iter(_loader(work, items, workers))
    except (PicklingError, AttributeError, TypeError) as error:  # of spawn and forkserver
        warnings.warn(
            f"images are read by one process, as others cannot have their source ({error}): define its class in a "
            "module that the script imports",
            CossWarning,
            stacklevel=2,
        )
        return iter(_loader(work, items, 0))


def _loader(work: Dataset[T], items: int, workers: int) -> DataLoader[T]:
    return DataLoader(
        work,
        batch_size=None,
        num_workers=min(workers, items),
        collate_fn=_as_is,
        worker_init_fn=obey_parent_alone,
        generator=torch.Generator(),  # else DataLoader draws a number from the global one
    )


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _as_is(item: Any) -> Any:
    """NumPy arrays go through a pipe; tensors would need shared memory, which containers often limit to 64 MB."""
    return item


def _default_workers(images: int, target: Target) -> int:
    if images <= (SERIAL_RESIZED if isinstance(target, Geometry) else SERIAL_NATIVE):
        return 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this run on this machine
    return max(1, min(processors() // here, 16))


def _chunks(indices: Ints, size: int) -> list[Ints]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _header_sample(count: int) -> Iterator[int]:
    """All of up to 1,024 images, or 32 evenly spaced runs of 32 neighbours, which parquet reads from 32 row groups."""
    if count <= 32 * 32:
        yield from range(count)
        return
    for start in np.linspace(0, count - 32, 32).astype(int).tolist():
        yield from range(start, start + 32)


def _most_common(headers: Mapping[int, Header]) -> tuple[Size | None, float]:
    """The size that most images have, and the share that has it."""
    counted = Counter(found.size for found in headers.values()).most_common(1)
    return (counted[0][0], counted[0][1] / len(headers)) if counted else (None, 0.0)
