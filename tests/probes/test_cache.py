"""The cache on disk: round trips, damage, bounds, and folders that cannot be written."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from coss_eval.errors import UsageError
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
    cache.save("large", {"a": np.zeros(MIB)})
    assert {path.stem for path in cache_folder.iterdir()} == {"small"}
    monkeypatch.setenv("COSS_CACHE_GB", "0")
    cache.save("other", {"a": np.zeros(10)})
    assert cache.load("other", ["a"]) is None


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
