"""Measurements on disk: atomic, keyed by their protocol, resumable, shared between processes.

    <path>/run.json               {"format": 2, "runs": [...]}: one entry a call, appended, never overwritten
           cells.jsonl.gz         the cells of finished runs, packed (see ``pack``)
           samples-<digest>.npz   their samples: the file that cells.jsonl.gz names
           cells/<key>.json       one cell: what was measured, under which protocol; wins over the packed one
           cells/<key>.lock       exists while a process is at this cell
           samples/<key>.parquet  "id" (int64) and one column a condition (see ``column_name``)
           run.lock               exists while a process packs, or adds to run.json

What holds, whatever happens to the process or the machine:

* A file is either absent, the old one or the new one, never half of one: temporary file, fsync, rename, fsync of the
  folder. The samples are written before the cell, which names their digest: samples that do not belong to
  their cell are recognised and not used.
* A cell that cannot be read (cut short by someone else) counts as missing and is named by a ``StoreWarning``. When it
  is computed again, the damaged file is kept beside it as ``<key>.json.damaged``: nothing is lost.
* A claim is a lock the kernel drops when its process ends, however it ends.
* Packing happens while no cell is claimed, and holds new claims back until it is done. The new samples are on disk
  before the new cells.jsonl.gz takes the old one's place, and only then are loose files and old samples removed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coss_eval.errors import CossError, UsageError
from coss_eval.runtime.disk import Lock, free_name, remove_leftovers, sync_folder, write_atomically
from coss_eval.runtime.provenance import git_commit
from coss_eval.store import pack as _pack
from coss_eval.store.cells import Cell, StoreWarning, _check_distinct, _plain, canonical_json, column_name
from coss_eval.store.pack import FORMAT

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class _OpenPack:
    """A pack once read; ``stamp`` tells whether it still is the one on disk."""

    stamp: tuple[int, int, int]
    cells: _pack.Cells
    _samples: _pack.Samples | _pack.Damaged | None = None

    def samples(self, folder: Path) -> _pack.Samples:
        """Its samples, read when they are first asked for. Raises Damaged where the file is not theirs."""
        if self._samples is None:
            try:
                self._samples = _pack.Samples.of(folder, self.cells)
            except _pack.Damaged as error:
                self._samples = error
        if isinstance(self._samples, _pack.Damaged):
            raise self._samples
        return self._samples


class Store:
    """A results folder, its cells loose, packed or some of each. Making one touches no disk; the first write does."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._opened: _OpenPack | None = None

    def key(self, protocol: Mapping[str, Any], cell: Cell) -> str:
        """20 hex digits of the SHA-256 of everything the cell's numbers depend on."""
        defaults = {name: canonical_json(value) for name, value in cell.defaults.items()}
        params = {name: v for name, v in cell.params.items() if defaults.get(name) != canonical_json(v)}
        identity = {
            "protocol": dict(protocol),
            "task": cell.task,
            "params": params,
            "algorithm_version": cell.algorithm_version,
        }
        return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:20]

    @contextmanager
    def claim(self, key: str) -> Iterator[Path | None]:
        """The cell's lock file while this process works on it; None when another live process does.

        The file holds the owner's pid and host for the curious; the lock itself is the kernel's (flock), so a
        process killed in any way leaves no claim behind. It works between machines where their file system does.
        """
        with self._locked():  # not while it is packed
            lock = self._lock(self._folder("cells") / f"{key}.lock")
        if lock is None:
            yield None
            return
        try:
            remove_leftovers(self.path / "cells", key)
            remove_leftovers(self.path / "samples", key)
            yield lock.path
        finally:
            lock.release()

    def write(self, key: str, record: Mapping[str, Any], samples: Any = None) -> None:
        """Store one cell: all of it or, on a CossError, nothing.

        ``record`` has protocol, cell (a Cell), model (the name shown), measurements, and maybe notes and seconds.
        ``samples`` (a mapping of arrays or a DataFrame) has "id" and a verdict column for some of the measurements,
        named by ``column_name``. NaN and infinity become null. Unknown columns, repeated ids and two measurements that
        nothing tells apart raise UsageError.
        """
        content = {"format": FORMAT, "key": key, **record}
        cell = content.pop("cell", None)
        if cell is not None:
            content |= {"task": cell.task, "params": cell.params, "algorithm_version": cell.algorithm_version}
        content = _plain(content)
        _check_distinct(content["measurements"])
        table = None if samples is None or len(samples) == 0 else _parquet(samples, content["measurements"])
        with self._locked():
            self._write_cell(key, content, table)

    def _write_cell(self, key: str, content: dict[str, Any], table: bytes | None) -> None:
        target = self._cell_path(key)
        if table is not None:  # before the cell, which is the mark of completion
            self._write_bytes(self._samples_path(key), table)
            content["samples"] = hashlib.sha256(table).hexdigest()
        if target.exists() and self._load(target) is None:
            _keep_aside(target)
        self._write_bytes(target, json.dumps(content, indent=1, allow_nan=False).encode())
        if table is None:
            self._samples_path(key).unlink(missing_ok=True)

    def read(self, key: str) -> dict[str, Any] | None:
        """A finished cell's record; None where it is missing or, with a StoreWarning, damaged."""
        try:
            return self._load(self._cell_path(key))
        except (FileNotFoundError, NotADirectoryError):
            packed = self._packed()
            return None if packed is None else packed.cells.record(key)

    def records(self) -> list[dict[str, Any]]:
        """All finished cells, by key. Damaged ones are left out, each with a StoreWarning."""
        keys = {path.stem for path in (self.path / "cells").glob("*.json")}  # before the pack, which they may go into
        packed = self._packed()
        keys |= set() if packed is None else packed.cells.records.keys()
        return [record for key in sorted(keys) if (record := self.read(key)) is not None]

    def samples(self, key: str) -> pd.DataFrame | None:
        """Per-sample verdicts indexed by id; None where the cell has none or, with a StoreWarning, not its own."""
        cell, path = self._cell_path(key), self._samples_path(key)
        try:
            record = self._load(cell)
        except (FileNotFoundError, NotADirectoryError):
            return self._packed_samples(key)
        if record is None or "samples" not in record:
            return None
        table = _own_samples(path, record)
        if table is None and not cell.exists():  # packed while it was read
            return self._packed_samples(key)
        if table is None:
            _warn(f"{path} is not the file its cell was stored with; paired tests leave it out (--overwrite renews it)")
        return table

    def pack(self) -> str | None:
        """Put all whole cells into the two files of a pack and remove the loose ones; None, or why it was not done.

        Damaged files stay, or are kept aside as <name>.damaged. Raises CossError where the disk is full.
        """
        with self._locked():
            if self._is_claimed():
                return "another process is at work there"
            loose = self._whole_cells()
            try:
                if loose:
                    cells, samples = _pack.encode([*loose.values(), *self._packed_cells(without=loose.keys())])
                    self._replace_pack(cells, samples)
            except _pack.Damaged:
                return "the samples of its pack are damaged, and other cells need them (--overwrite renews those)"
            except _pack.TooLarge as error:
                return str(error)
            self._remove_packed(loose.keys())
        return None

    def record_run(self, entry: Mapping[str, Any]) -> None:
        """Append one run's provenance to run.json; the commit of this code is added. Safe between processes."""
        self._change_runs(lambda runs: [*runs, _plain({"git_commit": git_commit(), **entry})])

    def amend_run(self, entry: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Add what is known only after a run to what ``record_run`` was given for it."""
        same = {name: _plain(entry[name]) for name in ("started", "command") if name in entry}

        def amended(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            mine = max((i for i, run in enumerate(runs) if same.items() <= run.items()), default=None)
            return [{**run, **_plain(facts)} if i == mine else run for i, run in enumerate(runs)]

        self._change_runs(amended)

    def _change_runs(self, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
        path = self.path / "run.json"
        with self._locked():
            runs = self.runs()
            if path.exists() and not runs:
                _keep_aside(path)
            runs = change(runs)
            self._write_bytes(path, json.dumps({"format": FORMAT, "runs": runs}, indent=1, allow_nan=False).encode())

    def runs(self) -> list[dict[str, Any]]:
        """The provenance of every run that wrote here, oldest first."""
        path = self.path / "run.json"
        if not path.exists():
            return []
        try:
            content = json.loads(path.read_bytes())
            runs = list(content["runs"])
            _pack.check_format(content, path)
            return runs
        except (ValueError, TypeError, KeyError):
            _warn(f"{path} is damaged; the next run keeps it as run.json.damaged and begins a new one")
            return []

    def _cell_path(self, key: str) -> Path:
        return self.path / "cells" / f"{key}.json"

    def _samples_path(self, key: str) -> Path:
        return self.path / "samples" / f"{key}.parquet"

    def _load(self, path: Path) -> dict[str, Any] | None:
        try:
            record = json.loads(path.read_bytes())
            if record["key"] == path.stem and isinstance(record["measurements"], list):
                _pack.check_format(record, path)
                return dict(record)
        except (ValueError, TypeError, KeyError):
            pass
        _warn(f"{path} is damaged and counts as missing; it is kept aside when the cell is computed again")
        return None

    def _packed(self) -> _OpenPack | None:
        """The pack as it is on disk now; None where there is none or, with a StoreWarning, it is damaged."""
        path = self.path / _pack.CELLS
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
                if self._opened is None or self._opened.stamp != stamp:
                    self._opened = _OpenPack(stamp, _pack.Cells.decode(file.read(_pack.MOST_CELLS + 1), path))
            return self._opened
        except (FileNotFoundError, NotADirectoryError):
            return None
        except _pack.Damaged:
            _warn(f"{path} is damaged and its cells count as missing; it is kept aside when the run is packed again")
            return None

    def _packed_samples(self, key: str) -> pd.DataFrame | None:
        packed = self._packed()
        where = None if packed is None else packed.cells.records.get(key, {}).get("samples")
        if packed is None or where is None:
            return None
        try:
            return packed.samples(self.path).table(where)
        except _pack.Damaged:
            if self._packed() is not packed:  # packed again while it was read
                return self._packed_samples(key)
            path = self.path / _pack.samples_name(packed.cells.samples_sha256 or "")
            _warn(
                f"{path} is not the file its cells were packed with; paired tests leave it out (--overwrite renews it)"
            )
            return None

    def _is_claimed(self) -> bool:
        """Whether any process is at a cell; locks of killed ones are cleared away. Under the store's lock."""
        for path in (self.path / "cells").glob("*.lock"):
            lock = self._lock(path)
            if lock is None:
                return True
            lock.release()
        return False

    def _whole_cells(self) -> dict[str, _pack.PackedCell]:
        """The loose cells that a pack can hold as they are, with their samples; damaged ones are named and left out."""
        found: dict[str, _pack.PackedCell] = {}
        for path in sorted((self.path / "cells").glob("*.json")):
            record, table = self._load(path), self.samples(path.stem)
            if record is None or ("samples" in record) != (table is not None):
                continue
            if table is None or _pack.can_hold(table):
                found[path.stem] = (record, table)
        return found

    def _packed_cells(self, *, without: Collection[str]) -> Iterator[_pack.PackedCell]:
        """The cells of the pack but those in ``without``. Raises Damaged where their samples cannot be had."""
        packed = self._packed()
        if packed is None:
            return
        for key in packed.cells.records.keys() - without:
            record = packed.cells.record(key)
            assert record is not None
            yield record, packed.samples(self.path).table(record["samples"]) if "samples" in record else None

    def _replace_pack(self, cells: bytes, samples: bytes | None) -> None:
        """Write a pack: first its samples, under a name of their own, then the cells, which name them."""
        path = self.path / _pack.CELLS
        whole = not path.exists() or self._packed() is not None
        for other in self.path.glob(_pack.SAMPLES):
            if not whole or not _pack.is_own_content(other):  # a damaged pack's samples may be all that is left of it
                _keep_aside(other)
        if not whole:
            _keep_aside(path)
        if samples is not None:
            self._write_bytes(self.path / _pack.samples_name(hashlib.sha256(samples).hexdigest()), samples)
        self._write_bytes(path, cells)

    def _remove_packed(self, keys: Collection[str]) -> None:
        """Remove loose cells of these keys, samples without a cell, and what packs that are no more have left."""
        for key in keys:
            self._cell_path(key).unlink(missing_ok=True)
        if keys:
            sync_folder(self.path / "cells")  # a cell that came back without its samples would win over the packed one
        for path in (self.path / "samples").glob("*.parquet"):
            if not self._cell_path(path.stem).exists():
                path.unlink()
        packed = self._packed()
        if packed is not None:
            used = packed.cells.samples_sha256
            for path in self.path.glob(_pack.SAMPLES):
                if (used is None or path.name != _pack.samples_name(used)) and _pack.is_own_content(path):
                    path.unlink()
        for stem in ("run", "cells.jsonl", "samples-*"):
            remove_leftovers(self.path, stem)
        for folder in (self.path / "cells", self.path / "samples"):
            with suppress(OSError):  # something else is in it, or it is not there
                folder.rmdir()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The store's own lock, waited for: nobody packs, writes or begins a claim meanwhile."""
        lock = self._lock(self._folder() / "run.lock", wait=True)
        assert lock is not None  # it waits
        try:
            yield
        finally:
            lock.release()

    def _folder(self, name: str = "") -> Path:
        folder = self.path / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, os.strerror(13))
        except OSError as error:
            raise CossError(f"cannot write results into {folder}: {error.strerror}; give another --out") from error
        return folder

    def _lock(self, path: Path, *, wait: bool = False) -> Lock | None:
        try:
            return Lock.take(path, wait=wait)
        except OSError as error:
            raise CossError(f"cannot lock {path}: {error.strerror}; give another --out") from error

    def _write_bytes(self, target: Path, content: bytes) -> None:
        try:
            write_atomically(self._folder(target.parent.relative_to(self.path).as_posix()) / target.name, content)
        except OSError as error:
            raise CossError(
                f"cannot write {target}: {error.strerror}; what was stored before is intact: make room or give another "
                "--out, then give the same command again"
            ) from error


