"""WebDataset: tar files in which neighbours of one name but for the suffix are a sample (KEY.jpg, KEY.cls, KEY.json).

The files are read where they lie. Nothing is unpacked, no link is followed, and what is neither a regular file nor a
folder is refused. One walk over the headers gives an index, kept in the user's cache directory by the files' state.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from coss_eval.data import layouts
from coss_eval.data.dataset import Dataset
from coss_eval.data.digests import SETTLED
from coss_eval.data.formats.columns import LabelTable, of_tables
from coss_eval.data.layouts import ReadOptions
from coss_eval.data.sources import TarMembers, state_of
from coss_eval.errors import CossError, UsageError
from coss_eval.runtime.disk import cache_folder, open_regular, read_text, replacing

CLASS_NAMES = "classnames.txt"  # a class a line, in the labels' order, as CLIP's benchmark keeps them
LABELS = ("cls", "label", "json")  # suffixes; a .json has the label in a field
IMAGES = tuple(suffix.removeprefix(".") for suffix in layouts.IMAGE_SUFFIXES)
MOST_LABEL = 2**20  # bytes of the file with a label
MOST_NAME = 2**16  # bytes of a header that holds a long name

_BLOCK = 512  # bytes: headers are as long, contents are filled up to a multiple
_SAMPLE = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<suffix>[^/]+)")  # webdataset's: up to the name's first dot
_INTEGER = r"^-?\d{1,18}$"
_REFUSED = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"6": "pipe",
    b"S": "sparse file",
}
_SCHEMA = pa.schema(
    {"name": pa.string(), "label": pa.string(), "shard": pa.int64(), "offset": pa.int64(), "size": pa.int64()}
)
_VERSION = 1  # of the index: to be raised when the same files come to give another one


class Member(NamedTuple):
    """A regular file in a tar file: its path there, and where its bytes are."""

    name: str
    offset: int
    size: int


def webdataset(folder: Path, reading: ReadOptions) -> Dataset:
    """WebDataset's shards by split; ``image_column`` and ``label_column`` are suffixes, or a field of the .json."""
    found = layouts.tar_shards(folder)
    return of_tables(folder, {split: _Shards(split, files, folder, reading) for split, files in found.items()}, reading)


class _Shards(LabelTable):
    """The samples of one split's tar files."""

    def __init__(self, split: str, files: Sequence[Path], folder: Path, reading: ReadOptions) -> None:
        self.split, self.file, self._files = split, files[0], files
        self.classes = _class_names(files[0].parent) or _class_names(folder)
        self._index = _index(files, reading)
        without = int((self._index.schema.metadata or {}).get(b"without", b"0"))
        self.notes = (f"{without} samples of {split} have no image and are left out",) if without else ()

    @property
    def values(self) -> list[Any]:
        labels = self._index["label"]
        if pc.all(pc.match_substring_regex(labels, _INTEGER)).as_py() is not False:  # nulls do not count
            labels = labels.cast(pa.int64())
        values: list[Any] = labels.to_pylist()
        return values

    def _source(self) -> TarMembers:
        columns = (self._index[name].to_numpy() for name in ("shard", "offset", "size"))
        return TarMembers(self._files, *columns)

    def _names(self) -> list[str]:
        names = self._index["name"]
        if pc.count_distinct(names).as_py() < len(names):
            return [str(row) for row in range(len(names))]
        found: list[str] = names.to_pylist()
        return found


def _class_names(folder: Path) -> tuple[str, ...]:
    file = folder / CLASS_NAMES
    if not file.is_file():
        return ()
    try:
        names = tuple(line.strip() for line in read_text(file).splitlines())
    except (OSError, ValueError) as error:
        raise CossError(f"cannot read {file}: {error}") from error
    if not names or "" in names or len(set(names)) < len(names):
        raise CossError(f"{file} must name each class once, a line each, in the labels' order")
    return names


