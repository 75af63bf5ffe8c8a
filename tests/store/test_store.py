"""The store: golden keys, whole files, claims between live and killed processes, nothing lost."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coss_eval.errors import CossError, UsageError
from coss_eval.runtime import disk
from coss_eval.store import Cell, Condition, Measurement, Store, StoreWarning, canonical_json, column_name

PROTOCOL = {
    "model": {"sha256": "ab" * 32, "arch": "resnet18", "mean": [0.485, 0.456, 0.406]},
    "data": {"name": "digits", "fingerprint": "cd" * 8, "limit": None},
    "geometry": {"size": [32, 32], "resize": "native"},
}
FOG = Cell("corruptions", {"corruption": "fog", "severities": [1, 2, 3], "seed": 0})


def record(value: float = 0.75) -> dict:
    """A cell of two conditions and four images."""
    measurements = [
        Measurement("accuracy", value, 4, 0.3, 0.9, {"corruption": "fog", "severity": 1}),
        Measurement("accuracy", 0.5, 4, 0.1, 0.8, {"corruption": "fog", "severity": 2}),
    ]
    return {"protocol": PROTOCOL, "cell": FOG, "model": "r18", "measurements": measurements, "seconds": 1.5}


def verdicts() -> dict[str, np.ndarray]:
    return {
        "id": np.array([2**62, 5, -7, 0]),
        "corruption=fog,severity=1": np.array([True, True, True, False]),
        "corruption=fog,severity=2": np.array([True, False, True, False]),
    }


def python(code: str, *args: object, **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "key"),
    [
        (FOG, "25123f220fc3929fb56f"),
        (
            Cell("attacks", {"attack": "pgd", "norm": "linf", "eps": [1 / 1020, 8 / 255], "step_size": None}),
            "0775af2f869120094eef",
        ),
        (Cell("internal", {"site": "stage1", "level": 0.1}, algorithm_version=2), "a0cb149551583ec356d5"),
    ],
)
def test_golden_keys(cell: Cell, key: str, tmp_path: Path) -> None:
    """These never change: a stored number must be found again by every later version."""
    assert Store(tmp_path).key(PROTOCOL, cell) == key


def test_a_parameter_at_its_default_keeps_old_keys(tmp_path: Path) -> None:
    store = Store(tmp_path)
    grown = Cell(
        FOG.task, FOG.params | {"flavour": "original", "scale": 1.0}, defaults={"flavour": "original", "scale": 1}
    )
    changed = Cell(FOG.task, FOG.params | {"flavour": "other"}, defaults={"flavour": "original"})
    assert store.key(PROTOCOL, grown) == store.key(PROTOCOL, FOG)
    assert store.key(PROTOCOL, changed) != store.key(PROTOCOL, FOG)


@pytest.mark.parametrize(
    "other",
    [
        Cell("corruptions", FOG.params | {"seed": 1}),
        Cell("attacks", FOG.params),
        Cell("corruptions", FOG.params, algorithm_version=2),
        Cell("corruptions", FOG.params | {"severities": [3, 2, 1]}),
    ],
)
def test_every_part_of_a_cell_counts(other: Cell, tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.key(PROTOCOL, other) != store.key(PROTOCOL, FOG)
    assert store.key({**PROTOCOL, "geometry": None}, FOG) != store.key(PROTOCOL, FOG)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.slow
@given(json_values)
def test_canonical_json_ignores_what_does_not_matter(value: object) -> None:
    text = canonical_json(value)
    assert canonical_json(json.loads(text)) == text

    def shuffled(item: object) -> object:
        if isinstance(item, dict):
            return {name: shuffled(item[name]) for name in reversed(item)}
        return tuple(map(shuffled, item)) if isinstance(item, list) else item

    assert canonical_json(shuffled(value)) == text


def test_canonical_json_knows_numpy_and_whole_floats() -> None:
    assert (
        canonical_json({"b": np.float64(0.1), "a": [np.int64(3), 2.0, -0.0, np.bool_(True)]})
        == '{"a":[3,2,0,true],"b":0.1}'
    )
    assert canonical_json(np.arange(3)) == "[0,1,2]"


@pytest.mark.parametrize("value", [math.nan, math.inf, {1: 2}, {"a": {3}}, object(), Path("x")])
def test_canonical_json_refuses_what_has_no_form(value: object) -> None:
    with pytest.raises(UsageError):
        canonical_json(value)


# --- writing and reading ----------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "folder")
    key = store.key(PROTOCOL, FOG)
    assert store.read(key) is None
    assert store.samples(key) is None
    store.write(key, record(), verdicts())
    read = store.read(key)
    assert read is not None
    assert read["task"], read["params"] == (FOG.task, FOG.params)
    assert read["protocol"] == PROTOCOL
    assert [Measurement(**m) for m in read["measurements"]] == record()["measurements"]
    samples = store.samples(key)
    assert samples is not None
    assert samples.index.tolist() == verdicts()["id"].tolist()
    assert samples["corruption=fog,severity=2"].tolist() == [True, False, True, False]
    assert [r["key"] for r in store.records()] == [key]


def test_column_names_need_no_parsing_twice() -> None:
    assert column_name("robust_accuracy", {"attack": "pgd", "eps": 1 / 255}) == "attack=pgd,eps=0.00392157"
    assert column_name("top1", {}) == "top1"


def test_a_condition_is_a_value_with_a_text_and_its_own_equality() -> None:
    one = Condition(attack="pgd", eps=1 / 255)
    assert str(one) == "attack=pgd,eps=0.00392157"
    assert str(Condition()) == ""
    assert dict(one) == {"attack": "pgd", "eps": 1 / 255} == one
    assert {one: "found"}[Condition(eps=float("0.00392157"), attack="pgd")] == "found"  # six digits, in any order
    assert one != Condition(attack="pgd", eps=1.0001 / 255)
    assert Condition(severity=1) == Condition(severity=1.0) != Condition(severity="1")
    assert Condition(seed=1234567) != Condition(seed=1234568)
    assert one.includes(eps=1 / 255)
    assert not one.includes(norm="linf")
    assert one.without("eps") == {"attack": "pgd"}
    assert Measurement("accuracy", 0.5, 2, condition={"level": 1}) == Measurement(
        "accuracy", 0.5, 2, condition={"level": 1.0}
    )


def test_an_undefined_number_is_null(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("k", {"model": "m", "measurements": [Measurement("r2", math.nan, 3)]})
    read = store.read("k")
    assert read is not None
    assert read["measurements"][0]["value"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corruption=fog,severity=9": np.zeros(4)}, "severity=9"),
        ({"id": np.array([1, 1, 2, 3])}, "unique ids"),
        ({"id": np.arange(5)}, "one length"),
    ],
)
def test_samples_that_do_not_fit_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        Store(tmp_path).write("k", record(), verdicts() | change)
    assert Store(tmp_path).records() == []


def test_measurements_of_one_cell_are_told_apart(tmp_path: Path) -> None:
    twice = [Measurement("within", 0.5, 3, condition={"site": "prepool"})] * 2
    with pytest.raises(UsageError, match=r'within under \{"site":"prepool"\}'):
        Store(tmp_path).write("k", {"model": "m", "measurements": twice})


def test_a_new_write_drops_samples_of_the_old(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("k", record(), verdicts())
    store.write("k", record(0.5))
    assert store.samples("k") is None
    assert not list((tmp_path / "samples").iterdir())


def test_samples_of_another_cell_are_not_used(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("k", record(), verdicts())
    (tmp_path / "samples" / "k.parquet").write_bytes(b"something else")
    with pytest.warns(StoreWarning, match=r"k\.parquet is not the file"):
        assert store.samples("k") is None


@pytest.mark.parametrize(
    "damage", [b"", b'{"key": "k", "measu', b"[]", b"\xff\xfe", b'{"key": "other", "measurements": []}']
)
def test_a_damaged_cell_is_named_and_kept_aside(damage: bytes, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("k", record())
    path = tmp_path / "cells" / "k.json"
    path.write_bytes(damage)
    with pytest.warns(StoreWarning, match="counts as missing"):
        assert store.read("k") is None
    with pytest.warns(StoreWarning):
        store.write("k", record())
    assert store.read("k") is not None
    assert path.with_name("k.json.damaged").read_bytes() == damage


def test_run_json_grows_by_what_is_new(tmp_path: Path) -> None:
    """2,000 cells asked for ten times take their room once; a cell that joins them is added."""
    store, path = Store(tmp_path), tmp_path / "run.json"
    cells = [{"key": f"{i:020x}", "task": "corruptions", "model": "r18"} for i in range(2000)]
    store.record_run({"command": "0", "cells": cells})
    once = path.stat().st_size
    for call in range(1, 10):
        store.record_run({"command": str(call), "cells": [*cells, {**cells[0], "key": f"new {call}"}]})
    assert path.stat().st_size < once + 9 * 400
    listed = [cell for run in store.runs() for cell in run["cells"]]
    assert listed == cells + [{**cells[0], "key": f"new {call}"} for call in range(1, 10)]


def test_runs_are_appended(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.runs() == []
    store.record_run({"command": "first", "seed": np.int64(3)})
    store.record_run({"command": "second"})
    assert [run["command"] for run in store.runs()] == ["first", "second"]
    assert "git_commit" in store.runs()[0]
    (tmp_path / "run.json").write_text("{")
    with pytest.warns(StoreWarning, match=r"run\.json is damaged"):
        store.record_run({"command": "third"})
    assert [run["command"] for run in store.runs()] == ["third"]
    assert (tmp_path / "run.json.damaged").read_text() == "{"


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "out")
    for attempt in (
        lambda: store.write("k", record()),
        lambda: store.record_run({}),
        lambda: store.claim("k").__enter__(),
    ):
        with pytest.raises(CossError, match=r"cannot write results into .*; give another --out") as caught:
            attempt()
        assert "\n" not in str(caught.value)


FULL_DISK = """
import resource, signal, sys
from coss_eval.errors import CossError
from coss_eval.store import Measurement, Store
store = Store(sys.argv[1])
store.write("small", {"model": "m", "measurements": []})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    store.write("small", {"model": "m" * 100_000, "measurements": []})
except CossError as error:
    print(error)
