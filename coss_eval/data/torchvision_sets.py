"""The datasets that torchvision reads, from files that are there already; nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coss_eval.data.assemble import Part, assemble
from coss_eval.data.dataset import Dataset
from coss_eval.data.images import ArrayImages, EncodedImages
from coss_eval.data.sources import Files
from coss_eval.errors import CossError


@dataclass(frozen=True)
class _TorchvisionSet:
    """A class of torchvision.datasets and the arguments of its training and test splits.

    Where a set has train, val and test, both of the first train: selection takes its own part of the training split.
    """

    cls: str
    train: tuple[dict[str, Any], ...]
    test: dict[str, Any]


SETS = {
    "cifar10": _TorchvisionSet("CIFAR10", ({"train": True},), {"train": False}),
    "cifar100": _TorchvisionSet("CIFAR100", ({"train": True},), {"train": False}),
    "stl10": _TorchvisionSet("STL10", ({"split": "train"},), {"split": "test"}),
    "svhn": _TorchvisionSet("SVHN", ({"split": "train"},), {"split": "test"}),
    "flowers102": _TorchvisionSet("Flowers102", ({"split": "train"}, {"split": "val"}), {"split": "test"}),
    "oxfordiiitpet": _TorchvisionSet("OxfordIIITPet", ({"split": "trainval"},), {"split": "test"}),
    "food101": _TorchvisionSet("Food101", ({"split": "train"},), {"split": "test"}),
    "dtd": _TorchvisionSet("DTD", ({"split": "train"}, {"split": "val"}), {"split": "test"}),
    "fgvcaircraft": _TorchvisionSet("FGVCAircraft", ({"split": "trainval"},), {"split": "test"}),
}


def torchvision_dataset(name: str, roots: Iterable[Path], *, exif: bool = False) -> Dataset:
    """The set of that name from the first of ``roots`` that has its files; CossError where none has."""
    entry = SETS[name]
    tried = []
    for root in roots:
        try:
            train = [_open(entry.cls, root, arguments) for arguments in entry.train]
            test = _open(entry.cls, root, entry.test)
        except (RuntimeError, OSError) as error:
            tried.append(f"{root}: {str(error).partition('.')[0]}")
            continue
        classes = _classes(test)
        return assemble(name, classes, _part("train", root, train, exif), _part("test", root, [test], exif))
    raise CossError(
        f"{name} is not there as torchvision lays it out ({'; '.join(tried)}); "
        f"point --data-root at the folder that torchvision.datasets.{entry.cls}(root, download=True) filled"
    )


def _open(cls: str, root: Path, arguments: dict[str, Any]) -> Any:
    from torchvision import datasets

    return getattr(datasets, cls)(str(root), download=False, **arguments)


def _part(split: str, root: Path, sets: Sequence[Any], exif: bool) -> Part:
    labels = np.concatenate([_attribute(one, "targets", "labels", "_labels") for one in sets])
    if hasattr(sets[0], "data"):
        pixels = np.concatenate([_as_nchw(one.data) for one in sets])
        return Part(ArrayImages(pixels, [f"{split}/{i}" for i in range(len(pixels))]), labels)
    files = [os.path.relpath(file, root) for one in sets for file in _attribute(one, "_image_files", "_images")]
    paths = [Path(file).as_posix() for file in files]
    return Part(EncodedImages(Files(root, paths), [f"{split}/{path}" for path in paths], exif=exif), labels)


def _attribute(one: Any, *names: str) -> Any:
    """The first of the names under which torchvision's classes keep the same thing."""
    return next(getattr(one, name) for name in names if hasattr(one, name))


def _as_nchw(data: Any) -> NDArray[np.uint8]:
    """uint8 (N, H, W, 3), as CIFAR has it, or (N, 3, H, W), as the others have, to the latter."""
    pixels = np.asarray(data, np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2) if pixels.shape[-1] == 3 else pixels)


def _classes(one: Any) -> list[str]:
    """torchvision's class names; the numbers where it has none (SVHN)."""
    if hasattr(one, "classes"):
        return list(one.classes)
    return [str(label) for label in range(int(max(_attribute(one, "targets", "labels", "_labels"))) + 1)]
