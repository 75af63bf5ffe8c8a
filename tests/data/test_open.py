"""Names and places: built-in names, folders inside the root, paths; and what importing this costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from written_datasets import write_class_folders, write_hugging_face, write_shards, write_tiny_imagenet

from coss_eval.data.open import BUILT_IN, load_dataset, names
from coss_eval.data.torchvision_sets import SETS


def test_a_name_is_a_folder_in_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path / "birds")
    monkeypatch.setenv("COSS_DATA_ROOT", str(tmp_path))
    from_environment = load_dataset("birds")
    assert from_environment.name == "birds"
    assert from_environment.test.fingerprint == load_dataset(tmp_path / "birds").test.fingerprint
    monkeypatch.setenv("COSS_DATA_ROOT", "/nowhere")
    assert load_dataset("birds", root=tmp_path).name == "birds"


def test_a_path_goes_before_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path / "root" / "birds")
    write_hugging_face(tmp_path / "here" / "birds")
    monkeypatch.chdir(tmp_path / "here")
    assert load_dataset("birds", root=tmp_path / "root").test.keys[0].startswith("val/n01_")
    monkeypatch.chdir(tmp_path / "here" / "birds")
    assert load_dataset(".").name == "birds"


def test_a_prepared_folder_may_have_a_torchvision_name(tmp_path: Path) -> None:
    write_hugging_face(tmp_path / "cifar10")
    assert load_dataset("cifar10", root=tmp_path).test.keys[0].startswith("val/")


@pytest.mark.parametrize("root", [".", "imagenet"])
def test_imagenet_is_class_folders(root: str, tmp_path: Path) -> None:
    write_class_folders(tmp_path / root)
    write_class_folders(tmp_path / "another")
    assert len(load_dataset("imagenet", root=tmp_path).test) == 9


def test_names_lists_what_is_in_the_root(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "folders")
    write_tiny_imagenet(tmp_path / "tiny")
    write_shards(tmp_path / "sharded")
    (tmp_path / "empty").mkdir()
    listed = names(tmp_path)
    assert set(listed) - set(BUILT_IN) == {"folders", "tiny", "sharded"}
    assert listed["tiny"].startswith("tiny-imagenet in ")
    assert set(names()) >= set(BUILT_IN)
    assert set(BUILT_IN) == set(SETS) | {"digits", "scattered-digits", "imagenet"}


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from coss_eval.data.open import names, Dataset; names('.');"
        "print([m for m in ('torch', 'torchvision', 'pandas', 'pyarrow', 'numpy', 'PIL') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "train", "test", "size", "first"),
    [
        ("tiny-imagenet-50", 25_000, 2_500, (64, 64), "val/val_"),
        ("cifar10-jpeg", 50_000, 10_000, (32, 32), "test/airplane/0000.jpg"),
    ],
)
def test_real_images(name: str, train: int, test: int, size: tuple[int, int], first: str, shared_data: Path) -> None:
    data = load_dataset(name, root=shared_data)
    assert (len(data.train), len(data.test)) == (train, test)
    assert data.train.native_size == data.test.native_size == size
    assert data.test.keys[0].startswith(first)
    seen = [len(batch.labels) for batch in data.test.batches(batch_size=1000)]
    assert sum(seen) == test
    assert not data.test.bad_images


def test_real_classes_have_titles(shared_data: Path) -> None:
    data = load_dataset("tiny-imagenet-50", root=shared_data)
    assert data.classes == tuple(sorted(data.classes))
    assert set(data.class_titles) == set(data.classes)
    assert data.class_titles["n01443537"] == "goldfish, Carassius auratus"
