"""Which dataset layout a folder has, from the names in it alone; quick and torch-free, for ``coss-eval list``."""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from coss_eval.corruptions.names import CATEGORIES, NAMES, SEVERITIES
from coss_eval.errors import CossError
from coss_eval.runtime.disk import read_text

# The first that is labelled is used: a labelled test split before the validation split, as people tune on the latter.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation", "eval", "evaluation")

# as torchvision has them, and what PIL reads as well (of a GIF its first frame); others are counted and left out
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
OTHER_SUFFIXES = (".avif", ".heic", ".jp2", ".jxl", ".svg", ".raw", ".psd")

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values", "image_bytes", "image_path")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target", "y", "category", "class_name")
FILE_COLUMNS = (
    "file_name",
    "filename",
    "file",
    "image",
    "image_path",
    "path",
    "filepath",
    "id",
    "image_id",
)  # of tables beside images

KAGGLE_DATA, KAGGLE_SOLUTION = Path("ILSVRC/Data/CLS-LOC"), "LOC_val_solution.csv"
IDX_FILES = {  # MNIST's
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}

LABELS = "labels.npy"  # beside the arrays of CIFAR-10-C

MOST_CONFIGURATIONS = 20  # folders that are looked into for parquet files of a configuration

MOST_CORRUPTIONS = 200  # folders that are looked into for severities

EXPECTED = "train/ and val/ (or test/) with a folder a class, or train.parquet and val.parquet (or test.parquet)"

DEVKIT = ("ILSVRC2012_devkit_t12/data", "data")  # of ImageNet's development kit, beside val/

_INTEGER = re.compile(r"0|[1-9][0-9]*")
_SHARD = re.compile(r"(?P<split>[a-z]+)(-(?P<number>\d+)-of-(?P<total>\d+)(-[0-9a-f]+)?)?\.parquet")
_CONVERTED = re.compile(r"\d{4}\.parquet")  # as the hub converts data sets: CONFIG/SPLIT/0000.parquet
_TAR = re.compile(
    r"(?:.*[-_.])?(?P<split>[A-Za-z]+)[-_.]?(?P<number>\d+)(?:-of-(?P<total>\d+))?\.tar|(?P<alone>[a-z]+)\.tar"
)
_NUMBERED_TAR = re.compile(r"(?:.*[-_.])?(?P<number>\d+)(?:-of-(?P<total>\d+))?\.tar")
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ReadOptions:
    """How a person wants files to be read, where that is not the usual way."""

    exif: bool = False
    image_column: str | None = None
    label_column: str | None = None
    holdout: float | None = None  # share of each class for the test split, where there is one split alone


@dataclass(frozen=True)
class DataLayout:
    """A way to lay data out: its line in lists, what tells it by names alone, and its reader "module:function"."""

    name: str
    about: str
    found: Callable[[Path], object]
    reader: str


def recognise(folder: Path, reading: ReadOptions | None = None) -> DataLayout | None:
    """The layout of a folder of images, None where it looks like none of them."""
    if reading is not None and reading.image_column and tables(folder, reading):
        return LISTED
    return next((layout for layout in LAYOUTS if layout.found(folder)), None)


def split_of(name: str) -> str | None:
    """ "train" or "test" for any usual name of either, in any case; None for others."""
    lower = name.lower()
    return "train" if lower in TRAIN_NAMES else "test" if lower in TEST_NAMES else None


def split_folders(folder: Path, names: Sequence[str]) -> list[Path]:
    """The folders inside with one of the names, in any case, in the names' order."""
    if not folder.is_dir():
        return []
    inside = sorted((entry for entry in folder.iterdir() if entry.is_dir()), key=lambda entry: entry.name, reverse=True)
    return [entry for name in names for entry in inside if entry.name.lower() == name]  # lower case sorts after upper


def splits(folder: Path) -> list[Path]:
    """The folders inside with any usual name of a split."""
    return split_folders(folder, (*TRAIN_NAMES, *TEST_NAMES))


