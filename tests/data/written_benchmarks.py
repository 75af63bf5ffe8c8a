"""Small corruption benchmarks as they are published, with what each must be read as."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from written_datasets import CLASSES, png, put

SIDE = 32
COUNT = 6  # images, two a class


def pixels_of(name: str, severity: int, row: int, side: int = SIDE) -> np.ndarray:
    """uint8 (side, side, 3), another one for every argument."""
    return np.random.default_rng([len(name), ord(name[0]), severity, row]).integers(0, 256, (side, side, 3), np.uint8)


def write_arrays(folder: Path, names: Iterable[str], *, tiled: bool = True) -> None:
    """CIFAR-10-C's layout; labels.npy repeated for every severity, as published, or once."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = np.arange(COUNT) % len(CLASSES)
    np.save(folder / "labels.npy", np.tile(labels, 5) if tiled else labels)
    for name in names:
        rows = [pixels_of(name, severity, row) for severity in range(1, 6) for row in range(COUNT)]
        np.save(folder / f"{name}.npy", np.stack(rows))


def write_folders(folder: Path, names: Iterable[str], *, category: str = "", side: int = SIDE) -> None:
    """ImageNet-C's layout, under its category where one is given; row i is image i // 3 of class i % 3."""
    for name in names:
        for severity in range(1, 6):
            for row in range(COUNT):
                path = folder / category / name / str(severity) / CLASSES[row % 3] / f"val_{row}.png"
                put(path, png(pixels_of(name, severity, row, side)))


def write_clean(folder: Path) -> None:
    """The dataset that both were made from: train/ and val/ with the same file names."""
    for split in ("train", "val"):
        for row in range(COUNT):
            put(folder / split / CLASSES[row % 3] / f"{split}_{row}.png", png(pixels_of("clean", len(split), row)))
