"""Checkpoint files from anywhere to nested dicts of tensors, without running anything of theirs.

safetensors as they are, in shards too; torch files with ``weights_only=True`` first. Training files often carry more
than weights (argparse Namespace, OmegaConf, Lightning's hyper-parameters, numpy scalars, optimisers), which that mode
refuses: they are read again by the inert unpickler. A folder or an archive that holds one checkpoint is that
checkpoint. Every other format is told as what it is.
"""

from __future__ import annotations

import bz2
import difflib
import gzip
import json
import lzma
import math
import os
import pickle
import shutil
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from coss_eval.checkpoints.screening import MAGIC, PlainUnpickler, screen_pickle, screen_zip
from coss_eval.checkpoints.unpickle import INERT_PICKLE, HostileCheckpoint, Stub, plain, tensor_of
from coss_eval.errors import CossError
from coss_eval.runtime.disk import open_regular, read_text
from coss_eval.runtime.remote import perhaps_remote

METADATA = "__metadata__"  # where a safetensors file keeps its text entries, in the file's own header and in our dict

ZIP, PICKLE, HDF5 = b"PK\x03\x04", b"\x80", b"\x89HDF\r\n\x1a\n"
CHECKPOINTS = (
    ".safetensors",
    ".pth",
    ".pt",
    ".ckpt",
    ".bin",
    ".th",
    ".tar",
    ".pkl",
    ".pickle",
    ".npz",
    ".t7",
    ".model",
)
FIRST = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The names under which the hub and our trainer keep the one network of a folder, in this order."""

MOST_UNPACKED = 50  # times its packed size that an archive may unpack to, beyond FREE: weights do not shrink so far
FREE = 2**28  # bytes
MOST_MEMBERS = 10_000  # of an archive
EXPORT = "save the network's state dict with torch.save(network.state_dict(), FILE) and give that"
OWN_CODE = "with --arch package.module:factory if the network is not recognised"

FORMATS: dict[str, tuple[str, str]] = {
    "TorchScript": (
        "a TorchScript archive (code and weights)",
        "export its weights with torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), 'state.pth') and "
        f"give that, {OWN_CODE}",
    ),
    "pt2": (
        "a program that torch.export wrote (code and weights)",
        "export its weights with torch.save(dict(torch.export.load(FILE).state_dict), 'state.pth') and give that, "
        + OWN_CODE,
    ),
    "package": ("a torch.package archive (code and weights)", f"{EXPORT}, {OWN_CODE}"),
    "ONNX": ("an ONNX file (a graph and weights)", f"in the code it was exported from, {EXPORT}, {OWN_CODE}"),
    "HDF5": (
        "an HDF5 file (as Keras and TensorFlow write weights)",
        f"convert it to PyTorch (timm and Hugging Face have most networks' weights), {EXPORT}, {OWN_CODE}",
    ),
    "Keras": (
        "a Keras archive",
        f"convert it to PyTorch (timm and Hugging Face have most networks' weights), {EXPORT}, {OWN_CODE}",
    ),
    "TensorFlow": ("TensorFlow's or JAX's", f"convert it to PyTorch, {EXPORT}, {OWN_CODE}"),
    "npy": ("one array of numpy", "save a network's arrays together with numpy.savez(FILE, **arrays), or torch.save"),
    "GGUF": ("a GGUF file (quantised weights)", "give the PyTorch weights it was made from"),
    "gzip": ("compressed with gzip", "unpack it (gunzip) and give what is inside"),
    "7z": ("a 7z or rar archive", "unpack it and give the checkpoint inside"),
    "image": ("an image", "give the network's weights here, and images as --data"),
    "HTML": ("a web page, saved in place of the file", "download the file itself (its 'raw' or 'download' link)"),
    "git-lfs": ("a git-lfs pointer, not the file itself", "run `git lfs pull`"),
}
_STARTS = (
    (HDF5, "HDF5"),
    (b"GGUF", "GGUF"),
    (b"\x93NUMPY", "npy"),
    (b"\x1f\x8b", "gzip"),
    (b"7z\xbc\xaf", "7z"),
    (b"Rar!", "7z"),
    (b"\x89PNG", "image"),
    (b"\xff\xd8\xff", "image"),
    (b"<!DOCTYPE", "HTML"),
    (b"<!doctype", "HTML"),
    (b"<html", "HTML"),
    (b"version https://", "git-lfs"),
)
_SUFFIXES = {
    ".onnx": "ONNX",
    ".h5": "HDF5",
    ".hdf5": "HDF5",
    ".keras": "Keras",
    ".pb": "TensorFlow",
    ".tflite": "TensorFlow",
    ".msgpack": "TensorFlow",
    ".gguf": "GGUF",
    ".pt2": "pt2",
}


@contextmanager
def checkpoint_file(path: Path | str) -> Iterator[Path]:
    """The file to read: ``path`` itself, the one checkpoint in a folder, or one unpacked from an archive while open.

    Errors: CossError, one line, for what is missing, for a folder or an archive with none or several, and for one that
    would unpack to far more than its size.
    """
    path = _inside(Path(path).expanduser())
    with tempfile.TemporaryDirectory() as temporary:
        members = _zipped(path) or _tarred(path)
        if members:
            _unpack(path, Path(temporary))
        yield _chosen(Path(temporary), path) if members else path


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """What a checkpoint file holds, on the CPU: nested dicts of tensors, with Stubs where foreign objects were.

    Large files are memory-mapped where their format allows. Errors: CossError, one line, for a missing file, a
    truncated one, one that is no checkpoint, and HostileCheckpoint for a pickle that would run code.
    """
    with checkpoint_file(path) as file:
        return read_file(file)


def read_file(path: Path) -> dict[str, Any]:
    """``read_checkpoint`` of a file that ``checkpoint_file`` gave."""
    start = _start(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors" or start[8:10] == b'{"':
        return _read_safetensors(path)
    if _is_npz(path):
        return _read_npz(path)
    if not start.startswith((ZIP, PICKLE)):
        _refuse_format(path, start)
    of_torch = start.startswith(ZIP) or start[2:].startswith(MAGIC)
    content = _read_torch(path, start.startswith(ZIP)) if of_torch else _read_pickle(path)
    if isinstance(content, Stub):
        content = {"state_dict": content}  # a whole pickled module, or nothing of use
    if isinstance(content, list | tuple):
        content = {str(number): value for number, value in enumerate(content)}
    if not isinstance(content, dict):
        raise CossError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors (a state dict)")
    items = dict.items(content)  # a pickle can give an OrderedDict an attribute of the name "items"
    try:
        return {_text(key): plain(value) for key, value in items}
    except RecursionError as error:
        raise CossError(f"{path} holds itself, so it is no checkpoint of a network") from error


def _text(key: Any) -> str:
    """A key as text; Python writes no integers of thousands of digits."""
    return f"an integer of {key.bit_length():,} bits" if isinstance(key, int) and key.bit_length() > 64 else str(key)


def _inside(path: Path) -> Path:
    """A file as it is; of a folder, the one checkpoint in it."""
    if path.is_file():
        return path
    if not path.is_dir():
        if os.path.lexists(path):
            raise CossError(f"checkpoint {path} is no regular file but a pipe, a device or a link that leads nowhere")
        raise CossError(f"checkpoint {path} does not exist{_near(path) or perhaps_remote(str(path))}")
    return _chosen(path, path)


def _near(path: Path) -> str:
    """The end of a message on a file that is not there: the names in its folder that are most like its own."""
    inside = [file.name for file in path.parent.iterdir() if file.exists()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, inside, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _chosen(folder: Path, source: Path) -> Path:
    """The one checkpoint in a folder, or at any depth of what was unpacked from ``source``."""
    for name in FIRST:
        if (folder / name).is_file():
            return folder / name
    files = folder.iterdir() if folder == source else folder.rglob("*")
    found = sorted(file for file in files if file.is_file() and _may_be_checkpoint(file.name))
    if len(found) == 1:
        return found[0]
    kind = "a folder" if folder == source else "an archive"
    names = [file.relative_to(folder).as_posix() for file in found]
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    if not found:
        usual = ", ".join(CHECKPOINTS[:4])
        raise CossError(f"{source} is {kind} that holds no checkpoint: give the file of the weights ({usual} ...)")
    unpack = "" if folder == source else "unpack it and "
    raise CossError(f"{source} is {kind} that holds several checkpoints ({shown}): {unpack}give the file itself")


def _may_be_checkpoint(name: str) -> bool:
    return name.lower().endswith(CHECKPOINTS) and not name.startswith((".", "optimizer", "training_args", "rng_state"))


def _start(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(16)


def _zipped(path: Path) -> bool:
    """Whether a file is a plain zip archive of other files, none of torch's or numpy's own; CossError for a program."""
    infos = _members(path)
    names = [info.filename for info in infos]
    _refuse_bomb(path, sum(info.file_size for info in infos))
    _refuse_crowd(path, 0 if any(name.endswith("data.pkl") for name in names) else len(names))
    if any(name.endswith("/constants.pkl") or name == "constants.pkl" for name in names):
        _refuse(path, "TorchScript")
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        _refuse(path, "pt2")
    if any(name.endswith((".data/extern_modules", ".data/python_version")) for name in names):
        _refuse(path, "package")
    if any(name.endswith("model.weights.h5") for name in names):
        _refuse(path, "Keras")
    return bool(names) and not _is_npz(path) and not any(PurePosixPath(name).name == "data.pkl" for name in names)


def _is_npz(path: Path) -> bool:
    """Whether all that a zip archive holds are arrays."""
    names = [info.filename for info in _members(path)]
    return bool(names) and all(name.endswith(".npy") for name in names)


def _members(path: Path) -> list[zipfile.ZipInfo]:
    """What a zip archive holds; nothing where it is none, or a damaged one (reading it says so)."""
    if not _start(path).startswith(ZIP):
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except zipfile.BadZipFile:
        return []


def _tarred(path: Path) -> bool:
    if path.suffix in (".safetensors", ".json"):
        return False
    try:
        with _tar(path):
            return True
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError):
        return False


@contextmanager
def _tar(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar archive, packed or not, to read. Raises what its readers do, and CossError for headers of megabytes."""
    start = _start(path)
    openers: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
    unpack = next((unpack for magic, unpack in openers.items() if start.startswith(magic)), nullcontext)
    with open_regular(path) as packed, unpack(packed) as unpacked:
        steps: Any = _InSteps(unpacked, path)
        with tarfile.open(fileobj=steps, mode="r:") as tar:
            yield tar


