"""A name, a folder or parquet files to a Dataset. Imports no torch until a dataset is loaded."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from coss_eval.data.dataset import Dataset as Dataset
from coss_eval.data.layouts import EXPECTED, ReadOptions, class_folders, recognise
from coss_eval.errors import CossError, UsageError, unknown_name
from coss_eval.runtime.disk import read_text
from coss_eval.runtime.remote import perhaps_remote, refuse_remote

BUILT_IN = {
    "digits": "scikit-learn's 8x8 digits at 32 px, 10 classes; bundled, the default",
    "scattered-digits": "the same digits scattered on coloured grounds at 64 px, 10 classes; bundled",
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


TORCHVISION_FOLDERS = {
    "cifar-10-batches-py": "cifar10",
    "cifar-100-python": "cifar100",
    "stl10_binary": "stl10",
    "oxford-iiit-pet": "oxfordiiitpet",
    "food-101": "food101",
}


def names(root: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """What ``load_dataset`` knows by name, each with a few words: the built-in names and the folders in the root."""
    folder = _root(root)
    found = {entry.name: layout for entry in class_folders(folder) if (layout := recognise(entry))} if folder else {}
    return BUILT_IN | {name: f"{layout.name} in {folder}" for name, layout in found.items()}


def load_dataset(
    name_or_path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    skip_bad_images: bool = False,
    classes: Sequence[str] | None = None,
    clean: str | os.PathLike[str] | Dataset | None = None,
    exif: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    holdout: float | None = None,
) -> Dataset:
    """Open a dataset: a built-in name, a path, or the name of a folder in ``root`` (else in $COSS_DATA_ROOT).

    Layouts: class folders under train/ and val/ or test/, class folders alone (a test split only), a table of files and
    classes beside the images, Hugging Face's parquet, save_to_disk and metadata.csv, Tiny-ImageNet's own, ImageNet's
    flat val with its labels, MNIST's idx files, an .npz file of arrays. ``image_column`` and ``label_column`` name the
    columns of a table where they have unusual names. ``holdout`` takes that share of each class for the test split,
    chosen by hashed id, where a set has no such split of its own.
    With ``skip_bad_images`` its splits leave out what cannot be read.
    ``classes`` keeps the images of these classes only. A ready-made corruption benchmark (ImageNet-C, Tiny-ImageNet-C,
    CIFAR-10-C, any NAME/SEVERITY/CLASS) opens as a Benchmark, and ``clean`` names the dataset it was made from: see
    ``benchmark.with_clean``. For a test set of another distribution it names that of its classes: ``with_training``.
    Photographs are read as they are stored; ``exif`` turns them as their EXIF orientation says. What is unusual about
    how it is read is in ``notes``. A dataset is what lay there when it was opened: open it again after changing files.
    Raises UsageError for an unknown name or a missing folder, CossError for a dataset that cannot be used.

    >>> import coss_eval as ce
    >>> digits = ce.load_dataset("digits")
    >>> len(digits.train), len(digits.test), digits.classes[:3]
    (1346, 451, ('0', '1', '2'))
    >>> next(digits.test.batches(batch_size=2)).images.shape
    torch.Size([2, 3, 32, 32])
    """
    data = _open(str(name_or_path), _root(root), ReadOptions(exif, image_column, label_column, holdout))
    if holdout is not None:
        data = _held_out(data, holdout)
    if skip_bad_images:
        train = replace(data.train, skip_bad_images=True) if data.train else None
        data = replace(data, train=train, test=replace(data.test, skip_bad_images=True))
    if clean is not None:
        from coss_eval.data.benchmark import Benchmark, with_clean, with_training

        if not isinstance(clean, Dataset):
            clean = load_dataset(clean, root=root, skip_bad_images=skip_bad_images, exif=exif)
        data = with_clean(data, clean) if isinstance(data, Benchmark) else with_training(data, clean)
    if classes is None:
        return data
    place = {name: i for i, name in enumerate(data.classes)}  # the dataset's order stays
    return data.restricted(sorted(dict.fromkeys(classes), key=lambda name: place.get(name, -1)))


def read_classes(file: str | os.PathLike[str]) -> list[str]:
    """The classes that a text file names, one a line; what follows a tab is a title. Raises UsageError for none."""
    try:
        lines = read_text(Path(file)).splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the classes of {file}: {error}") from error
    classes = [name for line in lines if (name := line.partition("\t")[0].strip())]
    if not classes:
        raise UsageError(f"{file} names no class; expected a class name on each line")
    return classes


def _open(name: str, root: Path | None, reading: ReadOptions) -> Dataset:
    if name in ("digits", "scattered-digits"):
        from coss_eval.data.formats import arrays

        return arrays.digits() if name == "digits" else arrays.scattered_digits()
    refuse_remote(name)
    places = [Path(name).expanduser()] + ([root / name] if root else [])
    if name == "imagenet" and root and (root / "val").is_dir():
        places.append(root)
    for place in places:
        if place.is_dir() and (layout := recognise(place, reading)):
            module, _, function = layout.reader.partition(":")
            read = getattr(import_module(f"coss_eval.data.formats.{module}"), function)
            data: Dataset = read(place.resolve(), reading)
            return data
        if place.is_file() and place.suffix == ".npz":
            from coss_eval.data.formats.arrays import npz

            return npz(place)
    if name in BUILT_IN and name != "imagenet":
        from coss_eval.data.torchvision_sets import torchvision_dataset

        if root is None:
            raise UsageError(f"{name} needs the folder that holds its files: pass --data-root or set COSS_DATA_ROOT")
        return torchvision_dataset(name, [root, root / name], exif=reading.exif)
    raise _not_found(name, places, root)


def _held_out(data: Dataset, share: float) -> Dataset:
    """A share of each class of the only split as the test split, the rest as the training split."""
    if data.train is not None:
        raise UsageError(f"{data.name} has a test split of its own: leave --holdout out")
    rest, held = data.test.holdout(share)
    note = f"{100 * share:g} % of each class are the test split, chosen by hashed id: the set has no split of its own"
    return replace(data, train=replace(rest, name="train"), test=held, notes=(*data.notes, note))


def _not_found(name: str, places: list[Path], root: Path | None) -> CossError:
    for place in places:
        if place.is_dir():
            entries = sorted(entry.name for entry in place.iterdir())
            shown = ", ".join(entries[:5]) + (", ..." if len(entries) > 5 else "") if entries else "an empty folder"
            inside = [entry for entry in class_folders(place) if recognise(entry)]
            if len(inside) == 1:
                return CossError(f"{place} is no dataset: give the folder {inside[0].name}/ in it, which is one")
            if known := next((name for folder, name in TORCHVISION_FOLDERS.items() if folder in entries), None):
                return CossError(f"{place} has torchvision's files of {known}: give --data {known} --data-root {place}")
            return CossError(f"{place} is no dataset: expected {EXPECTED}, got {shown}")
        if place.is_file() and place.suffix in (".zip", ".tar", ".gz", ".tgz", ".7z"):
            return UsageError(f"{place} is an archive: unpack it and give the folder")
        if place.is_file():
            return UsageError(f"{place} is a file; pass the folder that holds it, or arrays in .npz")
    if name == "imagenet":
        return UsageError(
            "imagenet needs a folder imagenet/ with train/ and val/: pass --data-root or set COSS_DATA_ROOT"
        )
    if os.sep in name or name.startswith((".", "~")):
        wanted = f"; expected one with {EXPECTED}, or a name of `coss-eval list`"
        return UsageError(f"there is no folder {name}{perhaps_remote(name, data=True) or wanted}")
    folders = [folder.name for folder in Path().iterdir() if folder.is_dir()]
    near = difflib.get_close_matches(name, folders)  # others would only lengthen the list that the message shows
    return unknown_name("dataset or folder", name, [*names(root), *near])


def _root(root: str | os.PathLike[str] | None) -> Path | None:
    given = root if root is not None else os.environ.get("COSS_DATA_ROOT")
    return Path(given).expanduser() if given else None
