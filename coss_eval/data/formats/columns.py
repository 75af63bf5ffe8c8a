"""Tables of images as Hugging Face writes them: parquet files, and the Arrow files of ``save_to_disk``."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from coss_eval.data import layouts
from coss_eval.data.assemble import Part, assemble
from coss_eval.data.dataset import Dataset
from coss_eval.data.formats.folders import class_titles
from coss_eval.data.images import EncodedImages
from coss_eval.data.layouts import ReadOptions
from coss_eval.data.sources import ArrowRows, Files, ParquetRows, Source
from coss_eval.errors import CossError, UsageError
from coss_eval.runtime.disk import read_text

MOST_ROWS = 1_000_000  # of files with fewer bytes than rows: labels that are all alike pack to nothing


def parquet(folder: Path, reading: ReadOptions) -> Dataset:
    """Hugging Face's layout: an image column {bytes, path} and labels, class names in the schema's metadata."""
    found = layouts.parquet_files(folder)
    return of_tables(
        folder, {split: _Parquet(split, files, folder, reading) for split, files in found.items()}, reading
    )


def saved_to_disk(folder: Path, reading: ReadOptions) -> Dataset:
    """What ``datasets.save_to_disk`` wrote: a folder of Arrow files, or one for each split."""
    found = layouts.arrow_files(folder)
    return of_tables(folder, {split: _Arrow(split, files, folder, reading) for split, files in found.items()}, reading)


def of_tables(folder: Path, tables: Mapping[str, LabelTable], reading: ReadOptions) -> Dataset:
    """The training split and the first labelled test split of what a folder holds, by their names there."""
    train = next((tables[name] for name in layouts.TRAIN_NAMES if name in tables), None)
    test = next((tables[name] for name in layouts.TEST_NAMES if name in tables and tables[name].is_labelled), None)
    if test is None and train is not None and reading.holdout is not None:
        train, test = None, train
    if test is None:
        raise layouts.no_test_split(folder, f"labelled images in {', '.join(tables)} only")
    if train and train.classes != test.classes:
        raise CossError(f"the class names of {train.file} and {test.file} must be the same; they differ")
    used = [table for table in (train, test) if table]
    if not test.classes:
        for table in used:
            table.refuse_negative()
    classes = test.classes or _classes_of([value for table in used for value in table.values])
    parts = [table.part(classes, numbered=not test.classes, exif=reading.exif) for table in used]
    return assemble(folder.name, classes, parts[0] if train else None, parts[-1], class_titles(folder))


class LabelTable(ABC):
    """The images of one split, a row each: their labels and names; how they are read is the subclasses'."""

    split: str
    file: Path  # the first one, for messages
    classes: tuple[str, ...]  # by number; empty where nothing names them
    notes: tuple[str, ...] = ()

    @property
    @abstractmethod
    def values(self) -> list[Any]:
        """The labels as stored: numbers, or names; None where there is none."""

    @abstractmethod
    def _source(self) -> Source:
        """The encoded images."""

    @abstractmethod
    def _names(self) -> list[str]:
        """Each image's path where they are all given and different, else its row."""

    @property
    def is_labelled(self) -> bool:
        """False where all labels are -1 or null, as in the published test split of ImageNet."""
        return not self.values or any(value not in (-1, None) for value in self.values)

    def part(self, classes: Sequence[str], *, numbered: bool, exif: bool) -> Part:
        """The images, with labels by name, or by value where the classes are ``numbered`` by the labels themselves."""
        values = self.values
        if numbered or any(isinstance(value, str) for value in values):
            number = {name: label for label, name in enumerate(classes)}
            labels = [number.get(str(value), -1) for value in values]
        else:
            labels = [-1 if value is None else int(value) for value in values]
        keys = [f"{self.split}/{name}" for name in self._names()]
        return Part(EncodedImages(self._source(), keys, exif=exif), labels, self.notes)

    def refuse_negative(self) -> None:
        values = self.values
        wrong = [row for row, value in enumerate(values) if isinstance(value, int) and value < 0]
        if wrong:
            raise CossError(
                f"{len(wrong)} of {len(values):,} labels in {self.file} are negative, the first one {values[wrong[0]]} "
                f"in row {wrong[0]}; expected whole numbers of 0 or more, or names: take the unlabelled rows out"
            )


