"""Every layout is read as what was written into it, wherever it lies."""

from __future__ import annotations

import os
import random
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from written_datasets import (
    CLASSES,
    COUNTS,
    FORMATS,
    Written,
    image_of,
    png,
    put,
    put_tar,
    write_class_folders,
    write_flat_imagenet,
    write_idx,
    write_parquet,
    write_webdataset,
)

from coss_eval.data.formats import shards
from coss_eval.data.open import load_dataset
from coss_eval.data.split import Split
from coss_eval.errors import CossError, UsageError


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
    hint = f"val alone is read, as the test split: give {tmp_path.name}, the folder above it, for its training"
    assert [note for note in data.notes if note.startswith(hint)]
    shutil.rmtree(tmp_path / "train")
    assert not [note for note in load_dataset(tmp_path / "val").notes if note.startswith(hint)]


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


@pytest.mark.parametrize("named", [False, True], ids=["wnids alone", "names and wnids"])
def test_a_flat_val_with_a_list_of_wnids(named: bool, tmp_path: Path) -> None:
    """ImageNet's validation images as they are distributed, without class folders, and without train/."""
    names = write_flat_imagenet(tmp_path, named=named)
    data = load_dataset(tmp_path)
    assert data.train is None
    assert data.classes == ("n00000003", "n00000005", "n00000007")
    assert data.test.labels.tolist() == [2, 0, 1] * 3
    (tmp_path / "val" / names[0]).unlink()
    if not named:
        with pytest.raises(CossError, match="has 9 lines for the 8 images"):
            load_dataset(tmp_path)


