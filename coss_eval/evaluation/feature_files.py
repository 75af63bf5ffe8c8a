"""FeatureRows of features into files of formats that other tools read, as they come: memory holds a batch of them.

All three are the same to read: ``features`` float32 (N, ...), ``ids`` and ``labels`` int64 (N,). The number of rows is
known at the end only, as images that cannot be read are left out.
"""

from __future__ import annotations

import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from coss_eval.errors import CossError, UsageError
from coss_eval.runtime.disk import replacing

FeatureRows = NDArray[np.float32]
Ids = NDArray[np.int64]
ROOM = 1 << 16  # bytes kept for the header of a safetensors file


class FeatureFile(ABC):
    """A file being written: at most ``most`` rows of one ``shape``; ``facts`` are kept where a format can."""

    suffix: str

    def __init__(self, path: Path, most: int, shape: Sequence[int], facts: Mapping[str, Any]) -> None:
        self.path, self.most, self.shape, self.facts, self.rows = path, most, tuple(shape), facts, 0

    @abstractmethod
    def add(self, rows: FeatureRows) -> None:
        """The next rows (B, ...)."""

    @abstractmethod
    def end(self, ids: Ids, labels: Ids, keys: Sequence[str]) -> None:
        """What the rows were of; the file is whole afterwards."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file, whole or not."""


class NpyFile(FeatureFile):
    """NumPy's: the rows alone; ids and labels lie beside them."""

    suffix = ".npy"

    def __init__(self, path: Path, most: int, shape: Sequence[int], facts: Mapping[str, Any]) -> None:
        super().__init__(path, most, shape, facts)
        self._file: BinaryIO = path.open("wb")
        self._room = self._file.write(self._header(most))

    def add(self, rows: FeatureRows) -> None:
        self._file.write(np.ascontiguousarray(rows, "<f4").data)
        self.rows += len(rows)

    def end(self, ids: Ids, labels: Ids, keys: Sequence[str]) -> None:
        header = self._header(self.rows)  # NumPy leaves room for more digits in it
        if len(header) != self._room:
            raise CossError(f"{self.path}: the header of {self.rows} rows does not fit in that of {self.most}")
        self._file.seek(0)
        self._file.write(header)

    def close(self) -> None:
        self._file.close()

    def _header(self, rows: int) -> bytes:
        buffer = io.BytesIO()
        about = {"descr": "<f4", "fortran_order": False, "shape": (rows, *self.shape)}
        np.lib.format.write_array_header_1_0(buffer, about)
        return buffer.getvalue()


class SafetensorsFile(FeatureFile):
    """A length, a JSON header padded with blanks, and the tensors one after the other."""

    suffix = ".safetensors"

    def __init__(self, path: Path, most: int, shape: Sequence[int], facts: Mapping[str, Any]) -> None:
        super().__init__(path, most, shape, facts)
        self._file: BinaryIO = path.open("wb")
        self._file.write(bytes(8 + ROOM))

    def add(self, rows: FeatureRows) -> None:
        self._file.write(np.ascontiguousarray(rows, "<f4").data)
        self.rows += len(rows)

    def end(self, ids: Ids, labels: Ids, keys: Sequence[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"coss_eval": json.dumps(self.facts)}}
        start = 0
        for name, dtype, shape in (
            ("features", "F32", (self.rows, *self.shape)),
            ("ids", "I64", (self.rows,)),
            ("labels", "I64", (self.rows,)),
        ):
            stop = start + math.prod(shape) * (4 if dtype == "F32" else 8)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
            start = stop
        for numbers in (ids, labels):
            self._file.write(np.ascontiguousarray(numbers, "<i8").data)
        content = json.dumps(header).encode()
        if len(content) > ROOM:
            raise CossError(f"{self.path}: what is known of the run does not fit into its header; use --format npy")
        self._file.seek(0)
        self._file.write(ROOM.to_bytes(8, "little") + content.ljust(ROOM))

    def close(self) -> None:
        self._file.close()


class Hdf5File(FeatureFile):
    """One HDF5 file: features, ids, labels and the images' keys as data sets; the facts as the attribute coss_eval."""

    suffix = ".h5"

    def __init__(self, path: Path, most: int, shape: Sequence[int], facts: Mapping[str, Any]) -> None:
        super().__init__(path, most, shape, facts)
        self._file = _h5py().File(path, "w")
        size = (most, *self.shape)
        self._features = self._file.create_dataset("features", size, "<f4", maxshape=size, chunks=True)

    def add(self, rows: FeatureRows) -> None:
        self._features[self.rows : self.rows + len(rows)] = rows
        self.rows += len(rows)

    def end(self, ids: Ids, labels: Ids, keys: Sequence[str]) -> None:
        self._features.resize(self.rows, axis=0)
        self._file["ids"], self._file["labels"] = ids, labels
        self._file.create_dataset("keys", data=list(keys), dtype=_h5py().string_dtype())
        self._file.attrs["coss_eval"] = json.dumps(self.facts)

    def close(self) -> None:
        self._file.close()


FORMATS: dict[str, type[FeatureFile]] = {"npy": NpyFile, "safetensors": SafetensorsFile, "hdf5": Hdf5File}


@contextmanager
def writing(
    kind: type[FeatureFile], path: Path, most: int, shape: Sequence[int], facts: Mapping[str, Any]
) -> Iterator[FeatureFile]:
    """A file that takes its place at ``path``, with its folder, if nothing is raised after ``end`` was called.

    Raises CossError where it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            file = kind(temporary, most, shape, facts)
            try:
                yield file
            finally:
                file.close()
    except OSError as error:
        raise CossError(f"cannot write {path}: {error.strerror or error}; give another --out") from error


def require(kind: type[FeatureFile]) -> None:
    """UsageError where what the format needs is not installed."""
    if kind is Hdf5File:
        _h5py()


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UsageError("--format hdf5 needs h5py: pip install h5py, or use --format npy") from error
    return h5py
