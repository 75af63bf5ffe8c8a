"""What is wrong with a dataset is said in one line, with what was expected and what to do."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from written_datasets import (
    image_of,
    png,
    put,
    put_tar,
    write_class_folders,
    write_hugging_face,
    write_parquet,
    write_shards,
    write_tiny_imagenet,
)

from coss_eval.data.batches import Geometry
from coss_eval.data.open import load_dataset
from coss_eval.errors import CossError, UsageError

ROW = (png(image_of("train", 0, 0)), 0)


def no_folder(at: Path) -> str:
    return str(at / "missing")


def no_relative_folder(at: Path) -> str:
    return "./data/missing"


def empty_folder(at: Path) -> str:
    at.mkdir()
    return str(at)


def a_file(at: Path) -> str:
    put(at / "train.parquet", b"")
    return str(at / "train.parquet")


def images_without_classes(at: Path) -> str:
    put(at / "a.png", ROW[0])
    return str(at)


def train_only(at: Path) -> str:
    write_class_folders(at)
    shutil.rmtree(at / "val")
    return str(at)


def empty_val(at: Path) -> str:
    write_class_folders(at)
    shutil.rmtree(at / "val")
    (at / "val").mkdir()
    return str(at)


def parquet_train_only(at: Path) -> str:
    write_hugging_face(at)
    (at / "val.parquet").unlink()
    return str(at)


def unlabelled_parquet(at: Path) -> str:
    write_hugging_face(at)
    write_parquet(at / "val.parquet", [(ROW[0], -1)] * 3)
    return str(at)


def empty_class(at: Path) -> str:
    write_class_folders(at)
    (at / "train" / "n02b").mkdir()
    (at / "val" / "n02b").mkdir()
    return str(at)


def class_missing_in_train(at: Path) -> str:
    write_class_folders(at)
    shutil.rmtree(at / "train" / "n02")
    return str(at)


def several_configurations(at: Path) -> str:
    for config in ("plain", "large"):
        write_parquet(at / config / "train" / "0000.parquet", [(png(image_of("train", 0, 0)), 0)])
    return str(at)


def paths_to_nowhere(at: Path) -> str:
    write_parquet(at / "test.parquet", [(None, 0)], paths=["images/a.png"])
    return str(at)


def pickled_arrays(at: Path) -> str:
    at.mkdir()
    np.savez(at / "a.npz", x_test=np.array([{}], dtype=object), y_test=np.zeros(1, int))
    return str(at / "a.npz")


def arrays_of_floats(at: Path) -> str:
    at.mkdir()
    np.savez(at / "a.npz", x_test=np.zeros((2, 8, 8, 3)), y_test=np.zeros(2, int))
    return str(at / "a.npz")


def arrays_that_unpack_to_terabytes(at: Path) -> str:
    """The sizes that a zip file states are believed before anything is unpacked."""
    at.mkdir()
    with zipfile.ZipFile(at / "a.npz", "w") as packed:
        packed.writestr("x_test.npy", b"")
        packed.filelist[0].file_size = 2**40
    return str(at / "a.npz")


def idx_cut_short(at: Path) -> str:
    at.mkdir()
    for name, axes in (("t10k-images-idx3-ubyte", 3), ("t10k-labels-idx1-ubyte", 1)):
        head = np.array([2051 if axes == 3 else 2049, *(5 for _ in range(axes))], ">u4").tobytes()
        (at / name).write_bytes(head + bytes(5**axes - 1))
    return str(at)


def table_that_ends_early(at: Path) -> str:
    put(at / "images" / "a.png", png(image_of("val", 0, 0)))
    (at / "labels.csv").write_text("filename,label\nimages/a.png,cat\nimages/b.png\n")
    return str(at)


def arrow_file_missing(at: Path) -> str:
    at.mkdir()
    (at / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    return str(at)


def label_out_of_range(at: Path) -> str:
    write_hugging_face(at)
    write_parquet(at / "val.parquet", [ROW, (ROW[0], 3), (ROW[0], 7)])
    return str(at)


def label_missing(at: Path) -> str:
    write_hugging_face(at)
    write_parquet(at / "train.parquet", [ROW, (ROW[0], None)])
    return str(at)


def empty_parquet(at: Path) -> str:
    write_hugging_face(at)
    write_parquet(at / "train.parquet", [])
    return str(at)


def other_class_names(at: Path) -> str:
    write_hugging_face(at)
    write_parquet(at / "val.parquet", [ROW], names=("n01", "n03", "n02"))
    return str(at)


def no_parquet_inside(at: Path) -> str:
    write_hugging_face(at)
    put(at / "val.parquet", b"PAR1 but no more")
    return str(at)


def no_image_column(at: Path) -> str:
    write_hugging_face(at)
    write_parquet(at / "val.parquet", [ROW], columns=("picture", "label"))
    return str(at)


def labels_of_another_kind(at: Path) -> str:
    write_hugging_face(at)
    write_parquet(at / "val.parquet", [(ROW[0], 0.5)])
    return str(at)


def shard_missing(at: Path) -> str:
    write_shards(at)
    (at / "data" / "train-00000-of-00002.parquet").unlink()
    return str(at)


def tar_of(at: Path, *extra: tarfile.TarInfo) -> str:
    """One sample, and these members without contents."""
    put_tar(at / "test-0.tar", {"a.cls": b"0", "a.png": ROW[0]})
    with tarfile.open(at / "test-0.tar", "a") as tar:
        for member in extra:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return str(at)


def special(kind: bytes, name: str = "b.png", target: str = "/etc/passwd") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def tar_with_a_link(at: Path) -> str:
    return tar_of(at, special(tarfile.SYMTYPE))


def tar_with_a_hard_link(at: Path) -> str:
    return tar_of(at, special(tarfile.LNKTYPE, target="a.png"))


def tar_with_a_device(at: Path) -> str:
    return tar_of(at, special(tarfile.CHRTYPE))


def tar_with_a_pipe(at: Path) -> str:
    return tar_of(at, special(tarfile.FIFOTYPE))


def tar_that_says_more_than_it_has(at: Path) -> str:
    tar_of(at)
    member = tarfile.TarInfo("b.png")
    member.size = 2**40
    with (at / "test-0.tar").open("r+b") as file:
        file.seek(4 * 512)  # after a.cls, a.png and their headers
        file.write(member.tobuf(tarfile.GNU_FORMAT))
    return str(at)


def tar_cut_short(at: Path) -> str:
    tar_of(at)
    content = (at / "test-0.tar").read_bytes()
    (at / "test-0.tar").write_bytes(content[: 3 * 512 + 100])
    return str(at)


def tar_with_a_huge_name(at: Path) -> str:
    return tar_of(at, tarfile.TarInfo("b/" * 50_000 + "b.png"))


def tar_that_is_packed(at: Path) -> str:
    at.mkdir()
    with tarfile.open(at / "test-0.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.cls"))
    return str(at)


def tar_without_labels(at: Path) -> str:
    put_tar(at / "test-0.tar", {"a.png": ROW[0], "a.txt": b"a caption"})
    return str(at)


def tar_with_a_long_label(at: Path) -> str:
    put_tar(at / "test-0.tar", {"a.cls": b"0" * (2**20 + 1), "a.png": ROW[0]})
    return str(at)


def tar_shard_missing(at: Path) -> str:
    for number in (0, 2):
        put_tar(at / f"test-{number}.tar", {f"{number}.cls": b"0", f"{number}.png": ROW[0]})
    return str(at)


def tar_without_images(at: Path) -> str:
    put_tar(at / "test-0.tar", {"a.cls": b"0", "b.cls": b"1"})
    return str(at)


def broken_titles(at: Path) -> str:
    write_hugging_face(at)
    (at / "classes.json").write_text("{")
    return str(at)


def unknown_wnid(at: Path) -> str:
    write_tiny_imagenet(at)
    with (at / "val" / "val_annotations.txt").open("a") as file:
        file.write("\nval_9.JPEG\tn98\t0\t0\t9\t9\n")
    return str(at)


def tiny_imagenet_without_train(at: Path) -> str:
    write_tiny_imagenet(at)
    shutil.rmtree(at / "train")
    return str(at)


WRONG: list[tuple[Callable[[Path], str], type[CossError], str]] = [
    (no_folder, UsageError, "there is no folder"),
    (no_relative_folder, UsageError, "there is no folder ./data/missing"),
    (empty_folder, CossError, "is no dataset: expected train/ and val/.*got an empty folder"),
    (a_file, UsageError, "is a file; pass the folder"),
    (images_without_classes, CossError, "is no dataset.*got a.png"),
    (train_only, CossError, "has no test split"),
    (empty_val, CossError, "has no test split"),
    (parquet_train_only, CossError, "has no test split"),
    (unlabelled_parquet, CossError, "has no test split"),
    (empty_class, CossError, "n02b holds no images"),
    (class_missing_in_train, CossError, "must be among the training split's; 1 of them is not: n02"),
    (several_configurations, CossError, r"several configurations \(large, plain\): give the folder of one"),
    (paths_to_nowhere, CossError, "images/a.png is not a file below"),
    (pickled_arrays, CossError, "cannot read .*a.npz: it holds Python objects: save arrays of numbers"),
    (arrays_of_floats, CossError, r"as uint8 .* got float64 \(2, 8, 8, 3\)"),
    (arrays_that_unpack_to_terabytes, CossError, "unpacks to 1024 GiB"),
    (idx_cut_short, CossError, "holds 125 bytes and has fewer"),
    (table_that_ends_early, CossError, "a row that ends early, in line 3"),
    (arrow_file_missing, CossError, "names data-00000-of-00001.arrow, which is not there"),
    (label_out_of_range, CossError, r"2 of 3 labels of the test split.*expected 0 to 2, got 3 for val/1"),
    (label_missing, CossError, r"1 of 2 labels of the train split.*got -1 for train/1"),
    (empty_parquet, CossError, "the train split of .* holds no images"),
    (other_class_names, CossError, "class names of .* must be the same"),
    (no_parquet_inside, CossError, "cannot read .*val.parquet"),
    (no_image_column, CossError, "no column image or img; it has picture, label"),
    (labels_of_another_kind, CossError, "expected column label .* integers or names, got double"),
    (shard_missing, CossError, "train shards .* not complete.*all 2 of train"),
    (tar_with_a_link, CossError, "holds a symbolic link, 'b.png'; expected files alone"),
    (tar_with_a_hard_link, CossError, "holds a hard link"),
    (tar_with_a_device, CossError, "holds a character device"),
    (tar_with_a_pipe, CossError, "holds a pipe"),
    (tar_that_says_more_than_it_has, CossError, "ends early.*copy it again"),
    (tar_cut_short, CossError, "ends early.*copy it again"),
    (tar_with_a_huge_name, CossError, "has a header of 100,0.* expected a name"),
    (tar_that_is_packed, CossError, "is no tar file .unpack it first if it is compressed"),
    (tar_without_labels, CossError, "a in .*has no label .*it has png, txt: give --label-column"),
    (tar_with_a_long_label, CossError, "too many for a label"),
    (tar_shard_missing, CossError, "test shards .* not complete.*got 2 from 0 to 2: test-0.tar, test-2.tar"),
    (tar_without_images, CossError, "hold no sample with a .jpg, .png or another image"),
    (broken_titles, CossError, "cannot read .*classes.json"),
    (unknown_wnid, CossError, "classes that train/ has not: n98"),
    (tiny_imagenet_without_train, CossError, "no train/"),
]


@pytest.mark.parametrize(("make", "kind", "message"), WRONG, ids=[make.__name__ for make, _, _ in WRONG])
def test_one_line_says_what_is_wrong(
    make: Callable[[Path], str], kind: type[CossError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CossError, match=message) as caught:
        load_dataset(make(tmp_path / "set"))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("cifar-10", "cifar10"), ("didgits", "digits"), ("tiny-imgenet", "tiny-imagenet"), ("Flowers102", "flowers102")],
)
def test_unknown_names_come_with_the_nearest(name: str, suggestion: str, tmp_path: Path) -> None:
    write_class_folders(tmp_path / "tiny-imagenet")
    with pytest.raises(UsageError, match=f"unknown dataset or folder '{name}'; did you mean .*{suggestion}"):
        load_dataset(name, root=tmp_path)


def test_a_misspelt_folder_comes_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"unknown dataset or folder 'photoz'; did you mean photos\?"):
        load_dataset("photoz")


@pytest.mark.parametrize("name", ["cifar10", "imagenet", "dtd"])
def test_names_that_need_files_ask_for_the_root(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COSS_DATA_ROOT", raising=False)
    with pytest.raises(UsageError, match="--data-root or set COSS_DATA_ROOT"):
        load_dataset(name)
    with pytest.raises(CossError, match="--data-root") as caught:
        load_dataset(name, root=tmp_path)
    assert "\n" not in str(caught.value)


def test_varied_sizes_need_a_geometry(varied: Path) -> None:
    split = load_dataset(varied).train
    with pytest.raises(UsageError, match="give the model's geometry"):
        split.batches()
    with pytest.raises(UsageError, match="give the model's geometry"):
        split.protocol()
    assert split.protocol(Geometry()) == {
        "size": 224,
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "decoder": "PIL",
    }
