"""Measurements on disk: atomic, keyed by their protocol, resumable, shared between processes.

    <path>/run.json               {"format": 1, "runs": [...]}: one entry a call, appended, never overwritten
           cells/<key>.json       one cell: what was measured, under which protocol
           cells/<key>.lock       exists while a process is at this cell
           samples/<key>.parquet  "id" (int64) and one column a condition (see ``column_name``)

What holds, whatever happens to the process or the machine:

* A file is either absent, the old one or the new one, never half of one: temporary file, fsync, rename, fsync of the
  folder. The samples are written before the cell, which names their digest: samples that do not belong to
  their cell are recognised and not used.
* A cell that cannot be read (cut short by someone else) counts as missing and is named by a ``StoreWarning``. When it
  is computed again, the damaged file is kept beside it as ``<key>.json.damaged``: nothing is lost.
* A claim is a lock the kernel drops when its process ends, however it ends.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coss_eval._disk import Lock, free_name, remove_leftovers, write_atomically
from coss_eval.errors import CossError, UsageError

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1


class StoreWarning(UserWarning):
    """A file of the store that cannot be used as it is; says which and what happens instead."""


@dataclass(frozen=True)
class Measurement:
    """One number with its n and interval, under one condition (corruption=fog, severity=3).

    ``value`` of a proportion is a fraction; ``low`` and ``high`` bound its 95 % interval, None where none is defined.
    """

    metric: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None
    condition: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """What one job computes and the store keeps: a task and the JSON parameters its numbers depend on.

    ``defaults`` holds the value that a parameter had when it was introduced; parameters still at it are left out of
    the key, so that adding one keeps the keys of everything already stored.
    """

    task: str
    params: dict[str, Any]
    algorithm_version: int = 1
    defaults: dict[str, Any] = field(default_factory=dict)


def column_name(metric: str, condition: Mapping[str, Any]) -> str:
    """The column of ``samples`` with a measurement's per-sample verdicts: "corruption=fog,severity=3".

    Floats have six digits; an unconditional measurement's column is its metric.
    """
    parts = (
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}" for name, value in condition.items()
    )
    return ",".join(parts) or metric


def canonical_json(value: Any) -> str:
    """The one JSON text of a value, for hashing: keys sorted, no spaces, shortest floats, 1.0 written as 1.

    Raises UsageError for what has no JSON form (NaN, infinity, objects, keys that are not text).
    """
    return json.dumps(_plain(value, canonical=True), sort_keys=True, separators=(",", ":"), allow_nan=False)


class Store:
    """A results folder. Making one touches no disk; the folder appears with the first write."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

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
        target = self._cell_path(key)
        table = None if samples is None or len(samples) == 0 else _parquet(samples, content["measurements"])
        if table is not None:  # before the cell, which is the mark of completion
            self._write_bytes(self._samples_path(key), table)
            content["samples"] = hashlib.sha256(table).hexdigest()
        if target.exists() and self._load(target) is None:
            os.replace(target, free_name(target.with_name(f"{target.name}.damaged")))
        self._write_bytes(target, json.dumps(content, indent=1, allow_nan=False).encode())
        if table is None:
            self._samples_path(key).unlink(missing_ok=True)

    def read(self, key: str) -> dict[str, Any] | None:
        """A finished cell's record; None where it is missing or, with a StoreWarning, damaged."""
        path = self._cell_path(key)
        return self._load(path) if path.exists() else None

    def records(self) -> list[dict[str, Any]]:
        """All finished cells, by key. Damaged ones are left out, each with a StoreWarning."""
        loaded = (self._load(path) for path in sorted((self.path / "cells").glob("*.json")))
        return [record for record in loaded if record is not None]

    def samples(self, key: str) -> pd.DataFrame | None:
        """Per-sample verdicts indexed by id; None where the cell has none or, with a StoreWarning, not its own."""
        record = self.read(key)
        if record is None or "samples" not in record:
            return None
        path = self._samples_path(key)
        table = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(table).hexdigest() != record["samples"]:
            _warn(f"{path} is not the file its cell was stored with; paired tests leave it out (--overwrite renews it)")
            return None
        import pandas as pd

        return pd.read_parquet(io.BytesIO(table)).set_index("id")

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
        path = self._folder() / "run.json"
        lock = self._lock(path.with_suffix(".lock"), wait=True)
        assert lock is not None  # it waits
        try:
            runs = self.runs()
            if path.exists() and not runs:
                os.replace(path, free_name(path.with_name("run.json.damaged")))
            runs = change(runs)
            self._write_bytes(path, json.dumps({"format": FORMAT, "runs": runs}, indent=1, allow_nan=False).encode())
        finally:
            lock.release()

    def runs(self) -> list[dict[str, Any]]:
        """The provenance of every run that wrote here, oldest first."""
        path = self.path / "run.json"
        if not path.exists():
            return []
        try:
            return list(json.loads(path.read_bytes())["runs"])
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
                return dict(record)
        except (ValueError, TypeError, KeyError):
            pass
        _warn(f"{path} is damaged and counts as missing; it is kept aside when the cell is computed again")
        return None

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


def git_commit() -> str | None:
    """The commit this package runs from, with "+" where files differ from it; None outside its own checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _plain(value: Any, *, canonical: bool = False) -> Any:
    """JSON's own types: dataclasses and NumPy scalars and arrays unpacked; NaN and infinity become None.

    ``canonical`` refuses what is not finite and writes whole floats as integers.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise UsageError(f"a stored mapping needs text for keys, got {list(value)!r}")
        return {name: _plain(item, canonical=canonical) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, canonical=canonical) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            if canonical:
                raise UsageError(f"a protocol cannot hold {value}")
            return None
        return int(value) if canonical and value.is_integer() else value
    if value is None or isinstance(value, str | int):
        return value
    raise UsageError(f"cannot store a {type(value).__name__}: {value!r}; give text, numbers, lists or mappings")


def _check_distinct(measurements: list[dict[str, Any]]) -> None:
    names = [(m["metric"], canonical_json(m["condition"])) for m in measurements]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two measurements of one cell are both {twice[0]} under {twice[1]}; tell them apart")


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


def _warn(message: str) -> None:
    warnings.warn(message, StoreWarning, stacklevel=3)
