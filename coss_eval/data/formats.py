"""The readers of each layout: digits, class folders, Tiny-ImageNet's own, Hugging Face parquet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from coss_eval.data import layouts
from coss_eval.data.assemble import Part, assemble
from coss_eval.data.choose import sample_ids, stratified
from coss_eval.data.dataset import Dataset
from coss_eval.data.images import ArrayImages, EncodedImages
from coss_eval.data.sources import Files, ParquetRows
from coss_eval.errors import CossError

DIGITS_SIZE = 32
DIGITS_TEST = 0.25  # of the 1,797 images

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def digits() -> Dataset:
    """scikit-learn's 1,797 digits of 8x8, up-sampled to 32 px RGB; a quarter of each class is the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8), from 0..16
    side = (DIGITS_SIZE, DIGITS_SIZE)
    large = np.stack([Image.fromarray(image).resize(side, Image.Resampling.BILINEAR) for image in grey])
    pixels = np.repeat(large[:, None], 3, axis=1)  # (N, 3, 32, 32)
    labels = bunch.target.astype(np.int64)
    is_test = stratified(labels, sample_ids(f"digits/{i}" for i in range(len(labels))), DIGITS_TEST, "digits")

    def part(split: str, chosen: Any) -> Part:
        places = np.flatnonzero(chosen)
        return Part(ArrayImages(pixels[places], [f"{split}/{i}" for i in places]), labels[places])

    return assemble("digits", [str(i) for i in range(10)], part("train", ~is_test), part("test", is_test))


def class_folders(folder: Path, *, exif: bool = False) -> Dataset:
    """train/ and val/ (or test/) with a folder a class, images at any depth; class folders alone are a test split."""
    train = next((folder / name for name in layouts.TRAIN_NAMES if (folder / name).is_dir()), None)
    classes = [entry.name for entry in layouts.class_folders(train)] if train else []
    tests = [folder / name for name in layouts.TEST_NAMES if _is_labelled(folder / name)]
    if not tests and train is None:
        tests = [folder]
    if not tests:
        raise _no_test_split(folder, "class folders in train only")
    test_classes = [entry.name for entry in layouts.class_folders(tests[0])]
    if train and classes != test_classes:
        different = sorted(set(classes) ^ set(test_classes))
        raise CossError(
            f"the class folders of {train} and {tests[0]} must be the same; "
            f"{len(different)} are in one only: {', '.join(different[:5])}"
        )
    test_part = _folder_part(folder, tests[0], test_classes, exif)
    train_part = _folder_part(folder, train, classes, exif) if train else None
    return assemble(folder.name, test_classes, train_part, test_part, class_titles(folder))


def tiny_imagenet(folder: Path, *, exif: bool = False) -> Dataset:
    """Tiny-ImageNet as it is distributed: train/<wnid>/images/*.JPEG, val/images/ and val/val_annotations.txt."""
    train = folder / "train"
    if not train.is_dir():
        raise CossError(f"{folder} has Tiny-ImageNet's val/ but no train/, whose folders name the classes")
    classes = [entry.name for entry in layouts.class_folders(train)]
    number = {wnid: label for label, wnid in enumerate(classes)}
    rows = sorted(_table(folder / "val" / "val_annotations.txt"))  # file, wnid, box
    unknown = sorted({row[1] for row in rows} - set(classes))
    if unknown:
        raise CossError(f"val_annotations.txt of {folder} has classes that train/ has not: {', '.join(unknown[:5])}")
    paths = [f"val/images/{row[0]}" for row in rows]
    test = Part(EncodedImages(Files(folder, paths), paths, exif=exif), [number[row[1]] for row in rows])
    return assemble(folder.name, classes, _folder_part(folder, train, classes, exif), test, class_titles(folder))


def parquet(folder: Path, *, exif: bool = False) -> Dataset:
    """Hugging Face's layout: an image column {bytes, path} and labels, class names in the schema's metadata."""
    files = layouts.parquet_files(folder)
    tables = {split: _ParquetTable(split, found) for split, found in files.items()}
    train = next((tables[name] for name in layouts.TRAIN_NAMES if name in tables), None)
    test = next((tables[name] for name in layouts.TEST_NAMES if name in tables and tables[name].is_labelled), None)
    if test is None:
        raise _no_test_split(folder, f"labelled images in {', '.join(files)} only")
    if train and train.classes != test.classes:
        raise CossError(f"the class names of {train.file} and {test.file} must be the same; they differ")
    used = [table for table in (train, test) if table]
    if not test.classes:
        for table in used:
            table.refuse_negative()
    classes = test.classes or _classes_of([value for table in used for value in table.values])
    parts = [table.part(classes, numbered=not test.classes, exif=exif) for table in used]
    return assemble(folder.name, classes, parts[0] if train else None, parts[-1], class_titles(folder))