"""


def test_a_full_disk_keeps_what_was_stored(tmp_path: Path) -> None:
    process = python(FULL_DISK, tmp_path)
    out, err = process.communicate(timeout=60)
    assert "cannot write" in out, err
    assert out.count("\n") == 1
    assert [r["model"] for r in Store(tmp_path).records()] == ["m"]
    assert [p.name for p in (tmp_path / "cells").iterdir()] == ["small.json"]  # no temporary file stays


# --- several processes ------------------------------------------------------------------------------------------------

HOLD = """
import os, sys, time
from coss_eval.store import Store
with Store(sys.argv[1]).claim("k") as mine:
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(60)
    print(mine is not None, flush=True)
    time.sleep(60)
"""


def freed(store: Store, key: str, seconds: float = 20) -> bool:
    """Whether the claim can be had; a forked child lets go of it as soon as it has been scheduled once."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with store.claim(key) as mine:
            if mine is not None:
                return True
        time.sleep(0.05)
    return False


def taken_over(store: Store) -> None:
    """The claim is this process's, once, and leaves nothing behind."""
    with store.claim("k") as mine:
        assert mine is not None
        assert mine.read_text().startswith(f"{os.getpid()} ")
        with store.claim("k") as again:
            assert again is None
    assert not list((store.path / "cells").iterdir())