class _ColumnTable(LabelTable):
    """The columns of one split's files."""

    source: type[ParquetRows]

    def __init__(self, split: str, files: Sequence[Path], root: Path, reading: ReadOptions) -> None:
        self.split, self.file, self._files, self._root = split, files[0], files, root
        try:
            schema = self._schema()
            self.image = _column(schema, reading.image_column, layouts.IMAGE_COLUMNS, files[0], "image")
            self.label = _column(schema, reading.label_column, layouts.LABEL_COLUMNS, files[0], "label")
            image_type = schema.field(self.image).type
            self.is_struct = pa.types.is_struct(image_type)
            self.is_text = pa.types.is_string(image_type) or pa.types.is_large_string(image_type)
            self.has_paths = self.is_struct and image_type.get_field_index("path") >= 0
            given = [f"{self.image}.path"] if self.has_paths else [self.image] if self.is_text else []
            self.table = self._read([self.label, *given])
        except (pa.ArrowException, OSError, MemoryError) as error:
            raise CossError(f"cannot read {files[0]}: {str(error).partition(chr(10))[0]}") from error
        _check_types(schema, self.image, self.label, files[0])
        self.classes = self._class_names(schema)

    def _class_names(self, schema: Any) -> tuple[str, ...]:
        """The classes by number as Hugging Face's description of the columns has them; empty where it has none."""
        try:
            names = self._features(schema).get(self.label, {}).get("names") or ()
            if all(isinstance(name, str) for name in names):
                return tuple(names)
        except (OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
            raise CossError(f"cannot read Hugging Face's description of the columns of {self.file}: {error}") from error
        raise CossError(f"the class names in Hugging Face's description of the columns of {self.file} are no names")

    @abstractmethod
    def _schema(self) -> Any:
        """The columns with their types and metadata, of the first file."""

    @abstractmethod
    def _read(self, columns: list[str]) -> pa.Table:
        """These columns of all files."""

    def _features(self, schema: Any) -> dict[str, Any]:
        """Hugging Face's own description of the columns."""
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features: dict[str, Any] = stored.get("info", {}).get("features", {})
        return features

    @property
    def values(self) -> list[Any]:
        values: list[Any] = self.table[self.label].to_pylist()
        return values

    def _source(self) -> ParquetRows | Files:
        """The encoded images: bytes in the rows, or files that the rows name."""
        if self.is_text:
            return self._named_files(self.table[self.image].to_pylist())
        rows = self.source(self._files, f"{self.image}.bytes" if self.is_struct else self.image)
        if self.has_paths and len(rows) and not rows.has_bytes(0):
            return self._named_files(pc.struct_field(self.table[self.image], "path").to_pylist())
        return rows

    def _named_files(self, paths: list[str | None]) -> Files:
        """The files at these paths, below the folder or that of the table; CossError where the first is not there."""
        first = next((path for path in paths if path), "")
        for place in (self._root, self.file.parent):
            if first and (place / first).is_file():
                return Files(place, [os.path.relpath(place / path, place) if path else "" for path in paths])
        raise CossError(
            f"{self.file} holds paths in place of images, and {first or 'an empty path'} is not a file below "
            f"{self._root}: put the images there, or write the parquet file with their bytes"
        )

    def _names(self) -> list[str]:
        if self.has_paths or self.is_text:
            paths = self.table[self.image] if self.is_text else pc.struct_field(self.table[self.image], "path")
            if paths.null_count == 0 and pc.count_distinct(paths).as_py() == len(paths):
                names: list[str] = paths.to_pylist()
                return names
        return [str(row) for row in range(len(self.table))]


class _Parquet(_ColumnTable):
    source = ParquetRows

    def _schema(self) -> Any:
        return pq.read_schema(self.file)

    def _read(self, columns: list[str]) -> pa.Table:
        rows = sum(pq.read_metadata(file).num_rows for file in self._files)
        size = sum(file.stat().st_size for file in self._files)
        if rows > max(MOST_ROWS, size):
            raise OSError(f"it says that it has {rows:,} rows, in {size:,} bytes")
        return pa.concat_tables([pq.ParquetFile(file).read(columns=columns) for file in self._files])


class _Arrow(_ColumnTable):
    source = ArrowRows

    def _schema(self) -> Any:
        return ArrowRows.mapped(str(self.file)).schema

    def _read(self, columns: list[str]) -> pa.Table:
        names = list(dict.fromkeys(name.partition(".")[0] for name in columns))
        return pa.concat_tables([ArrowRows.mapped(str(file)).select(names) for file in self._files])

    def _features(self, schema: Any) -> dict[str, Any]:
        info = self.file.parent / "dataset_info.json"
        if not info.is_file():
            return super()._features(schema)
        features: dict[str, Any] = json.loads(read_text(info)).get("features") or {}
        return features


def _column(schema: Any, asked: str | None, names: Sequence[str], file: Path, what: str) -> str:
    """The column that was asked for, or the first with a usual name."""
    flag = f"--{what}-column"
    if asked is not None:
        if asked not in schema.names:
            raise UsageError(f"{flag} {asked}: {file} has no such column; it has {', '.join(schema.names)}")
        return asked
    found = next((name for name in names if name in schema.names), None)
    if found is None:
        raise CossError(f"{file} has no column {' or '.join(names[:2])}; it has {', '.join(schema.names)}: give {flag}")
    return found


def _check_types(schema: Any, image: str, label: str, file: Path) -> None:
    """CossError unless the images are {bytes, path}, plain binary or paths, and the labels integers or names."""
    image_type, label_type = schema.field(image).type, schema.field(label).type
    has_bytes = pa.types.is_struct(image_type) and image_type.get_field_index("bytes") >= 0
    stored = image_type.field("bytes").type if has_bytes else image_type
    text = pa.types.is_string(image_type) or pa.types.is_large_string(image_type)
    if not (text or pa.types.is_binary(stored) or pa.types.is_large_binary(stored)):
        raise CossError(f"expected column {image} of {file} to hold {{bytes, path}} or bytes, got {image_type}")
    if not (pa.types.is_integer(label_type) or pa.types.is_string(label_type) or pa.types.is_large_string(label_type)):
        raise CossError(f"expected column {label} of {file} to hold integers or names, got {label_type}")


def _classes_of(values: Sequence[Any]) -> tuple[str, ...]:
    """Class names where the schema has none: the names, or the numbers, that occur, in order."""
    return tuple(layouts.class_order({str(value) for value in values if value is not None}))
