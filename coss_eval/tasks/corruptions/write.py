"""`coss-eval corruptions --write`: a corrupted copy of a test split, laid out as the published benchmarks are.

npy      NAME.npy, uint8 (5 N, H, W, 3) with the severities one after the other, and labels.npy, as CIFAR-10-C has them
folders  NAME/SEVERITY/CLASS/file.png, as ImageNet-C and Tiny-ImageNet-C; PNG and not their JPEG of quality 85, so that
         the files hold the very pixels that are evaluated on the fly

What is finished has its final name; what a killed process left is made again by the same call.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from coss_eval import __version__
from coss_eval.corruptions import corrupt, resolve_table
from coss_eval.corruptions.names import SEVERITIES
from coss_eval.data.batches import Geometry
from coss_eval.data.benchmark import Benchmark
from coss_eval.data.dataset import Dataset
from coss_eval.data.decode import Size
from coss_eval.data.formats.corrupted import KEYS, MANIFEST
from coss_eval.data.images import Pixels
from coss_eval.data.split import Split
from coss_eval.errors import CossError, UsageError
from coss_eval.runtime.background import in_background
from coss_eval.runtime.disk import Lock, remove_leftovers, replacing, write_atomically
from coss_eval.tasks.corruptions.task import Corruptions

WrittenAs = Literal["npy", "folders"]
OnProgress = Callable[[int, int, str], None]  # corruptions done, corruptions in all, the one at hand


@dataclass(frozen=True)
class Copy:
    """Which images are corrupted, how, and where the copy goes. ``geometry`` is for sets without a native size."""

    data: Dataset
    out: Path
    task: Corruptions
    layout: WrittenAs
    geometry: Geometry
    seed: int = 0
    device: str | torch.device = "cpu"
    batch_size: int = 256

    @cached_property
    def split(self) -> Split:
        """The test split, without images that cannot be read where the dataset was opened to leave them out."""
        split = self.data.test
        if not split.skip_bad_images:
            return split
        readable = [batch.ids.numpy() for batch in split.batches(self.geometry, batch_size=self.batch_size)]
        return split.subset(np.flatnonzero(np.isin(split.ids, np.concatenate(readable))))

    @property
    def size(self) -> Size:
        return self.split.native_size or (self.geometry.size, self.geometry.size)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """All that the pixels depend on; a copy is only gone on with under the same."""
        return {
            "source": self.data.name,
            "fingerprint": self.split.fingerprint,
            "images": len(self.split),
            "limit": self.split.limit,
            "geometry": self.split.protocol(self.geometry),
            "layout": self.layout,
            "table": resolve_table(self.task.table, self.size, self.task.backend),
            "flavour": self.task.flavour,
            "backend": self.task.backend,
            "seed": self.seed,
            "device": torch.device(self.device).type,  # a kind of device has pixels of its own
            **({"code": self._code} if self._code else {}),
        }

    @cached_property
    def _code(self) -> dict[str, str]:
        return {name: found.code for name, found in self.task.corruptions.items() if found.code is not None}

    def pieces(self, name: str, severities: Sequence[int]) -> Iterator[tuple[int, int, Pixels]]:
        """(severity, first row, uint8 (B, H, W, 3)) of one corruption, in the split's order; read once for all."""

        def made() -> Iterator[tuple[int, int, Pixels]]:
            row = 0
            for batch in self.split.batches(self.geometry, batch_size=self.batch_size, skip_bad_images=False):
                images, ids = batch.images.to(self.device), batch.ids.to(self.device)
                for severity in severities:
                    how = {name: self.manifest[name] for name in ("seed", "table", "flavour", "backend")}
                    corrupted = corrupt(images, self.task.corruptions[name], severity, ids, **how)
                    yield severity, row, corrupted.permute(0, 2, 3, 1).contiguous().cpu().numpy()
                row += len(ids)

        return in_background(made())


def write_copy(copy: Copy, on_progress: OnProgress | None = None) -> tuple[int, int]:
    """Write what is missing of a copy; (corruptions written, corruptions that were there).

    Raises UsageError for a folder that holds anything else or a copy made in another way, CossError where an image
    cannot be read, the disk is full or another process writes here.
    """
    _check(copy)
    try:
        copy.out.mkdir(parents=True, exist_ok=True)
        lock = Lock.take(copy.out / ".lock")
        if lock is None:
            raise CossError(f"another process is writing {copy.out}; wait for it")
        try:
            return _write(copy, on_progress)
        finally:
            lock.release()
    except OSError as error:
        raise CossError(f"cannot write {copy.out}: {error}; what is finished is kept, the same call goes on") from error


