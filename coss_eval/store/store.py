"""Measurements on disk: atomic, keyed by their protocol, resumable, shared between processes.

    <path>/run.json               {"format": 2, "runs": [...]}: one entry a call, appended, never overwritten; each
                                  lists the cells it was to measure that none before it lists
           cells.jsonl.gz         the cells of finished runs, packed (see ``pack``)
           samples-<digest>.npz   their samples: the file that cells.jsonl.gz names
           cells/<key>.json       one cell: what was measured, under which protocol; wins over the packed one
           cells/<key>.lock       exists while a process is at this cell
           samples/<key>.parquet  "id" (int64), maybe "label", and one column a condition (see ``column_name``) or a
                                  measurement (see ``own_column``)
           run.lock               exists while a process packs, or adds to run.json

The folder <out>/<run>/results of a study's run may lie in <out>/runs.zip instead (see ``runs``): it is read from there,
and unpacked before it is written to.

What holds, whatever happens to the process or the machine:

* A file is either absent, the old one or the new one, never half of one: temporary file, fsync, rename, fsync of the
  folder. The samples are written before the cell, which names their digest: samples that do not belong to
  their cell are recognised and not used.
* A cell that cannot be read (cut short by someone else) counts as missing and is named by a ``StoreWarning``. When it
  is computed again, the damaged file is kept beside it as ``<key>.json.damaged``: nothing is lost. One whose samples
  are damaged is read, and computed again when it is asked for.
* A claim is a lock that the kernel drops when its process ends, however it ends; on a file system without such locks,
  one that others clear away when its process has given no sign of life for two minutes (see ``Lock``).
* Packing happens while no cell is claimed, and holds new claims back until it is done. The new samples are on disk
  before the new cells.jsonl.gz takes the old one's place, and only then are loose files and old samples removed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coss_eval.errors import UsageError
from coss_eval.runtime.disk import lock_holder, remove_leftovers, sync_folder
from coss_eval.runtime.provenance import git_commit
from coss_eval.store import pack as _pack
from coss_eval.store.cells import (
    Cell,
    SampleColumns,
    _check_distinct,
    _plain,
    canonical_json,
    column_name,
    own_column,
    warn,
)
from coss_eval.store.folder import ResultsFolder, keep_aside
from coss_eval.store.pack import FORMAT
from coss_eval.store.packed import PackOfFolder

if TYPE_CHECKING:
    import pandas as pd


class Store:
    """A results folder, its cells loose, packed or some of each. Making one touches no disk; the first write does."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._folder = ResultsFolder(self.path)
        self._packed = PackOfFolder(self._folder)

    def is_there(self) -> bool:
        """Whether it is a folder, or that of a packed run."""
        return self._folder.is_there

    @property
    def is_packed_run(self) -> bool:
        """Whether it is read from a study's runs.zip: there is no folder to write into."""
        return self._folder.is_packed

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

        The file names the owner's pid and host (see ``holder``). A process killed in any way leaves no claim behind,
        also between machines that share the folder.
        """
        with self._folder.locked():  # not while it is packed
            lock = self._folder.lock(self._folder.inside("cells") / f"{key}.lock")
        if lock is None:
            yield None
            return
        try:
            remove_leftovers(self.path / "cells", key)
            remove_leftovers(self.path / "samples", key)
            yield lock.path
        finally:
            lock.release()

    def holder(self, key: str) -> str | None:
        """ "process 12 on host" for who claims the cell, as its lock's file says; None where nobody does."""
        return lock_holder(self.path / "cells" / f"{key}.lock")

    def write(self, key: str, record: Mapping[str, Any], samples: Any = None) -> None:
        """Store one cell: all of it or, on a CossError, nothing.

        ``record`` has protocol, cell (a Cell), model (the name shown), measurements, and maybe notes and seconds.
        ``samples`` (a mapping of arrays or a DataFrame) has "id", maybe "label", and a column for some of the
        measurements, named by ``column_name`` or, where several have one condition, by ``own_column``. NaN and infinity
        become null. Unknown columns, repeated ids and two measurements that nothing tells apart raise UsageError.
        """
        content = {"format": FORMAT, "key": key, **record}
        cell = content.pop("cell", None)
        if cell is not None:
            content |= {"task": cell.task, "params": cell.params, "algorithm_version": cell.algorithm_version}
        content = _plain(content)
        _check_distinct(content["measurements"])
        table = None if samples is None or len(samples) == 0 else _parquet(samples, content["measurements"])
        with self._folder.locked():
            self._write_cell(key, content, table)

    def _write_cell(self, key: str, content: dict[str, Any], table: bytes | None) -> None:
        target = self._cell_path(key)
        if table is not None:  # before the cell, which is the mark of completion
            self._folder.write(self._samples_path(key), table)
            content["samples"] = hashlib.sha256(table).hexdigest()
        if target.exists() and self._load(target) is None:
            keep_aside(target)
        self._folder.write(target, json.dumps(content, indent=1, allow_nan=False).encode())
        if table is None:
            self._samples_path(key).unlink(missing_ok=True)

    def read(self, key: str) -> dict[str, Any] | None:
        """A finished cell's record; None where it is missing or, with a StoreWarning, damaged."""
        try:
            return self._load_loose(key)
        except (FileNotFoundError, NotADirectoryError):
            return self._packed.record(key)

    def finished(self, key: str) -> dict[str, Any] | None:
        """A cell's record where it need not be computed again: the cell is there, and so are its own samples.

        With a StoreWarning for what is damaged.
        """
        record = self.read(key)
        if record is None or "samples" not in record:
            return record
        try:
            self._load_loose(key)
        except (FileNotFoundError, NotADirectoryError):
            return record if self._packed.has_samples() else None
        return record if self.columns(key) is not None else None

    def records(self) -> list[dict[str, Any]]:
        """All finished cells, by key. Damaged ones are left out, each with a StoreWarning."""
        loose = [] if self._folder.is_packed else (self.path / "cells").glob("*.json")
        keys = {path.stem for path in loose}  # before the pack, which they may go into
        keys |= set(self._packed.keys())
        return [record for key in sorted(keys) if (record := self.read(key)) is not None]

    def loose_keys(self) -> set[str]:
        """The keys of cells that have a file of their own, by its name alone: cheap to ask for again and again."""
        return {path.stem for path in (self.path / "cells").glob("*.json")}

    def holds_cells(self) -> bool:
        """Whether there are cells, without reading any."""
        try:
            with self._folder.opened(_pack.CELLS):
                return True
        except (FileNotFoundError, NotADirectoryError):
            return any((self.path / "cells").glob("*.json"))

    def samples(self, key: str) -> pd.DataFrame | None:
        """Per-sample verdicts indexed by id; None where the cell has none or, with a StoreWarning, not its own."""
        found = self.columns(key)
        return None if found is None else found.table()

    def columns(self, key: str) -> SampleColumns | None:
        """The samples as arrays, which cost less than ``samples``."""
        cell, path = self._cell_path(key), self._samples_path(key)
        try:
            record = self._load_loose(key)
        except (FileNotFoundError, NotADirectoryError):
            return self._packed.columns(key)
        if record is None or "samples" not in record:
            return None
        found = _own_samples(path, record)
        if found is None and not cell.exists():  # packed while it was read
            return self._packed.columns(key)
        if found is None:
            warn(f"{path} is not the file its cell was stored with; paired tests leave it out until it is done again")
        return found

    def pack(self) -> str | None:
        """Put all whole cells into the two files of a pack and remove the loose ones; None, or why it was not done.

        Damaged files stay, or are kept aside as <name>.damaged. Raises CossError where the disk is full.
        """
        with self._folder.locked():
            if self._is_claimed():
                return "another process is at work there"
            loose = self._whole_cells()
            try:
                if loose:
                    cells, samples = _pack.encode([*loose.values(), *self._packed.entries(without=loose.keys())])
                    self._packed.replace(cells, samples)
            except _pack.Damaged:
                return "the samples of its pack are damaged, and other cells need them (done again, they renew them)"
            except _pack.TooLarge as error:
                return str(error)
            self._remove_packed(loose.keys())
        return None

    @contextmanager
    def at_rest(self) -> Iterator[str | None]:
        """Nobody writes here meanwhile; gives why it is not wholly packed, None where it is."""
        with self._folder.locked():
            if self._is_claimed():
                yield "another process is at work there"
            elif any((self.path / "cells").glob("*.json")):
                yield "some of its cells cannot be packed"
            else:
                yield None

    def record_run(self, entry: Mapping[str, Any]) -> None:
        """Append one run's provenance to run.json; the commit of this code is added. Safe between processes.

        Of its "cells" those stay that no entry before it lists, so that the file grows by what is new.
        """
        whole = _plain({"git_commit": git_commit(), **entry})

        def appended(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            if "cells" not in whole:
                return [*runs, whole]
            listed = {canonical_json(cell) for run in runs for cell in run.get("cells", ())}
            return [*runs, {**whole, "cells": [cell for cell in whole["cells"] if canonical_json(cell) not in listed]}]

        self._change_runs(appended)

    def amend_run(self, entry: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Add what is known only after a run to what ``record_run`` was given for it."""
        same = {name: _plain(entry[name]) for name in ("started", "command") if name in entry}

        def amended(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            mine = max((i for i, run in enumerate(runs) if same.items() <= run.items()), default=None)
            return [{**run, **_plain(facts)} if i == mine else run for i, run in enumerate(runs)]

        self._change_runs(amended)

    def _change_runs(self, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
        path = self.path / "run.json"
        with self._folder.locked():
            runs, whole = self._runs()
            if not whole:
                keep_aside(path)
            runs = change(runs)
            self._folder.write(path, json.dumps({"format": FORMAT, "runs": runs}, indent=1, allow_nan=False).encode())

    def runs(self) -> list[dict[str, Any]]:
        """The provenance of every run that wrote here, oldest first."""
        return self._runs()[0]

    def _runs(self) -> tuple[list[dict[str, Any]], bool]:
        """The runs that can be read, and whether these are all that the file has."""
        path = self.path / "run.json"
        try:
            with self._folder.opened(path.name) as file:
                text = file.read(_pack.MOST_CELLS)
        except (FileNotFoundError, NotADirectoryError):
            return [], True
        runs, found = [], None
        try:
            content = json.loads(text)
            found = list(content["runs"])
            _pack.check_format(content, path)
            runs = [run for run in found if _is_run(run)]
        except (ValueError, TypeError, KeyError, RecursionError):
            found = None
        if found is None or len(runs) < len(found):
            kept = f"; {len(runs)} of its {len(found)} runs are read" if found else ""
            warn(f"{path} is damaged{kept}; the next run keeps it as run.json.damaged and goes on in a new one")
            return runs, False
        return runs, True

    def _cell_path(self, key: str) -> Path:
        return self.path / "cells" / f"{key}.json"

    def _samples_path(self, key: str) -> Path:
        return self.path / "samples" / f"{key}.parquet"

    def _load_loose(self, key: str) -> dict[str, Any] | None:
        """A cell with a file of its own. Raises FileNotFoundError where it has none that counts."""
        if self._folder.is_packed:
            raise FileNotFoundError(key)
        return self._load(self._cell_path(key))

    def _load(self, path: Path) -> dict[str, Any] | None:
        try:
            record = json.loads(path.read_bytes())
            if record["key"] == path.stem:
                _pack.check_format(record, path)
                _pack.check_record(record)
                return dict(record)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            pass
        warn(f"{path} is damaged and counts as missing; it is kept aside when the cell is computed again")
        return None

    def _is_claimed(self) -> bool:
        """Whether any process is at a cell; locks of killed ones are cleared away. Under the store's lock."""
        for path in (self.path / "cells").glob("*.lock"):
            lock = self._folder.lock(path)
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

    def _remove_packed(self, keys: Collection[str]) -> None:
        """Remove loose cells of these keys, samples without a cell, and what packs that are no more have left."""
        for key in keys:
            self._cell_path(key).unlink(missing_ok=True)
        if keys:
            sync_folder(self.path / "cells")  # a cell that came back without its samples would win over the packed one
        for path in (self.path / "samples").glob("*.parquet"):
            if not self._cell_path(path.stem).exists():
                path.unlink()
        self._packed.remove_old_samples()
        for stem in ("run", "cells.jsonl", "samples-*"):
            remove_leftovers(self.path, stem)
        for folder in (self.path / "cells", self.path / "samples"):
            with suppress(OSError):  # something else is in it, or it is not there
                folder.rmdir()


def _is_run(entry: Any) -> bool:
    """Whether an entry of run.json has the kinds of fields that readers go into."""
    if not isinstance(entry, dict):
        return False
    lists = [entry.get(name, []) for name in ("models", "cells")]
    fits = all(isinstance(found, list) and all(isinstance(one, dict) for one in found) for found in lists)
    return fits and all(isinstance(entry.get(name, {}), dict) for name in ("data", "versions"))


def _parquet(samples: Any, measurements: list[dict[str, Any]]) -> bytes:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = dict(samples.items())
    known = {name(m["metric"], m["condition"]) for m in measurements for name in (column_name, own_column)}
    unknown = sorted(set(columns) - known - {"id", "label"})
    if "id" not in columns or unknown:
        raise UsageError(
            f'samples need "id" and columns named by column_name (or own_column); unknown: {unknown}, '
            f"known: {sorted(known)}"
        )
    arrays = {name: np.asarray(column) for name, column in columns.items()}
    ids = arrays["id"] = arrays["id"].astype(np.int64, casting="same_kind")
    if any(array.shape != ids.shape for array in arrays.values()) or len(np.unique(ids)) != len(ids):
        raise UsageError(f"samples need unique ids and columns of one length, got {len(ids)} ids")
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays), buffer, compression="zstd")
    return buffer.getvalue()


def _own_samples(path: Path, record: Mapping[str, Any]) -> SampleColumns | None:
    """The samples of a loose cell; None where the file is not the one it was stored with."""
    table = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(table).hexdigest() != record["samples"]:
        return None
    import pyarrow.parquet as pq

    stored = pq.read_table(io.BytesIO(table))
    columns = {name: stored[name].to_numpy() for name in stored.column_names}
    return SampleColumns(columns.pop("id"), columns)