@pytest.mark.parametrize("place", [".", "ILSVRC2012_devkit_t12/data"])
def test_the_development_kits_numbers_are_not_the_classes_order(place: str, tmp_path: Path) -> None:
    write_flat_imagenet(tmp_path)
    wnids = (tmp_path / "labels.txt").read_text().split()
    (tmp_path / "labels.txt").unlink()
    numbers = {"n00000007": 1, "n00000003": 2, "n00000005": 3}  # as the kit has them: not sorted
    kit = tmp_path / place
    kit.mkdir(parents=True, exist_ok=True)
    truth = kit / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(f"{numbers[wnid]}\n" for wnid in wnids))
    with pytest.raises(CossError, match=r"by ILSVRC2012_ID.* put the development kit's meta.mat beside it"):
        load_dataset(tmp_path)
    kind = np.dtype([("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)])
    rows = [*((number, wnid, 0) for wnid, number in numbers.items()), (4, "n00000001", 3)]  # the last: of all three
    savemat(kit / "meta.mat", {"synsets": np.array(rows, kind)})
    data = load_dataset(tmp_path)
    assert data.classes == ("n00000003", "n00000005", "n00000007")
    assert data.test.labels.tolist() == [2, 0, 1] * 3
    truth.write_text("".join(f"{numbers[wnid] + 1}\n" for wnid in wnids))
    with pytest.raises(CossError, match="has the class 4; expected 1 to 3: give a list of wnids"):
        load_dataset(tmp_path)


def test_numbers_after_file_names_are_places_among_the_training_classes(tmp_path: Path) -> None:
    names = write_flat_imagenet(tmp_path)
    wnids = (tmp_path / "labels.txt").read_text().split()
    (tmp_path / "labels.txt").unlink()
    order = sorted(set(wnids))
    listed = (f"{name} {order.index(wnid)}\n" for name, wnid in zip(names, wnids, strict=True))
    (tmp_path / "val.txt").write_text("".join(listed))
    assert load_dataset(tmp_path).classes == ("0", "1", "2")
    for wnid in order:
        (tmp_path / "train" / wnid).mkdir(parents=True)
        shutil.copy(tmp_path / "val" / names[0], tmp_path / "train" / wnid / "0.png")
    data = load_dataset(tmp_path)
    assert data.classes == tuple(order)
    assert data.test.labels.tolist() == [2, 0, 1] * 3


@pytest.mark.parametrize("layout", ["keras", "medmnist"])
@pytest.mark.parametrize("shape", [(6, 8, 9), (6, 8, 9, 3), (6, 3, 8, 9), (6, 8, 9, 1)], ids=str)
def test_arrays_in_npz(shape: tuple[int, ...], layout: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    labels = np.array([7, 3, 7, 3, 3, 7], np.uint8)
    x, y = ("x_{}", "y_{}") if layout == "keras" else ("{}_images", "{}_labels")
    given = {x.format("test"): pixels, y.format("test"): labels[:, None] if layout == "medmnist" else labels}
    given |= {x.format("train"): pixels[::-1], y.format("train"): labels[::-1]}
    np.savez_compressed(tmp_path / "set.npz", **given)
    data = load_dataset(tmp_path / "set.npz")
    assert (data.name, data.classes) == ("set", ("3", "7"))
    assert data.test.labels.tolist() == [1, 0, 1, 0, 0, 1]
    channels_last = pixels.transpose(0, 2, 3, 1) if shape[1] == 3 else pixels.reshape(6, 8, 9, -1)
    read = next(data.test.batches()).images.numpy().transpose(0, 2, 3, 1)
    assert np.array_equal(read, np.broadcast_to(channels_last, (6, 8, 9, 3)))


@pytest.mark.parametrize("place", [".", "raw", "MNIST/raw"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_mnists_own_files(packed: bool, place: str, tmp_path: Path) -> None:
    expected_images = write_idx(tmp_path, place, packed=packed)
    data = load_dataset(tmp_path)
    assert data.train is not None
    assert (len(data.train), len(data.test), data.classes) == (8, 4, ("0", "1", "2", "3"))
    assert np.array_equal(next(data.test.batches()).images[:, 1].numpy(), expected_images["t10k"])


def test_columns_that_are_named_by_hand(tmp_path: Path) -> None:
    rows = [(png(image_of("val", label, i)), label) for label in range(3) for i in range(2)]
    write_parquet(tmp_path / "p" / "test.parquet", rows, columns=("picture", "kind"))
    with pytest.raises(CossError, match="no column image or img; it has picture, kind: give --image-column"):
        load_dataset(tmp_path / "p")
    data = load_dataset(tmp_path / "p", image_column="picture", label_column="kind")
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(UsageError, match=r"--label-column sort: .* no such column"):
        load_dataset(tmp_path / "p", image_column="picture", label_column="sort")
    put(tmp_path / "t" / "a.png", png(image_of("val", 0, 0)))
    (tmp_path / "t" / "list.tsv").write_text("pic\tkind\na.png\tcat\n")
    assert load_dataset(tmp_path / "t", image_column="pic", label_column="kind").classes == ("cat",)


def test_a_set_without_splits_is_split_by_hashed_ids(tmp_path: Path) -> None:
    for label in range(2):
        for i in range(10):
            put(tmp_path / "set" / f"c{label}" / f"{i}.png", png(image_of("val", label, i)))
    data = load_dataset(tmp_path / "set", holdout=0.2)
    assert data.train is not None
    assert (len(data.train), len(data.test)) == (16, 4)
    assert np.bincount(data.test.labels).tolist() == [2, 2]
    assert not set(data.train.ids.tolist()) & set(data.test.ids.tolist())
    assert any("20 % of each class are the test split" in note for note in data.warnings())
    again = load_dataset(tmp_path / "set", holdout=0.2)
    assert again.test.keys == data.test.keys
    only_train = tmp_path / "only"
    shutil.copytree(tmp_path / "set", only_train / "train")
    assert len(load_dataset(only_train, holdout=0.2).test) == 4
    shutil.copytree(tmp_path / "set", only_train / "val")
    with pytest.raises(UsageError, match="has a test split of its own"):
        load_dataset(only_train, holdout=0.2)


def test_a_class_without_test_images_stays_and_is_told(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    shutil.rmtree(tmp_path / "val" / "n02")
    data = load_dataset(tmp_path)
    assert data.classes == CLASSES
    assert set(data.test.labels.tolist()) == {0, 2}
    assert "1 of 3 classes have no image in val: n02" in data.warnings()


def test_formats_that_nothing_reads_are_counted_and_gifs_give_their_first_frame(tmp_path: Path) -> None:
    first, second = (Image.fromarray(np.full((12, 12, 3), value, np.uint8)) for value in (200, 10))
    for name in ("n01", "n02"):
        folder = tmp_path / "val" / name
        folder.mkdir(parents=True)
        first.save(folder / "a.gif", save_all=True, append_images=[second])
        (folder / "b.avif").write_bytes(b"")
    data = load_dataset(tmp_path)
    assert next(data.test.batches()).images.float().mean().item() == pytest.approx(200, abs=2)
    assert any(".avif (2)" in note for note in data.warnings())


def test_accents_that_are_spelled_in_two_ways_are_one_class(tmp_path: Path) -> None:
    for split, form in (("train", "NFC"), ("val", "NFD")):
        for name in ("café", "tea"):
            put(tmp_path / split / unicodedata.normalize(form, name) / "a.png", png(image_of(split, 0, len(name))))
    data = load_dataset(tmp_path)
    assert [unicodedata.normalize("NFC", name) for name in data.classes] == ["café", "tea"]
    assert data.test.labels.tolist() == [0, 1]


def test_shards_are_walked_once_and_again_where_one_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SETTLED", -10)  # files of this second count as settled
    written, walks = write_webdataset(tmp_path), list[Path]()
    members = shards.members
    monkeypatch.setattr(shards, "members", lambda descriptor, file: walks.append(file) or members(descriptor, file))
    for _ in range(2):
        assert everything(load_dataset(tmp_path).train) == expected(written.train)
    assert len(walks) == 6
    put_tar(tmp_path / "shards" / "val-000001.tar", {"a.cls": b"1", "a.png": png(image_of("val", 1, 0))})
    with pytest.raises(CossError, match="out of range"):  # a .cls where the first shard has a .json
        load_dataset(tmp_path)
    assert len(walks) == 9


def test_a_damaged_index_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SETTLED", -10)
    written = write_webdataset(tmp_path)
    draw = random.Random(0)
    load_dataset(tmp_path)
    kept = {file: file.read_bytes() for file in Path(os.environ["COSS_CACHE_DIR"]).glob("shards-*.parquet")}
    assert len(kept) == 2
    for _ in range(20):
        for file, whole in kept.items():
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
        assert everything(load_dataset(tmp_path).train) == expected(written.train)


def test_ids_do_not_depend_on_how_samples_are_cut_into_shards(tmp_path: Path) -> None:
    samples = {
        f"{i}.{suffix}": content
        for i in range(6)
        for suffix, content in (("cls", b"0"), ("png", png(image_of("val", 0, i))))
    }
    names = list(samples)
    for place, cuts in (("one", [12]), ("three", [2, 8, 12])):
        for number, (start, stop) in enumerate(zip([0, *cuts], cuts, strict=False)):
            part = {name: samples[name] for name in names[start:stop]}
            put_tar(tmp_path / place / "test" / f"{number:05d}.tar", part)
    one, three = (load_dataset(tmp_path / place).test for place in ("one", "three"))
    assert one.keys == [f"test/{i}.png" for i in range(6)]
    assert np.array_equal(one.ids, three.ids)
    assert one.fingerprint == three.fingerprint


def test_samples_of_one_key_in_two_shards_are_told_apart_by_their_row(tmp_path: Path) -> None:
    for number in range(2):
        put_tar(
            tmp_path / f"val-{number}.tar", {"a.png": png(image_of("val", 0, number)), "a.cls": b"cat", "b.cls": b"dog"}
        )
    data = load_dataset(tmp_path)
    assert data.test.keys == ["val/0", "val/1"]
    assert data.classes == ("cat",)
    assert data.notes == ("2 samples of val have no image and are left out",)


def test_suffixes_and_fields_that_are_named_by_hand(tmp_path: Path) -> None:
    told = b'{"species": "cat", "label": 3}'
    put_tar(tmp_path / "val.tar", {"a.small.png": png(image_of("val", 0, 0)), "a.png": b"not read", "a.json": told})
    assert load_dataset(tmp_path, image_column="small.png").classes == ("3",)
    data = load_dataset(tmp_path, image_column="small.png", label_column="species")
    assert everything(data.test) == expected({"val/a.small.png": (0, image_of("val", 0, 0))})
    assert data.classes == ("cat",)
    with pytest.raises(UsageError, match=r"--label-column kind: a in .* no such suffix or field; it has small\.png"):
        load_dataset(tmp_path, label_column="kind")


def test_shards_are_read_without_a_file_being_written(tmp_path: Path) -> None:
    """Names that lead elsewhere are keys like any others; one that is damaged later is a bad image."""
    put_tar(tmp_path / "set" / "val.tar", {"../../a.png": png(image_of("val", 0, 0)), "../../a.cls": b"0"})
    before = sorted(tmp_path.rglob("*"))
    data = load_dataset(tmp_path / "set")
    assert everything(data.test) == expected({"val/../../a.png": (0, image_of("val", 0, 0))})
    assert sorted(tmp_path.rglob("*")) == before
    assert data.test.fingerprint
    os.truncate(tmp_path / "set" / "val.tar", 600)
    with pytest.raises(UsageError, match="has changed on disk"):
        data.test.refuse_changed()
    assert data.test.images.raw(0) == b""
