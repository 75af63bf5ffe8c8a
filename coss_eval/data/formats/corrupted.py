"""The readers of ready-made corruption benchmarks: NAME/SEVERITY/CLASS/file, and CIFAR-10-C's NAME.npy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from coss_eval.corruptions.names import SEVERITIES
from coss_eval.data import layouts
from coss_eval.data.benchmark import Benchmark, Open
from coss_eval.data.choose import Ints, by_value, sample_ids
from coss_eval.data.decode import Size, Target
from coss_eval.data.digests import Hashes, digest_rows
from coss_eval.data.formats.folders import class_titles
from coss_eval.data.images import NATIVE_LIMIT, EncodedImages, Images, Piece
from coss_eval.data.layouts import ReadOptions
from coss_eval.data.sources import Blocks, Files
from coss_eval.data.split import Split
from coss_eval.errors import CossError
from coss_eval.runtime.disk import read_text

MANIFEST = "benchmark.json"  # how the pixels were made, in copies of our own
KEYS = "keys.txt"  # a line for each row of the arrays: its key in the clean dataset, in copies of our own

# as the published arrays number them
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def corrupted_folders(folder: Path, reading: ReadOptions) -> Benchmark:
    """ImageNet-C and Tiny-ImageNet-C: NAME/SEVERITY/CLASS/file, NAME perhaps inside noise/, blur/, weather/ ...

    The files of the first condition say which photographs there are; the other conditions must have them all.
    """
    places = layouts.corrupted_folders(folder)
    severities = {name: tuple(s for s in SEVERITIES if (place / str(s)).is_dir()) for name, place in places.items()}
    first = next(iter(places))
    top = places[first] / str(severities[first][0])
    classes = [entry.name for entry in layouts.class_folders(top)]
    for name, levels in severities.items():
        for severity in levels:
            here = [entry.name for entry in layouts.class_folders(places[name] / str(severity))]
            if here != classes:
                other = sorted(set(here) ^ set(classes))
                raise CossError(
                    f"the class folders of {places[name] / str(severity)} and {top} must be the same; "
                    f"{len(other)} are in one only: {', '.join(other[:5])}"
                )
    found = [
        (f"{name}/{path}", label) for label, name in enumerate(classes) for path in layouts.image_paths(top / name)
    ]
    paths = pa.array([path for path, _ in found], pa.string())
    labels = np.array([label for _, label in found], np.int64)

    def open_(name: str, severity: int) -> Images:
        return EncodedImages(Files(places[name] / str(severity), paths), paths)

    return _benchmark(folder, classes, labels, sample_ids(paths.to_pylist()), severities, open_)


def corrupted_arrays(folder: Path, reading: ReadOptions) -> Benchmark:
    """CIFAR-10-C: NAME.npy of uint8 (5 N, H, W, 3), the severities one after the other, and labels.npy; memory-mapped.

    Classes are those of classes.json, CIFAR-10's where the folder is called so, else numbers.
    """
    files = layouts.corrupted_arrays(folder)
    count = len(_array(next(iter(files.values())))) // len(SEVERITIES)
    labels = _labels(folder, count)
    shape = (len(SEVERITIES) * count, *_array(next(iter(files.values()))).shape[1:3], 3)
    for file in files.values():
        array = _array(file)
        if array.shape != shape or array.dtype != np.uint8:
            raise CossError(f"expected {file} to hold uint8 {shape}, got {array.dtype} {array.shape}")
    keys = pa.array(_keys(folder, count), pa.string())

    def open_(name: str, severity: int) -> Images:
        return MappedImages(files[name], (severity - 1) * count, keys)

    classes, labels = _named(folder, labels)
    return _benchmark(folder, classes, labels, sample_ids(keys.to_pylist()), dict.fromkeys(files, SEVERITIES), open_)


class MappedImages:
    """One severity of a memory-mapped uint8 (rows, H, W, 3): the rows from ``start`` on, one for each key."""

    exif = False

    def __init__(self, file: Path, start: int, keys: pa.StringArray) -> None:
        self.keys = keys
        self.bad: dict[int, str] = {}
        self._array, self._start = _array(file), start
        self._digests: Hashes | None = None

    def raw(self, index: int) -> bytes:
        return bytes(self._array[self._start + index])

    def digests(self, indices: Ints) -> Hashes:
        if self._digests is None:
            self._digests = digest_rows(self._array[self._start : self._start + len(self.keys)])
        return self._digests[indices]

    def digests_known(self, indices: Ints) -> bool:
        return True

    def changed(self, indices: Ints) -> int | None:
        return None

    def remarks(self, name: str, native: bool) -> list[str]:
        return []

    def common_size(self, limit: int | None = NATIVE_LIMIT) -> Size | None:
        height, width = self._array.shape[1:3]
        return None if limit is not None and max(height, width) > limit else (height, width)

    def blocks(self, native: Size | None) -> Blocks | None:
        return None

    def read(self, indices: Ints, target: Target, chunk: int, workers: int | None) -> Iterator[Piece]:
        for start in range(0, len(indices), chunk):
            rows = self._array[self._start + indices[start : start + chunk]]  # (B, H, W, 3)
            yield Piece(np.ones(len(rows), bool), np.ascontiguousarray(rows.transpose(0, 3, 1, 2)))


def _benchmark(
    folder: Path, classes: list[str], labels: Ints, ids: Ints, severities: dict[str, tuple[int, ...]], open_: Open
) -> Benchmark:
    first = next(iter(severities))
    images = open_(first, severities[first][0])
    if not len(labels):
        raise CossError(f"{folder} holds no images under {first}")
    size = images.common_size(limit=None)  # read as they are, whatever their size
    test = Split("test", tuple(classes), images, np.arange(len(labels)), labels, ids, size)
    made = _json(folder / MANIFEST)
    return Benchmark(folder.name, None, test, class_titles(folder), severities, open_, made)


def _array(file: Path) -> Any:
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise CossError(f"cannot read {file}: {str(error).partition(chr(10))[0]}") from error
    if array.ndim < 1:
        raise CossError(f"expected {file} to hold one entry an image, got a single number")
    return array


def _labels(folder: Path, count: int) -> Ints:
    """int64 (N,), from (N,) or, as published, the same five times."""
    file = folder / layouts.LABELS
    if not file.is_file():
        raise CossError(f"{folder} has no labels.npy, which says the classes of its arrays' rows")
    labels = np.asarray(_array(file))
    wanted = (count, len(SEVERITIES) * count)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or len(labels) not in wanted or not count:
        raise CossError(f"expected {file} to hold {wanted[0]} or {wanted[1]} whole numbers, got {labels.shape}")
    rows = labels.reshape(-1, count)
    if (rows != rows[0]).any() or rows.min() < 0:
        raise CossError(f"expected {file} to repeat the same labels, 0 or more, for every severity; they differ")
    found: Ints = rows[0].astype(np.int64)
    return found


def _keys(folder: Path, count: int) -> list[str]:
    """The rows' keys: those of the clean images in copies of our own, else places in the test split, as for CIFAR."""
    if not (folder / KEYS).is_file():
        return [f"test/{row}" for row in range(count)]
    try:
        keys = read_text(folder / KEYS).splitlines()
    except (OSError, ValueError) as error:
        raise CossError(f"cannot read {folder / KEYS}: {error}") from error
    if len(keys) != count:
        raise CossError(f"expected {folder / KEYS} to have a line for each of {count} images, got {len(keys)}")
    return keys


def _named(folder: Path, labels: Ints) -> tuple[list[str], Ints]:
    """The class names, and the labels as places among them; without names the numbers that occur are the names."""
    named = list(_json(folder / "classes.json"))
    if not named and "".join(filter(str.isalnum, folder.name.lower())) in ("cifar10c", "cifar10cbar"):
        named = list(CIFAR10)
    if named and len(named) <= labels.max():
        raise CossError(f"{folder} has labels up to {labels.max()}, but {len(named)} class names")
    return (named, labels) if named else by_value(labels)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise CossError(f"cannot read {file}: {error}") from error
    return content if isinstance(content, dict) else {}
