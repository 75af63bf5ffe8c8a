"""Checkpoint files from anywhere, read without running anything of theirs.

safetensors as they are; torch files with ``weights_only=True`` first. Training files often carry more than weights
(argparse Namespace, OmegaConf, Lightning's hyper-parameters, numpy scalars, optimisers), which that mode refuses:
they are read again by an unpickler that knows how to rebuild tensors and nothing else, and that puts an inert Stub in
the place of every other class or function. A pickle that names something only an attack needs is refused outright.
"""

from __future__ import annotations

import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coss_eval.errors import CossError

METADATA = "__metadata__"  # where a safetensors file keeps its text entries, in the file's own header and in our dict

ZIP, PICKLE = b"PK\x03\x04", b"\x80"

# What only an attack needs. Nothing of it would run as a Stub either, but such a file deserves no trust at all.
# getattr is not here: some Python versions pickle enum members and bound methods with it.
# fmt: off
HOSTILE_MODULES = {
    "_posixsubprocess", "_winapi", "bdb", "code", "codeop", "commands", "ctypes", "importlib", "marshal",
    "multiprocessing", "nt", "os", "pdb", "pickle", "pip", "posix", "pty", "pydoc", "runpy", "shutil", "socket",
    "subprocess", "sys", "timeit", "webbrowser",
}
HOSTILE_BUILTINS = {
    "__import__", "breakpoint", "compile", "delattr", "eval", "exec", "execfile", "input", "open", "setattr",
}
HOSTILE_NAMES = {
    "_io.FileIO", "_io.open", "io.FileIO", "io.open", "torch.hub", "torch.jit.load", "torch.load", "torch.package",
    "torch.serialization.load", "torch.utils.cpp_extension",
}
# fmt: on


class HostileCheckpoint(CossError):
    """The file's pickle asks for something that would run code; it was not run."""


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """What a checkpoint file holds, on the CPU: nested dicts of tensors, with Stubs where foreign objects were.

    Large files are memory-mapped where their format allows. Errors: CossError, one line, for a missing file, a
    truncated one, one that is no checkpoint, and HostileCheckpoint for a pickle that would run code.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        inside = path / "model.safetensors"  # of a training run
        wanted = inside if inside.is_file() else "the file itself"
        what = f"is a folder: give {wanted}" if path.is_dir() else "does not exist"
        raise CossError(f"checkpoint {path} {what}")
    with path.open("rb") as file:
        start = file.read(16)
    if path.suffix == ".safetensors" or start[8:10] == b'{"':
        return _read_safetensors(path)
    if not start.startswith((ZIP, PICKLE)):
        _refuse_format(path, start)
    content = _read_torch(path, start.startswith(ZIP))
    if isinstance(content, Stub):
        content = {"state_dict": content}  # a whole pickled module, or nothing of use
    if not isinstance(content, dict):
        raise CossError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors (a state dict)")
    items = dict.items(content)  # a pickle can give an OrderedDict an attribute of the name "items"
    try:
        return {str(key): _module_state(value) if isinstance(value, Stub) else value for key, value in items}
    except RecursionError as error:
        raise CossError(f"{path} holds itself, so it is no checkpoint of a network") from error


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sources and storages of classes that are not loaded anyway
            try:
                return torch.load(path, weights_only=True, **options)
            except pickle.UnpicklingError:
                return torch.load(path, weights_only=False, pickle_module=INERT_PICKLE, **options)
    except HostileCheckpoint as error:
        raise HostileCheckpoint(f"{path} {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way: each is the file's fault, none is ours
        if "TorchScript" in str(error):
            raise CossError(f"{path} is a TorchScript archive (code): save the module's state_dict instead") from error
        if "magic number" in str(error):
            raise CossError(f"{path} is a pickle that torch.save did not write; save it with torch.save") from error
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
    if start.startswith(b"version https://"):
        raise CossError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull`")
    if tarfile.is_tarfile(path):
        raise CossError(f"{path} is a tar archive: unpack it and give the checkpoint inside")
    raise CossError(f"{path} is not a checkpoint: expected a torch file or .safetensors, it starts with {start!r}")


class Stub:
    """Stands for an object of a class that is not loaded: takes whatever a pickle does to it, and does nothing.

    ``state`` is what the pickle would have given the object: a dict of its attributes, as a rule.
    """

    dump_patches = False  # torch asks it of classes in files from before 1.6
    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Stub:
        return Stub()

    def __setstate__(self, state: Any) -> None:
        object.__setattr__(self, "state", state)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    extend = add = append

    def __repr__(self) -> str:
        return f"<stub for {type(self).__module__}.{type(self).__qualname__}>"


class PlainDict(dict[Any, Any]):
    """Stands for OrderedDict: a dict without attributes, so that a pickle can replace none of its methods."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass  # a state dict's _metadata, of no use here


