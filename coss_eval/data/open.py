"""A name, a folder or parquet files to a Dataset. Imports no torch until a dataset is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from coss_eval.data.dataset import Dataset as Dataset
from coss_eval.data.layouts import EXPECTED, Layout, class_folders, recognise
from coss_eval.errors import CossError, UsageError, unknown_name

BUILT_IN = {
    "digits": "scikit-learn's 8x8 digits at 32 px, 10 classes; bundled, the default",
    "cifar10": "32 px, 10 classes (torchvision)",
    "cifar100": "32 px, 100 classes (torchvision)",
    "stl10": "96 px, 10 classes (torchvision)",
    "svhn": "32 px house numbers, 10 classes (torchvision)",
    "imagenet": "1,000 classes, a folder with train/ and val/ class folders named by wnid",
    "flowers102": "102 flowers (torchvision; train and val are the training split)",
    "oxfordiiitpet": "37 cat and dog breeds (torchvision)",
    "food101": "101 dishes (torchvision)",
    "dtd": "47 textures (torchvision; partition 1, train and val are the training split)",
    "fgvcaircraft": "100 aircraft variants (torchvision)",
}


def names(root: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """What ``load_dataset`` knows by name, each with a few words: the built-in names and the folders in the root."""
    folder = _root(root)
    found = {entry.name: layout for entry in class_folders(folder) if (layout := recognise(entry))} if folder else {}
    return BUILT_IN | {name: f"{layout} in {folder}" for name, layout in found.items()}


def load_dataset(
    name_or_path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    skip_bad_images: bool = False,
    classes: Sequence[str] | None = None,
    clean: str | os.PathLike[str] | Dataset | None = None,
    exif: bool = False,
) -> Dataset:
    """Open a dataset: a built-in name, a path, or the name of a folder in ``root`` (else in $COSS_DATA_ROOT).

    Layouts: class folders under train/ and val/ or test/, class folders alone (a test split only), Tiny-ImageNet's
    own, Hugging Face parquet; see ``names``. With ``skip_bad_images`` its splits leave out what cannot be read.
    ``classes`` keeps the images of these classes only. A ready-made corruption benchmark (ImageNet-C, Tiny-ImageNet-C,
    CIFAR-10-C) opens as a Benchmark, and ``clean`` names the dataset it was made from: see ``benchmark.with_clean``.
    Photographs are read as they are stored; ``exif`` turns them as their EXIF orientation says. What is unusual about
    how it is read is in ``notes``. A dataset is what lay there when it was opened: open it again after changing files.
    Raises UsageError for an unknown name or a missing folder, CossError for a dataset that cannot be used.
    """
    data = _open(str(name_or_path), _root(root), exif)
    if skip_bad_images:
        train = replace(data.train, skip_bad_images=True) if data.train else None
        data = replace(data, train=train, test=replace(data.test, skip_bad_images=True))
    if clean is not None:
        from coss_eval.data.benchmark import Benchmark, with_clean

        if not isinstance(data, Benchmark):
            raise UsageError(
                f"{data.name} has clean images of its own; --clean is for ready-made corruption benchmarks"
            )
        if not isinstance(clean, Dataset):
            clean = load_dataset(clean, root=root, skip_bad_images=skip_bad_images, exif=exif)
        data = with_clean(data, clean)
    if classes is None:
        return data
    place = {name: i for i, name in enumerate(data.classes)}  # the dataset's order stays
    return data.restricted(sorted(dict.fromkeys(classes), key=lambda name: place.get(name, -1)))


def read_classes(file: str | os.PathLike[str]) -> list[str]:
    """The classes that a text file names, one a line; what follows a tab is a title. Raises UsageError for none."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the classes of {file}: {error}") from error
    classes = [name for line in lines if (name := line.partition("\t")[0].strip())]
    if not classes:
        raise UsageError(f"{file} names no class; expected a class name on each line")
    return classes


def _open(name: str, root: Path | None, exif: bool) -> Dataset:
    if name == "digits":
        from coss_eval.data.formats import digits

        return digits()
    places = [Path(name).expanduser()] + ([root / name] if root else [])
    if name == "imagenet" and root and (root / "val").is_dir():
        places.append(root)
    for place in places:
        if place.is_dir() and (layout := recognise(place)):
            return _open_folder(place.resolve(), layout, exif)
    if name in BUILT_IN and name != "imagenet":
        from coss_eval.data.torchvision_sets import torchvision_dataset

        if root is None:
            raise UsageError(f"{name} needs the folder that holds its files: pass --data-root or set COSS_DATA_ROOT")
        return torchvision_dataset(name, [root, root / name], exif=exif)
    raise _not_found(name, places, root)


def _open_folder(folder: Path, layout: Layout, exif: bool) -> Dataset:
    from coss_eval.data import benchmark_files, formats

    readers: dict[Layout, Callable[[Path], Dataset]] = {
        "parquet": partial(formats.parquet, exif=exif),
        "tiny-imagenet": partial(formats.tiny_imagenet, exif=exif),
        "class-folders": partial(formats.class_folders, exif=exif),
        "corrupted-folders": benchmark_files.corrupted_folders,
        "corrupted-arrays": benchmark_files.corrupted_arrays,
    }
    return readers[layout](folder)


def _not_found(name: str, places: list[Path], root: Path | None) -> CossError:
    for place in places:
        if place.is_dir():
            entries = sorted(entry.name for entry in place.iterdir())
            shown = ", ".join(entries[:5]) + (", ..." if len(entries) > 5 else "") if entries else "an empty folder"
            return CossError(f"{place} is no dataset: expected {EXPECTED}, got {shown}")
        if place.is_file():
            return UsageError(f"{place} is a file; pass the folder that holds it: expected {EXPECTED}")
    if name == "imagenet":
        return UsageError(
            "imagenet needs a folder imagenet/ with train/ and val/: pass --data-root or set COSS_DATA_ROOT"
        )
    if os.sep in name or name.startswith((".", "~")):
        return UsageError(f"there is no folder {name}; expected one with {EXPECTED}, or a name of `coss-eval list`")
    return unknown_name("dataset", name, names(root))


def _root(root: str | os.PathLike[str] | None) -> Path | None:
    given = root if root is not None else os.environ.get("COSS_DATA_ROOT")
    return Path(given).expanduser() if given else None
