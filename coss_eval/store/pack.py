"""A finished run as two small files, readable without this package: the store's packed form.

    cells.jsonl.gz          line 1: {"format", "cells": how many follow, "samples_sha256", "protocols": [...]}
                            then a cell a line: its record, with "protocol" an index into protocols, and "samples":
                            {"ids": i, "columns": {name: [dtype, column]}} where it has verdicts
    samples-<digest>.npz    ids_<i>     (N,) int64, the images that some cells share, in their order
                            bool_<i>    (N, ceil(C / 8)) uint8, their verdicts: numpy.unpackbits(..., axis=1)[:, column]
                            <dtype>_<i> (N, C), columns that are no verdicts, as they were

A pack from anybody may be read: it runs no code, and no more memory is taken than MOST_CELLS and MOST_SAMPLES allow.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coss_eval.errors import CossError
from coss_eval.store.cells import Record, SampleColumns

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

PackedCell = tuple[Record, "pd.DataFrame | None"]  # a cell and its samples, indexed by id

FORMAT = 2  # of run.json, cells and packs alike; 1 had no packs
CELLS, SAMPLES = "cells.jsonl.gz", "samples-" + "[0-9a-f]" * 16 + ".npz"  # the name, a pattern for the name
_GZIP = 16 + zlib.MAX_WBITS  # zlib.h
MOST_CELLS, MOST_SAMPLES = 2**26, 2**27  # bytes, uncompressed: 10,000 cells; 1,000 verdicts on each of a million images
# gzip, zip, .npy and JSON have many ways to say that bytes are not theirs
_UNREADABLE = (
    *(OSError, EOFError, zlib.error, zipfile.BadZipFile, SyntaxError, RuntimeError),
    *(ValueError, TypeError, LookupError, AttributeError, RecursionError),
)
DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")


class Damaged(Exception):
    """The bytes are not those of a whole pack."""


class TooLarge(Exception):
    """More than one pack may hold."""


def samples_name(sha256: str) -> str:
    """The file name of the samples with this digest."""
    return f"samples-{sha256[:16]}.npz"


def is_own_content(path: Path) -> bool:
    """Whether a file of samples still is what its name says."""
    return samples_name(hashlib.sha256(path.read_bytes()).hexdigest()) == path.name


def check_format(content: Mapping[str, Any], path: object) -> None:
    """CossError where a newer version wrote the file: it is not damaged, and must not be taken for it."""
    version = content.get("format", 1)
    if isinstance(version, int) and version > FORMAT:
        raise CossError(
            f"{path} is of format {version}, written by a newer coss-eval; this one reads up to {FORMAT}: upgrade it"
        )


def can_hold(table: pd.DataFrame) -> bool:
    """Whether a pack gives this table back as it is."""
    return table.index.dtype == "int64" and all(str(dtype) in DTYPES for dtype in table.dtypes)


def encode(entries: Iterable[PackedCell]) -> tuple[bytes, bytes | None]:
    """The bytes of the two files for these cells; None for the second where no cell has samples.

    The same cells give the same bytes. Raises TooLarge.
    """
    columns, protocols, lines = _Columns(), list[Any](), []
    for record, table in sorted(entries, key=lambda entry: _order(entry[0])):
        line = {name: value for name, value in record.items() if name not in ("protocol", "samples")}
        if "protocol" in record:
            if record["protocol"] not in protocols:
                protocols.append(record["protocol"])
            line["protocol"] = protocols.index(record["protocol"])
        if table is not None:
            line["samples"] = columns.add(table)
        lines.append(line)
    samples = columns.npz()
    digest = None if samples is None else hashlib.sha256(samples).hexdigest()
    header = {"format": FORMAT, "cells": len(lines), "samples_sha256": digest, "protocols": protocols}
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in (header, *lines))
    if len(text) > MOST_CELLS:
        raise TooLarge(f"its cells take {len(text) >> 20} MiB, more than the {MOST_CELLS >> 20} of a pack")
    return gzip.compress(text.encode(), 9, mtime=0), samples


def _order(record: Record) -> tuple[str, ...]:
    """Alike beside alike, so that they compress: task, checkpoint, parameters."""
    parts = (record.get("task"), record.get("model"), json.dumps(record.get("params"), sort_keys=True), record["key"])
    return tuple(map(str, parts))


class _Columns:
    """Samples of many cells gathered by the images they are of, then by dtype."""

    def __init__(self) -> None:
        self._ids: list[NDArray[np.int64]] = []
        self._found: dict[bytes, int] = {}  # the ids' digest: their place in _ids
        self._columns: dict[tuple[str, int], list[NDArray[Any]]] = {}

    def add(self, table: pd.DataFrame) -> dict[str, Any]:
        """Keep a cell's columns; where they are, for its line."""
        ids = table.index.to_numpy()
        place = self._found.setdefault(hashlib.sha256(ids.tobytes()).digest(), len(self._ids))
        if place == len(self._ids):
            self._ids.append(ids)
        where = {}
        for name in table.columns:
            kept = self._columns.setdefault((str(table[name].dtype), place), [])
            kept.append(table[name].to_numpy())
            where[name] = [str(table[name].dtype), len(kept) - 1]
        return {"ids": place, "columns": where}

    def npz(self) -> bytes | None:
        import numpy as np

        if not self._ids:
            return None
        arrays: dict[str, NDArray[Any]] = {f"ids_{place}": ids for place, ids in enumerate(self._ids)}
        for (dtype, place), columns in self._columns.items():
            stacked = np.stack(columns, axis=1)  # (N, C): an image's verdicts beside one another compress best
            arrays[f"{dtype}_{place}"] = np.packbits(stacked, axis=1) if dtype == "bool" else stacked
        size = sum(array.nbytes for array in arrays.values())
        if size > MOST_SAMPLES - 2**16:  # the arrays' headers count as well
            raise TooLarge(f"its samples take {size >> 20} MiB, more than the {MOST_SAMPLES >> 20} of a pack")
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()


