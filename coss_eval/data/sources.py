"""Where encoded images lie: files, members of tars, rows of parquet files. Workers get copies, so they are small."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from coss_eval.runtime.disk import open_regular

MOST_BYTES = 2**30  # of the file of one image
UNPACKED = 64  # times the size in the file that a column's values may take: images do not shrink so far
FREE = 2**28  # bytes that it may take in any case


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


class Source(Protocol):
    """Encoded images by index.

    ``place`` names what is read, for the cache of digests; ``parallel`` says whether several threads may ``open``.
    """

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


class ParquetRows:
    """The image column of parquet files in order; one row group at a time is in memory, so reading in order is quick.

    ``column`` is a binary column or the dotted path of one inside a struct ("image.bytes").
    """

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self._files = [str(file) for file in files]
        self._column = column
        self.place, self.parallel = f"{column} of {self._files[0]}", False  # a row group is held for the next row
        groups = self._row_groups()
        self._groups = [(number, group) for number, group, _ in groups]
        self._ends = np.cumsum([rows for _, _, rows in groups], dtype=np.int64)
        in_file = np.bincount([number for number, _, _ in groups], [rows for _, _, rows in groups])
        self._file_ends = np.cumsum(in_file).astype(np.int64)
        self._held: tuple[int, pa.ChunkedArray | str] | None = None

    def _row_groups(self) -> list[tuple[int, int, int]]:
        """(file, group in it, rows) of each row group, in order."""
        return [
            (number, group, metadata.row_group(group).num_rows)
            for number, metadata in enumerate(map(pq.read_metadata, self._files))
            for group in range(metadata.num_row_groups)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

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
        group = int(np.searchsorted(self._ends, index, side="right"))
        if self._held is None or self._held[0] != group:
            self._held = (group, self._read_or_why_not(group))
        found = self._held[1]
        if isinstance(found, str):
            raise ValueError(found)
        return found[index - int(self._ends[group])]  # counted from the group's end: the offset is negative

    def _read_or_why_not(self, group: int) -> pa.ChunkedArray | str:
        """A row group's images; why they cannot be read, which is then known for all of them."""
        try:
            return self._read(group)
        except (OSError, ValueError, pa.ArrowException, MemoryError) as error:
            return str(error).partition("\n")[0] or type(error).__name__

    def open(self, index: int) -> BinaryIO:
        image = self._image(index)
        if not image.is_valid:
            raise ValueError("no bytes in the file")
        return io.BytesIO(image.as_buffer())

    def _read(self, group: int) -> pa.ChunkedArray:
        number, group_in_file = self._groups[group]
        with pq.ParquetFile(self._files[number], memory_map=True) as file:
            chunk = self._chunk(file.metadata.row_group(group_in_file))
            most = FREE + UNPACKED * chunk.total_compressed_size
            if chunk.total_uncompressed_size > most:
                raise ValueError(f"would unpack to {chunk.total_uncompressed_size:,} bytes")
            shared = any("DICTIONARY" in name for name in chunk.encodings)  # one value may stand for every row
        names = [self._column] if shared else None
        # use_threads=False: this also runs in forked workers
        with pq.ParquetFile(self._files[number], memory_map=True, read_dictionary=names) as file:
            table = file.read_row_group(group_in_file, columns=[self._column], use_threads=False)
        column, _, field = self._column.partition(".")
        found = pc.struct_field(table[column], field) if field else table[column]
        return _decoded(found, most) if shared else found

    def _chunk(self, group: Any) -> Any:
        """What a row group's metadata say of the images."""
        columns = map(group.column, range(group.num_columns))
        return next(chunk for chunk in columns if chunk.path_in_schema == self._column)


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

    def _row_groups(self) -> list[tuple[int, int, int]]:
        return [(number, 0, len(self.mapped(file))) for number, file in enumerate(self._files)]

    def _read(self, group: int) -> pa.ChunkedArray:
        table = self.mapped(self._files[self._groups[group][0]])
        column, _, field = self._column.partition(".")
        return pc.struct_field(table[column], field) if field else table[column]
