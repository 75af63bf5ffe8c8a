"""Every layout is read as what was written into it, wherever it lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from written_datasets import CLASSES, COUNTS, FORMATS, Written, image_of, png, put, write_class_folders, write_parquet

from coss_eval.data.open import load_dataset
from coss_eval.data.split import Split


def everything(split: Split) -> dict[str, tuple[int, bytes]]:
    """Key -> (label, pixels (H, W, 3) as bytes), from the batches."""
    batches = list(split.batches(batch_size=4))
    pixels = np.concatenate([batch.images.numpy() for batch in batches]).transpose(0, 2, 3, 1)
    labels = np.concatenate([batch.labels.numpy() for batch in batches])
    return {key: (int(y), x.tobytes()) for key, y, x in zip(split.keys, labels, pixels, strict=True)}


def expected(images: dict[str, tuple[int, np.ndarray]]) -> dict[str, tuple[int, bytes]]:
    return {key: (label, pixels.tobytes()) for key, (label, pixels) in images.items()}


def test_what_was_written_is_read(written: Written) -> None:
    data = load_dataset(written.folder)
    assert data.name == "set"
    assert data.classes == CLASSES
    assert data.train is not None
    assert (data.train.name, data.test.name) == ("train", "test")
    assert (len(data.train), len(data.test)) == (3 * COUNTS["train"], 3 * COUNTS["val"])
    assert data.train.native_size == data.test.native_size == (12, 12)
    assert everything(data.train) == expected(written.train)
    assert everything(data.test) == expected(written.test)


def test_ids_and_fingerprints_do_not_depend_on_the_place(written: Written, tmp_path: Path) -> None:
    here = load_dataset(written.folder)
    shutil.copytree(written.folder, tmp_path / "elsewhere" / "other-name")
    there = load_dataset("other-name", root=tmp_path / "elsewhere")
    for a, b in ((here.train, there.train), (here.test, there.test)):
        assert a is not None
        assert b is not None
        assert np.array_equal(a.ids, b.ids)
        assert a.keys == b.keys
        assert a.fingerprint == b.fingerprint
    assert len(set(here.train.ids) | set(here.test.ids)) == len(here.train) + len(here.test)
    assert here.train.fingerprint != here.test.fingerprint


@pytest.mark.parametrize(
    ("layout", "titles"),
    [
        ("Hugging Face", {"n01": "one", "n02": "two, second"}),
        ("Tiny-ImageNet", {"n01": "one", "n02": "two, second"}),
        ("class folders", {}),
    ],
)
def test_class_titles(layout: str, titles: dict[str, str], tmp_path: Path) -> None:
    assert load_dataset(FORMATS[layout](tmp_path).folder).class_titles == titles


def test_class_folders_alone_are_a_test_split(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    data = load_dataset(tmp_path / "val")
    assert data.train is None
    assert len(data.test) == 9
    assert data.test.keys[0] == "n01/0.png"


def test_a_labelled_test_split_goes_before_val(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    shutil.copytree(tmp_path / "val", tmp_path / "test")
    assert load_dataset(tmp_path).test.keys[0] == "test/n01/0.png"
    shutil.rmtree(tmp_path / "test")
    put(tmp_path / "test" / "images" / "0.png", png(image_of("test", 0, 0)))
    assert load_dataset(tmp_path).test.keys[0] == "val/n01/0.png"


def test_hidden_folders_and_other_files_are_no_classes(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    for folder in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / "train" / folder).mkdir()
    (tmp_path / "train" / "n01" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "n01" / "._0.png").write_bytes(b"macOS leaves these")
    data = load_dataset(tmp_path)
    assert data.classes == CLASSES
    assert len(data.train) == 15


def test_parquet_without_class_names_counts_them(tmp_path: Path) -> None:
    for split, labels in (("train", [0, 1, 2]), ("test", [2, 0])):
        write_parquet(tmp_path / f"{split}.parquet", [(png(image_of(split, y, 0)), y) for y in labels], names=None)
    data = load_dataset(tmp_path)
    assert data.classes == ("0", "1", "2")
    assert data.test.keys == ["test/0", "test/1"]


def test_a_fingerprint_follows_content_labels_and_limit(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    before = load_dataset(tmp_path)
    assert before.train.limited(6).fingerprint != before.train.fingerprint
    assert before.train.limited(6).fingerprint != before.train.limited(6, seed=1).fingerprint
    put(tmp_path / "train" / "n01" / "0.png", png(image_of("train", 2, 9)))
    after = load_dataset(tmp_path)
    assert after.train.fingerprint != before.train.fingerprint
    assert after.test.fingerprint == before.test.fingerprint
    (tmp_path / "val" / "n01" / "0.png").rename(tmp_path / "val" / "n02" / "0 of n01.png")
    assert load_dataset(tmp_path).test.fingerprint != before.test.fingerprint
