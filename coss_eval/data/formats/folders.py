"""Folders of images: a folder a class under train/ and val/ or test/, and Tiny-ImageNet's own layout."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from coss_eval.data import layouts
from coss_eval.data.assemble import Part, assemble
from coss_eval.data.dataset import Dataset
from coss_eval.data.images import EncodedImages
from coss_eval.data.layouts import ReadOptions
from coss_eval.data.sources import Files
from coss_eval.errors import CossError
from coss_eval.runtime.disk import read_text


def class_folders(folder: Path, reading: ReadOptions) -> Dataset:
    """train/ and val/ (or test/) with a folder a class, images at any depth; class folders alone are a test split.

    Classes are train's, where it is there. A class without test images stays, with n = 0, and is named in the notes.
    """
    train = layouts.split_folder(folder, layouts.TRAIN_NAMES)
    tests = [place for place in layouts.split_folders(folder, layouts.TEST_NAMES) if _is_labelled(place)]
    test = tests[0] if tests else folder if train is None else None
    if test is None and reading.holdout is not None:
        train, test = None, train
    if test is None:
        raise layouts.no_test_split(folder, "class folders in train only")
    names = [entry.name for entry in layouts.class_folders(train or test)]
    test_part, empty = _classes_in(folder, test, names, reading)
    if train is None and empty:
        raise _no_images(test / empty[0])
    if test == folder and layouts.split_of(folder.name) and len(layouts.splits(folder.parent)) > 1:
        above = f"{folder.parent.name}, the folder above it,"
        hint = f"{folder.name} alone is read, as the test split: give {above} for its training and test images"
        test_part = replace(test_part, notes=(*test_part.notes, hint))
    train_part = folder_part(folder, train, names, reading) if train else None
    return assemble(folder.name, names, train_part, test_part, class_titles(folder))


def tiny_imagenet(folder: Path, reading: ReadOptions) -> Dataset:
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
    test = Part(EncodedImages(Files(folder, paths), paths, exif=reading.exif), [number[row[1]] for row in rows])
    return assemble(folder.name, classes, folder_part(folder, train, classes, reading), test, class_titles(folder))


def class_titles(folder: Path) -> dict[str, str]:
    """Names for people from classes.json ({class: title}) or Tiny-ImageNet's words.txt; empty without them."""
    if (folder / "classes.json").is_file():
        try:
            titles = json.loads(read_text(folder / "classes.json"))
        except (OSError, ValueError, RecursionError) as error:
            raise CossError(f"cannot read {folder / 'classes.json'}: {error}") from error
        return {str(key): str(title) for key, title in titles.items()} if isinstance(titles, dict) else {}
    if (folder / "words.txt").is_file():
        return {row[0]: row[1] for row in _table(folder / "words.txt")}
    return {}


def folder_part(root: Path, folder: Path, classes: Sequence[str], reading: ReadOptions) -> Part:
    """The images of a folder with a folder a class, with paths below ``root`` as keys; each class has some."""
    part, empty = _classes_in(root, folder, classes, reading)
    if empty:
        raise _no_images(folder / empty[0])
    return part


def _classes_in(root: Path, folder: Path, classes: Sequence[str], reading: ReadOptions) -> tuple[Part, list[str]]:
    """The images of these classes in a folder, and the classes that have none. CossError for folders of other ones."""
    spelled = {layouts.composed(entry.name): entry.name for entry in layouts.class_folders(folder)}
    other = sorted(set(spelled) - set(map(layouts.composed, classes)))
    if other:
        raise CossError(
            f"the class folders of {folder} must be among the training split's; {len(other)} of them "
            f"{'is' if len(other) == 1 else 'are'} not: {', '.join(other[:5])}"
        )
    prefix = "" if folder == root else f"{folder.name}/"
    paths, labels, empty = list[str](), list[int](), list[str]()
    left_out = Counter[str]()
    for label, name in enumerate(classes):
        own = spelled.get(layouts.composed(name), name)
        found = [f"{prefix}{own}/{path}" for path in layouts.image_paths(folder / own, left_out)]
        empty += [] if found else [name]
        paths += found
        labels += [label] * len(found)
    notes = list[str]()
    if empty:
        notes.append(f"{len(empty)} of {len(classes)} classes have no image in {folder.name}: {', '.join(empty[:5])}")
    if left_out:
        named = ", ".join(f"{name} ({count})" for name, count in sorted(left_out.items()))
        notes.append(f"files in hidden folders and of formats that are not read are left out of {folder.name}: {named}")
    return Part(EncodedImages(Files(root, paths), paths, exif=reading.exif), labels, tuple(notes)), empty


def _no_images(folder: Path) -> CossError:
    return CossError(f"the class folder {folder} holds no images; expected at least one, or no such folder")


def _is_labelled(folder: Path) -> bool:
    """Whether a folder has class folders; a lone images/ is none (the unlabelled test/images/ of Tiny-ImageNet)."""
    return bool({entry.name for entry in layouts.class_folders(folder)} - {"images"})


def _table(file: Path) -> list[list[str]]:
    """The rows of a tab-separated file that have at least two fields."""
    try:
        rows = [line.split("\t") for line in read_text(file).splitlines()]
    except (OSError, ValueError) as error:
        raise CossError(f"cannot read {file}: {error}") from error
    return [row for row in rows if len(row) >= 2]
