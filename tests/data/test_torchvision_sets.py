"""torchvision's own layouts, written small: labels, classes and pixels come as its classes give them."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor
from written_datasets import image_of, png, put

from coss_eval.data.batches import Geometry
from coss_eval.data.open import load_dataset
from coss_eval.data.torchvision_sets import SETS

Patch = pytest.MonkeyPatch


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def write_cifar(folder: Path, patch: Patch, cls: type, label_key: str, meta_key: str) -> None:
    """Pickled batches as Krizhevsky's; torchvision's checksums become those of these files."""
    rng = np.random.default_rng(0)

    def batch(name: str, n: int) -> list[str]:
        data = {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), label_key: [i % 3 for i in range(n)]}
        put(folder / name, pickle.dumps(data))
        return [name, md5(folder / name)]

    put(folder / "meta", pickle.dumps({meta_key: ["a", "b", "c"]}))
    patch.setattr(cls, "train_list", [batch("one", 6), batch("two", 6)])
    patch.setattr(cls, "test_list", [batch("test", 6)])
    patch.setattr(cls, "meta", {"filename": "meta", "key": meta_key, "md5": md5(folder / "meta")})


def write_cifar10(root: Path, patch: Patch) -> None:
    write_cifar(root / "cifar-10-batches-py", patch, datasets.CIFAR10, "labels", "label_names")


def write_cifar100(root: Path, patch: Patch) -> None:
    write_cifar(root / "cifar-100-python", patch, datasets.CIFAR100, "fine_labels", "fine_label_names")


def write_svhn(root: Path, patch: Patch) -> None:
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    splits = {}
    root.mkdir(exist_ok=True)
    for split, n in (("train", 12), ("test", 10)):
        file = root / f"{split}_32x32.mat"
        labels = 1 + np.arange(n)[:, None] % 10  # 10 stands for the digit 0
        savemat(file, {"X": rng.integers(0, 256, (32, 32, 3, n), dtype=np.uint8), "y": labels.astype(np.uint8)})
        splits[split] = ["", file.name, md5(file)]
    patch.setattr(datasets.SVHN, "split_list", splits)


def write_stl10(root: Path, patch: Patch) -> None:
    folder, rng = root / "stl10_binary", np.random.default_rng(0)
    for split, n in (("train", 12), ("test", 10)):
        put(folder / f"{split}_X.bin", rng.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8).tobytes())
        put(folder / f"{split}_y.bin", (1 + np.arange(n) % 10).astype(np.uint8).tobytes())
    put(folder / "class_names.txt", "\n".join(f"class {i}" for i in range(10)).encode())
    for split in ("train_list", "test_list"):
        files = [name for name, _ in getattr(datasets.STL10, split) if (folder / name).is_file()]
        patch.setattr(datasets.STL10, split, [[name, md5(folder / name)] for name in files])


def write_dtd(root: Path, patch: Patch) -> None:
    folder = root / "dtd" / "dtd"
    for number, split in enumerate(("train", "val", "test")):
        names = [f"{name}/{split}_{i}.jpg" for i in range(2) for name in ("banded", "dotted", "zigzagged")]
        put(folder / "labels" / f"{split}1.txt", "\n".join(names).encode())
        for i, name in enumerate(names):
            put(folder / "images" / name, png(image_of(split, number, i, 100 + i)))


def write_food101(root: Path, patch: Patch) -> None:
    folder = root / "food-101"
    for split in ("train", "test"):
        names = {dish: [f"{dish}/{split}{i}" for i in range(3)] for dish in ("apple_pie", "waffles")}
        put(folder / "meta" / f"{split}.json", json.dumps(names).encode())
        for label, paths in enumerate(names.values()):
            for i, path in enumerate(paths):
                put(folder / "images" / f"{path}.jpg", png(image_of(split, label, i, 99 + i)))


def write_pets(root: Path, patch: Patch) -> None:
    folder = root / "oxford-iiit-pet"
    for split in ("trainval", "test"):
        rows = [(f"{breed}_{split}{i}", label) for i in range(2) for label, breed in enumerate(("Birman", "boxer"))]
        text = "\n".join(f"{name} {label + 1} {label + 1} 1" for name, label in rows)
        put(folder / "annotations" / f"{split}.txt", text.encode())
        for i, (name, label) in enumerate(rows):
            put(folder / "images" / f"{name}.jpg", png(image_of(split, label, i, 99 + i)))


def write_flowers(root: Path, patch: Patch) -> None:
    from scipy.io import savemat

    folder = root / "flowers-102"
    for i in range(1, 13):
        put(folder / "jpg" / f"image_{i:05d}.jpg", png(image_of("train", 0, i, 99 + i)))
    savemat(folder / "imagelabels.mat", {"labels": 1 + np.arange(12) % 3})
    savemat(folder / "setid.mat", {"trnid": [4, 1, 2], "valid": [3, 5, 6], "tstid": np.arange(7, 13)})
    files = {
        key: (f"{name}.mat", md5(folder / f"{name}.mat"))
        for key, name in (("label", "imagelabels"), ("setid", "setid"))
    }
    patch.setattr(datasets.Flowers102, "_file_dict", {**datasets.Flowers102._file_dict, **files})


def write_aircraft(root: Path, patch: Patch) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    put(folder / "variants.txt", b"707-320\nA310 x\n")
    for split in ("trainval", "test"):
        rows = [(f"{split}{i}", ("707-320", "A310 x")[i % 2]) for i in range(4)]
        put(folder / f"images_variant_{split}.txt", "\n".join(" ".join(row) for row in rows).encode())
        for i, (name, _) in enumerate(rows):
            put(folder / "images" / f"{name}.jpg", png(image_of(split, 0, i, 99 + i)))


WRITE: dict[str, Callable[[Path, Patch], None]] = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "svhn": write_svhn,
    "stl10": write_stl10,
    "flowers102": write_flowers,
    "oxfordiiitpet": write_pets,
    "food101": write_food101,
    "dtd": write_dtd,
    "fgvcaircraft": write_aircraft,
}


def test_every_set_is_tried() -> None:
    assert set(WRITE) == set(SETS)


@pytest.mark.parametrize("inside", [".", "own folder"])
@pytest.mark.parametrize("name", WRITE)
def test_equal_to_torchvision(name: str, inside: str, tmp_path: Path, monkeypatch: Patch) -> None:
    root = tmp_path / (name if inside == "own folder" else ".")
    WRITE[name](root, monkeypatch)
    data = load_dataset(name, root=tmp_path)
    for split, arguments in ((data.train, SETS[name].train), (data.test, (SETS[name].test,))):
        theirs = [item for one in arguments for item in getattr(datasets, SETS[name].cls)(str(root), **one)]
        assert split.labels.tolist() == [label for _, label in theirs]
        if split.native_size is None:
            assert sum(len(b.labels) for b in split.batches(Geometry(64), workers=0)) == len(split)
        else:
            pixels = np.concatenate([batch.images for batch in split.batches(batch_size=5)])
            assert np.array_equal(pixels, np.stack([pil_to_tensor(image) for image, _ in theirs]))
    assert len(set(data.train.ids) | set(data.test.ids)) == len(data.train) + len(data.test)
    ours = getattr(datasets, SETS[name].cls)(str(root), **SETS[name].test)
    count = 3 if name == "flowers102" else 10  # of what is written here, where a set has no names for its classes
    assert data.classes == tuple(getattr(ours, "classes", map(str, range(count))))
