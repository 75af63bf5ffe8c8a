"""The pack of a results folder, as it is on disk now: read when asked for, and put in another's place."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from coss_eval.store import pack as _pack
from coss_eval.store.cells import Record, SampleColumns, warn
from coss_eval.store.folder import ResultsFolder, keep_aside
from coss_eval.store.runs import Stamp


@dataclass
class _OpenPack:
    """A pack once read; ``stamp`` tells whether it still is the one on disk."""

    stamp: Stamp
    cells: _pack.Cells
    _samples: _pack.Samples | _pack.Damaged | None = None

    def samples(self, folder: ResultsFolder) -> _pack.Samples:
        """Its samples, read when they are first asked for. Raises Damaged where the file is not theirs."""
        if self._samples is None:
            try:
                self._samples = self._read(folder)
            except _pack.Damaged as error:
                self._samples = error
        if isinstance(self._samples, _pack.Damaged):
            raise self._samples
        return self._samples

    def _read(self, folder: ResultsFolder) -> _pack.Samples:
        try:
            with folder.opened(_pack.samples_name(self.cells.samples_sha256 or "")) as file:
                content = file.read(_pack.MOST_SAMPLES + 1)  # which fails its digest if there is more
        except OSError as error:
            raise _pack.Damaged(str(error)) from error
        return _pack.Samples.of(content, self.cells)


class PackOfFolder:
    """Packed cells and their samples, by key; other processes may pack anew at any time."""

    def __init__(self, folder: ResultsFolder) -> None:
        self._folder, self.path = folder, folder.path
        self._opened: _OpenPack | None = None

    def keys(self) -> Collection[str]:
        """Those of the packed cells."""
        packed = self._now()
        return () if packed is None else packed.cells.records.keys()

    def record(self, key: str) -> Record | None:
        """A packed cell; None where it is not there."""
        packed = self._now()
        return None if packed is None else packed.cells.record(key)

    def columns(self, key: str) -> SampleColumns | None:
        """A packed cell's samples; None where it has none or, with a StoreWarning, not its own."""
        packed = self._now()
        where = None if packed is None else packed.cells.records.get(key, {}).get("samples")
        if packed is None or where is None:
            return None
        try:
            return packed.samples(self._folder).columns(where)
        except _pack.Damaged:
            if self._now() is not packed:  # packed again while it was read
                return self.columns(key)
            self._tell_of_damaged(packed)
            return None

    def has_samples(self) -> bool:
        """Whether the samples of the packed cells are theirs; with a StoreWarning where not."""
        packed = self._now()
        if packed is None:
            return False
        try:
            packed.samples(self._folder)
        except _pack.Damaged:
            if self._now() is not packed:  # packed again while it was read
                return self.has_samples()
            self._tell_of_damaged(packed)
            return False
        return True

    def _tell_of_damaged(self, packed: _OpenPack) -> None:
        path = self.path / _pack.samples_name(packed.cells.samples_sha256 or "")
        warn(
            f"{path} is not the file its cells were packed with; paired tests leave them out until they are done again"
        )

    def entries(self, *, without: Collection[str]) -> Iterator[_pack.PackedCell]:
        """The cells of the pack but those in ``without``. Raises Damaged where their samples cannot be had."""
        packed = self._now()
        if packed is None:
            return
        for key in packed.cells.records.keys() - without:
            record = packed.cells.record(key)
            assert record is not None
            where = record.get("samples")
            yield record, None if where is None else packed.samples(self._folder).columns(where).table()

    def replace(self, cells: bytes, samples: bytes | None) -> None:
        """Write a pack: first its samples, under a name of their own, then the cells, which name them."""
        path = self.path / _pack.CELLS
        whole = not path.exists() or self._now() is not None
        for other in self.path.glob(_pack.SAMPLES):
            if not whole or not _pack.is_own_content(other):  # a damaged pack's samples may be all that is left of it
                keep_aside(other)
        if not whole:
            keep_aside(path)
        if samples is not None:
            self._folder.write(self.path / _pack.samples_name(hashlib.sha256(samples).hexdigest()), samples)
        self._folder.write(path, cells)

    def remove_old_samples(self) -> None:
        """The samples of packs that are no more."""
        packed = self._now()
        if packed is None:
            return
        used = packed.cells.samples_sha256
        for path in self.path.glob(_pack.SAMPLES):
            if (used is None or path.name != _pack.samples_name(used)) and _pack.is_own_content(path):
                path.unlink()

    def _now(self) -> _OpenPack | None:
        """The pack as it is on disk now; None where there is none or, with a StoreWarning, it is damaged."""
        path = self.path / _pack.CELLS
        try:
            with self._folder.opened(_pack.CELLS) as file:
                if self._opened is None or self._opened.stamp != file.stamp:
                    self._opened = _OpenPack(file.stamp, _pack.Cells.decode(file.read(_pack.MOST_CELLS + 1), path))
            return self._opened
        except (FileNotFoundError, NotADirectoryError):
            return None
        except _pack.Damaged:
            warn(f"{path} is damaged and its cells count as missing; it is kept aside when the run is packed again")
            return None
