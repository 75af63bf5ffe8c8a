"""Ready-made corruption benchmarks are read as they are; what does not fit together is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from written_benchmarks import COUNT, pixels_of, write_arrays, write_clean, write_folders
from written_datasets import CLASSES, write_class_folders

from coss_eval.data.benchmark import Benchmark
from coss_eval.data.open import load_dataset, read_classes
from coss_eval.data.split import Split
from coss_eval.errors import CossError, UsageError

LAYOUTS: dict[str, Callable[[Path], None]] = {
    "arrays": lambda folder: write_arrays(folder, ["fog", "snow"]),
    "arrays, labels once": lambda folder: write_arrays(folder, ["fog", "snow"], tiled=False),
    "folders": lambda folder: write_folders(folder, ["fog", "snow"]),
    "folders in categories": lambda folder: [
        write_folders(folder, ["fog"], category="weather"),
        write_folders(folder, ["snow"], category="extra"),
    ],
}


def benchmark_at(folder: Path, **options: object) -> Benchmark:
    data = load_dataset(folder, **options)  # type: ignore[arg-type]
    assert isinstance(data, Benchmark)
    return data


def pixels(split: Split) -> np.ndarray:
    """uint8 (N, H, W, 3), in the split's order."""
    return np.concatenate([batch.images.numpy().transpose(0, 2, 3, 1) for batch in split.batches(batch_size=4)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pixel_is_read_as_it_is(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path / "set")
    data = benchmark_at(tmp_path / "set")
    rows = range(COUNT) if "arrays" in layout else sorted(range(COUNT), key=lambda row: (row % 3, row))
    assert data.severities == {"fog": (1, 2, 3, 4, 5), "snow": (1, 2, 3, 4, 5)}
    assert data.test.labels.tolist() == [row % 3 for row in rows]
    assert data.train is None
    for name in ("fog", "snow"):
        for severity in (1, 3, 5):
            split = data.condition(name, severity)
            assert np.array_equal(pixels(split), np.stack([pixels_of(name, severity, row) for row in rows]))
            assert np.array_equal(split.ids, data.test.ids)


def test_large_files_are_not_resized(tmp_path: Path) -> None:
    write_folders(tmp_path, ["fog"], side=120)
    split = benchmark_at(tmp_path).condition("fog", 2)
    assert split.native_size == (120, 120)
    assert np.array_equal(pixels(split)[0], pixels_of("fog", 2, 0, 120))


def test_arrays_are_mapped_and_not_loaded(tmp_path: Path) -> None:
    write_arrays(tmp_path, ["fog"])
    images = benchmark_at(tmp_path).condition("fog", 1).images
    assert isinstance(images._array, np.memmap)  # type: ignore[attr-defined]


@pytest.mark.parametrize("layout", ["arrays", "folders"])
def test_the_fingerprint_follows_the_pixels(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path / "a")
    LAYOUTS[layout](tmp_path / "b")
    a, b = benchmark_at(tmp_path / "a"), benchmark_at(tmp_path / "b")
    assert a.fingerprint("fog", (1, 2)) == b.fingerprint("fog", (1, 2))
    others = {a.fingerprint("fog", (1,)), a.fingerprint("fog", (2,)), a.fingerprint("snow", (1,))}
    assert len(others) == 3


@pytest.mark.parametrize("layout", ["arrays", "folders"])
def test_the_clean_dataset_gives_train_ids_and_names(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path / "set")
    write_clean(tmp_path / "clean")
    clean = load_dataset(tmp_path / "clean")
    if layout == "arrays":  # in the clean test split's order, as CIFAR-10-C is in CIFAR-10's
        labels = np.tile(clean.test.labels, 5)
        np.save(tmp_path / "set" / "labels.npy", labels)
    data = benchmark_at(tmp_path / "set", clean=clean)
    assert data.classes == CLASSES
    assert data.train is clean.train
    assert set(data.test.ids) == set(clean.test.ids)
    few = data.test.limited(3, 0)
    paired = replace(data, test=few).clean_test()
    assert paired is not None
    assert paired.ids.tolist() == few.ids.tolist()
    assert paired.limit == 3


@pytest.mark.parametrize("layout", ["arrays", "folders"])
def test_a_subset_of_the_classes(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path / "set")
    if layout == "arrays":
        (tmp_path / "set" / "classes.json").write_text(json.dumps(dict.fromkeys(CLASSES, "")))
    (tmp_path / "some.txt").write_text("n03\tthree\nn01\n\n")
    write_clean(tmp_path / "clean")
    data = benchmark_at(tmp_path / "set", classes=read_classes(tmp_path / "some.txt"), clean=tmp_path / "clean")
    assert data.classes == ("n01", "n03")
    assert sorted(data.test.labels.tolist()) == [0, 0, 1, 1]
    assert data.train is not None
    assert data.train.classes == data.classes
    shown = pixels(data.condition("fog", 4))
    rows = [row for row in range(COUNT) if row % 3 != 1]
    rows = rows if layout == "arrays" else sorted(rows, key=lambda row: (row % 3, row))
    assert np.array_equal(shown, np.stack([pixels_of("fog", 4, row) for row in rows]))


def test_cifar10_c_has_its_class_names(tmp_path: Path) -> None:
    write_arrays(tmp_path / "CIFAR-10-C", ["fog"])
    assert benchmark_at(tmp_path / "CIFAR-10-C").classes[:2] == ("airplane", "automobile")
    write_arrays(tmp_path / "other", ["fog"])
    assert benchmark_at(tmp_path / "other").classes == ("0", "1", "2")


def _arrays(folder: Path) -> None:
    write_arrays(folder, ["fog", "snow"])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no labels": (lambda f: (_arrays(f), (f / "labels.npy").unlink()), "has no labels.npy"),
    "labels of another length": (lambda f: (_arrays(f), np.save(f / "labels.npy", np.zeros(7, int))), "expected"),
    "labels that change": (lambda f: (_arrays(f), np.save(f / "labels.npy", np.arange(5 * COUNT))), "differ"),
    "float labels": (lambda f: (_arrays(f), np.save(f / "labels.npy", np.zeros(COUNT))), "whole numbers"),
    "float pixels": (
        lambda f: (_arrays(f), np.save(f / "snow.npy", np.zeros((5 * COUNT, 32, 32, 3)))),
        "to hold uint8",
    ),
    "an array cut short": (
        lambda f: (_arrays(f), (f / "snow.npy").write_bytes((f / "snow.npy").read_bytes()[:500])),
        "cannot read",
    ),
    "other classes at one severity": (
        lambda f: (write_folders(f, ["fog"]), (f / "fog" / "3" / "n09").mkdir()),
        "must be the same",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    spoil, message = DAMAGES[damage]
    spoil(tmp_path / "set")
    with pytest.raises(CossError, match=message) as caught:
        load_dataset(tmp_path / "set")
    assert "\n" not in str(caught.value)


def test_wrong_calls(tmp_path: Path) -> None:
    _arrays(tmp_path / "set")
    write_class_folders(tmp_path / "other")
    write_folders(tmp_path / "named" / "set", ["fog"])
    (tmp_path / "empty.txt").write_text("\n")
    data = benchmark_at(tmp_path / "set")
    with pytest.raises(UsageError, match="holds no frost; it has"):
        data.condition("frost", 1)
    with pytest.raises(UsageError, match="clean images of its own"):
        load_dataset(tmp_path / "other", clean="digits")
    with pytest.raises(UsageError, match="another benchmark"):
        load_dataset(tmp_path / "set", clean=tmp_path / "set")
    with pytest.raises(UsageError, match="unknown class 'n7'; known: n01"):
        load_dataset(tmp_path / "other", classes=["n7", "n01"])
    with pytest.raises(CossError, match="classes of set are not in digits"):
        load_dataset(tmp_path / "named" / "set", clean="digits")
    with pytest.raises(UsageError, match="names no class"):
        read_classes(tmp_path / "empty.txt")
