"""The same small dataset in every layout, so that each reader can be held against what was written."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("n01", "n02", "n03")
COUNTS = {"train": 5, "val": 3}  # images a class


@dataclass(frozen=True)
class Written:
    """A dataset on disk and what it must be read as: key -> (label, pixels (H, W, 3))."""

    folder: Path
    train: dict[str, tuple[int, np.ndarray]]
    test: dict[str, tuple[int, np.ndarray]]


Write = Callable[[Path], Written]


def image_of(split: str, label: int, index: int, side: int = 12) -> np.ndarray:
    """uint8 (side, side, 3), another one for every argument."""
    seed = [len(split), label, index]
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def samples(split: str) -> Iterator[tuple[int, int, np.ndarray]]:
    for label in range(len(CLASSES)):
        for index in range(COUNTS[split]):
            yield label, index, image_of(split, label, index)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def put(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def write_tree(folder: Path, path: Callable[[str, str, int], str]) -> Written:
    """Files named ``path(split, class, index)``, whose keys are those paths."""
    found: dict[str, dict[str, tuple[int, np.ndarray]]] = {"train": {}, "val": {}}
    for split in found:
        for label, index, pixels in samples(split):
            key = path(split, CLASSES[label], index)
            put(folder / key, png(pixels))
            found[split][key] = (label, pixels)
    return Written(folder, found["train"], found["val"])


def write_class_folders(folder: Path) -> Written:
    return write_tree(folder, lambda split, name, i: f"{split}/{name}/{i}.png")


def write_nested_folders(folder: Path) -> Written:
    return write_tree(folder, lambda split, name, i: f"{'test' if split == 'val' else split}/{name}/deep/er{i}/a.PNG")


def write_tiny_imagenet(folder: Path) -> Written:
    """Tiny-ImageNet's own layout, with the boxes, the unlabelled test/ and the words.txt it comes with."""

    def path(split: str, name: str, i: int) -> str:
        return f"val/images/val_{name}_{i}.JPEG" if split == "val" else f"train/{name}/images/{name}_{i}.JPEG"

    written = write_tree(folder, path)  # PNG bytes under these names: PIL goes by content
    rows = [f"{Path(key).name}\t{CLASSES[label]}\t0\t0\t9\t9" for key, (label, _) in written.test.items()]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(reversed(rows)))
    for name in CLASSES:
        (folder / "train" / name / f"{name}_boxes.txt").write_text("0 0 9 9")
    put(folder / "test" / "images" / "test_0.JPEG", png(image_of("test", 0, 0)))
    (folder / "words.txt").write_text("n01\tone\nn02\ttwo, second\nn99\tnot here\n")
    return written


def write_parquet(
    file: Path,
    rows: list[tuple[object, object]],
    *,
    paths: list[str | None] | None = None,
    names: tuple[str, ...] | None = CLASSES,
    columns: tuple[str, str] = ("image", "label"),
    group: int = 4,
) -> None:
    """Rows of (encoded image, label) as Hugging Face's datasets write them."""
    images = [{"bytes": raw, "path": paths[i] if paths else None} for i, (raw, _) in enumerate(rows)]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = pa.array([label for _, label in rows]) if rows else pa.array([], pa.int64())
    table = pa.table({columns[0]: pa.array(images, struct), columns[1]: labels})
    if names is not None:
        features = {columns[0]: {"_type": "Image"}, columns[1]: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=group)


def write_hugging_face(folder: Path) -> Written:
    found: dict[str, dict[str, tuple[int, np.ndarray]]] = {}
    for split in COUNTS:
        rows = [(png(pixels), label) for label, _, pixels in samples(split)]
        paths = [f"{CLASSES[label]}_{index}.png" for label, index, _ in samples(split)]
        write_parquet(folder / f"{split}.parquet", rows, paths=paths)
        found[split] = {
            f"{split}/{path}": (label, pixels) for path, (label, _, pixels) in zip(paths, samples(split), strict=True)
        }
    (folder / "classes.json").write_text(json.dumps({"n01": "one", "n02": "two, second"}))
    return Written(folder, found["train"], found["val"])


