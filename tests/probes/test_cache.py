"""The cache on disk: round trips, damage, bounds, and folders that cannot be written."""

from __future__ import annotations

import os
import random
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from coss_eval.errors import CossWarning, UsageError
from coss_eval.probes import cache

ARRAYS = {"ids": np.arange(50), "at stage1": np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)}
MIB = 2**20


def test_round_trip(cache_folder: Path) -> None:
    assert cache.load("x", list(ARRAYS)) is None
    cache.save("x", ARRAYS)
    found = cache.load("x", list(ARRAYS))
    assert found is not None
    assert all(np.array_equal(found[name], ARRAYS[name]) and found[name].dtype == ARRAYS[name].dtype for name in found)
    assert [path.name for path in cache_folder.iterdir()] == ["x.npz"]
    assert cache.load("x", ["something else"]) is None


def test_no_damage_is_ever_taken_for_data(cache_folder: Path) -> None:
    """One random bit, anywhere in the file, and cuts at random places: nothing is read, or what was written."""
    draw = random.Random(0)
    cache.save("x", ARRAYS)
    whole = (cache_folder / "x.npz").read_bytes()
    for trial in range(400):
        damaged = bytearray(whole)
        if trial % 4:
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        else:
            del damaged[draw.randrange(len(whole)) :]
        (cache_folder / "x.npz").write_bytes(damaged)
        found = cache.load("x", list(ARRAYS))
        assert found is None or all(np.array_equal(found[name], ARRAYS[name]) for name in ARRAYS)


def test_a_damaged_file_is_named(cache_folder: Path) -> None:
    (cache_folder / "x.npz").write_bytes(b'{"junk')
    with pytest.warns(CossWarning, match=r"cannot use .*x\.npz of the cache .*computed again"):
        assert cache.load("x", list(ARRAYS)) is None


def test_the_least_recently_used_go_first(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSS_CACHE_GB", str(3.5 / 1024))
    array = {"a": np.zeros(MIB, np.uint8)}
    for age, name in enumerate(("new", "middle", "old")):
        cache.save(name, array)
        used = time.time() - 1000 * age
        os.utime(cache_folder / f"{name}.npz", (used, used))
    assert cache.load("old", ["a"]) is not None  # which makes it the newest
    cache.save("newest", array)
    assert {path.stem for path in cache_folder.iterdir()} == {"new", "old", "newest"}


def test_what_exceeds_the_limit_is_not_kept(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.save("small", {"a": np.zeros(10)})
    monkeypatch.setenv("COSS_CACHE_GB", "0.0001")
    with pytest.warns(UserWarning, match="0.00781 GB of large exceed the cache's 0.0001 GB .* COSS_CACHE_GB=1 would"):
        cache.save("large", {"a": np.zeros(MIB)})
    assert {path.stem for path in cache_folder.iterdir()} == {"small"}
    monkeypatch.setenv("COSS_CACHE_GB", "0")
    cache.save("other", {"a": np.zeros(10)})
    assert cache.load("other", ["a"]) is None


LARGE = {**ARRAYS, "turned": np.asfortranarray(np.arange(12.0).reshape(3, 4)), "none": np.zeros((0, 3))}


@pytest.mark.parametrize("gigabytes", ["8", "0.0000001"])
def test_large_arrays_are_mapped(gigabytes: str, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache, or from a file without a name where they are too large for it: the same numbers, aligned."""
    monkeypatch.setenv("COSS_CACHE_GB", gigabytes)
    monkeypatch.setattr(cache, "MAPPED", 1)
    kept = gigabytes == "8"
    with nullcontext() if kept else pytest.warns(UserWarning, match="exceed the cache's"):
        cache.save("features-x", LARGE)
    found = cache.on_disk("features-x", LARGE)
    assert cache.holds("features-x") == kept
    assert [path.name for path in cache_folder.iterdir()] == (["features-x.npz"] if kept else [])
    for name, array in LARGE.items():
        assert np.array_equal(found[name], array)
        assert isinstance(found[name], np.memmap) == bool(array.size)
        assert found[name].flags.aligned
        assert found[name].ctypes.data % 64 == 0 or not array.size
    found["ids"][0] = 77  # in this process alone
    assert kept is False or cache.load("features-x", ["ids"])["ids"][0] == 0


def test_files_of_earlier_versions_are_read(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAPPED", 1)
    cache_folder.mkdir(exist_ok=True)
    np.savez(cache_folder / "x.npz", **LARGE)
    found = cache.load("x", list(LARGE))
    assert found is not None
    assert all(np.array_equal(found[name], LARGE[name]) and found[name].flags.aligned for name in LARGE)


def test_the_limit_of_nothing_writes_nothing(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSS_CACHE_GB", "0")
    monkeypatch.setattr(cache, "MAPPED", 1)
    cache.save("x", ARRAYS)
    found = cache.on_disk("x", ARRAYS)
    assert all(found[name] is ARRAYS[name] for name in ARRAYS)
    assert not list(cache_folder.glob("*"))


def test_abandoned_temporary_files_go(cache_folder: Path) -> None:
    old, young = cache_folder / ".x.1234.tmp", cache_folder / ".y.1234.tmp"
    for path, age in ((old, 2 * cache.ABANDONED), (young, 0)):
        path.write_bytes(b"cut short")
        os.utime(path, (time.time() - age,) * 2)
    cache.save("z", ARRAYS)
    assert (old.exists(), young.exists()) == (False, True)


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COSS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot be written"):
        cache.save("x", ARRAYS)
    assert cache.load("x", list(ARRAYS)) is None


@pytest.mark.parametrize("given", ["lots", "-1", "nan", "inf"])
def test_a_wrong_limit(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSS_CACHE_GB", given)
    with pytest.raises(UsageError, match="COSS_CACHE_GB must be a number"):
        cache.save("x", ARRAYS)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COSS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "coss-eval"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "home" / ".cache" / "coss-eval"