def _check(copy: Copy) -> None:
    if isinstance(copy.data, Benchmark):
        raise UsageError(f"{copy.data.name} is corrupted already; give a clean dataset to write a corrupted copy of")
    if copy.layout == "npy" and tuple(sorted(copy.task.severities)) != SEVERITIES:
        raise UsageError(
            f"the npy layout holds severities 1 to 5, got {list(copy.task.severities)}; use --layout folders"
        )
    odd = [
        name for name in copy.split.classes if name in ("", ".", "..") or "/" in name or name.startswith((".", "__"))
    ]
    if copy.layout == "folders" and odd:
        raise UsageError(f"class {odd[0]!r} cannot be the name of a folder; use --layout npy")
    file = copy.out / MANIFEST
    if not file.is_file():
        if copy.out.exists() and (not copy.out.is_dir() or set(os.listdir(copy.out)) - {".lock"}):
            raise UsageError(f"{copy.out} holds something else already; give a new or empty folder")
        return
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CossError(f"cannot read {file}: {error}; remove the folder, or give another") from error
    for name, value in copy.manifest.items():
        if there.get(name, "cpu" if name == "device" else None) != json.loads(json.dumps(value)):
            raise UsageError(f"{copy.out} was made with {name} {there.get(name)}, not {value}; give another folder")


def _write(copy: Copy, on_progress: OnProgress | None) -> tuple[int, int]:
    if not (copy.out / MANIFEST).is_file():  # last of these, as it says that the others are there
        titles = {name: copy.data.class_titles.get(name, name) for name in copy.split.classes}
        _write_json(copy.out / "classes.json", titles)
        if copy.layout == "npy":
            with replacing(copy.out / "labels.npy") as temporary, open(temporary, "wb") as file:
                np.save(file, np.tile(copy.split.labels, len(SEVERITIES)))
            write_atomically(copy.out / KEYS, "".join(f"{key}\n" for key in copy.split.keys).encode())
        _write_json(copy.out / MANIFEST, copy.manifest | {"made_by": f"coss-eval {__version__}"})
    write = {"npy": _write_array, "folders": _write_folders}[copy.layout]
    written = 0
    for number, name in enumerate(copy.task.corruptions):
        if on_progress is not None:
            on_progress(number, len(copy.task.corruptions), name)
        written += write(copy, name)
    if on_progress is not None:
        on_progress(len(copy.task.corruptions), len(copy.task.corruptions), "done")
    return written, len(copy.task.corruptions) - written


def _write_array(copy: Copy, name: str) -> bool:
    """NAME.npy, if it is not there."""
    target = copy.out / f"{name}.npy"
    if target.exists():
        return False
    remove_leftovers(copy.out, name)
    count = len(copy.split)
    with replacing(target) as temporary:
        shape = (len(SEVERITIES) * count, *copy.size, 3)
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)  # type: ignore[no-untyped-call]
        for severity, row, pixels in copy.pieces(name, SEVERITIES):
            start = (severity - 1) * count + row
            array[start : start + len(pixels)] = pixels
        array.flush()
    return True


def _write_folders(copy: Copy, name: str) -> bool:
    """NAME/SEVERITY/ of those severities that are not there; each gets its name when all of its files are on disk."""
    missing = [severity for severity in copy.task.severities if not (copy.out / name / str(severity)).is_dir()]
    begun = {severity: copy.out / name / f".{severity}.tmp" for severity in missing}
    for folder in begun.values():
        shutil.rmtree(folder, ignore_errors=True)
        for class_name in copy.split.classes:
            (folder / class_name).mkdir(parents=True)
    paths = _file_names(copy.split) if missing else []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for severity, row, pixels in copy.pieces(name, missing) if missing else ():
            files = [begun[severity] / path for path in paths[row : row + len(pixels)]]
            list(pool.map(_save_png, files, pixels))
    if missing:
        os.sync()  # once, where fsync of every file would take minutes
    for severity, folder in begun.items():
        os.rename(folder, folder.with_name(str(severity)))
    return bool(missing)


def _file_names(split: Split) -> list[str]:
    """CLASS/file.png: the image's own name where it is the only one of that name in its class, else all of its key."""
    stems = [
        (split.classes[label], PurePosixPath(key).stem) for label, key in zip(split.labels, split.keys, strict=True)
    ]
    repeated = max(Counter(stems).values(), default=0) > 1
    names = [key.replace("/", "_") for key in split.keys] if repeated else [stem for _, stem in stems]
    return [f"{class_name}/{name}.png" for (class_name, _), name in zip(stems, names, strict=True)]


def _save_png(file: Path, pixels: Pixels) -> None:
    Image.fromarray(pixels).save(file, compress_level=1)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_atomically(file, (json.dumps(content, indent=1) + "\n").encode())
