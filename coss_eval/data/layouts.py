"""Which dataset layout a folder has, from the names in it alone; quick and torch-free, for ``coss-eval list``."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from coss_eval.corruptions.names import CATEGORIES, NAMES, SEVERITIES
from coss_eval.errors import CossError

# The first that is labelled is used: a labelled test split before the validation split, as people tune on the latter.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "val", "valid", "validation")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision has them

EXPECTED = "train/ and val/ (or test/) with a folder a class, or train.parquet and val.parquet (or test.parquet)"

Layout = Literal["parquet", "tiny-imagenet", "class-folders", "corrupted-folders", "corrupted-arrays"]

_INTEGER = re.compile(r"0|[1-9][0-9]*")
_SHARD = re.compile(r"(?P<split>[a-z]+)(-(?P<number>\d+)-of-(?P<total>\d+)(-[0-9a-f]+)?)?\.parquet")


def recognise(folder: Path) -> Layout | None:
    """The layout of a folder of images, None where it looks like none of them."""
    if parquet_files(folder):
        return "parquet"
    if (folder / "val" / "val_annotations.txt").is_file() and (folder / "val" / "images").is_dir():
        return "tiny-imagenet"
    if corrupted_arrays(folder):
        return "corrupted-arrays"
    if corrupted_folders(folder):
        return "corrupted-folders"
    splits = [folder / name for name in (*TRAIN_NAMES, *TEST_NAMES)]
    if any(map(class_folders, splits)) or any(map(_holds_image_files, class_folders(folder))):
        return "class-folders"
    return None


def corrupted_arrays(folder: Path) -> dict[str, Path]:
    """CIFAR-10-C's NAME.npy by the corruption's name."""
    return {name: file for name in NAMES if (file := folder / f"{name}.npy").is_file()}


def corrupted_folders(folder: Path) -> dict[str, Path]:
    """NAME/SEVERITY/ of ImageNet-C by the corruption's name, inside noise/, blur/ ... as well, as it is extracted."""
    places = [folder, *(folder / category for category in (*CATEGORIES, "extra"))]
    return {
        name: place / name
        for name in NAMES
        for place in places
        if (place / name).is_dir() and any((place / name / str(severity)).is_dir() for severity in SEVERITIES)
    }


def class_folders(folder: Path) -> list[Path]:
    """The visible folders inside a folder in the classes' order; none where it does not exist."""
    if not folder.is_dir():
        return []
    found = {entry.name: entry for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name)}
    return [found[name] for name in class_order(found)]


def class_order(names: Iterable[str]) -> list[str]:
    """Sorted as numbers where all are whole numbers as one writes them (0, 1, 2, ... 10), else as text (0001, n01)."""
    found = list(names)
    return sorted(found, key=int) if all(map(_INTEGER.fullmatch, found)) else sorted(found)


def is_hidden(folder: str) -> bool:
    """Whether a folder of that name is none of the dataset's: .thumbnails, __MACOSX, a storage server's @eaDir."""
    return folder.startswith((".", "__")) or folder in ("@eaDir", "$RECYCLE.BIN", "lost+found")


def image_paths(folder: Path, hidden: Counter[str] | None = None) -> Iterator[str]:
    """All images in a folder and the folders in it, in a fixed order, as paths below it with forward slashes.

    Those in hidden folders are left out; ``hidden`` counts them by their folder's name.
    """
    for parent, folders, files in os.walk(folder, followlinks=True):
        if hidden is not None:
            for name in filter(is_hidden, folders):
                hidden[name] += sum(1 for _ in image_paths(Path(parent) / name))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        below = Path(parent).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        for file in sorted(files):
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."):
                yield prefix + file


def _holds_image_files(folder: Path) -> bool:
    """Whether images lie right in the folder; deeper ones would make a dataset of any folder of datasets."""
    return any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in folder.iterdir())


def parquet_files(folder: Path) -> dict[str, list[Path]]:
    """The parquet files of each known split, in the folder or in data/, in the shards' order.

    Raises CossError where a shard of "train-00000-of-00002.parquet" is missing.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for place in (folder, folder / "data"):
        for file in sorted(place.glob("*.parquet")):
            match = _SHARD.fullmatch(file.name)
            if match and match["split"] in (*TRAIN_NAMES, *TEST_NAMES):
                found[match["split"]].append(file)
        if found:
            break
    for split, files in found.items():
        _check_shards(split, files)
    return dict(found)


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
