"""A torch file or a pickle looked through before it is loaded: what it says of its sizes, against the file's own.

Python's own slow unpickler goes through the pickle with stubs in the place of all that it names, and makes no tensor.
It refuses what would cost the fast one without bound: storages larger than what is stored, texts longer than the file,
places in its memory that the file has no room to fill, and keys that take ages to hash.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, ClassVar

import torch

from coss_eval.checkpoints.unpickle import HostileCheckpoint, InertUnpickler, Rebuild, Stub

MOST_IN_A_KEY = 1000  # parts of a tuple that is a dictionary's key; (x, x) of (x, x) ... has 2^n
MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that a torch file from before the zip format begins with
HEADS_OF_OLD_FILES = 3  # pickles before the content in a torch file from before the zip format
ITEMSIZES = {"Double": 8, "Long": 8, "ComplexFloat": 8, "ComplexDouble": 16, "Float": 4, "Int": 4} | {
    "Half": 2,
    "BFloat16": 2,
    "Short": 2,
}  # bytes, by the names of torch's storages; others have one a number
_Slow: Any = pickle._Unpickler  # type: ignore[attr-defined]  # in every CPython; not in its stubs


class FalseSize(ValueError):
    """The file is not what it says of its parts."""


def screen_zip(file: BinaryIO) -> None:
    """The records of a torch file: each once, whole, and as large as its pickle says. FalseSize where not."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        names = [info.filename.lower() for info in infos]  # torch looks names up in any case
        if len(set(names)) < len(names):
            raise FalseSize("it holds a record twice: which of the two counts depends on the reader")
        sizes = {info.filename.partition("/data/")[2]: info.file_size for info in infos}
        place = next(info for info in infos if info.filename.rpartition("/")[2] == "data.pkl")
        content = archive.read(place)
        _Screen(io.BytesIO(content), len(content), sizes.get).load()
        # files whose sums were not computed when they were written have none (torch.serialization.set_crc32_options)
        summed = [info for info in infos if info.CRC or not info.file_size]
        for info in summed:
            _check_sum(archive, info)


def _check_sum(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    try:
        with archive.open(info) as record:
            while record.read(2**22):
                pass
    except zipfile.BadZipFile as error:
        raise FalseSize(f"{info.filename} in it does not match its checksum") from error


def screen_pickle(file: BinaryIO, size: int, *, of_torch: bool) -> None:
    """A plain pickle of ``size`` bytes, or a torch file from before the zip format. FalseSize or pickle's errors."""
    for _ in range(HEADS_OF_OLD_FILES if of_torch else 0):
        _Screen(file, size).load()
    stored = _Screen(file, size, lambda _: size)
    stored.load()
    if stored.bytes > size:
        raise FalseSize(f"it says that its tensors take {stored.bytes:,} bytes, which are more than its own {size:,}")


class _Screen(_Slow):  # type: ignore[misc]
    """Goes through a pickle of ``size`` bytes; ``stored`` gives the bytes that there are of a storage, by its key."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Slow.dispatch)

    def __init__(self, file: BinaryIO, size: int, stored: Callable[[str], int | None] = lambda _: None) -> None:
        super().__init__(_Bounded(file, size))
        self._size, self._stored, self._seen, self.bytes = size, stored, set[str](), 0

    def find_class(self, module: str, name: str) -> Any:
        InertUnpickler.refuse_hostile(module, name)
        return type(name.rpartition(".")[2] or "nameless", (Stub,), {"__module__": module})

    def persistent_load(self, saved: Any) -> Any:
        if not isinstance(saved, tuple) or len(saved) < 5 or saved[0] not in ("storage", b"storage"):
            return Stub()
        kind, key, numel = getattr(saved[1], "__name__", ""), str(saved[2]), saved[4]
        if not isinstance(numel, int) or numel < 0:
            raise pickle.UnpicklingError("a storage without a size")
        wanted, there = numel * ITEMSIZES.get(kind.removesuffix("Storage"), 1), self._stored(key)
        if there is not None and wanted > there:
            raise FalseSize(f"it says that a tensor takes {wanted:,} bytes, of which it holds {there:,}")
        if key not in self._seen:
            self._seen.add(key)
            self.bytes += wanted
        return Stub()

    def _remember(self, place: int) -> None:
        if not 0 <= place <= self._size:
            raise pickle.UnpicklingError(f"it refers to place {place:,} of its memory")
        self.memo[place] = self.stack[-1]

    def load_put(self) -> None:
        self._remember(int(self.readline()[:-1]))

    def load_long_binput(self) -> None:
        self._remember(int.from_bytes(self.read(4), "little"))

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def load_setitem(self) -> None:
        _refuse_heavy(self.stack[-2])
        super().load_setitem()

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            _refuse_heavy(key)
        super().load_setitems()

    def load_dict(self) -> None:
        for key in self.stack[::2]:
            _refuse_heavy(key)
        super().load_dict()

    def load_additems(self) -> None:
        for key in self.stack:
            _refuse_heavy(key)
        super().load_additems()

    def load_frozenset(self) -> None:
        for key in self.stack:
            _refuse_heavy(key)
        super().load_frozenset()


_OWN: Mapping[bytes, Callable[[Any], None]] = {
    pickle.PUT: _Screen.load_put,
    pickle.LONG_BINPUT: _Screen.load_long_binput,
    pickle.BYTEARRAY8: _Screen.load_bytearray8,
    pickle.SETITEM: _Screen.load_setitem,
    pickle.SETITEMS: _Screen.load_setitems,
    pickle.DICT: _Screen.load_dict,
    pickle.ADDITEMS: _Screen.load_additems,
    pickle.FROZENSET: _Screen.load_frozenset,
}
_Screen.dispatch |= {code[0]: load for code, load in _OWN.items()}


def _refuse_heavy(key: Any) -> None:
    """UnpicklingError for a tuple of tuples of tuples: its hash looks at every one of them."""
    left, seen = [key], 0
    while left:
        part = left.pop()
        if isinstance(part, tuple):
            seen += len(part)
            left += part
        if seen > MOST_IN_A_KEY:
            raise pickle.UnpicklingError("it has tuples of tuples as keys, of more parts than any checkpoint has")


class _Bounded:
    """A file that is asked for no more bytes at once than it has in all."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise pickle.UnpicklingError(f"it says that a part of it has {count:,} bytes")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline()

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)  # type: ignore[attr-defined, no-any-return]


class PlainUnpickler(InertUnpickler):
    """For what pickle.dump wrote: its tensors carry their storages along, each a torch file of its own."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return Rebuild(_storage)
        return super().find_class(module, name)


def _storage(content: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the old kind of storages
        try:
            if content.startswith(b"PK"):
                screen_zip(io.BytesIO(content))
            elif content[2:].startswith(MAGIC):
                screen_pickle(io.BytesIO(content), len(content), of_torch=True)
            else:
                raise pickle.UnpicklingError("no torch file")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise HostileCheckpoint(
                "hides other objects in a tensor's numbers; nothing was run, do not load it"
            ) from error
