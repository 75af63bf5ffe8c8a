"""Packed runs: equal to folders in all that is read, whatever is killed, damaged or written by strangers."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coss_eval.errors import CossError
from coss_eval.store import Cell, Measurement, Store, StoreWarning, column_name
from coss_eval.store import pack as _pack
from coss_eval.store.runs import Runs, results_in, run_file
from coss_eval.sweeps.packing import pack_runs

IMAGES = 50


def fill(store: Store, keys: str, value: float = 0.5, seed: int = 0) -> None:
    """A cell a letter, with verdicts; "f" with floats and its own images, "n" without samples."""
    for key in keys:
        rng = np.random.default_rng([seed, ord(key)])
        ids = np.random.default_rng(key == "f").integers(-(2**62), 2**62, IMAGES)
        conditions = [{"severity": s} for s in range(1, 4)]
        samples = {"id": ids} | {column_name("accuracy", c): rng.random(IMAGES) < value for c in conditions}
        if key == "f":
            samples["severity=2"] = rng.normal(size=IMAGES)
            samples["severity=3"] = rng.integers(0, 9, IMAGES)
        record = {
            "protocol": {"data": "digits", "model": {"sha256": "ab" * 32}},
            "cell": Cell("corruptions", {"corruption": key}),
            "model": "m",
            "measurements": [Measurement("accuracy", value, IMAGES, condition=c) for c in conditions],
            "seed": seed,
        }
        with store.claim(key):
            store.write(key, record, None if key == "n" else samples)


def everything(path: Path) -> dict[str, tuple[dict, pd.DataFrame | None]]:
    """All records, but for where their samples are, and all samples; any warning is an error."""
    store = Store(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {record["key"]: (record, store.samples(record["key"])) for record in store.records()}
    for key, (record, table) in found.items():
        assert ("samples" in record) == (table is not None), key
        record.pop("samples", None)
    return found


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key, (record, table) in a.items():
        assert record == b[key][0]
        if table is None:
            assert b[key][1] is None
        else:
            pd.testing.assert_frame_equal(table, b[key][1], check_exact=True)


def names(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    Store(path).record_run({"command": "first"})
    fill(Store(path), "abcfn")
    return path


def packed_names(path: Path) -> tuple[Path, Path]:
    (samples,) = path.glob("samples-*.npz")
    return path / "cells.jsonl.gz", samples


def test_a_packed_run_reads_as_the_folder(run: Path) -> None:
    before, runs = everything(run), Store(run).runs()
    assert Store(run).pack() is None
    assert names(run) == ["cells.jsonl.gz", "run.json", packed_names(run)[1].name]
    assert_same(everything(run), before)
    assert Store(run).runs() == runs
    first = [path.read_bytes() for path in packed_names(run)]
    assert Store(run).pack() is None
    assert [path.read_bytes() for path in packed_names(run)] == first


def test_the_files_are_what_the_docstring_says(run: Path) -> None:
    before = everything(run)
    Store(run).pack()
    cells, samples = packed_names(run)
    header, *lines = [json.loads(line) for line in gzip.decompress(cells.read_bytes()).splitlines()]
    assert (header["format"], header["cells"], len(header["protocols"])) == (2, 5, 1)
    arrays = np.load(samples)  # allow_pickle is False
    line = next(line for line in lines if line["key"] == "b")
    (dtype, column), place = line["samples"]["columns"]["severity=2"], line["samples"]["ids"]
    assert dtype == "bool"
    verdicts = np.unpackbits(arrays[f"bool_{place}"], axis=1)[:, column]
    table = before["b"][1]
    assert table is not None
    assert verdicts.tolist() == table["severity=2"].tolist()
    assert arrays[f"ids_{place}"].tolist() == table.index.tolist()
    assert sorted(name for name in arrays if name.startswith("ids")) == ["ids_0", "ids_1"]  # each set of images once


def test_new_cells_lie_beside_the_pack_until_it_is_packed_again(run: Path) -> None:
    store = Store(run)
    store.pack()
    fill(store, "d")
    fill(store, "a", 0.9, seed=1)  # --overwrite: the loose cell wins over the packed one
    assert [key in names(run) for key in ("cells/a.json", "cells/b.json", "cells/d.json")] == [True, False, True]
    before = everything(run)
    assert sorted(before) == list("abcdfn")
    assert (before["a"][0]["seed"], before["b"][0]["seed"]) == (1, 0)
    assert Store(run).pack() is None
    assert len(names(run)) == 3
    assert_same(everything(run), before)
    fill(store, "a", 0.1, seed=2)
    assert everything(run)["a"][0]["seed"] == 2  # the same Store sees a pack that changed


def test_a_store_kept_open_sees_what_others_pack(run: Path) -> None:
    reader, before = Store(run), everything(run)
    assert reader.read("a") is not None
    Store(run).pack()
    table = reader.samples("a")
    assert table is not None
    fill(Store(run), "a", 0.9, seed=1)
    Store(run).pack()
    new = reader.samples("a")
    assert new is not None
    assert not new.equals(table)
    pd.testing.assert_frame_equal(table, before["a"][1])


def test_a_claimed_run_is_not_packed(run: Path) -> None:
    before = names(run)
    with Store(run).claim("z"):
        assert Store(run).pack() == "another process is at work there"
        assert "cells/z.lock" in names(run)
    assert names(run) == before
    (run / "cells" / "y.lock").write_text("1 killed\n")  # nobody holds it
    assert Store(run).pack() is None
    assert len(names(run)) == 3


SHARE = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_pack import fill
from coss_eval.store import Store
store = Store(Path(sys.argv[1]))
for key in sys.argv[3]:
    if store.read(key) is None:
        fill(store, key)
    store.pack()
"""


