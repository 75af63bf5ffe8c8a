"""Arrays, tensors and other packages' datasets become a Dataset of the same pixels; mistakes are told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from coss_eval.data.as_dataset import as_dataset, dataset_of, split_of
from coss_eval.data.batches import Geometry
from coss_eval.data.open import load_dataset
from coss_eval.errors import CossError, UsageError

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (12, 10, 10, 3), dtype=np.uint8)
Y = np.arange(12) % 3
CHW = np.ascontiguousarray(X.transpose(0, 3, 1, 2))


class Pictures(TorchDataset[tuple[Any, int]]):
    """PIL images with labels, as torchvision's sets give them; counts how often an image is read."""

    classes = ("ant", "bee", "cat")

    def __init__(self, images: np.ndarray = X, *, targets: bool = True) -> None:
        self.images, self.read = images, 0
        if targets:
            self.targets = Y.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        self.read += 1
        return Image.fromarray(self.images[index]), int(Y[index])


class Columns:
    """What the package looks for in a Hugging Face Dataset."""

    class Names:
        names = ("ant", "bee", "cat")

    column_names = ("pixel_values", "fine_label")
    features = {"pixel_values": object(), "fine_label": Names}  # noqa: RUF012 - as theirs

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return list(Y) if key == "fine_label" else [Image.fromarray(image) for image in X]
        return {"pixel_values": Image.fromarray(X[key]), "fine_label": int(Y[key])}


GIVEN = {
    "HWC": lambda: (X, Y),
    "CHW": lambda: (CHW, Y.tolist()),
    "tensors": lambda: (torch.from_numpy(CHW), torch.from_numpy(Y)[:, None]),
    "floats": lambda: (X.astype(np.float32) / 255, Y),
    "float tensor": lambda: (torch.from_numpy(CHW) / 255, Y),
    "pictures": lambda: ([Image.fromarray(image) for image in X], Y),
    "list of arrays": lambda: (list(X), list(Y)),
    "torch pictures": Pictures,
    "torch pictures, labels in the items only": lambda: Pictures(targets=False),
    "torch tensors": lambda: TensorDataset(torch.from_numpy(CHW) / 255, torch.from_numpy(Y)),
    "part of a torch set": lambda: Subset(Pictures(np.concatenate([X, X[:3]])), range(12)),
    "two torch sets": lambda: ConcatDataset([Subset(Pictures(), range(5)), Subset(Pictures(), range(5, 12))]),
    "Hugging Face": Columns,
}


@pytest.mark.parametrize("kind", GIVEN)
def test_the_same_pixels_labels_and_ids_come_out(kind: str) -> None:
    split = as_dataset(test=GIVEN[kind]()).test
    batch = next(split.batches(batch_size=12))
    assert np.array_equal(batch.images.numpy(), CHW)
    assert split.labels.tolist() == Y.tolist()
    assert split.ids.tolist() == as_dataset(test=(X, Y)).test.ids.tolist()


def test_identity_is_the_content() -> None:
    def fingerprint(given: Any) -> str:
        return as_dataset(test=given, classes=["ant", "bee", "cat"]).test.fingerprint

    assert fingerprint((X, Y)) == fingerprint((CHW, Y)) == fingerprint((torch.from_numpy(CHW) / 255, Y))
    assert fingerprint(Pictures()) == fingerprint(Columns())
    changed = X.copy()
    changed[11, 0, 0, 0] ^= 1
    assert fingerprint((changed, Y)) != fingerprint((X, Y))
    assert fingerprint(Pictures(changed)) != fingerprint(Pictures())
    assert fingerprint((X, Y[::-1])) != fingerprint((X, Y))


def test_arrays_are_those_of_an_npz_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=X, y_train=Y, x_test=X[:6], y_test=Y[:6])
    file, given = load_dataset(tmp_path / "a.npz"), as_dataset((X, Y), (X[:6], Y[:6]))
    assert file.train is not None
    assert given.train is not None
    assert (file.train.fingerprint, file.test.fingerprint) == (given.train.fingerprint, given.test.fingerprint)


def test_changing_an_array_afterwards_changes_nothing() -> None:
    mine = CHW.copy()
    split = as_dataset(test=(mine, Y)).test
    mine[:] = 0
    assert np.array_equal(next(split.batches()).images.numpy(), CHW)


def test_a_set_of_items_is_not_held_in_memory_and_large_pictures_are_read_as_files_are() -> None:
    large = RNG.integers(0, 256, (12, 120, 100, 3), dtype=np.uint8)
    pictures = Pictures(large)
    split = as_dataset(test=pictures).test
    before = pictures.read
    batch = next(split.batches(Geometry(32), batch_size=4))
    assert pictures.read - before == 4  # those of the batch alone
    assert batch.images.shape == (4, 3, 32, 32)
    tensors = TensorDataset(torch.from_numpy(large.transpose(0, 3, 1, 2)) / 255, torch.from_numpy(Y))
    assert as_dataset(test=tensors).test.native_size == (120, 100)  # somebody has brought them to a size


