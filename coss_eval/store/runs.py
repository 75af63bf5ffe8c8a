"""The finished runs of a study in one file, read in the place of their folders.

    <out>/runs.zip     "<run>/job.json", "<run>/log.jsonl" and, of an evaluated one, "<run>/results/run.json",
                       "<run>/results/cells.jsonl.gz" and "<run>/results/samples-<digest>.npz": any zip program opens it

A run whose folder has a job.json of its own is unpacked (a log.jsonl, where ``coss-eval train`` alone made it). Where
both are there, the one whose job.json was changed last counts, and a ``StoreWarning`` says so. Weights are never
packed: they stay in the folder, for whatever reads weights.
A file from anybody may be read: names that lead elsewhere are refused, and no more memory is taken than MOST_MEMBER.
"""

from __future__ import annotations

import calendar
import io
import os
import re
import time
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coss_eval.errors import CossError
from coss_eval.runtime.disk import Lock, remove_leftovers, write_atomically
from coss_eval.store import pack as _pack
from coss_eval.store.cells import warn

RUNS = "runs.zip"
JOB, LOG, MODEL, RESULTS = "job.json", "log.jsonl", "model.safetensors", "results"
MOST_MEMBER = _pack.MOST_SAMPLES
_OLDEST = 315_532_800  # seconds to 1980, where the dates of a zip begin
_NAME = r"\w[\w.=,-]*"
_MEMBER = re.compile(rf"({_NAME})/({JOB}|{LOG}|{RESULTS}/(?:run\.json|cells\.jsonl\.gz|{_pack.SAMPLES}))")

Stamp = tuple[int, ...]  # tells whether a file still is the one that was read


@dataclass(frozen=True)
class PackedFile:
    """A file of a run as a pack holds it; ``changed`` in seconds since 1970, in the zip's steps of two."""

    content: bytes
    changed: int


PackedRun = Mapping[str, PackedFile]  # by its path in the run's folder


@dataclass(frozen=True)
class _Directory:
    """A pack's directory once read: its entries by run and path."""

    stamp: Stamp
    entries: Mapping[str, Mapping[str, zipfile.ZipInfo]]


