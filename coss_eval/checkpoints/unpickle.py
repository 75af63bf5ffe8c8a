"""Pickles from anywhere, read without running anything of theirs.

The unpickler knows how to rebuild tensors and arrays and nothing else, and puts an inert Stub in the place of every
other class or function. A pickle that names something only an attack needs is refused outright.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from coss_eval.errors import CossError

# What only an attack needs. Nothing of it would run as a Stub either, but such a file deserves no trust at all.
# getattr is not here: some Python versions pickle enum members and bound methods with it.
# fmt: off
HOSTILE_MODULES = {
    "_posixsubprocess", "_winapi", "bdb", "codeop", "ctypes", "importlib", "marshal",
    "multiprocessing", "nt", "os", "pdb", "pickle", "pip", "posix", "pty", "pydoc", "runpy", "shutil", "socket",
    "subprocess", "sys", "timeit", "webbrowser",
}
HOSTILE_BUILTINS = {
    "__import__", "breakpoint", "compile", "delattr", "eval", "exec", "execfile", "input", "open", "setattr",
}
HOSTILE_NAMES = {  # people have packages called "code" and "commands", too
    "code.InteractiveConsole", "code.InteractiveInterpreter", "code.compile_command", "code.interact",
    "commands.getoutput", "commands.getstatus", "commands.getstatusoutput",
    "_io.FileIO", "_io.open", "io.FileIO", "io.open", "torch.hub", "torch.jit.load", "torch.load", "torch.package",
    "torch.serialization.load", "torch.utils.cpp_extension",
}
# fmt: on


MOST_PLACES = 1000  # of one container in a checkpoint: a shared block, a teacher that is its student


class HostileCheckpoint(CossError):
    """The file's pickle asks for something that would run code; it was not run."""


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


class Rebuild:
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


class _PickledArray:
    """Stands for a numpy array that a pickle rebuilds: empty until its state comes, then made of its bytes alone."""

    __slots__ = ("tensor",)

    def __init__(self, *_: Any) -> None:
        self.tensor: Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.tensor = _of_bytes(content, dtype, shape, fortran=bool(fortran))


class _Dtype:
    """Stands for numpy.dtype: its text, and the byte order that its state sets."""

    __slots__ = ("_little", "_text")

    def __init__(self, text: Any = "", *_: Any) -> None:
        self._text, self._little = str(text), True

    def __setstate__(self, state: Any) -> None:
        self._little = state[1] != ">"

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self._text).newbyteorder("<" if self._little else ">")


def _of_bytes(content: Any, dtype: Any, shape: Any, *, fortran: bool) -> Tensor | None:
    """The array as a tensor; None for one of objects, text or dates, which is no weight."""
    if not isinstance(content, bytes | bytearray) or not isinstance(dtype, _Dtype):
        return None
    return tensor_of(content, dtype.numpy, tuple(shape), fortran=fortran)


def tensor_of(content: bytes | bytearray, dtype: np.dtype[Any], shape: Any, *, fortran: bool) -> Tensor | None:
    """A copy of an array's bytes as a tensor, in this machine's byte order; None where torch has no such numbers."""
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        return None
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(np.array(array, dtype=dtype.newbyteorder("="), order="C"))


# All that the reader ever calls. Nothing may join this table that can reach a file, an attribute by name, or code.
REBUILDERS: dict[str, Any] = {
    "torch._utils._rebuild_tensor": Rebuild(_tensor),
    "torch._utils._rebuild_tensor_v2": Rebuild(_tensor),
    "torch._utils._rebuild_tensor_v3": Rebuild(_tensor_of_dtype),
    "torch._utils._rebuild_parameter": Rebuild(lambda data, *_: data),
    "torch._utils._rebuild_parameter_with_state": Rebuild(lambda data, *_: data),
    "torch._tensor._rebuild_from_type_v2": Rebuild(lambda rebuild, _type, args, _state: rebuild(*args)),
    "torch.storage.UntypedStorage": _ByteStorage(),
    "torch.Size": Rebuild(lambda sizes=(): tuple(sizes)),
}
ARRAYS: dict[str, Any] = {
    f"{package}.{name}": rebuild
    for package in ("numpy.core", "numpy._core")
    for name, rebuild in (
        ("multiarray._reconstruct", Rebuild(lambda *_: _PickledArray())),
        ("numeric._frombuffer", Rebuild(lambda data, dtype, shape, order: _filled(data, dtype, shape, order))),
    )
} | {
    "numpy.ndarray": Stub,
    "numpy.dtype": Rebuild(_Dtype),
    "_codecs.encode": Rebuild(lambda text, _encoding: text.encode("latin1")),  # bytes, in the older protocols
}
"""What numpy's arrays are rebuilt with."""


def _filled(content: Any, dtype: Any, shape: Any, order: Any) -> _PickledArray:
    """An array of a pickle of protocol 5."""
    array = _PickledArray()
    array.tensor = _of_bytes(content, dtype, shape, fortran=order == "F")
    return array


class InertUnpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers; every other global is a new Stub class, looked up nowhere."""

    @staticmethod
    def refuse_hostile(module: str, name: str) -> None:
        """HostileCheckpoint for what only an attack names."""
        if _is_hostile(module, name):
            raise HostileCheckpoint(f"would run {module}.{name} if it were trusted; nothing was run, do not load it")

    def find_class(self, module: str, name: str) -> Any:
        self.refuse_hostile(module, name)
        full_name = f"{module}.{name}"
        known = REBUILDERS | ARRAYS
        if full_name in known:
            return known[full_name]
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


def plain(value: Any) -> Any:
    """A rebuilt array as its tensor, a pickled module as its state dict, anything else as it is.

    Raises RecursionError for a module that holds itself, CossError for one that is held at more places than any is.
    """
    if isinstance(value, _PickledArray):
        return value.tensor
    if isinstance(value, Stub):
        return _module_state(value, Visits())
    return value


class Visits:
    """How often each container has been entered. A pickle of a few bytes can name one twice at every depth."""

    def __init__(self) -> None:
        self._counts = Counter[int]()

    def enter(self, container: object) -> None:
        """CossError where it is there more often than in any checkpoint of a network."""
        self._counts[id(container)] += 1
        if self._counts[id(container)] > MOST_PLACES:
            raise CossError(
                f"it has one of its entries at more than {MOST_PLACES:,} places: no checkpoint of a network"
            )


def _module_state(stub: Stub, visits: Visits) -> Any:
    """The state dict of a whole pickled nn.Module, read off its stubs; the stub itself where it was none."""
    state = stub.state
    if not isinstance(state, Mapping) or not isinstance(state.get("_modules"), Mapping):
        return stub
    visits.enter(stub)
    tensors: dict[str, Any] = {}
    for group in (state.get("_parameters"), state.get("_buffers")):
        if isinstance(group, Mapping):
            tensors |= {key: value for key, value in group.items() if isinstance(value, Tensor)}
    for name, child in state["_modules"].items():
        inner = _module_state(child, visits) if isinstance(child, Stub) else None
        if isinstance(inner, Mapping):
            tensors |= {f"{name}.{key}": value for key, value in inner.items()}
    return tensors