@pytest.mark.slow
def test_processes_pack_one_folder_at_a_time(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", SHARE, str(tmp_path / "run"), str(Path(__file__).parent)]
    processes = [subprocess.Popen([*arguments, keys]) for keys in ("abcdefghijn", "nmlkjihgfed")]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert Store(tmp_path / "run").pack() is None
    fill(Store(tmp_path / "alone"), "abcdefghijklmn")
    assert_same(everything(tmp_path / "run"), everything(tmp_path / "alone"))
    assert len(names(tmp_path / "run")) == 2


# --- killed at every step ---------------------------------------------------------------------------------------------

KILL = """
import os, shutil, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_pack import assert_same, everything, names
from coss_eval.store import Store
from coss_eval.store.runs import Runs
from coss_eval.sweeps.packing import pack_runs
base = Path(sys.argv[1])
study = (base / "a").is_dir()
where = "a/results" if study else "."
expected = everything(base / where)
def pack(path):
    return pack_runs(path)["a"] if study else Store(path).pack()

def pack_and_die(path, step):
    left = step
    def dying(call):
        def wrapped(*args, **kwargs):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*args, **kwargs)
        return wrapped
    for name in ("open", "replace", "unlink", "fsync", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    pack(path)
    os._exit(0)

step = 0
while True:
    path = base.with_name(f"killed-{step}")
    shutil.copytree(base, path)
    child = os.fork()
    if child == 0:
        pack_and_die(path, step)
    status = os.waitpid(child, 0)[1]
    assert_same(everything(path / where), expected)
    assert (None if study and Runs(path).is_packed("a") else pack(path)) is None
    if study:
        pack_runs(path)
    assert_same(everything(path / where), expected)
    left = [name for name in names(path) if not name.startswith(("first", ".")) and not name.endswith(".lock")]
    assert len(left) == (1 if study else 3), names(path)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    step += 1
print(step)
"""


@pytest.mark.slow
def test_kill_9_at_every_step_of_packing_loses_nothing(run: Path) -> None:
    """A pack, cells that replace some of it, new cells: killed before each call that touches the disk."""
    Store(run).pack()
    fill(Store(run), "ad", 0.9, seed=1)
    arguments = [sys.executable, "-c", KILL, str(run), str(Path(__file__).parent)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


# --- the runs of a study ----------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A run that is evaluated, a pilot, and a run that was begun."""
    out = tmp_path / "study"
    for name, facts in (("a", {"sha256": "0", "evaluated": {}}), ("pilot", {"knn": 0.5}), ("begun", {})):
        (out / name).mkdir(parents=True)
        (out / name / "job.json").write_text(json.dumps({"arm": "byol", **facts}))
        (out / name / "log.jsonl").write_text('{"kind": "start"}\n')
    Store(out / "a" / "results").record_run({"command": "first"})
    fill(Store(out / "a" / "results"), "abcfn")
    return out


def test_a_studys_finished_runs_are_read_from_one_file(study: Path) -> None:
    results = study / "a" / "results"
    (study / "a" / "model.safetensors").write_bytes(b"weights")
    before, runs = everything(results), Store(results).runs()
    log = run_file(study / "a", "log.jsonl")
    assert pack_runs(study) == {"a": None, "pilot": None, "begun": "not finished"}
    assert names(study) == ["a/model.safetensors", "begun/job.json", "begun/log.jsonl", "runs.zip"]
    with zipfile.ZipFile(study / "runs.zip") as archive:
        assert len(archive.namelist()) == 7
    packed = (study / "runs.zip").read_bytes()
    assert_same(everything(results), before)
    assert Store(results).runs() == runs
    assert run_file(study / "a", "log.jsonl") == log
    assert results_in(study) == results_in(study / "a") == [results]
    assert pack_runs(study) == {"begun": "not finished"}
    assert (study / "runs.zip").read_bytes() == packed
    (study / "begun" / "job.json").write_text(json.dumps({"knn": 0.1}))
    assert pack_runs(study) == {"begun": None}
    assert_same(everything(results), before)


def test_a_packed_run_that_is_written_to_is_unpacked_first(study: Path) -> None:
    results = study / "a" / "results"
    before = everything(results)
    pack_runs(study)
    store = Store(results)
    store.records()
    fill(store, "d")
    assert not Runs(study).is_packed("a")
    after = everything(results)
    assert after.keys() - before.keys() == {"d"}
    assert_same({key: after[key] for key in before}, before)
    with Store(results).claim("e"):
        assert pack_runs(study)["a"] == "another process is at work there"
    assert pack_runs(study)["a"] is None
    assert_same(everything(results), after)


def test_of_a_run_and_its_packed_form_the_newer_is_read(study: Path) -> None:
    pack_runs(study)
    with (runs := Runs(study)).locked():
        runs.unpack("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not runs.is_packed("a")  # the same: nothing is to be said
    job = study / "a" / "job.json"
    job.write_text(json.dumps({"arm": "other", "evaluated": {}}))
    os.utime(job, (job.stat().st_mtime + 100,) * 2)
    with pytest.warns(StoreWarning, match="is newer than its packed form and is read; coss-eval pack"):
        assert b"other" in run_file(study / "a", "job.json")
    os.utime(job, (10**9, 10**9))
    with pytest.warns(StoreWarning, match="is older than its packed form in .*, which is read; remove one"):
        assert b"byol" in run_file(study / "a", "job.json")
    with pytest.warns(StoreWarning), pytest.raises(CossError, match="is older than its packed form"):
        fill(Store(study / "a" / "results"), "d")  # neither is overwritten
    with pytest.warns(StoreWarning):
        assert pack_runs(study).get("a", "left") == "left"


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign", "huge"])
def test_a_damaged_pack_of_runs_is_one_line(damage: str, study: Path) -> None:
    pack_runs(study)
    path = study / "runs.zip"
    whole = path.read_bytes()
    if damage == "foreign":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("../x/job.json", "{}")
    elif damage == "huge":  # more than it may take, said by its own directory
        place = whole.rindex(b"PK\x01\x02") + 24
        path.write_bytes(whole[:place] + (2**31).to_bytes(4, "little") + whole[place + 4 :])
    elif damage == "flipped":  # in the first file's bytes, with its name and size as they were
        place = 30 + len("a/job.json") + 5
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    with pytest.raises(CossError, match=r"runs\.zip is damaged .*; put back the one that was stored") as caught:
        run_file(study / "a", "job.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(CossError, match="is damaged"):
        pack_runs(study)


@pytest.mark.slow
def test_kill_9_at_every_step_of_packing_runs_loses_nothing(study: Path) -> None:
    shutil.rmtree(study / "begun")
    arguments = [sys.executable, "-c", KILL, str(study), str(Path(__file__).parent)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


def test_several_processes_pack_one_study(study: Path) -> None:
    for number in range(12):
        shutil.copytree(study / "pilot", study / f"pilot-{number}")
    with ThreadPoolExecutor(3) as pool:  # flock keeps threads apart as it does processes
        told = list(pool.map(pack_runs, [study] * 3))
    packed = [name for each in told for name, reason in each.items() if reason is None]
    assert sorted(packed) == sorted({"a", "pilot", *(f"pilot-{number}" for number in range(12))})
    assert sorted(Runs(study).packed()) == sorted(packed)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "not gzip", "lost line"])
def test_a_damaged_pack_is_named_and_kept_aside(damage: str, run: Path) -> None:
    Store(run).pack()
    cells, samples = packed_names(run)
    whole, verdicts = cells.read_bytes(), samples.read_bytes()
    middle = len(whole) // 2
    lines = gzip.decompress(whole).splitlines(keepends=True)
    broken = {
        "cut": whole[:middle],
        "empty": b"",
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "not gzip": gzip.decompress(whole),
        "lost line": gzip.compress(b"".join(lines[:-1])),
    }[damage]
    cells.write_bytes(broken)
    with pytest.warns(StoreWarning, match=r"cells\.jsonl\.gz is damaged"):
        assert Store(run).records() == []
    with pytest.warns(StoreWarning):
        assert Store(run).pack() is None  # nothing loose: nothing is touched
    assert (cells.read_bytes(), samples.read_bytes()) == (broken, verdicts)
    fill(Store(run), "ab", seed=1)
    with pytest.warns(StoreWarning):
        assert Store(run).pack() is None
    assert (run / "cells.jsonl.gz.damaged").read_bytes() == broken
    assert (run / f"{samples.name}.damaged").read_bytes() == verdicts
    assert sorted(everything(run)) == ["a", "b"]


def test_damaged_samples_are_named_and_never_packed_away(run: Path) -> None:
    Store(run).pack()
    samples = packed_names(run)[1]
    samples.write_bytes(samples.read_bytes()[:-1])
    with pytest.warns(StoreWarning, match="not the file its cells were packed with"):
        assert Store(run).samples("a") is None
    assert len(Store(run).records()) == 5
    fill(Store(run), "a", seed=1)
    reason = Store(run).pack()
    assert reason is not None
    assert "damaged" in reason
    fill(Store(run), "bcf", seed=1)  # with "a" all that have samples
    assert Store(run).pack() is None
    assert sorted(everything(run)) == list("abcfn")
    assert (run / f"{samples.name}.damaged").exists()


def test_damaged_loose_cells_stay_as_they_are(run: Path) -> None:
    (run / "cells" / "a.json").write_text("{")
    (run / "samples" / "b.parquet").write_bytes(b"another")
    with pytest.warns(StoreWarning):
        assert Store(run).pack() is None
    left = [name for name in names(run) if "/" in name]
    assert left == ["cells/a.json", "cells/b.json", "samples/a.parquet", "samples/b.parquet"]
    assert (run / "samples" / "b.parquet").read_bytes() == b"another"


def test_a_newer_format_is_one_line_and_left_alone(run: Path) -> None:
    Store(run).pack()
    cells = packed_names(run)[0]
    header, *lines = gzip.decompress(cells.read_bytes()).splitlines(keepends=True)
    newer = gzip.compress(b"".join([json.dumps(json.loads(header) | {"format": 3}).encode() + b"\n", *lines]))
    cells.write_bytes(newer)
    fill(Store(run), "d")
    for attempt in (Store(run).records, lambda: Store(run).read("a"), Store(run).pack):
        with pytest.raises(CossError, match=r"cells\.jsonl\.gz is of format 3, .* upgrade"):
            attempt()
    assert cells.read_bytes() == newer
    for path, content in (
        (run / "run.json", {"runs": [{}]}),
        (run / "cells" / "e.json", {"key": "e", "measurements": []}),
    ):
        path.write_text(json.dumps(content | {"format": 3}))
    with pytest.raises(CossError, match=r"run\.json is of format 3"):
        Store(run).record_run({})
    with pytest.raises(CossError, match=r"e\.json is of format 3"):
        Store(run).read("e")


def test_a_folder_of_the_first_format_is_read_and_packed(tmp_path: Path) -> None:
    """Written as the first version did, without the store."""
    import hashlib

    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("cells", "samples"):
        (tmp_path / name).mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "runs": [{"command": "old"}]}))
    pq.write_table(pa.table({"id": [5, 3], "top1": [True, False]}), tmp_path / "samples" / "k.parquet")
    digest = hashlib.sha256((tmp_path / "samples" / "k.parquet").read_bytes()).hexdigest()
    measured = {"metric": "top1", "value": 0.5, "n": 2, "low": None, "high": None, "condition": {}}
    named = {"format": 1, "key": "k", "model": "m", "protocol": {}, "task": "probe", "params": {}}
    cell = named | {"measurements": [measured], "samples": digest}
    (tmp_path / "cells" / "k.json").write_text(json.dumps(cell, indent=1))
    before = everything(tmp_path)
    assert Store(tmp_path).pack() is None
    assert_same(everything(tmp_path), before)
    table = Store(tmp_path).samples("k")
    assert table is not None
    assert table["top1"].to_dict() == {5: True, 3: False}
    assert [run["command"] for run in Store(tmp_path).runs()] == ["old"]