def test_both_splits_in_every_form() -> None:
    pair = (X, Y), (X[:6], Y[:6])
    for data in (as_dataset(*pair), dataset_of(pair), dataset_of({"train": pair[0], "validation": pair[1]})):
        assert data.train is not None
        assert (len(data.train), len(data.test), data.classes) == (12, 6, ("0", "1", "2"))
    assert dataset_of("digits").name == "digits"
    assert as_dataset(data) is data
    alone = dataset_of(Pictures(), alone="train")
    assert alone.train is not None
    assert (alone.train.name, len(alone.train), len(alone.test), alone.classes) == ("train", 12, 0, Pictures.classes)
    with pytest.raises(UsageError, match="has no test split"):
        dataset_of(alone)


def test_a_set_has_a_name() -> None:
    assert [as_dataset(test=given).name for given in ((X, Y), Subset(Pictures(), range(12)), Columns())] == [
        "arrays",
        "Pictures",
        "images",
    ]
    assert as_dataset(test=(X, Y), name="mine").name == "mine"


def test_labels_may_be_names_and_need_not_begin_at_0() -> None:
    assert as_dataset(test=(X, Y + 5)).classes == ("5", "6", "7")
    named = as_dataset(test=(X, ["ant" if y == 0 else "bee" for y in Y]))
    assert named.classes == ("ant", "bee")
    assert named.test.labels.tolist() == (Y != 0).astype(int).tolist()
    assert as_dataset((X, Y), Pictures()).classes == Pictures.classes


def test_images_without_labels_are_a_split() -> None:
    split = split_of(torch.from_numpy(CHW))
    assert (len(split), set(split.labels.tolist())) == (12, {-1})
    assert len(split_of((X, Y))) == 12


class Random(Pictures):
    def __getitem__(self, index: int) -> tuple[Any, int]:
        return torch.rand(3, 10, 10), 0


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Normalised(Pictures):
    def __getitem__(self, index: int) -> tuple[Any, int]:
        return torch.from_numpy(CHW[index]).float() / 127.5 - 1, 0


WRONG: dict[str, tuple[Any, str]] = {
    "normalised floats": ((X / 127.5 - 1, Y), r"test images: floats from -1 to 1, expected \[0, 1\]: leave the normal"),
    "floats to 255": ((X.astype(np.float32), Y), r"floats from 0 to 255, expected \[0, 1\]: divide by 255"),
    "integers": ((X.astype(np.int64), Y), "got int64"),
    "uint8 of 0 and 1": ((X % 2, Y), "multiply by 255"),
    "NaN": ((np.full((2, 8, 8, 3), np.nan), [0, 1]), "NaN or infinity"),
    "one image": ((X[0], Y), "expected 10 labels"),
    "one grey image": ((X[0, :, :, 0], Y), r"is it one image\? Give images\[None\]"),
    "alpha": ((np.zeros((2, 8, 8, 4), np.uint8), [0, 1]), "leave the fourth, alpha, out"),
    "one-hot": ((X, np.eye(3)[Y]), r"look one-hot: give labels.argmax\(1\)"),
    "too few labels": ((X, Y[:5]), r"expected 12 labels, one for each image, got shape \(5,\)"),
    "labels that are floats": ((X, Y / 2), "labels as whole numbers or names, got float64"),
    "no labels": (X, r"labels are missing: give the pair \(images, labels\)"),
    "a loader": (DataLoader(Pictures()), r"got a DataLoader.* give its dataset"),
    "a stream": (Stream(), "Stream can only be run through"),
    "random transforms": (Random(), "item 0 is another image each time it is read"),
    "a normalising transform": (Normalised(), r"item 0: image: floats from -1 to .*: leave the normalisation out"),
    "something else": (3, "int is no set of images; expected a path"),
    "four arrays": ((X, Y, X, Y), "got 4 things"),
    "no splits": ({"a": (X, Y)}, "expected splits called train and test, got a"),
    "an empty set": (Subset(Pictures(), []), "holds no items"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_line_says_what_is_wrong(case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(UsageError, match=message) as caught:
        dataset_of(given)
    assert "\n" not in str(caught.value)


def test_columns_with_unusual_names_are_asked_for() -> None:
    class Unusual(Columns):
        column_names = ("photo", "kind")
        features = {"photo": object(), "kind": object()}  # noqa: RUF012

        def __getitem__(self, key: int | str) -> Any:
            usual = {"photo": "pixel_values", "kind": "fine_label"}
            item = super().__getitem__(usual.get(key, key))  # type: ignore[call-overload]
            return item if isinstance(key, str) else dict(zip(("photo", "kind"), item.values(), strict=True))

    with pytest.raises(UsageError, match="no column image or img; it has photo, kind: give image_column="):
        as_dataset(test=Unusual())
    split = as_dataset(test=Unusual(), image_column="photo", label_column="kind").test
    assert np.array_equal(next(split.batches()).images.numpy(), CHW)


def test_an_item_that_cannot_be_read_is_counted_and_named() -> None:
    class Broken(Pictures):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            if index == 6:
                raise KeyError("gone")
            return super().__getitem__(index)

    with pytest.raises(UsageError, match=r"label of item 6 cannot be read \(KeyError: 'gone'\); leave it out"):
        as_dataset(test=Broken(targets=False))
    split = as_dataset(test=Broken()).test
    with pytest.raises(CossError, match=r"1 of 12 test images cannot be read: test/6 \(KeyError: 'gone'\)"):
        list(split.batches())