class Runs:
    """The runs in a study's folder, packed or not. Making one touches no disk. Damage is a CossError of one line."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / RUNS
        self._opened: _Directory | None = None

    def names(self) -> list[str]:
        """All runs: those with a job.json in their folders, or a log and no results, and the packed ones."""
        jobs = {path.parent.name for path in self.out.glob(f"*/{JOB}")}
        logs = {path.parent.name for path in self.out.glob(f"*/{LOG}") if not (path.parent / "run.json").exists()}
        return sorted(jobs | logs | set(self._entries()))

    def evaluated(self) -> list[str]:
        """The packed runs that have results."""
        return [name for name, files in self._entries().items() if f"{RESULTS}/run.json" in files]

    def is_packed(self, name: str) -> bool:
        """Whether the pack is what counts for this run."""
        files = self._entries().get(name)
        if not files:
            return False
        entry, own = files[_mark(files)], self.out / name / _mark(files)
        try:
            content, changed = own.read_bytes(), int(own.stat().st_mtime) // 2 * 2
        except (FileNotFoundError, NotADirectoryError):
            return True
        if zlib.crc32(content) == entry.CRC:
            return False
        newer = changed >= _changed(entry)
        warn(
            f"{own.parent} is newer than its packed form and is read; coss-eval pack {self.out} packs it"
            if newer
            else f"{own.parent} is older than its packed form in {self.path}, which is read; remove one of them"
        )
        return not newer

    def read(self, name: str, file: str) -> bytes:
        """A file of a run, by its path in the run's folder. Raises FileNotFoundError."""
        if not self.is_packed(name):
            return (self.out / name / file).read_bytes()
        return self._read(self._entry(name, file)).content

    def stamp(self, name: str, file: str) -> Stamp:
        """What tells whether a packed file still is the one that was read. Raises FileNotFoundError."""
        entry = self._entry(name, file)
        return (*self._now().stamp, entry.header_offset)

    def loose(self, name: str) -> PackedRun:
        """What a pack can hold of a run's folder."""
        folder = self.out / name
        files = [path for path in (folder / JOB, folder / LOG, *sorted((folder / RESULTS).glob("*"))) if path.is_file()]
        named = {path.relative_to(folder).as_posix(): path for path in files}
        return {
            file: PackedFile(path.read_bytes(), int(max(path.stat().st_mtime, _OLDEST)) // 2 * 2)
            for file, path in named.items()
            if _MEMBER.fullmatch(f"{name}/{file}")
        }

    def remove(self, name: str, files: Collection[str]) -> None:
        """Drop files of a run's folder that are packed: first its mark, so that half a folder is no run."""
        for file in sorted(files, key=(JOB, LOG, *files).index):
            (self.out / name / file).unlink(missing_ok=True)

    def packed(self) -> dict[str, PackedRun]:
        """What the pack holds."""
        return {
            name: {file: self._read(entry) for file, entry in files.items()} for name, files in self._entries().items()
        }

    def replace(self, runs: Mapping[str, PackedRun]) -> None:
        """Write the pack anew: all of it or nothing. The same runs give the same bytes; under the lock."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name, files in sorted(runs.items()):
                for file, packed in sorted(files.items()):
                    entry = zipfile.ZipInfo(f"{name}/{file}", time.gmtime(packed.changed)[:6])
                    entry.external_attr = 0o644 << 16
                    archive.writestr(entry, packed.content, zipfile.ZIP_DEFLATED)
        with _written(self.path):
            remove_leftovers(self.out, self.path.stem)
            write_atomically(self.path, buffer.getvalue())

    def unpack(self, name: str) -> None:
        """Put a packed run's files into its folder, where it can be gone on with; the pack stays. Under the lock."""
        if not self.is_packed(name):
            return
        folder = self.out / name
        files = self._entries()[name]
        if (folder / _mark(files)).exists():
            raise CossError(f"{folder} is older than its packed form in {self.path}; remove one of them")
        for file in sorted(files, key=lambda file: file == _mark(files)):  # the mark of a run, last
            packed, target = self._read(files[file]), folder / file
            with _written(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(target, packed.content)
                os.utime(target, (packed.changed, packed.changed))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While it is held, nobody else packs or unpacks runs here."""
        with _written(self.path):
            lock = Lock.take(self.path.with_suffix(".lock"), wait=True)
        assert lock is not None  # it waits
        try:
            yield
        finally:
            lock.release()

    def _entries(self) -> Mapping[str, Mapping[str, zipfile.ZipInfo]]:
        try:
            return self._now().entries
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def _entry(self, name: str, file: str) -> zipfile.ZipInfo:
        entry = self._entries().get(name, {}).get(file)
        if entry is None:
            raise FileNotFoundError(f"{self.path} has no {name}/{file}")
        return entry

    def _now(self) -> _Directory:
        """The pack's directory as it is on disk now. Raises FileNotFoundError, NotADirectoryError and CossError."""
        stat = self.path.stat()
        stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if self._opened is None or self._opened.stamp != stamp:
            found: dict[str, dict[str, zipfile.ZipInfo]] = {}
            with self._undamaged(), zipfile.ZipFile(self.path) as archive:
                for entry in archive.infolist():
                    name, file = _parts(entry)
                    found.setdefault(name, {})[file] = entry
                if any(_mark(files) not in files for files in found.values()):
                    raise ValueError(f"it holds a run without {JOB} and {LOG}")
            self._opened = _Directory(stamp, found)
        return self._opened

    def _read(self, entry: zipfile.ZipInfo) -> PackedFile:
        with self._undamaged(), zipfile.ZipFile(self.path) as archive:
            return PackedFile(archive.read(entry), _changed(entry))

    @contextmanager
    def _undamaged(self) -> Iterator[None]:
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
            raise CossError(f"{self.path} is damaged ({error}); put back the one that was stored") from error


def run_file(folder: Path, file: str) -> bytes:
    """A file of the run in ``folder``, which is packed or not. Raises FileNotFoundError."""
    folder = folder.absolute()
    return Runs(folder.parent).read(folder.name, file)


def results_in(folder: Path) -> list[Path]:
    """The results folders in a folder, at any depth, packed ones too; without itself."""
    loose = {path.parent for path in folder.rglob("run.json")} - {folder}
    packs = [(path.parent, "") for path in folder.rglob(RUNS)] + [(folder.parent, folder.absolute().name)]
    packed = {out / name / RESULTS for out, alone in packs for name in Runs(out).evaluated() if alone in ("", name)}
    return sorted(loose | packed)


def _mark(files: Collection[str]) -> str:
    """The file whose presence says that a folder is a run."""
    return JOB if JOB in files else LOG


def _parts(entry: zipfile.ZipInfo) -> tuple[str, str]:
    """Run and path in its folder. Raises ValueError for what does not belong into a pack."""
    match = _MEMBER.fullmatch(entry.filename)
    if match is None or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"it holds {entry.filename!r}, which is no file of a run")
    _changed(entry)  # which may be no date
    if entry.file_size > MOST_MEMBER:
        raise ValueError(f"{entry.filename} takes more than {MOST_MEMBER >> 20} MiB")
    return match[1], match[2]


def _changed(entry: zipfile.ZipInfo) -> int:
    return calendar.timegm(entry.date_time)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CossError(f"cannot write {path}: {error.strerror}; make room or give another --out") from error