def split_folder(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of ``split_folders``; None where there is none."""
    return next(iter(split_folders(folder, names)), None)


def no_test_split(folder: Path, found: str) -> CossError:
    return CossError(f"{folder} has no test split: expected {EXPECTED}, got {found}; or give --holdout 0.2")


def composed(name: str) -> str:
    """One spelling of a name with accents, which file systems write in two ways (Unicode's NFC and NFD)."""
    return unicodedata.normalize("NFC", name)


def _has_class_folders(folder: Path) -> bool:
    named = splits(folder)
    classes = [entry for entry in class_folders(folder) if not split_of(entry.name)]
    if [entry.name.lower() for entry in classes] in (["images"], ["image"], ["imgs"], ["img"]):
        classes = []  # all images, whose classes something else says
    return any(map(class_folders, named)) or any(map(_holds_image_files, classes))


def _is_tiny_imagenet(folder: Path) -> bool:
    return (folder / "val" / "val_annotations.txt").is_file() and (folder / "val" / "images").is_dir()


def _is_kaggle_imagenet(folder: Path) -> bool:
    return (folder / KAGGLE_SOLUTION).is_file() and (folder / KAGGLE_DATA / "val").is_dir()


def corrupted_arrays(folder: Path) -> dict[str, Path]:
    """CIFAR-10-C's NAME.npy by the corruption's name; the published names come first.

    Others (CIFAR-10-C-bar's, one's own) are those that hold five severities of the images that labels.npy is for.
    """
    known = {name: file for name in NAMES if (file := folder / f"{name}.npy").is_file()}
    if not (labels := folder / LABELS).is_file():
        return known
    others = [file for file in files_in(folder, "*.npy") if file.name != LABELS and file.stem not in known]
    return known | {file.stem: file for file in others[:MOST_CORRUPTIONS] if _is_stacked(file, labels)}


def _is_stacked(file: Path, labels: Path) -> bool:
    """Whether an array is uint8 (5 N, H, W, 3), for N labels, or for 5 N that repeat; their files are only mapped."""
    import numpy as np  # quick lists do not need it

    try:
        array, numbers = (np.load(one, mmap_mode="r") for one in (file, labels))
    except (OSError, ValueError, EOFError):
        return False  # no arrays: what else the folder may be is seen elsewhere
    count, left = divmod(len(array) if array.ndim == 4 else 0, len(SEVERITIES))
    if not count or left or array.dtype != np.uint8 or array.shape[3] != 3 or numbers.ndim != 1:
        return False
    repeats = len(numbers) == len(array) and bool((numbers.reshape(-1, count) == numbers[:count]).all())
    return repeats or len(numbers) == count


def corrupted_folders(folder: Path) -> dict[str, Path]:
    """NAME/SEVERITY/ of ImageNet-C by the corruption's name, inside noise/, blur/ ... as well, as it is extracted.

    The published names come first; others (ImageNet-C-bar's, 3D Common Corruptions', one's own) are as good.
    """
    places = [folder, *(folder / category for category in (*CATEGORIES, "extra"))]
    known = {
        name: place / name
        for name in NAMES
        for place in places
        if (place / name).is_dir() and any((place / name / str(severity)).is_dir() for severity in SEVERITIES)
    }
    inside = [entry for entry in class_folders(folder) if not split_of(entry.name)][:MOST_CORRUPTIONS]
    others = inside if all(map(_has_severities, inside)) else []
    return known | {entry.name: entry for entry in others if entry.name not in known}


def _has_severities(folder: Path) -> bool:
    """Whether all that a folder holds are the folders of severities, 1 to 5, with class folders in them."""
    inside = class_folders(folder)
    numbers = {str(severity) for severity in SEVERITIES}
    return bool(inside) and {entry.name for entry in inside} <= numbers and all(map(class_folders, inside))


def class_folders(folder: Path) -> list[Path]:
    """The visible folders inside a folder in the classes' order; none where it does not exist."""
    if not folder.is_dir():
        return []
    found = {entry.name: entry for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name)}
    _refuse_unreadable(folder, found)
    return [found[name] for name in class_order(found)]


def files_in(folder: Path, pattern: str) -> list[Path]:
    """The regular files of a folder whose names fit, sorted; a pipe among them would be waited for when it is read."""
    return sorted(file for file in folder.glob(pattern) if file.is_file())


def class_order(names: Iterable[str]) -> list[str]:
    """Sorted as numbers where all are whole numbers as one writes them (0, 1, 2, ... 10), else as text (0001, n01)."""
    found = list(names)
    return sorted(found, key=int) if all(map(_INTEGER.fullmatch, found)) else sorted(found)


def _refuse_unreadable(folder: Path | str, names: Iterable[str]) -> None:
    """CossError for a name that is not UTF-8: it would stand in keys and tables that no other program reads."""
    for name in names:
        if not name.isascii() and any("\udc80" <= letter <= "\udcff" for letter in name):
            shown = f"the name {os.fsencode(name)!r} in {printable(folder)}"
            raise CossError(f"{shown} is not UTF-8; rename it (convmv -f latin1 -t utf8 does many at once)")


def printable(path: Path | str) -> str:
    """A path for a message, with what is not UTF-8 in it as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_hidden(folder: str) -> bool:
    """Whether a folder of that name is none of the dataset's: .thumbnails, __MACOSX, a storage server's @eaDir."""
    return folder.startswith((".", "__")) or folder in ("@eaDir", "$RECYCLE.BIN", "lost+found")


def image_paths(folder: Path, left_out: Counter[str] | None = None) -> Iterator[str]:
    """All images in a folder and the folders in it, in a fixed order, as paths below it with forward slashes.

    Links to folders are followed, each folder once: links that lead round, or double at every depth, come to an end.
    ``left_out`` counts those in hidden folders by their folder's name, and images of other formats by their suffix.
    """
    linked = set[str]()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if left_out is not None:
            for name in filter(is_hidden, folders):
                left_out[name] += sum(1 for _ in image_paths(Path(parent) / name))
            others = (file for file in files if file.lower().endswith(OTHER_SUFFIXES))
            left_out.update(Path(file).suffix.lower() for file in others)
        folders[:] = sorted(name for name in folders if not is_hidden(name) and _leads_on(parent, name, linked))
        below = Path(parent).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        _refuse_unreadable(parent, files)
        for file in sorted(files):
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."):
                yield prefix + file


def _leads_on(parent: str, name: str, linked: set[str]) -> bool:
    """Whether to enter a folder; a link not to one that it lies in, nor to one of ``linked``, which it then joins."""
    path = os.path.join(parent, name)
    if not os.path.islink(path):
        return True
    target = os.path.realpath(path)
    if target in linked or Path(os.path.realpath(parent)).is_relative_to(target):
        return False
    linked.add(target)
    return True


def _holds_image_files(folder: Path) -> bool:
    """Whether images lie right in the folder; deeper ones would make a dataset of any folder of datasets."""
    return any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in folder.iterdir())


def parquet_files(folder: Path) -> dict[str, list[Path]]:
    """The parquet files of each known split, in the shards' order.

    They lie in the folder or in data/ ("train-00000-of-00002.parquet"), or as the hub converts data sets in SPLIT/ or
    CONFIG/SPLIT/ ("0000.parquet"), or as shards in CONFIG/. Raises CossError where a shard is missing, and for several
    CONFIGs.
    """
    for place in (folder, folder / "data"):
        if found := _shards(place) or _converted(place):
            return found
    folders = class_folders(folder)
    if len(folders) > MOST_CONFIGURATIONS:  # classes: listing all their images would take minutes
        return {}
    inside = {entry: found for entry in folders if (found := _shards(entry) or _converted(entry))}
    if len(inside) > 1:
        names = ", ".join(entry.name for entry in inside)
        raise CossError(f"{folder} holds several configurations ({names}): give the folder of one of them")
    return next(iter(inside.values()), {})


def _shards(place: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    for file in files_in(place, "*.parquet"):
        match = _SHARD.fullmatch(file.name)
        if match and split_of(match["split"]):
            found[match["split"]].append(file)
    for split, files in found.items():
        _check_shards(split, files)
    return dict(found)


def _converted(place: Path) -> dict[str, list[Path]]:
    """SPLIT/0000.parquet, SPLIT/0001.parquet, ..., or one file of the split's own name in it."""
    found = {}
    for entry in splits(place):
        files = [file for file in files_in(entry, "*.parquet") if _CONVERTED.fullmatch(file.name)]
        if files or (files := _shards(entry).get(entry.name.lower(), [])):
            found[entry.name.lower()] = files
    return found


def _check_shards(split: str, files: list[Path]) -> None:
    shards = [(match["number"], match["total"]) for file in files if (match := _SHARD.fullmatch(file.name))]
    if shards == [(None, None)]:
        return
    total = next(int(total) for _, total in shards if total)
    if [int(number) if number else None for number, _ in shards] != list(range(total)):
        raise CossError(
            f"the {split} shards in {files[0].parent} are not complete: expected {split}.parquet alone or all {total} "
            f"of {split}-*-of-{total:05d}.parquet, got {len(files)}: {', '.join(file.name for file in files[:4])}"
        )


def arrow_files(folder: Path) -> dict[str, list[Path]]:
    """The Arrow files by split, as ``datasets.save_to_disk`` writes them; without splits they are the test split."""
    places = {entry.name: entry for entry in class_folders(folder) if (entry / "state.json").is_file()}
    if not places and (folder / "state.json").is_file():
        places = {"test": folder}
    found = {}
    for name, place in places.items():
        try:
            files = [place / str(one["filename"]) for one in json.loads(read_text(place / "state.json"))["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CossError(f"cannot read {place / 'state.json'}: it names no data files") from error
        if missing := [file.name for file in files if not file.is_file()]:
            raise CossError(f"{place / 'state.json'} names {missing[0]}, which is not there: copy the whole folder")
        if files and split_of(name):
            found[name.lower()] = files
    return found


def tar_shards(folder: Path) -> dict[str, list[Path]]:
    """The tar files of WebDataset by split, in their numbers' order.

    They lie in the folder, in shards/ or in data/ ("train-000000.tar", "imagenet1k-validation-00.tar", "train.tar"), or
    in SPLIT/ ("0.tar", "00012.tar"). Raises CossError where one is missing between the others.
    """
    for place in (folder, folder / "shards", folder / "data"):
        found: dict[str, list[tuple[re.Match[str], Path]]] = defaultdict(list)
        for file in files_in(place, "*.tar"):
            if (match := _TAR.fullmatch(file.name)) and split_of(name := match["split"] or match["alone"]):
                found[name.lower()].append((match, file))
        for entry in [] if found else splits(place):
            numbered = [(match, f) for f in files_in(entry, "*.tar") if (match := _NUMBERED_TAR.fullmatch(f.name))]
            if numbered:
                found[entry.name.lower()] = numbered
        if found:
            return {split: _in_order(split, files) for split, files in found.items()}
    return {}


def _in_order(split: str, shards: Sequence[tuple[re.Match[str], Path]]) -> list[Path]:
    """Numbered shards in order. CossError unless they are all from 0 or 1 to the last, or to the total they say."""
    if len(shards) == 1 and shards[0][0]["number"] is None:
        return [shards[0][1]]
    files = {int(match["number"] or -1): file for match, file in shards}
    first, last = min(files), max(files)
    total = next((int(match["total"]) for match, _ in shards if match["total"]), last - first + 1)
    if first not in (0, 1) or not len(files) == len(shards) == total == last - first + 1:
        names = ", ".join(sorted(file.name for _, file in shards)[:4])
        raise CossError(
            f"the {split} shards in {shards[0][1].parent} are not complete: expected each number from 0 to the last "
            f"once, got {len(shards)} from {first} to {last}: {names}"
        )
    return [files[number] for number in sorted(files)]


def idx_folder(folder: Path) -> Path | None:
    """Where MNIST's own files lie: in the folder, in raw/, or in NAME/raw/, as torchvision has them."""
    places = (folder, folder / "raw", *(entry / "raw" for entry in class_folders(folder)))
    return next((place for place in places if any(place.glob("t10k-images?idx3-ubyte*"))), None)


class ImageTable(NamedTuple):
    """A table beside images: its file, the folder that it stands for, and its columns."""

    file: Path
    place: Path
    image: str
    label: str


def tables(folder: Path, reading: ReadOptions | None = None) -> list[ImageTable]:
    """The tables (CSV, TSV, JSON lines) that name images and classes: of each split's folder, else of the folder."""
    wanted = reading or ReadOptions()
    images = (wanted.image_column,) if wanted.image_column else FILE_COLUMNS
    labels = (wanted.label_column,) if wanted.label_column else LABEL_COLUMNS
    for places in (splits(folder), [folder]):
        found = [table for place in places if (table := _table_in(folder, place, images, labels)) is not None]
        if found:
            return found
    return []


def _table_in(root: Path, place: Path, images: Sequence[str], labels: Sequence[str]) -> ImageTable | None:
    """The first table in a folder that has both columns, and whose first row names a file that is there."""
    for file in (file for file in files_in(place, "*") if file.suffix.lower() in (".csv", ".tsv", ".jsonl")):
        try:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                if file.suffix == ".jsonl":
                    first = json.loads(next(lines, "{}"))
                else:
                    first = next(csv.DictReader(lines, delimiter=delimiter(file)), {})
        except (OSError, ValueError, RecursionError, csv.Error):
            continue  # no table: the folder is told as what else it may be
        if not isinstance(first, dict):
            continue
        image, label = (next((name for name in names if name in first), None) for names in (images, labels))
        if image and label and (root / listed_path(root, place, str(first[image]))).is_file():
            return ImageTable(file, place, image, label)
    return None


def listed_path(root: Path, place: Path, name: str) -> str:
    """A table's file name as a path below the root: relative to the table, or to images/ beside it.

    Where it says no suffix, that of an image that is there.
    """
    for folder in (place, place / "images"):
        for suffix in ("", *IMAGE_SUFFIXES):
            if (folder / f"{name}{suffix}").is_file():
                return (folder / f"{name}{suffix}").relative_to(root).as_posix()
    return (place / name).relative_to(root).as_posix()


def delimiter(file: Path) -> str:
    """What stands between a table's columns, by its first line: a comma unless only tabs or semicolons are there."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        first = next(lines, "")
    return next((sign for sign in (",", "\t", ";") if sign in first), ",")


def _listed(folder: Path) -> list[ImageTable]:
    """Its tables, where folders do not say the classes: a set of class folders may have a table of its own."""
    places = [folder, *splits(folder)]
    if any(len([entry for entry in class_folders(place) if _holds_image_files(entry)]) > 1 for place in places[1:]):
        return []
    return tables(folder)


def flat_val_labels(folder: Path) -> Path | None:
    """The text file of a val/ without folders that has a class on each line, alone or after the file's name.

    Classes are wnids, or numbers as in the development kit's list, which may still lie in the kit's folder.
    """
    val = folder / "val"
    if not val.is_dir() or class_folders(val) or not _holds_image_files(val):
        return None
    for file in sorted(
        file for place in (folder, *(folder / kit for kit in DEVKIT)) for file in files_in(place, "*.txt")
    ):
        with file.open(encoding="utf-8", errors="replace") as lines:
            words = next(lines, "").split()
        if not 0 < len(words) <= 2:
            continue
        named = len(words) > 1 and (val / words[0].removeprefix("val/")).is_file()
        if _WNID.fullmatch(words[-1]) or (words[-1].isdecimal() and (named or "ground_truth" in file.name)):
            return file
    return None


LISTED = DataLayout(
    "listed",
    "a CSV, TSV or JSON-lines table of files and classes (as metadata.csv of Hugging Face datasets)",
    _listed,
    "listed:listed",
)
LAYOUTS = (  # the first that is found counts
    DataLayout(
        "parquet",
        "parquet files with an image column and labels (Hugging Face datasets)",
        parquet_files,
        "columns:parquet",
    ),
    DataLayout("saved-to-disk", "Arrow files that datasets.save_to_disk wrote", arrow_files, "columns:saved_to_disk"),
    DataLayout(
        "webdataset",
        "WebDataset's tar shards: images with .cls or .json beside them (Aizman, Maltby & Breuel 2019)",
        tar_shards,
        "shards:webdataset",
    ),
    DataLayout(
        "idx", "MNIST's own files, and those of sets made like it (LeCun et al. 1998)", idx_folder, "arrays:idx"
    ),
    DataLayout(
        "tiny-imagenet",
        "Tiny-ImageNet as it is distributed, with val/val_annotations.txt",
        _is_tiny_imagenet,
        "folders:tiny_imagenet",
    ),
    DataLayout(
        "kaggle-imagenet",
        "ImageNet as Kaggle's competition has it, beside LOC_val_solution.csv",
        _is_kaggle_imagenet,
        "listed:kaggle_imagenet",
    ),
    DataLayout(
        "flat-imagenet",
        "val/ of ImageNet without folders, beside a list of wnids or the development kit",
        flat_val_labels,
        "listed:flat_imagenet",
    ),
    DataLayout(
        "corrupted-arrays",
        "CIFAR-10-C, CIFAR-10-C-bar: NAME.npy beside labels.npy (Hendrycks & Dietterich 2019)",
        corrupted_arrays,
        "corrupted:corrupted_arrays",
    ),
    DataLayout(
        "corrupted-folders",
        "ImageNet-C and Tiny-ImageNet-C: NAME/SEVERITY/CLASS (Hendrycks & Dietterich 2019)",
        corrupted_folders,
        "corrupted:corrupted_folders",
    ),
    LISTED,
    DataLayout(
        "class-folders",
        "train/ and val/ (or test/) with a folder a class (torchvision's ImageFolder)",
        _has_class_folders,
        "folders:class_folders",
    ),
)