# --- packs of strangers -----------------------------------------------------------------------------------------------


def npz(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy(shape: str, data: bytes = b"", dtype: str = "|u1") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        npz(ids_0=npy("(1000000000000,)", b"few")),
        npz(ids_0=npy("(-1, -1)", b"x")),
        npz(ids_0=npy("(1,)", b"cos\nsystem\n(S'true'\ntR.", "|O")),
        npz(ids_0=bytes(2**27 + 1)),  # inflates to more than a pack may hold
        npz(ids_0=b"no array"),
        b"PK\x05\x06 no archive",
    ],
)
def test_samples_of_strangers_take_no_memory_and_run_nothing(content: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(_pack.Damaged):
            _pack.Samples(content)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_a_column_cannot_be_asked_for_many_times(run: Path) -> None:
    Store(run).pack()
    samples = _pack.Samples(packed_names(run)[1].read_bytes())
    assert len(samples.columns({"ids": 0, "columns": {"x": ["bool", 0]}}).values["x"]) == IMAGES
    for columns in (
        {str(i): ["bool", 0] for i in range(9)},
        {"x": ["bool", -1]},
        {"x": ["bool", 10**9]},
        {"x": ["ids", 0]},
    ):
        with pytest.raises(_pack.Damaged):
            samples.columns({"ids": 0, "columns": columns})


def test_cells_that_inflate_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl.gz").write_bytes(gzip.compress(b" " * (_pack.MOST_CELLS + 1)))
    with pytest.warns(StoreWarning, match="damaged"):
        assert Store(tmp_path).records() == []


@pytest.mark.parametrize("change", [{"key": "../../etc/x"}, {"measurements": None}, {"protocol": 7}, {"protocol": 0.0}])
def test_lines_that_are_no_records_are_damage(change: dict, run: Path) -> None:
    Store(run).pack()
    header, line, *rest = gzip.decompress(packed_names(run)[0].read_bytes()).splitlines()
    content = b"\n".join([header, json.dumps(json.loads(line) | change).encode(), *rest])
    with pytest.raises(_pack.Damaged):
        _pack.Cells.decode(gzip.compress(content), "x")


# --- size -------------------------------------------------------------------------------------------------------------


def test_a_run_of_the_study_takes_a_tenth_of_a_megabyte(tmp_path: Path) -> None:
    """30 cells of 5 verdicts on 2,500 images, as noise, which nothing compresses."""
    store, rng = Store(tmp_path), np.random.default_rng(0)
    ids = rng.integers(-(2**62), 2**62, 2500)
    for key in range(30):
        conditions = [{"corruption": f"c{key}", "severity": s} for s in range(1, 6)]
        samples = {"id": ids} | {column_name("", c): rng.random(2500) < 0.5 for c in conditions}
        measurements = [Measurement("accuracy", rng.random(), 2500, rng.random(), rng.random(), c) for c in conditions]
        protocol = {"model": {"sha256": "ab" * 32, "mean": list(rng.random(3))}, "data": {"fingerprint": "cd" * 16}}
        store.write(str(key), {"protocol": protocol, "model": "m", "measurements": measurements}, samples)
    store.pack()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 100_000


def test_a_run_too_large_for_a_pack_stays_a_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(run)
    monkeypatch.setattr(_pack, "MOST_SAMPLES", 2**16)
    reason = Store(run).pack()
    assert reason is not None
    assert "more than" in reason
    assert names(run) == before