class _Rebuild:
    """A function that a pickle may call but not change: without attributes of its own, and no state to set."""

    __slots__ = ("_function",)

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("a pickle tried to change a function")


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_grad_and_hooks: Any) -> Tensor:
    return _view(storage.dtype, storage, offset, size, stride)


def _tensor_of_dtype(storage: Any, offset: int, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any) -> Tensor:
    """Of the dtypes without a storage class of their own (float8, uint16, ...)."""
    return _view(dtype, storage, offset, size, stride)


def _view(dtype: Any, storage: Any, offset: int, size: Any, stride: Any) -> Tensor:
    return torch.empty((0,), dtype=dtype).set_(storage._untyped_storage, offset, tuple(size), tuple(stride))


class _ByteStorage:
    """Stands for torch.UntypedStorage, which a pickle names as the storage of the newer dtypes."""

    __slots__ = ()
    dtype = torch.uint8

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("a pickle tried to change a storage type")


# All that the reader ever calls. Nothing may join this table that can reach a file, an attribute by name, or code.
REBUILDERS: dict[str, Any] = {
    "torch._utils._rebuild_tensor": _Rebuild(_tensor),
    "torch._utils._rebuild_tensor_v2": _Rebuild(_tensor),
    "torch._utils._rebuild_tensor_v3": _Rebuild(_tensor_of_dtype),
    "torch._utils._rebuild_parameter": _Rebuild(lambda data, *_: data),
    "torch._utils._rebuild_parameter_with_state": _Rebuild(lambda data, *_: data),
    "torch._tensor._rebuild_from_type_v2": _Rebuild(lambda rebuild, _type, args, _state: rebuild(*args)),
    "torch.storage.UntypedStorage": _ByteStorage(),
    "torch.Size": _Rebuild(lambda sizes=(): tuple(sizes)),
}


class InertUnpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers; every other global is a new Stub class, looked up nowhere."""

    def find_class(self, module: str, name: str) -> Any:
        if _is_hostile(module, name):
            raise HostileCheckpoint(f"would run {module}.{name} if it were trusted; nothing was run, do not load it")
        full_name = f"{module}.{name}"
        if full_name in REBUILDERS:
            return REBUILDERS[full_name]
        if full_name == "collections.OrderedDict":
            return PlainDict
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name.rpartition(".")[2], (Stub,), {"__module__": module})


def _load(file: Any, **options: Any) -> Any:
    return InertUnpickler(file, **options).load()


INERT_PICKLE = SimpleNamespace(__name__="inert_pickle", Unpickler=InertUnpickler, load=_load)
"""What torch.load takes for a pickle module."""


def _is_hostile(module: str, name: str) -> bool:
    if module in ("builtins", "__builtin__"):
        return name in HOSTILE_BUILTINS
    if module.partition(".")[0] in HOSTILE_MODULES:
        return True
    return any(f"{module}.{name}.".startswith(f"{hostile}.") for hostile in HOSTILE_NAMES)


def _module_state(stub: Stub) -> Any:
    """The state dict of a whole pickled nn.Module, read off its stubs; the stub itself where it was none."""
    state = stub.state
    if not isinstance(state, Mapping) or not isinstance(state.get("_modules"), Mapping):
        return stub
    tensors: dict[str, Any] = {}
    for group in ("_parameters", "_buffers"):
        tensors |= {key: value for key, value in (state.get(group) or {}).items() if isinstance(value, Tensor)}
    for name, child in state["_modules"].items():
        inner = _module_state(child) if isinstance(child, Stub) else None
        if isinstance(inner, Mapping):
            tensors |= {f"{name}.{key}": value for key, value in inner.items()}
    return tensors
