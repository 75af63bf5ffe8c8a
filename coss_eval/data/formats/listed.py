"""Images that a table names with their classes: metadata.csv, labels.csv, Kaggle's ImageNet, ImageNet's flat val."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from coss_eval.data import layouts
from coss_eval.data.assemble import Part, assemble
from coss_eval.data.dataset import Dataset
from coss_eval.data.formats.folders import class_titles, folder_part
from coss_eval.data.images import EncodedImages
from coss_eval.data.layouts import ReadOptions
from coss_eval.data.sources import Files
from coss_eval.errors import CossError
from coss_eval.runtime.disk import read_text


def listed(folder: Path, reading: ReadOptions) -> Dataset:
    """A table (CSV, TSV or JSON lines) in the folder, or one in each split's, with a file and a class on each row.

    A column split says which is which; without one, and without folders of splits, all rows are the test split.
    """
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    tables = layouts.tables(folder, reading)
    for table in tables:
        fixed = layouts.split_of(table.place.name) if table.place != folder else None
        for row in read_table(table.file):
            split = fixed or layouts.split_of(str(row.get("split") or "test"))
            if split is None:
                raise CossError(f"{table.file} has a row of the split {row['split']!r}; expected train, val or test")
            path = layouts.listed_path(folder, table.place, str(row[table.image]))
            rows[split].append((path, str(row[table.label])))
    return _of_rows(folder, rows["train"], rows["test"], reading)


def kaggle_imagenet(folder: Path, reading: ReadOptions) -> Dataset:
    """ILSVRC/Data/CLS-LOC/{train/WNID, val} beside LOC_val_solution.csv: "ImageId, wnid x y x y ...", a row a photo."""
    data = folder / layouts.KAGGLE_DATA
    solution = read_table(folder / layouts.KAGGLE_SOLUTION)
    rows = [(f"val/{row['ImageId']}.JPEG", str(row["PredictionString"]).split()[0]) for row in solution]
    return _flat(folder, data, rows, reading)


def flat_imagenet(folder: Path, reading: ReadOptions) -> Dataset:
    """val/ of ImageNet with no folders, beside a text file with a class for each photograph (or its name and class).

    Classes are wnids; the development kit's numbers, which its meta.mat explains; or, after a file's name, places
    among train/'s sorted classes from 0 on, as Caffe's lists have them.
    """
    listing = layouts.flat_val_labels(folder)
    assert listing is not None
    try:
        lines = [line.split() for line in read_text(listing).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise CossError(f"cannot read {listing}: {error}") from error
    if len({len(line) for line in lines}) > 1:
        raise CossError(f"{listing} must have as many words on each line; some have one and some two")
    classes = _wnids([line[-1] for line in lines], folder, listing)
    if len(lines[0]) == 1:
        names = sorted(path for path in layouts.image_paths(folder / "val"))
        if len(names) != len(lines):
            raise CossError(f"{listing} has {len(lines)} lines for the {len(names)} images of {folder / 'val'}")
        rows = [(f"val/{name}", wnid) for name, wnid in zip(names, classes, strict=True)]
    else:
        rows = [(f"val/{line[0].removeprefix('val/')}", wnid) for line, wnid in zip(lines, classes, strict=True)]
    return _flat(folder, folder, rows, reading)


def _wnids(classes: list[str], folder: Path, listing: Path) -> list[str]:
    """The classes of a list as they are, or as what their numbers stand for."""
    if not all(name.isdecimal() for name in classes):
        return classes
    if "ground_truth" in listing.name:
        known = _of_the_kit(folder, listing)
    else:
        inside = layouts.class_folders(folder / "train")
        known = {place: entry.name for place, entry in enumerate(inside)} or {int(name): name for name in classes}
    numbers = [int(name) for name in classes]
    if unknown := set(numbers) - set(known):
        raise CossError(
            f"{listing} has the class {min(unknown)}; expected {min(known)} to {max(known)}: give a list of wnids"
        )
    return [known[number] for number in numbers]


def _of_the_kit(folder: Path, listing: Path) -> dict[int, str]:
    """ILSVRC2012_ID to wnid, from the development kit's meta.mat; its groups of classes are left out."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    places = (listing.parent, folder, *(folder / kit for kit in layouts.DEVKIT))
    meta = next((place / "meta.mat" for place in places if (place / "meta.mat").is_file()), None)
    if meta is None:
        raise CossError(
            f"{listing.name} numbers its classes by ILSVRC2012_ID, which is not their order: "
            "put the development kit's meta.mat beside it, or give a list of wnids"
        )
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        rows = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["num_children"], strict=True)
        return {int(number): str(wnid) for number, wnid, children in rows if children == 0}
    except (OSError, ValueError, KeyError, TypeError, IndexError, NotImplementedError, MatReadError) as error:
        raise CossError(f"cannot read {meta}: it has no synsets with ILSVRC2012_ID and WNID") from error


def read_table(file: Path) -> Iterable[dict[str, Any]]:
    """The rows of a table by column. Raises CossError where it is none, and for a row that ends early."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".jsonl":
                found = [json.loads(line) for line in lines if line.strip()]
            else:
                found = list(csv.DictReader(lines, delimiter=layouts.delimiter(file)))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise CossError(f"cannot read {file}: {str(error).partition(chr(10))[0]}") from error
    for number, row in enumerate(found, start=2):
        if not isinstance(row, dict) or None in row.values():
            raise CossError(f"{file} has a row that ends early, in line {number}: mend or remove it")
    return found


def _flat(folder: Path, data: Path, rows: list[tuple[str, str]], reading: ReadOptions) -> Dataset:
    """A flat val/ with a class for each file; train/ has class folders where it is there."""
    train = data / "train"
    if train.is_dir():
        classes = [entry.name for entry in layouts.class_folders(train)]
        unknown = sorted({name for _, name in rows} - set(classes))
        if unknown:
            raise CossError(f"val/ of {data} has classes that train/ has not: {', '.join(unknown[:5])}")
        return assemble(
            folder.name, classes, folder_part(data, train, classes, reading), _part(data, rows, classes, reading)
        )
    return _of_rows(data, [], rows, reading, name=folder.name)


def _of_rows(
    root: Path,
    train: list[tuple[str, str]],
    test: list[tuple[str, str]],
    reading: ReadOptions,
    *,
    name: str | None = None,
) -> Dataset:
    classes = layouts.class_order({label for _, label in (*train, *test)})
    if not test and reading.holdout is not None:
        train, test = [], train
    if not test:
        raise layouts.no_test_split(root, "the table's rows are of train only")
    parts = [_part(root, rows, classes, reading) if rows else None for rows in (train, test)]
    assert parts[1] is not None
    return assemble(name or root.name, classes, parts[0], parts[1], class_titles(root))


def _part(root: Path, rows: Sequence[tuple[str, str]], classes: Sequence[str], reading: ReadOptions) -> Part:
    number = {label: place for place, label in enumerate(classes)}
    paths = [path for path, _ in rows]
    images = EncodedImages(Files(root, paths), paths, exif=reading.exif)
    return Part(images, [number[label] for _, label in rows])