def write_shards(folder: Path) -> Written:
    """Shards in data/, as on the hub: no paths, another image column, names as labels, an unlabelled test split."""
    found: dict[str, dict[str, tuple[int, np.ndarray]]] = {}
    for split, hub_name in (("train", "train"), ("val", "validation")):
        rows = [(png(pixels), CLASSES[label]) for label, _, pixels in samples(split)]
        for shard in range(2):
            part = rows[:7] if shard == 0 else rows[7:]
            file = folder / "data" / f"{hub_name}-{shard:05d}-of-00002.parquet"
            write_parquet(file, part, names=None, columns=("img", "label"))
        found[split] = {f"{hub_name}/{row}": (label, pixels) for row, (label, _, pixels) in enumerate(samples(split))}
    unlabelled = [(png(image_of("test", 0, i)), -1) for i in range(4)]
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", unlabelled, names=None, columns=("img", "label"))
    return Written(folder, found["train"], found["val"])


def write_other_names(folder: Path) -> Written:
    """Splits called Training and Testing; a GIF, of which the first frame is read, and formats that nothing reads."""
    written = write_tree(folder, lambda split, name, i: f"{'Testing' if split == 'val' else 'Training'}/{name}/{i}.png")
    put(folder / "Testing" / "n01" / "a.avif", b"not read")
    return written


def write_other_columns(folder: Path) -> Written:
    """Columns as webdatasets become them, in the hub's own conversion: CONFIG/SPLIT/0000.parquet."""
    found: dict[str, dict[str, tuple[int, np.ndarray]]] = {}
    for split, hub_name in (("train", "train"), ("val", "test")):
        rows = [(png(pixels), label) for label, _, pixels in samples(split)]
        for number, part in enumerate((rows[:4], rows[4:])):
            write_parquet(folder / "default" / hub_name / f"{number:04d}.parquet", part, columns=("jpg", "cls"))
        found[split] = {f"{hub_name}/{row}": (label, pixels) for row, (label, _, pixels) in enumerate(samples(split))}
    return Written(folder, found["train"], found["val"])


def write_paths_in_parquet(folder: Path) -> Written:
    """Tables that name files in place of holding images."""
    found: dict[str, dict[str, tuple[int, np.ndarray]]] = {}
    for split in COUNTS:
        paths = [f"images/{split}_{label}_{index}.png" for label, index, _ in samples(split)]
        for path, (_, _, pixels) in zip(paths, samples(split), strict=True):
            put(folder / path, png(pixels))
        write_parquet(folder / f"{split}.parquet", [(None, label) for label, _, _ in samples(split)], paths=[*paths])
        found[split] = {
            f"{split}/{path}": (label, pixels) for path, (label, _, pixels) in zip(paths, samples(split), strict=True)
        }
    return Written(folder, found["train"], found["val"])