class _InSteps:
    """An unpacked archive, of which no more is read at once than STEP: headers are read whole, however large they say
    that they are."""

    STEP = 2**20

    def __init__(self, file: Any, path: Path) -> None:
        self.seek, self.tell, self.name = file.seek, file.tell, str(path)
        self._read, self._path = file.read, path

    def read(self, count: int) -> bytes:
        if count > self.STEP:
            raise CossError(
                f"{self._path} would unpack to a header of {count:,} bytes: it is no archive of a checkpoint"
            )
        content: bytes = self._read(count)
        return content


def _unpack(path: Path, folder: Path) -> None:
    """Every regular file of an archive into a folder, under no name that leads out of it."""
    try:
        if _start(path).startswith(ZIP):
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)
            return
        with _tar(path) as tar:
            total = 0
            for number, member in enumerate(tar):
                total += member.size
                _refuse_bomb(path, total)
                _refuse_crowd(path, number)
                if member.isfile():
                    _unpack_member(path, tar, member, folder)
    except CossError:
        raise
    except Exception as error:  # a damaged archive can fail in any way: each is the file's fault, none is ours
        raise _damaged(path, error) from error


def _unpack_member(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """One regular file, written by us, as Python before 3.11.4 has no filters that keep links and modes out."""
    target = (folder / member.name.lstrip("/")).resolve()
    content = tar.extractfile(member)
    if content is None or not target.is_relative_to(folder.resolve()):
        raise CossError(
            f"{path} holds {member.name!r}, which leads out of it: unpack it and give the checkpoint itself"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with content, target.open("wb") as file:
        shutil.copyfileobj(content, file)


def _refuse_bomb(path: Path, unpacked: int) -> None:
    size = path.stat().st_size
    if unpacked > max(FREE, MOST_UNPACKED * size):
        grows = f"{path} ({size:,} bytes) would unpack to {unpacked:,} bytes or more"
        raise CossError(f"{grows}: if you trust it, unpack it and give the file itself")


def _refuse_crowd(path: Path, members: int) -> None:
    if members > MOST_MEMBERS:
        raise CossError(f"{path} holds more than {MOST_MEMBERS:,} files: unpack it and give the checkpoint itself")


def _read_shards(index: Path) -> dict[str, Any]:
    """The tensors of all files that a Hugging Face index names; they lie beside it."""
    try:
        names = sorted(set(json.loads(read_text(index))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CossError(f"{index} is no index of shards: it names no files for its weights") from error
    content: dict[str, Any] = {}
    for name in names:
        file = index.parent / str(name)
        if file.name.endswith(".index.json"):
            raise CossError(f"{index} names {name}, which is an index itself and no shard")
        if file.parent != index.parent or not file.is_file():
            raise CossError(f"{index} names {name}, which is not beside it; download all of its shards")
        content |= read_file(file)
    content.pop(METADATA, None)
    return content


def _read_npz(path: Path) -> dict[str, Any]:
    """numpy's arrays as tensors; objects and text are left out, and nothing is unpickled."""
    content: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                with archive.open(info) as file:
                    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, fortran, dtype = read[np.lib.format.read_magic(file)](file)
                    if dtype.hasobject:
                        continue
                    data = file.read()
                    if len(data) == math.prod(shape) * dtype.itemsize:
                        content[info.filename.removesuffix(".npy")] = tensor_of(data, dtype, shape, fortran=fortran)
    except Exception as error:  # as with pickles
        raise _damaged(path, error) from error
    return {key: value for key, value in content.items() if value is not None}


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            content: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata()
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    return content | {METADATA: metadata} if metadata else content


def _read_torch(path: Path, is_zip: bool) -> Any:
    try:
        options: dict[str, Any] = {"map_location": "cpu", "mmap": is_zip and _stored_uncompressed(path)}
        with open_regular(path) as file:
            if is_zip:
                screen_zip(file)
            else:
                screen_pickle(file, path.stat().st_size, of_torch=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sources and storages of classes that are not loaded anyway
            try:
                return torch.load(path, weights_only=True, **options)
            except pickle.UnpicklingError:
                return torch.load(path, weights_only=False, pickle_module=INERT_PICKLE, **options)
    except HostileCheckpoint as error:
        raise HostileCheckpoint(f"{path} {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way: each is the file's fault, none is ours
        raise _damaged(path, error) from error


def _read_pickle(path: Path) -> Any:
    """What pickle.dump wrote, not torch.save."""
    try:
        with open_regular(path) as file:
            screen_pickle(file, path.stat().st_size, of_torch=False)
            file.seek(0)
            return PlainUnpickler(file).load()
    except HostileCheckpoint as error:
        raise HostileCheckpoint(f"{path} {error}") from error
    except Exception as error:  # as above
        raise _damaged(path, error) from error


def _stored_uncompressed(path: Path) -> bool:
    """Whether a zip's records lie in the file as they are, as torch writes them; re-zipped ones cannot be mapped."""
    with zipfile.ZipFile(path) as archive:
        return all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


def _damaged(path: Path, error: Exception) -> CossError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    size = path.stat().st_size
    return CossError(f"{path} ({size:,} bytes) is truncated or damaged, copy or download it again: {reason}")


def _refuse_format(path: Path, start: bytes) -> NoReturn:
    if not start:
        raise CossError(f"{path} is empty; expected a torch file or .safetensors")
    for beginning, name in _STARTS:
        if start.lstrip().startswith(beginning):
            _refuse(path, name)
    if path.suffix.lower() in _SUFFIXES:
        _refuse(path, _SUFFIXES[path.suffix.lower()])
    raise CossError(f"{path} is not a checkpoint: expected a torch file or .safetensors, it starts with {start!r}")


def _refuse(path: Path, name: str) -> NoReturn:
    what, way_out = FORMATS[name]
    raise CossError(f"{path} is {what}: {way_out}")