def _index(files: Sequence[Path], reading: ReadOptions) -> pa.Table:
    """The samples of tar files in order, by ``_SCHEMA``; from the cache where the files are what they were."""
    before = time.time() - SETTLED
    facts = [_VERSION, reading.image_column, reading.label_column, *(state_of(str(file), before) for file in files)]
    name = hashlib.sha256(json.dumps(facts).encode(errors="surrogateescape")).hexdigest()[:32]
    kept = cache_folder() / f"shards-{name}.parquet"
    with suppress(OSError, ValueError, pa.ArrowException):
        found = pq.read_table(kept, page_checksum_verification=True)
        if found.schema.equals(_SCHEMA):
            os.utime(kept)  # the least recently used go first
            return found
    index = _walked(files, reading)
    if "" not in facts:  # none of them is changing still
        with suppress(OSError):  # a cache that cannot be written only costs time
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as temporary:
                pq.write_table(index, temporary, write_page_checksum=True)
    return index


def _walked(files: Sequence[Path], reading: ReadOptions) -> pa.Table:
    tables, without = [], 0
    how: _How | None = None
    for number, file in enumerate(files):
        rows = []
        try:
            with open_regular(file) as opened:
                for name, sample in _samples(opened.fileno(), file):
                    how = how or _How.of(opened.fileno(), name, sample, reading, file)
                    image = how.image_of(sample)
                    if image is None:
                        without += 1
                        continue
                    label = how.label_of(opened.fileno(), name, sample, file)
                    rows.append((f"{name}.{image}", label, number, sample[image].offset, sample[image].size))
        except OSError as error:
            raise CossError(f"cannot read {file}: {error.strerror}") from error
        columns = list(zip(*rows, strict=True)) or [()] * len(_SCHEMA)
        tables.append(pa.table([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA))
    index = pa.concat_tables(tables)
    if not len(index):
        wanted = f".{reading.image_column}" if reading.image_column else ".jpg, .png or another image"
        raise CossError(
            f"{files[0]} and the shards beside it hold no sample with a {wanted}; expected KEY.jpg, KEY.cls"
        )
    return index.replace_schema_metadata({"without": str(without)})


def _samples(descriptor: int, file: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Key and members by suffix, in lower case, of each sample: of neighbours with one key."""
    key, found = None, dict[str, Member]()
    for member in members(descriptor, file):
        match = _SAMPLE.fullmatch(member.name)
        if match is None:
            continue
        if match["key"] != key:
            if key is not None:
                yield key, found
            key, found = match["key"], {}
        suffix = match["suffix"].lower()
        if suffix in found:
            raise CossError(f"{file} has {key}.{suffix} twice; expected a key of its own for each sample")
        found[suffix] = member
    if key is not None:
        yield key, found


class _How(NamedTuple):
    """Where samples have their image and label: suffixes, and the field of a .json; decided by the first one."""

    images: tuple[str, ...]
    label: str
    field: str | None

    @classmethod
    def of(cls, descriptor: int, key: str, sample: dict[str, Member], reading: ReadOptions, file: Path) -> _How:
        images = (reading.image_column.lower(),) if reading.image_column else IMAGES
        asked = reading.label_column
        if asked is not None and asked.lower() in sample and asked.lower() != "json":
            return cls(images, asked.lower(), None)
        fields = _fields(descriptor, sample["json"], file) if "json" in sample else {}
        if asked is not None:
            if asked not in fields:
                has = ", ".join([*sample, *fields])
                raise UsageError(f"--label-column {asked}: {key} in {file} has no such suffix or field; it has {has}")
            return cls(images, "json", asked)
        label = next((suffix for suffix in LABELS if suffix in sample), None)
        field = next((name for name in layouts.LABEL_COLUMNS if name in fields), None)
        if label is None or (label == "json" and field is None):
            has = ", ".join([*sample, *fields])
            raise CossError(
                f"{key} in {file} has no label (.cls, or a field of .json); it has {has}: give --label-column"
            )
        return cls(images, label, field if label == "json" else None)

    def image_of(self, sample: dict[str, Member]) -> str | None:
        return next((suffix for suffix in self.images if suffix in sample), None)

    def label_of(self, descriptor: int, key: str, sample: dict[str, Member], file: Path) -> str | None:
        """The label as text; None where the sample has none."""
        if (member := sample.get(self.label)) is None:
            return None
        if self.field is None:
            return _text(descriptor, member, file).strip() or None
        value = _fields(descriptor, member, file).get(self.field)
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
            raise CossError(
                f"{self.field} of {key} in {file} is {str(value)[:40]!r}; expected a whole number or a name"
            )
        return None if value is None else str(value)


def _text(descriptor: int, member: Member, file: Path) -> str:
    if member.size > MOST_LABEL:
        raise CossError(f"{member.name} in {file} has {member.size:,} bytes, too many for a label; leave it out")
    try:
        return os.pread(descriptor, member.size, member.offset).decode("utf-8")
    except ValueError as error:
        raise CossError(f"{member.name} in {file} is not UTF-8; expected a label") from error


def _fields(descriptor: int, member: Member, file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(_text(descriptor, member, file))
    except (ValueError, RecursionError) as error:
        raise CossError(f"{member.name} in {file} is not JSON") from error
    return fields if isinstance(fields, dict) else {}


def members(descriptor: int, file: Path) -> Iterator[Member]:
    """The regular files in an opened tar file (POSIX's ustar and pax, GNU's), without their contents.

    Raises CossError for links, devices and the like, for what is no tar file, and for one that ends early. The standard
    library's reader does the same at a tenth of this speed, and takes headers of any length into memory.
    """
    end, offset, named = os.fstat(descriptor).st_size, 0, dict[str, str]()
    while (block := os.pread(descriptor, _BLOCK, offset)) and block.count(0) < len(block):
        size, kind = _size(block, file, offset), block[156:157]
        start = offset + _BLOCK
        size = int(named.pop("size", size)) if kind in (b"0", b"\0", b"7") else size
        if start + size > end:
            raise CossError(f"{file} ends early, at byte {end:,} of a member to byte {start + size:,}: copy it again")
        offset = start + -(-size // _BLOCK) * _BLOCK
        if kind in (b"L", b"x"):  # the next member's name
            if size > MOST_NAME:
                raise CossError(f"{file} has a header of {size:,} bytes at byte {start:,}; expected a name")
            named |= _named(os.pread(descriptor, size, start), kind, file)
            continue
        name = named.get("path") or _name(block, file)
        named = {}
        if kind in _REFUSED:
            raise CossError(f"{file} holds a {_REFUSED[kind]}, {name[:80]!r}; expected files alone (tar --dereference)")
        if kind in (b"0", b"\0", b"7") and not name.endswith("/"):
            yield Member(name.removeprefix("./"), start, size)


def _size(block: bytes, file: Path, offset: int) -> int:
    """The size that a header says. CossError for what is no header: its checksum is of all its other bytes."""
    try:
        if len(block) < _BLOCK or int(block[148:156].strip(b" \0"), 8) != sum(block) - sum(block[148:156]) + 8 * 32:
            raise ValueError("checksum")
        field = block[124:136]
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        what = (
            "is no tar file (unpack it first if it is compressed)" if offset == 0 else f"is damaged at byte {offset:,}"
        )
        raise CossError(f"{file} {what}: expected the header of a member") from error


def _name(block: bytes, file: Path) -> str:
    name, prefix = (field.partition(b"\0")[0] for field in (block[:100], block[345:500]))
    return _decoded(prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name, file)


def _named(content: bytes, kind: bytes, file: Path) -> dict[str, str]:
    """The "path", and perhaps "size", that a header of its own says of the next member."""
    if kind == b"L":
        return {"path": _decoded(content.partition(b"\0")[0], file)}
    found = {}
    while content.strip(b"\0"):
        length, _, _ = content.partition(b" ")
        if not (length.isdigit() and len(length) < 6 and len(length) + 1 < int(length) <= len(content)):
            raise CossError(f"{file} has a pax header that is damaged")
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        content = content[int(length) :]
        if key.startswith(b"GNU.sparse"):
            raise CossError(f"{file} holds a sparse file; expected files as they are (tar without --sparse)")
        if key == b"path" or (key == b"size" and value.isdigit() and len(value) < 19):
            found[key.decode()] = _decoded(value, file)
    return found


def _decoded(name: bytes, file: Path) -> str:
    try:
        return name.decode("utf-8")
    except ValueError as error:
        raise CossError(f"the name {name!r} in {file} is not UTF-8; rename it and write the shard again") from error
