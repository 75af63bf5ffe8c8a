"""Where encoded images lie: files, members of tars, rows of parquet files. Workers get copies, so they are small."""

from __future__ import annotations

import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from coss_eval.errors import CossError
from coss_eval.runtime.disk import open_regular

MOST_BYTES = 2**30  # of the file of one image
UNPACKED = 64  # times the size in the file that a column's values may take: images do not shrink so far
FREE = 2**28  # bytes that it may take in any case
_BUFFER = 2**20  # bytes read at once
_FEW = 16  # rows: what one value of a dictionary may take so many times before it is looked at
HELD_BYTES = 2**28  # of row groups that a process holds; larger groups are read in blocks of a quarter of it


def state_of(path: str, before: float) -> str:
    """What changes when the file does; empty where it is not there or has changed after ``before``."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    if max(status.st_mtime, status.st_ctime) > before:
        return ""
    return f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def _hash(state: str) -> int:
    """64 bits, never 0 but for an empty state."""
    return (
        int.from_bytes(hashlib.sha256(state.encode(errors="surrogateescape")).digest()[:8], "big") | 1 if state else 0
    )


class Blocks(NamedTuple):
    """Which images are read together: number i of N lies in the first block whose end is above i."""

    ends: NDArray[np.int64]  # (M,)
    groups: NDArray[np.int64]  # (M,): blocks of one group are read one after the other
    together: int  # so many blocks can be held at once, twice


class Source(Protocol):
    """Encoded images by index.

    ``place`` names what is read, for the cache of digests; ``parallel`` says whether several threads may ``open``.
    ``blocks`` is None where each image is read alone.
    """

    @property
    def blocks(self) -> Blocks | None: ...

    @property
    def place(self) -> str: ...

    @property
    def parallel(self) -> bool: ...

    def signatures(self, indices: NDArray[np.int64], before: float) -> NDArray[np.uint64]:
        """A number for each image's file as it is on disk now (path, size, times of change, inode) and its row there.

        0 where the file is not there or has changed after ``before`` (seconds since the epoch): it may be changing
        still. The time of the inode is in it, so that a file put back with an old time stamp is seen.
        """
        ...

    def __len__(self) -> int: ...

    def open(self, index: int) -> BinaryIO:
        """The encoded bytes of one image as a stream; OSError or ValueError where there are none."""
        ...


class Files:
    """Image files under one root; their relative paths are packed, as millions of str objects would not stay flat."""

    blocks = None

    def __init__(self, root: Path, paths: Sequence[str] | pa.StringArray) -> None:
        self._root = str(root)
        self._paths = pa.array(paths, pa.string())
        self.place, self.parallel = self._root, True

    def __len__(self) -> int:
        return len(self._paths)

    def signatures(self, indices: NDArray[np.int64], before: float) -> NDArray[np.uint64]:
        names = self._paths.take(indices).to_pylist()
        return np.array([_hash(state_of(f"{self._root}/{name}", before)) for name in names], np.uint64)

    def open(self, index: int) -> BinaryIO:
        return open_regular(f"{self._root}/{self._paths[index].as_py()}", MOST_BYTES)


class TarMembers:
    """Members of tar files by their places there, int64 (N,) each: read one by one, never unpacked."""

    blocks = None

    def __init__(
        self, files: Sequence[Path], numbers: NDArray[np.int64], offsets: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> None:
        self._files = [str(file) for file in files]
        self._numbers, self._offsets, self._sizes = numbers, offsets, sizes
        self.place, self.parallel = f"images in {self._files[0]}", True

    def __len__(self) -> int:
        return len(self._numbers)

    def signatures(self, indices: NDArray[np.int64], before: float) -> NDArray[np.uint64]:
        numbers = self._numbers[indices]
        states = {number: state_of(self._files[number], before) for number in np.unique(numbers).tolist()}
        found = [
            _hash(states[number] and f"{states[number]} {offset} {size}")
            for number, offset, size in zip(
                numbers.tolist(), self._offsets[indices].tolist(), self._sizes[indices].tolist(), strict=True
            )
        ]
        return np.array(found, np.uint64)

    def open(self, index: int) -> BinaryIO:
        size = int(self._sizes[index])
        if size > MOST_BYTES:
            raise ValueError(f"{size:,} bytes are larger than what is read of an image")
        with open_regular(self._files[self._numbers[index]]) as file:
            content = os.pread(file.fileno(), size, int(self._offsets[index]))
        if len(content) < size:
            raise ValueError("the tar file ends early")
        return io.BytesIO(content)


class _RowBlock(NamedTuple):
    """Neighbouring rows of a row group, all of them or, where it is large, a part."""

    file: int
    group: int
    part: int
    rows: int


@dataclass
class _GroupInReading:
    """A row group that is being read: the numbers of its first block and of the next one, and what is to come."""

    first: int
    following: int
    images: Iterator[pa.ChunkedArray]


class ParquetRows:
    """The image column of parquet files in order; up to HELD_BYTES of row groups are held, those used last.

    Of a group that is larger, blocks of rows are held, and it is read from its beginning where an earlier one is asked
    for: reading in order is quick. ``column`` is a binary column or the dotted path of one in a struct ("image.bytes").
    """

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self._files = [str(file) for file in files]
        self._column = column
        self.place, self.parallel = f"{column} of {self._files[0]}", False  # row groups are held for the next row
        groups = self._row_groups()
        self._blocks = [block for number, group, rows, size in groups for block in _blocks(number, group, rows, size)]
        self._ends = np.cumsum([block.rows for block in self._blocks], dtype=np.int64)
        in_file = np.bincount([block.file for block in self._blocks], [block.rows for block in self._blocks])
        self._file_ends = np.cumsum(in_file).astype(np.int64)
        self._largest = max((min(size, HELD_BYTES) for *_, size in groups), default=0)
        self._forget()

    def _forget(self) -> None:
        self._held: OrderedDict[int, pa.ChunkedArray | str] = OrderedDict()  # by the block's number
        self._stream: _GroupInReading | None = None

    def _row_groups(self) -> list[tuple[int, int, int, int]]:
        """(file, group in it, rows, bytes of the images) of each row group, in order."""
        return [
            (number, place, group.num_rows, self._chunk(group).total_uncompressed_size if group.num_rows else 0)
            for number, metadata in enumerate(map(pq.read_metadata, self._files))
            for place, group in enumerate(map(metadata.row_group, range(metadata.num_row_groups)))
        ]

    @property
    def blocks(self) -> Blocks | None:
        starts = np.cumsum([block.part == 0 for block in self._blocks], dtype=np.int64)
        return Blocks(self._ends, starts - 1, max(1, HELD_BYTES // 2 // max(1, self._largest)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_held", "_stream")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def signatures(self, indices: NDArray[np.int64], before: float) -> NDArray[np.uint64]:
        states = [state_of(file, before) for file in self._files]
        numbers = np.searchsorted(self._file_ends, indices, side="right")
        found = [
            _hash(states[number] and f"{states[number]} {self._column} {index - self._file_ends[number]}")
            for number, index in zip(numbers.tolist(), indices.tolist(), strict=True)
        ]
        return np.array(found, np.uint64)

    def has_bytes(self, index: int) -> bool:
        """Whether a row has an image; tables of paths have none in any row."""
        return bool(self._image(index).is_valid)

    def _image(self, index: int) -> Any:
        number = int(np.searchsorted(self._ends, index, side="right"))
        if number in self._held:
            self._held.move_to_end(number)
        else:
            self._read_or_say_why_not(number)
        found = self._held[number]
        if isinstance(found, str):
            raise ValueError(found)
        return found[index - int(self._ends[number])]  # counted from the block's end: the offset is negative

    def _read_or_say_why_not(self, number: int) -> None:
        """Hold a block's images, or why they cannot be read, which is then known for all of them."""
        try:
            self._read(number)
        except (OSError, ValueError, pa.ArrowException, MemoryError) as error:
            self._stream = None
            self._hold(number, str(error).partition("\n")[0] or type(error).__name__)

    def _hold(self, number: int, found: pa.ChunkedArray | str) -> None:
        if not isinstance(found, str) and len(found) != self._blocks[number].rows:
            raise ValueError(f"{len(found)} rows in the place of {self._blocks[number].rows}")
        self._held[number] = found
        while len(self._held) > 1 and sum(map(self._weight, self._held.values())) > HELD_BYTES:
            self._held.popitem(last=False)

    @staticmethod
    def _weight(found: pa.ChunkedArray | str) -> int:
        """Bytes of memory."""
        return 0 if isinstance(found, str) else int(found.nbytes)

    def open(self, index: int) -> BinaryIO:
        image = self._image(index)
        if not image.is_valid:
            raise ValueError("no bytes in the file")
        return io.BytesIO(image.as_buffer())

    def _read(self, number: int) -> None:
        """Hold a block; of a large row group those before it, too, from where it was read last."""
        block = self._blocks[number]
        first = number - block.part
        stream = self._stream
        if stream is None or stream.first != first or stream.following > number:
            self._stream = stream = _GroupInReading(first, first, self._streamed(first))
        while stream.following <= number:
            self._hold(stream.following, next(stream.images, pa.chunked_array([], pa.binary())))
            stream.following += 1

    def _streamed(self, first: int) -> Iterator[pa.ChunkedArray]:
        """The images of the row group whose first block this is, block by block; no more is in memory."""
        block = self._blocks[first]
        path = self._files[block.file]
        with pq.ParquetFile(path) as file:
            group = file.metadata.row_group(block.group)
            chunk = self._chunk(group)
            most = FREE + UNPACKED * chunk.total_compressed_size
            if chunk.total_uncompressed_size > most:
                raise ValueError(f"would unpack to {chunk.total_uncompressed_size:,} bytes")
            shared = any("DICTIONARY" in name for name in chunk.encodings)  # one value may stand for every row
        large = block.rows < group.num_rows
        names = [self._column] if shared and not large else None
        step = _FEW if shared and large else block.rows  # reading dictionaries as such takes ever more memory
        # use_threads=False: this also runs in forked workers
        with pq.ParquetFile(path, read_dictionary=names, buffer_size=_BUFFER, pre_buffer=False) as file:
            waiting = list[pa.RecordBatch]()
            for batch in file.iter_batches(step, [block.group], [self._column], use_threads=False):
                waiting.append(batch)
                if large and sum(part.nbytes for part in waiting) > most:
                    raise ValueError(f"would unpack to more than {most:,} bytes")
                while sum(map(len, waiting)) >= block.rows:
                    table = pa.Table.from_batches(waiting)
                    yield self._images(table[: block.rows], most if names else None)
                    waiting = table[block.rows :].to_batches()
            if waiting:
                yield self._images(pa.Table.from_batches(waiting), most if names else None)

    def _images(self, table: pa.Table, most: int | None = None) -> pa.ChunkedArray:
        """The image column of rows; with ``most``, what a dictionary may be unpacked to."""
        column, _, field = self._column.partition(".")
        found = pc.struct_field(table[column], field) if field else table[column]
        return found if most is None else _decoded(found, most)

    def _chunk(self, group: Any) -> Any:
        """What a row group's metadata say of the images."""
        columns = map(group.column, range(group.num_columns))
        found = next((chunk for chunk in columns if chunk.path_in_schema == self._column), None)
        if found is None:
            raise CossError(f"one of {self._files[0]} and the files beside it has no column {self._column}")
        return found