def _parquet(samples: Any, measurements: list[dict[str, Any]]) -> bytes:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = dict(samples.items())
    known = {column_name(m["metric"], m["condition"]) for m in measurements}
    unknown = sorted(set(columns) - known - {"id"})
    if "id" not in columns or unknown:
        raise UsageError(
            f'samples need "id" and columns named by column_name; unknown: {unknown}, known: {sorted(known)}'
        )
    arrays = {name: np.asarray(column) for name, column in columns.items()}
    ids = arrays["id"] = arrays["id"].astype(np.int64, casting="same_kind")
    if any(array.shape != ids.shape for array in arrays.values()) or len(np.unique(ids)) != len(ids):
        raise UsageError(f"samples need unique ids and columns of one length, got {len(ids)} ids")
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays), buffer, compression="zstd")
    return buffer.getvalue()


def _own_samples(path: Path, record: Mapping[str, Any]) -> pd.DataFrame | None:
    """The samples of a loose cell, indexed by id; None where the file is not the one it was stored with."""
    table = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(table).hexdigest() != record["samples"]:
        return None
    import pandas as pd

    return pd.read_parquet(io.BytesIO(table)).set_index("id")


def _keep_aside(path: Path) -> None:
    os.replace(path, free_name(path.with_name(f"{path.name}.damaged")))


def _warn(message: str) -> None:
    warnings.warn(message, StoreWarning, stacklevel=3)
