"""Whatever a person has in hand as a dataset: a Dataset, a name, a path, arrays, or other packages' sets of images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from coss_eval.data import items
from coss_eval.data.assemble import Part, assemble
from coss_eval.data.choose import sample_ids
from coss_eval.data.dataset import Dataset
from coss_eval.data.images import ArrayImages, EncodedImages, Images
from coss_eval.data.layouts import TEST_NAMES, TRAIN_NAMES, class_order
from coss_eval.data.open import load_dataset
from coss_eval.data.pixels import LabelValues, as_labels, as_pixels, is_array
from coss_eval.data.split import Split
from coss_eval.errors import UsageError

DatasetLike = Any
"""What every function that measures on images takes: see ``as_dataset``."""
EXPECTED = (
    "a path, a name, a Dataset, a pair (images, labels), a pair (train, test) of such pairs, or a Dataset of torch's "
    "or Hugging Face's"
)


def as_dataset(
    train: Any = None,
    test: Any = None,
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Dataset:
    """A Dataset of a training split, a test split, or both.

    Each is a pair (images, labels), or a set of items (image, label): a torch Dataset or one of Hugging Face's. Images
    are uint8, or floats in [0, 1] without normalisation, (N, H, W), (N, H, W, 3) or (N, 3, H, W), or a list of PIL
    images; labels whole numbers or names. Arrays are copied; sets of items stay where they are and are read image by
    image, so they must give the same image each time. Arrays and tensors of one size keep it; pictures are brought to
    the model's input size as files are. ``classes`` names the labels 0, 1, ... where the sets do not;
    ``image_column`` and ``label_column`` say where items have them. Identity is by content, as of files. A path, a
    name, a Dataset, and a mapping or a pair of both splits may stand alone. Raises UsageError for what does not fit.

    >>> import numpy as np
    >>> images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    >>> data = as_dataset((images, [0, 1, 2, 0, 1, 2]), (images, [0, 1, 2, 0, 1, 2]), classes=["cat", "dog", "ant"])
    >>> len(data.train), data.test.native_size, data.classes
    (6, (8, 8), ('cat', 'dog', 'ant'))
    """
    asked = _Asked(name, None if classes is None else tuple(classes), image_column, label_column)
    if test is None and train is not None and (whole := _whole(train, asked)) is not None:
        return whole
    if train is None and test is None:
        raise UsageError(f"a dataset is {EXPECTED}; got none")
    given = {which: _part(one, which, asked) for which, one in (("train", train), ("test", test)) if one is not None}
    return _assembled(given, asked)


def dataset_of(given: DatasetLike, alone: Literal["train", "test"] = "test") -> Dataset:
    """What every function that takes a dataset is given; a single split is the ``alone`` one. See ``as_dataset``.

    Raises UsageError where that split is not there.
    """
    whole = _whole(given, _Asked())
    data = whole if whole is not None else as_dataset(**{alone: given})
    if alone == "test" and not len(data.test):
        raise UsageError(f"{data.name} has no test split; give as_dataset(train, test)")
    return data


def split_of(given: Split | DatasetLike) -> Split:
    """A split as it is, images without labels (theirs are -1), or the test split of what ``dataset_of`` takes."""
    if isinstance(given, Split):
        return given
    if is_array(given) or _is_pictures(given):
        images = _images(given, "test", "images")
        keys: list[str] = images.keys.to_pylist()
        nothing = np.full(len(keys), -1)
        return Split("test", (), images, np.arange(len(keys)), nothing, sample_ids(keys), images.common_size())
    return dataset_of(given).test


@dataclass(frozen=True)
class _Asked:
    """What a caller says of a dataset beside its images."""

    name: str | None = None
    classes: tuple[str, ...] | None = None
    image: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class _Found:
    """One split: its images, a label for each, and what else is known."""

    images: Images
    labels: LabelValues
    classes: tuple[str, ...] | None
    name: str


def _whole(given: Any, asked: _Asked) -> Dataset | None:
    """A Dataset of what holds all its splits; None for a single split."""
    if isinstance(given, Dataset | str | os.PathLike):
        if asked != _Asked(asked.name):
            raise UsageError("classes and columns of a path, a name or a Dataset are asked for in load_dataset")
        data = given if isinstance(given, Dataset) else load_dataset(given)
        return data if asked.name is None else replace(data, name=asked.name)
    if isinstance(given, Split):
        named = asked.name or "a split"
        return Dataset(named, None, given) if given.name != "train" else Dataset(named, given, given.subset([]))
    splits: Mapping[str, Any] = {}
    if isinstance(given, Mapping):  # Hugging Face's DatasetDict among them
        splits = given
        if not any(name in given for name in TEST_NAMES + TRAIN_NAMES):
            got = ", ".join(map(str, given)) or "none"
            raise UsageError(f"expected splits called train and test, got {got}; one split is a pair (images, labels)")
    elif isinstance(given, tuple) and len(given) == 2 and not _is_pair(given):
        splits = dict(zip(("train", "test"), given, strict=True))
    elif isinstance(given, tuple) and len(given) != 2:
        raise UsageError(f"expected (images, labels), or ((images, labels), (images, labels)), got {len(given)} things")
    if not splits:
        return None
    train, test = (next((splits[n] for n in names if n in splits), None) for names in (TRAIN_NAMES, TEST_NAMES))
    given_splits = {w: _part(one, w, asked) for w, one in (("train", train), ("test", test)) if one is not None}
    return _assembled(given_splits, asked)


def _is_pair(given: tuple[Any, ...] | list[Any]) -> bool:
    """Whether the second of two are labels: one number or name, or a row of few, for each image."""
    labels = given[1]
    if is_array(labels):
        return bool(labels.ndim <= 2)
    return isinstance(labels, list | tuple | range) and (not labels or np.ndim(labels[0]) == 0)


def _is_pictures(given: Any) -> bool:
    from PIL import Image

    return isinstance(given, list) and bool(given) and isinstance(given[0], Image.Image)


def _part(given: Any, which: str, asked: _Asked) -> _Found:
    """One split of what is given for it; UsageError that names it for what cannot be one."""
    what = f"{which} images"
    if isinstance(given, list | tuple) and len(given) == 2 and not _is_pictures(given):
        images = _images(given[0], which, what)
        return _Found(images, as_labels(given[1], len(images.keys), what), None, "arrays")
    if is_array(given) or _is_pictures(given):
        raise UsageError(f"{what}: labels are missing: give the pair (images, labels)")
    if hasattr(given, "batch_sampler") and hasattr(given, "dataset"):
        raise UsageError(f"{what}: got a DataLoader, which batches and shuffles: give its dataset (loader.dataset)")
    if hasattr(given, "__iter__") and not hasattr(given, "__len__"):
        raise UsageError(f"{what}: {type(given).__name__} can only be run through: give a set with len() and [index]")
    if not items.is_items(given):
        raise UsageError(f"{what}: {type(given).__name__} is no set of images; expected {EXPECTED}")
    image, label = items.places(given, asked.image, asked.label, what)
    labels, classes = items.labels_of(given, label, what), items.classes_of(given, label)
    return _Found(_of_items(items.Items(given, image), which, what), labels, classes, items.name_of(given))


def _images(given: Any, which: str, what: str) -> Images:
    if is_array(given):
        pixels = as_pixels(given, what)
        return ArrayImages(pixels, [f"{which}/{i}" for i in range(len(pixels))])
    if not isinstance(given, list | tuple) or not given:
        raise UsageError(f"{what}: expected an array, a tensor or a list of images, got {type(given).__name__}")
    return _of_items(items.Items(items.LabelledList(given, [0] * len(given)), 0), which, what)


def _of_items(source: items.Items, which: str, what: str) -> EncodedImages:
    items.refuse_unsteady(source, what)
    return EncodedImages(source, [f"{which}/{i}" for i in range(len(source))], sized=not source.is_picture())


def _assembled(given: Mapping[str, _Found], asked: _Asked) -> Dataset:
    """Both splits with the same classes; where one is not there, an empty test split or no training split."""
    classes, numbered = _classes(list(given.values()), asked)
    number = {value: place for place, value in enumerate(classes)}

    def part(found: _Found) -> Part:
        labels = found.labels if numbered else [number[str(value)] for value in found.labels]
        return Part(found.images, [int(label) for label in labels])

    name = asked.name or next(iter(given.values())).name
    train, test = given.get("train"), given.get("test")
    if test is not None:
        return assemble(name, classes, part(train) if train else None, part(test))
    assert train is not None
    alone = assemble(name, classes, None, part(train)).test
    return Dataset(name, replace(alone, name="train"), alone.subset([]))


def _classes(parts: Sequence[_Found], asked: _Asked) -> tuple[tuple[str, ...], bool]:
    """The names of all splits' classes, and whether labels number them; else they are the labels themselves."""
    words = {isinstance(label, str) for part in parts for label in part.labels}
    if len(words) > 1:
        raise UsageError("some labels are names and some numbers: give one kind")
    said = {part.classes for part in parts if part.classes is not None}
    if asked.classes is None and len(said) > 1:
        raise UsageError("the class names of train and test differ: make their classes the same, or give classes=")
    names = asked.classes or (said.pop() if said else None)
    if names is not None and len(set(names)) != len(names):
        raise UsageError("two classes have the same name: give classes= with names of their own")
    if True in words:
        found = {str(label) for part in parts for label in part.labels}
        if names is not None and (unknown := found - set(names)):
            raise UsageError(f"label {min(unknown)!r} is none of the classes: {', '.join(names[:5])}, ...")
        return names or tuple(sorted(found)), False
    if names is not None:
        return names, True
    return tuple(class_order({str(label) for part in parts for label in part.labels})), False