@pytest.mark.parametrize("child", ["alone", "fork"])
def test_a_claim_dies_with_its_process(child: str, tmp_path: Path) -> None:
    """Also where the killed process leaves a forked worker behind."""
    store = Store(tmp_path)
    holder = python(HOLD, tmp_path, child, start_new_session=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with store.claim("k") as mine:
            assert mine is None
        with store.claim("other") as mine:
            assert mine is not None
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        assert freed(store, "k")
        taken_over(store)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


SHARE = """
import sys, time
from coss_eval.store import Store
store, done = Store(sys.argv[1]), []
store.record_run({"command": sys.argv[2]})
for i in range(30):
    key = f"cell{i:02d}"
    with store.claim(key) as mine:
        if mine is None or store.read(key) is not None:
            continue
        time.sleep(0.002)
        store.write(key, {"model": "m", "measurements": [], "by": sys.argv[2]})
        done.append(key)
print(*done)
"""


def test_processes_share_a_store(tmp_path: Path) -> None:
    processes = [python(SHARE, tmp_path, name) for name in "abc"]
    done = [process.communicate(timeout=60) for process in processes]
    assert all(process.returncode == 0 for process in processes), done
    everything = sorted(key for out, _ in done for key in out.split())
    assert everything == [f"cell{i:02d}" for i in range(30)]  # each once
    assert len(Store(tmp_path).records()) == 30
    assert sorted(run["command"] for run in Store(tmp_path).runs()) == ["a", "b", "c"]
    assert not list((tmp_path / "cells").glob("*.lock"))


NO_FLOCK = """
import errno, fcntl, os
def flock(descriptor, operation):  # as the kernel answers for a file system without locks
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = flock
from coss_eval.runtime import disk
disk.BEAT = 0.2
"""


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, too, is on a file system without locks."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(disk, "BEAT", 0.2)


def old(lock: Path, seconds: float = 2 * disk.SILENT) -> None:
    """Have the file look as if nobody had touched it for so long."""
    then = lock.stat().st_mtime - seconds
    os.utime(lock, (then, then))


def test_processes_share_a_store_without_flock(tmp_path: Path) -> None:
    processes = [python(NO_FLOCK + SHARE, tmp_path, name) for name in "abc"]
    done = [process.communicate(timeout=60) for process in processes]
    assert all(process.returncode == 0 for process in processes), done
    everything = sorted(key for out, _ in done for key in out.split())
    assert everything == [f"cell{i:02d}" for i in range(30)]  # each once
    assert sorted(run["command"] for run in Store(tmp_path).runs()) == ["a", "b", "c"]
    assert not list(tmp_path.rglob("*.lock*"))
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize("child", ["alone", "fork"])
def test_a_claim_without_flock_lasts_as_long_as_its_process(child: str, tmp_path: Path) -> None:
    """A living holder's beat undoes any age; a killed one's file is taken over when it is old, not before."""
    store, lock = Store(tmp_path), tmp_path / "cells" / "k.lock"
    holder = python(NO_FLOCK + HOLD, tmp_path, child, start_new_session=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        old(lock)
        with store.claim("k") as mine:
            assert mine is None
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with store.claim("k") as mine:
            assert mine is None
        assert str(store.pack()).startswith("another process")
        old(lock)
        taken_over(store)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize("seconds", [2 * disk.SILENT, -2 * disk.SILENT])
def test_a_clock_that_was_set_frees_no_claim_of_the_living(seconds: float, tmp_path: Path) -> None:
    store, lock = Store(tmp_path), tmp_path / "cells" / "k.lock"
    with store.claim("k") as mine:
        assert mine is not None
        for _ in range(2):
            old(lock, seconds)
            with store.claim("k") as again:
                assert again is None


def test_who_only_asks_about_a_lock_keeps_nobody_from_taking_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sweep --list` locks a dead process's file for the moment of asking: a run that begins then looks once more."""
    path = tmp_path / "job.lock"
    path.write_text("1 elsewhere\n")
    asking = os.open(path, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(asking, fcntl.LOCK_UN))  # it lets go meanwhile
    lock = disk.Lock.take(path)
    assert lock is not None
    assert disk.Lock.take(path) is None  # which another does hold
    lock.release()
    os.close(asking)


TAKE = """
import sys
from pathlib import Path
from coss_eval.runtime.disk import Lock
print("ready", flush=True)
sys.stdin.readline()
lock = Lock.take(Path(sys.argv[1], "k.lock"))
print(lock is not None, flush=True)
sys.stdin.readline()
if lock is not None:
    lock.release()
"""


def test_exactly_one_takes_over_what_a_dead_process_held(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    cells.mkdir()
    (cells / "k.lock").write_text("1 gone\n")
    (cells / "k.lock.next").write_text("2 killed while it cleared the first away\n")
    for left in cells.iterdir():
        old(left)
    asking = [python(NO_FLOCK + TAKE, cells, stdin=subprocess.PIPE) for _ in range(4)]
    for process in asking:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in asking:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.stdout.readline().strip() for process in asking if process.stdout is not None]
    for process in asking:
        process.communicate("end\n", timeout=60)
    assert sorted(answers) == ["False", "False", "False", "True"]
    assert not list(cells.iterdir())


def test_a_link_in_the_place_of_a_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run.lock").symlink_to("precious")
    with pytest.raises(CossError, match="cannot lock"):
        Store(tmp_path).record_run({})
    assert (tmp_path / "precious").read_text() == "kept"


WRITE_FOREVER = """
import sys
import numpy as np
from coss_eval.store import Measurement, Store
store, n = Store(sys.argv[1]), 0
ids = np.arange(2000)
while True:
    n += 1
    key = f"cell{n % 4}"
    measurement = Measurement("accuracy", 0.5, n, condition={"n": "any"})
    with store.claim(key):
        record = {"model": "m" * 20_000, "measurements": [measurement], "n": n}
        store.write(key, record, {"id": ids, "n=any": ids % n == 0})
    store.record_run({"n": n})
    if n == 4:
        print("ready", flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_the_store_readable(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    rng = random.Random(0)
    store = Store(tmp_path)
    for _ in range(6):
        process = python(WRITE_FOREVER, tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        records = store.records()
        assert len(records) == 4
        assert not recwarn.list, "a damaged file"
        assert len(store.runs()) >= 4
        for one in records:
            # only the cell in flight may have samples that are not its own, and then says so
            samples = store.samples(one["key"])
            assert samples is None or samples["n=any"].tolist() == [i % one["n"] == 0 for i in range(2000)]
        assert sum("not the file" in str(w.message) for w in recwarn.list) <= 1
        recwarn.clear()
        for one in records:
            with store.claim(one["key"]) as mine:
                assert mine is not None
    assert not list(tmp_path.glob("*/.*.tmp"))  # the next claim cleaned up


def test_importing_the_store_imports_neither_torch_nor_pandas() -> None:
    process = python("import sys, coss_eval.store; print({'torch', 'pandas', 'pyarrow', 'numpy'} & set(sys.modules))")
    assert process.communicate(timeout=60)[0] == "set()\n"


def test_a_cell_whose_samples_are_damaged_is_not_finished(tmp_path: Path) -> None:
    """Loose or packed, it is read and named, and written anew when it is asked for."""
    store = Store(tmp_path)
    key = store.key(PROTOCOL, FOG)
    store.write(key, record(), verdicts())
    assert store.finished(key) is not None
    (tmp_path / "samples" / f"{key}.parquet").write_bytes(b"junk")
    with pytest.warns(StoreWarning, match=rf"{key}\.parquet is not the file"):
        assert store.finished(key) is None
    assert store.read(key) is not None
    store.write(key, record(), verdicts())
    assert store.pack() is None
    assert Store(tmp_path).finished(key) is not None
    (samples,) = tmp_path.glob("samples-*.npz")
    samples.write_bytes(b"junk")
    with pytest.warns(StoreWarning, match="not the file its cells were packed with"):
        assert Store(tmp_path).finished(key) is None
    store.write(key, record(), verdicts())
    assert store.pack() is None
    assert Store(tmp_path).finished(key) is not None
    assert (tmp_path / f"{samples.name}.damaged").read_bytes() == b"junk"