def write_saved_to_disk(folder: Path) -> Written:
    """As ``datasets.DatasetDict.save_to_disk`` does: Arrow streams in two files, state.json and dataset_info.json."""
    found: dict[str, dict[str, tuple[int, np.ndarray]]] = {}
    for split, name in (("train", "train"), ("val", "test")):
        rows = [({"bytes": png(pixels), "path": None}, label) for label, _, pixels in samples(split)]
        files = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
        for file, part in zip(files, (rows[:5], rows[5:]), strict=True):
            struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            table = pa.table({"image": pa.array([image for image, _ in part], struct), "label": [y for _, y in part]})
            put(folder / name / file, b"")
            with pa.ipc.new_stream(str(folder / name / file), table.schema) as stream:
                stream.write_table(table, max_chunksize=2)
        state = {"_data_files": [{"filename": file} for file in files]}
        (folder / name / "state.json").write_text(json.dumps(state))
        features = {"label": {"names": CLASSES, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        (folder / name / "dataset_info.json").write_text(json.dumps({"features": features}))
        found[split] = {f"{name}/{row}": (label, pixels) for row, (label, _, pixels) in enumerate(samples(split))}
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return Written(folder, found["train"], found["val"])


def put_tar(file: Path, contents: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> None:
    """A tar file of these members, as the standard library writes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=form) as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_webdataset(folder: Path) -> Written:
    """Shards with numbers in .cls, or in .json beside what is no image, in each of tar's forms; names in a file."""
    found: dict[str, dict[str, tuple[int, np.ndarray]]] = {"train": {}, "val": {}}
    forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    for split, images in found.items():
        contents = list[dict[str, bytes]]()
        for label, index, pixels in samples(split):
            key = f"{CLASSES[label]}/{CLASSES[label]}_{index}" + "-and-so-on" * (10 * (label == 2))
            told = (
                {"cls": f"{label}\n"}
                if split == "train"
                else {"json": json.dumps({"label": label}), "txt": "a caption"}
            )
            images[f"{split}/{key}.png"] = (label, pixels)
            contents.append({f"{key}.{suffix}": text.encode() for suffix, text in told.items()})
            contents[-1][f"{key}.PNG"] = png(pixels)
        for shard, part in enumerate((contents[:4], contents[4:7], contents[7:])):
            names = {name: content for sample in part for name, content in sample.items()}
            form = forms[(shard + 1) % 3] if shard < 2 else tarfile.PAX_FORMAT
            put_tar(folder / "shards" / f"{split}-{shard:06d}.tar", names, form)
    (folder / "shards" / "classnames.txt").write_text("\n".join(CLASSES))
    return Written(folder, found["train"], found["val"])


def write_metadata(folder: Path) -> Written:
    """Hugging Face's imagefolder: metadata.csv beside each split's images, JSON lines for the other one."""
    written = write_tree(folder, lambda split, name, i: f"{split}/{name}_{i}.png")
    for split, images in (("train", written.train), ("val", written.test)):
        rows = [{"file_name": Path(key).name, "label": CLASSES[label]} for key, (label, _) in images.items()]
        lines = (
            [json.dumps(row) for row in rows]
            if split == "val"
            else ["file_name,label", *(",".join(r.values()) for r in rows)]
        )
        (folder / split / f"metadata.{'jsonl' if split == 'val' else 'csv'}").write_text("\n".join(lines))
    return written


def write_labels_csv(folder: Path) -> Written:
    """images/ and a table of all of them, with a column that says the split."""
    written = write_tree(folder, lambda split, name, i: f"images/{split}_{name}_{i}.png")
    rows = [
        f"{Path(key).name},{CLASSES[label]},{split}"
        for split, images in (("train", written.train), ("val", written.test))
        for key, (label, _) in images.items()
    ]
    (folder / "labels.csv").write_text("filename,label,split\n" + "\n".join(rows))
    return written


def write_kaggle(folder: Path) -> Written:
    """ImageNet as Kaggle's competition lays it out, boxes and all."""
    data = folder / "ILSVRC" / "Data" / "CLS-LOC"
    written = write_tree(
        data, lambda split, name, i: f"val/v_{name}_{i}.JPEG" if split == "val" else f"train/{name}/{i}.JPEG"
    )
    rows = [f"{Path(key).stem},{CLASSES[label]} 85 1 499 272 " for key, (label, _) in written.test.items()]
    (folder / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(reversed(rows)))
    return Written(folder, written.train, {key: written.test[key] for key in reversed(written.test)})


def write_idx(folder: Path, place: str = ".", *, packed: bool = False) -> dict[str, np.ndarray]:
    """MNIST's own files: 8 training and 4 test images of 4 classes; the pixels by split."""
    rng, pixels = np.random.default_rng(0), {}
    for split, count in (("train", 8), ("t10k", 4)):
        images, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 4
        for name, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
            content = np.array([magic, *array.shape], ">u4").tobytes() + array.tobytes()
            file = folder / place / f"{split}-{name}-ubyte{'.gz' if packed else ''}"
            put(file, gzip.compress(content) if packed else content)
        pixels[split] = images
    return pixels


def write_flat_imagenet(folder: Path, *, named: bool = False) -> list[str]:
    """ImageNet's validation images as they are distributed, nine of three wnids, and a list of these; the names."""
    wnids = ["n00000007", "n00000003", "n00000005"] * 3
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 10)]
    for i, name in enumerate(names):
        put(folder / "val" / name, png(image_of("val", i % 3, i)))
    pairs = zip(names, wnids, strict=True)
    (folder / "labels.txt").write_text("\n".join(f"{name} {wnid}" if named else wnid for name, wnid in pairs))
    return names


FORMATS: dict[str, Write] = {
    "class folders": write_class_folders,
    "nested folders": write_nested_folders,
    "Tiny-ImageNet": write_tiny_imagenet,
    "Hugging Face": write_hugging_face,
    "shards": write_shards,
    "other names": write_other_names,
    "other columns": write_other_columns,
    "paths in parquet": write_paths_in_parquet,
    "saved to disk": write_saved_to_disk,
    "WebDataset": write_webdataset,
    "metadata": write_metadata,
    "labels.csv": write_labels_csv,
    "Kaggle": write_kaggle,
}