class _ParquetTable:
    """The labels, paths and class names of one split's parquet files."""

    def __init__(self, split: str, files: Sequence[Path]) -> None:
        self.split, self.file, self._files = split, files[0], files
        try:
            schema = pq.read_schema(files[0])
            self.image = _column(schema, IMAGE_COLUMNS, files[0])
            self.label = _column(schema, LABEL_COLUMNS, files[0])
            image_type = schema.field(self.image).type
            self.is_struct = pa.types.is_struct(image_type)
            self.has_paths = self.is_struct and image_type.get_field_index("path") >= 0
            columns = [self.label] + ([f"{self.image}.path"] if self.has_paths else [])
            self.table = pa.concat_tables([pq.ParquetFile(file).read(columns=columns) for file in files])
        except (pa.ArrowInvalid, OSError) as error:
            raise CossError(f"cannot read {files[0]}: {str(error).partition(chr(10))[0]}") from error
        _check_types(schema, self.image, self.label, files[0])
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        self.classes: tuple[str, ...] = tuple(features.get(self.label, {}).get("names") or ())

    @property
    def values(self) -> list[Any]:
        """The labels as stored: numbers, or names."""
        values: list[Any] = self.table[self.label].to_pylist()
        return values

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
        source = ParquetRows(self._files, f"{self.image}.bytes" if self.is_struct else self.image)
        return Part(EncodedImages(source, [f"{self.split}/{name}" for name in self._names()], exif=exif), labels)

    def refuse_negative(self) -> None:
        values = self.values
        wrong = [row for row, value in enumerate(values) if isinstance(value, int) and value < 0]
        if wrong:
            raise CossError(
                f"{len(wrong)} of {len(values):,} labels in {self.file} are negative, the first one {values[wrong[0]]} "
                f"in row {wrong[0]}; expected whole numbers of 0 or more, or names: take the unlabelled rows out"
            )

    def _names(self) -> list[str]:
        """Each image's path where they are all given and different, else its row."""
        if self.has_paths:
            paths = pc.struct_field(self.table[self.image], "path")
            if paths.null_count == 0 and pc.count_distinct(paths).as_py() == len(paths):
                names: list[str] = paths.to_pylist()
                return names
        return [str(row) for row in range(len(self.table))]


def class_titles(folder: Path) -> dict[str, str]:
    """Names for people from classes.json ({class: title}) or Tiny-ImageNet's words.txt; empty without them."""
    if (folder / "classes.json").is_file():
        try:
            titles = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise CossError(f"cannot read {folder / 'classes.json'}: {error}") from error
        return {str(key): str(title) for key, title in titles.items()} if isinstance(titles, dict) else {}
    if (folder / "words.txt").is_file():
        return {row[0]: row[1] for row in _table(folder / "words.txt")}
    return {}


def _folder_part(root: Path, folder: Path, classes: Sequence[str], exif: bool) -> Part:
    """The images of a folder with a folder a class, with paths below ``root`` as keys."""
    prefix = "" if folder == root else f"{folder.name}/"
    paths: list[str] = []
    labels: list[int] = []
    hidden = Counter[str]()
    for label, name in enumerate(classes):
        found = [f"{prefix}{name}/{path}" for path in layouts.image_paths(folder / name, hidden)]
        if not found:
            raise CossError(
                f"the class folder {folder / name} holds no images; expected at least one, or no such folder"
            )
        paths += found
        labels += [label] * len(found)
    named = ", ".join(f"{name} ({count})" for name, count in sorted(hidden.items()))
    notes = (f"images in hidden folders inside the classes of {folder.name} are left out: {named}",) if hidden else ()
    return Part(EncodedImages(Files(root, paths), paths, exif=exif), labels, notes)


def _is_labelled(folder: Path) -> bool:
    """Whether a folder has class folders; a lone images/ is none (the unlabelled test/images/ of Tiny-ImageNet)."""
    return bool({entry.name for entry in layouts.class_folders(folder)} - {"images"})


def _no_test_split(folder: Path, found: str) -> CossError:
    return CossError(f"{folder} has no test split: expected {layouts.EXPECTED}, got {found}")


def _column(schema: Any, names: Sequence[str], file: Path) -> str:
    for name in names:
        if name in schema.names:
            return name
    raise CossError(f"{file} has no column {' or '.join(names)}; it has {', '.join(schema.names)}")


def _check_types(schema: Any, image: str, label: str, file: Path) -> None:
    """CossError unless the images are {bytes, path} or plain binary, and the labels integers or names."""
    image_type, label_type = schema.field(image).type, schema.field(label).type
    has_bytes = pa.types.is_struct(image_type) and image_type.get_field_index("bytes") >= 0
    stored = image_type.field("bytes").type if has_bytes else image_type
    if not (pa.types.is_binary(stored) or pa.types.is_large_binary(stored)):
        raise CossError(f"expected column {image} of {file} to hold {{bytes, path}} or bytes, got {image_type}")
    if not (pa.types.is_integer(label_type) or pa.types.is_string(label_type) or pa.types.is_large_string(label_type)):
        raise CossError(f"expected column {label} of {file} to hold integers or names, got {label_type}")


def _classes_of(values: Sequence[Any]) -> tuple[str, ...]:
    """Class names where the schema has none: the names, or the numbers, that occur, in order."""
    return tuple(layouts.class_order({str(value) for value in values if value is not None}))


def _table(file: Path) -> list[list[str]]:
    """The rows of a tab-separated file that have at least two fields."""
    rows = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if len(row) >= 2]