@dataclass(frozen=True)
class Cells:
    """cells.jsonl.gz read: records by key as they are in the file, their protocols, and the digest of their samples."""

    records: dict[str, Record]
    protocols: Sequence[Any]
    samples_sha256: str | None

    @classmethod
    def decode(cls, content: bytes, path: object) -> Cells:
        """Raises Damaged, and CossError (naming ``path``) where a newer version wrote it."""
        try:
            unpacked = zlib.decompressobj(wbits=_GZIP)  # takes what the text takes; GzipFile.read what it may take
            text = unpacked.decompress(content, MOST_CELLS + 1)
            if not unpacked.eof:
                raise ValueError("too large, or not whole")
            header, *lines = (json.loads(line) for line in text.splitlines())
            check_format(header, path)
            records = {line["key"]: line for line in lines}
            sha256 = header["samples_sha256"]
            protocols = list(header["protocols"])
            if not header["cells"] == len(lines) == len(records):
                raise ValueError("not as many cells as it says")
            if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
                raise ValueError("no digest")
            for line in lines:
                _check_line(line, len(protocols))
        except _UNREADABLE as error:
            raise Damaged(str(error)) from error
        return cls(records, protocols, sha256)

    def record(self, key: str) -> Record | None:
        """A cell's record, the caller's own; None where the pack has none of this key."""
        found = self.records.get(key)
        if found is None:
            return None
        record: Record = _copied(found)
        if "protocol" in record:
            record["protocol"] = _copied(self.protocols[record["protocol"]])
        return record


def _copied(value: Any) -> Any:
    """A copy of what JSON gave, all the way down: copy.deepcopy takes three times as long, as it looks for cycles."""
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def check_record(record: Any) -> None:
    """ValueError, or whatever it comes to, for what reports could not read as a cell."""
    texts = [record["key"], *(record[name] for name in ("task", "model") if name in record)]
    mappings = [record[name] for name in ("params", "protocol") if "task" in record]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(found, dict) for found in mappings):
        raise ValueError("not a record")
    if not isinstance(record["measurements"], list):
        raise ValueError("no measurements")
    for one in record["measurements"]:
        numbers = [one["n"], *(one[name] for name in ("value", "low", "high") if one.get(name) is not None)]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("a measurement without numbers")
        if not isinstance(one["metric"], str) or not isinstance(one["condition"], dict):
            raise ValueError("a measurement without a name")


def _check_line(line: Any, protocols: int) -> None:
    check_record({**line, "protocol": {}} if "protocol" in line else line)
    if not re.fullmatch(r"[\w-]+", line["key"]):
        raise ValueError("not a key")
    protocol = line.get("protocol")
    if "protocol" in line and not (isinstance(protocol, int) and 0 <= protocol < protocols):
        raise ValueError("no such protocol")


class Samples:
    """samples-<digest>.npz read."""

    @classmethod
    def of(cls, content: bytes, cells: Cells) -> Samples:
        """Those that belong to ``cells``. Raises Damaged where they are others."""
        if hashlib.sha256(content).hexdigest() != cells.samples_sha256:
            raise Damaged("another digest")
        return cls(content)

    def __init__(self, content: bytes) -> None:
        """Raises Damaged."""
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                entries = archive.infolist()
                if sum(entry.file_size for entry in entries) > MOST_SAMPLES:
                    raise ValueError("too large")
                self._arrays = {entry.filename.removesuffix(".npy"): _array(archive, entry) for entry in entries}
        except _UNREADABLE as error:
            raise Damaged(str(error)) from error

    def columns(self, where: Any) -> SampleColumns:
        """The samples of a cell; ``where`` is what its line says of them. Raises Damaged."""
        try:
            place, columns = where["ids"], where["columns"]
            places = [(dtype, column) for dtype, column in columns.values()]
            if len(set(places)) < len(places):  # a small file could stand for a huge table
                raise ValueError("a column twice")
            data = {name: self._column(dtype, place, column) for name, (dtype, column) in columns.items()}
            ids = self._arrays[f"ids_{place}"]
            if any(values.shape != ids.shape for values in data.values()):
                raise ValueError("columns of another length")
            return SampleColumns(ids, data)
        except _UNREADABLE as error:
            raise Damaged(str(error)) from error

    def _column(self, dtype: str, place: int, column: int) -> NDArray[Any]:
        if not isinstance(column, int) or column < 0 or dtype not in DTYPES:
            raise ValueError("no such column")
        array = self._arrays[f"{dtype}_{place}"]
        if dtype != "bool":
            return array[:, column].copy()
        bits: NDArray[np.bool_] = (array[:, column // 8] >> (7 - column % 8) & 1).astype(bool)
        return bits


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> NDArray[Any]:
    """One array of an .npz, made only once its header is known to fit the bytes. Raises ValueError."""
    import numpy as np

    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the others inflate without a bound
        raise ValueError("an unknown compression")
    file = io.BytesIO(archive.read(entry))
    if np.lib.format.read_magic(file) != (1, 0):  # type: ignore[no-untyped-call]
        raise ValueError("an unknown version of .npy")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call]
    data = file.read()
    if dtype.kind not in "biuf" or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("an array that is not its header's")
    array: NDArray[Any] = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return array