def _blocks(file: int, group: int, rows: int, size: int) -> Iterator[_RowBlock]:
    """A row group as one block, or in several where its ``size`` in bytes is beyond what may be held."""
    step = rows if size <= HELD_BYTES else max(1, rows * (HELD_BYTES // 4) // size)
    for part, first in enumerate(range(0, rows, step or 1)):
        yield _RowBlock(file, group, part, min(step, rows - first))


def _decoded(column: pa.ChunkedArray, most: int) -> pa.ChunkedArray:
    """A column of places in a dictionary as the values there. ValueError where these take more than ``most`` bytes."""
    if not pa.types.is_dictionary(column.type):
        return column
    lengths = (pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() for chunk in column.chunks)
    if sum(length or 0 for length in lengths) > most:
        raise ValueError(f"would unpack to more than {most:,} bytes")
    return pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], column.type.value_type)


class ArrowRows(ParquetRows):
    """The image column of Arrow files, as ``datasets.save_to_disk`` writes them: mapped, each of them one group."""

    @staticmethod
    def mapped(file: str) -> pa.Table:
        """The whole table of a file; its columns stay on disk until they are read.

        Raises ValueError (ArrowInvalid) where its offsets lead out of it: Arrow follows them unchecked, and crashes.
        """
        table = pa.ipc.open_stream(pa.memory_map(file)).read_all()
        table.validate(full=True)
        return table

    @property
    def blocks(self) -> Blocks | None:
        """None: no more of a mapped file is in memory than is looked at."""
        return None

    def _row_groups(self) -> list[tuple[int, int, int, int]]:
        return [(number, 0, len(self.mapped(file)), 0) for number, file in enumerate(self._files)]

    def _read(self, number: int) -> None:
        self._hold(number, self._images(self.mapped(self._files[self._blocks[number].file])))

    @staticmethod
    def _weight(found: pa.ChunkedArray | str) -> int:
        return 0  # files that are mapped
