"""benchmarks/gpu.py and merge.py: limits, what travels, what is put together; the small form runs without a GPU."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from coss_eval.errors import CossError
from coss_eval.runtime.provenance import git_commit, made_with, portable
from coss_eval.sweeps.packing import pack_runs
from coss_eval.sweeps.plan import Evaluation, Sweep, runs
from coss_eval.sweeps.state import states

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROW = {"what": "byol", "value": 2000.0, "low": 1900.0, "high": 2100.0, "unit": "images/s", "against": "bare passes",
       "ratio": 0.9, "goal": "at least 2,000 images/s", "met": True, "precision": "bf16", "batch": 256, "turns": 8,
       "device": "GPU A", "torch": "2.11.0", "small_form": False, "commit": "abc", "peak_gib": 9.5}  # fmt: skip


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/ by its name, as the scripts import each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def gpu(scripts: Any) -> ModuleType:
    return scripts("gpu")


@pytest.fixture
def merge(scripts: Any) -> ModuleType:
    return scripts("merge")


@pytest.mark.slow
def test_a_stage_is_killed_with_its_children_at_its_limit(gpu: ModuleType, tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "print(child.pid, flush=True); time.sleep(300)\n"
    )
    called: list[float] = []
    gpu.PACK_EVERY, before = 1.0, gpu.PACK_EVERY
    try:
        ended = gpu.run_limited(
            [sys.executable, "-c", code], tmp_path / "log", 4, dict(os.environ), lambda: called.append(time.monotonic())
        )
    finally:
        gpu.PACK_EVERY = before
    assert ended.code is None
    assert 4 <= ended.seconds < 60
    assert called
    child = int((tmp_path / "log").read_text().split()[0])
    for _ in range(100):
        if not alive(child):
            return
        time.sleep(0.1)
    pytest.fail("the child of a stopped stage lives on")


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


def test_exit_codes_come_back(gpu: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('one'); print('the last line'); raise SystemExit(3)"]
    ended = gpu.run_limited(command, tmp_path / "log", 60, dict(os.environ))
    assert ended.code == 3
    assert gpu.last_line(tmp_path / "log") == "the last line"


def test_counts_of_tests(gpu: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("....\n=== 1 failed, 12 passed, 3 skipped, 20 deselected in 4.20s ===\n")
    assert gpu.counts(log) == "1 failed, 12 passed, 3 skipped, 20 deselected"


def test_what_is_packed_is_unpacked(gpu: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    written = {"epochs.json": b"{}", "byol-seed=0/job.json": b"1", "byol-seed=0/results/cells.json": b"22"}
    for name, content in {**written, "byol-seed=0/last.pt": b"state", "byol-seed=0/job.lock": b""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "link").symlink_to("/etc/hostname")
    assert gpu.pack(folder, tmp_path / "study.tar") == "3 files in study.tar"
    gpu.unpack(tmp_path / "study.tar", tmp_path / "there")
    found = {
        str(f.relative_to(tmp_path / "there")): f.read_bytes() for f in (tmp_path / "there").rglob("*") if f.is_file()
    }
    assert found == written


def test_a_tar_stays_below_its_size_and_keeps_results_before_weights(gpu: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    for name in ("a.safetensors", "b.safetensors", "c.json"):
        (folder / name).write_bytes(bytes(9 * 2**20 if "safe" in name else 2**20))
    assert gpu.pack(folder, tmp_path / "study.tar").startswith("only 2 of 3 files fit")
    assert (tmp_path / "study.tar").stat().st_size <= 16 * 2**20
    with tarfile.open(tmp_path / "study.tar") as tar:
        assert tar.getnames()[0] == "c.json"


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "link"])
def test_a_tar_that_leads_out_is_refused(gpu: ModuleType, name: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "study.tar", "w") as tar:
        member = tarfile.TarInfo(name)
        if name == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(member, io.BytesIO())
    with pytest.raises(ValueError, match="no plain file inside it"):
        gpu.unpack(tmp_path / "study.tar", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_tar_that_grows_too_large_is_refused(gpu: ModuleType, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "study.tar", "w") as tar:
        for name in ("a", "b"):
            member = tarfile.TarInfo(name)
            member.size = 1000
            tar.addfile(member, io.BytesIO(bytes(1000)))
    with pytest.raises(ValueError, match="more than"):
        gpu.unpack(tmp_path / "study.tar", tmp_path / "there", most_bytes=1500)


def test_what_is_too_large_to_travel_is_cut_or_named(gpu: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tests.txt").write_bytes(b"first\n" + b"x" * (17 * 2**20) + b"\nlast\n")
    for number in range(8):
        (tmp_path / f"{number}.txt").touch()
    lines = gpu.trim(tmp_path)
    assert (tmp_path / "tests.txt").stat().st_size <= 16 * 2**20
    assert (tmp_path / "tests.txt").read_bytes().endswith(b"last\n")
    assert any("tests.txt was cut" in line for line in lines)
    assert any("holds 9 files, over 8" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages", "speed,lunch"], "--stages takes some of tests, speed, study"),
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--commit", "a b"], "--commit takes a revision"),
        (["--data-root", "/no/such"], "is no folder"),
    ],
)
def test_wrong_calls(gpu: ModuleType, words: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path / "out"), *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_tests_for_cuda_are_found(gpu: ModuleType) -> None:
    found = {Path(name).name for name in gpu.files_on_cuda()}
    assert {"test_attacks_on_cuda.py", "test_training_on_cuda.py", "test_native.py", "test_devices_agree.py"} <= found


def test_a_copy_without_git_is_told_its_commit(tmp_path: Path) -> None:
    package = Path(__file__).parents[1] / "coss_eval"
    (tmp_path / "coss_eval").symlink_to(package)
    code = "import sys; from coss_eval.runtime import provenance as p; p.__file__ = sys.argv[1]; print(p.git_commit())"
    copied = str(tmp_path / "coss_eval" / "runtime" / "provenance.py")
    for given, expected in (("abc123", "abc123"), ("", "None")):
        environment = {**os.environ, "COSS_COMMIT": given, "PYTHONPATH": str(package.parent)}
        done = subprocess.run([sys.executable, "-c", code, copied], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr
    assert git_commit() is None or len(git_commit() or "") >= 7


def test_a_copy_with_another_commits_git_is_told_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSS_COMMIT", "abc123")
    assert git_commit() == "abc123"


def test_a_command_names_no_folder_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    words = [str(here / "data"), str(home / "a b"), str(home), f"{home}-other", "--seed", "results/x"]
    other = f".../{home.parent.name}/{home.name}-other"
    assert [portable(word) for word in words] == ["data", "~/a b", "~", other, "--seed", "results/x"]


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/scratch/me/study/runs", ".../study/runs"),
        ("--out=/scratch/me/study/runs/", "--out=.../study/runs"),
        ("r18=/scratch/a.pth,/scratch/me/b/c.pth", "r18=.../scratch/a.pth,.../b/c.pth"),
        ("/a.pth", ".../a.pth"),
        ("8/255", "8/255"),
        ("package.module:factory", "package.module:factory"),
        ("s3://bucket/a.pth", "s3://bucket/a.pth"),
    ],
)
def test_a_stored_command_names_no_folder_of_the_machine(word: str, shown: str) -> None:
    assert portable(word) == shown


@pytest.mark.parametrize(
    ("script", "program"),
    [("lib/coss_eval/__main__.py", "coss-eval"), ("bin/coss-eval", "coss-eval"), ("here/study.py", "study.py")],
)
def test_a_runs_command_is_what_a_person_types(script: str, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, "list", "tasks"])
    assert made_with(torch.device("cpu"))["command"] == f"{program} list tasks"


def test_out_of_memory_is_a_row_and_the_next_is_measured(scripts: Any, tmp_path: Path, monkeypatch: Any) -> None:
    speed = scripts("gpu_speed")

    def too_large(bench: Any, share: float) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")

    def broken(bench: Any, share: float) -> None:
        raise ImportError("No module named 'foolbox'")

    jobs = {"large": (0.1, too_large), "broken": (0.1, broken), "fits": (0.1, speed.redundancy_measure)}
    monkeypatch.setattr(speed, "JOBS", jobs)
    bench = speed.Bench(torch.device("cpu"), tmp_path, 2.0, None)
    assert [speed.do(bench, name) for name in jobs] == [False, False, True]
    rows = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert rows[0]["error"] == "out of memory on the device: CUDA out of memory. Tried to allocate 20.00 GiB."
    assert rows[1]["error"] == "ImportError: No module named 'foolbox'"
    assert rows[2]["value"] > 0
    assert rows[2]["small_form"]


def test_contenders_take_turns_until_the_box_is_used_up(scripts: Any, tmp_path: Path) -> None:
    bench = scripts("gpu_speed").Bench(torch.device("cpu"), tmp_path, 1.0, None)
    found = bench.race({"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.002)}, 0.5)
    assert found["slow"].median >= 0.02
    assert 0.002 <= found["fast"].median < found["slow"].median
    assert found["slow"].turns == found["fast"].turns >= 1


@pytest.mark.slow
def test_the_small_form_of_every_measurement(scripts: Any, tmp_path: Path) -> None:
    speed = scripts("gpu_speed")
    bench = speed.Bench(torch.device("cpu"), tmp_path, 1.0, None)
    assert [name for name in speed.JOBS if not speed.do(bench, name)] == []
    rows = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert len({row["what"] for row in rows}) == len(rows) >= len(speed.JOBS)
    for row in rows:
        assert {"value", "unit", "device", "torch", "precision", "batch", "peak_gib", "turns"} <= set(row)
        assert row["value"] > 0
        assert row.get("low", row["value"]) <= row["value"] <= row.get("high", row["value"])
    assert sum(row["what"].endswith(": views") for row in rows) == 4
    assert (tmp_path / "kernels.txt").read_text().count("a step takes") == 2


@pytest.mark.slow
def test_every_stage_is_told_and_the_next_one_starts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--minutes", "0.6", "--out", str(out), "--stages", "speed,study", "--device", "cpu", "--commit", "abc"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert "no GPU: the small form" in done.stdout, done.stderr
    lines = [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]
    assert lines[0]["device"] == "cpu"
    assert [line["stage"] for line in lines[1:]] == ["speed", "study"]
    for line in lines[1:]:  # how far a stage comes in this time is the machine's affair
        ends: dict[int | None, Any] = {
            0: "done",
            None: ("stopped at its limit", "left out"),
            **dict.fromkeys(range(1, 256), "failed"),
        }
        assert line["told"].startswith(ends[line["code"]])
    assert done.returncode == int(any(line["code"] != 0 for line in lines[1:]))
    assert len([path for path in out.rglob("*") if path.is_file()]) <= 8


def came_back(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"what": "cut sh')
    (folder / "kernels.txt").write_text("byol: a step takes 2 ms\nkernels\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_tables_are_merged_once(merge: ModuleType, tmp_path: Path, capsys: Any) -> None:
    small = {**ROW, "what": "tiny", "device": "CPU", "small_form": True}
    failed = {"what": "PGD", "error": "out of memory on the device", "device": "GPU A", "torch": "2.11.0",
              "small_form": False, "commit": None, "peak_gib": 80.0}  # fmt: skip
    came = came_back(tmp_path / "came", [ROW, {**ROW, "value": 2050.0}, failed, small])
    results = tmp_path / "results"
    words = [str(came), "--results", str(results)]
    assert merge.main(words) == 0
    first = contents(results)
    assert merge.main(words) == 0
    assert contents(results) == first
    table = first["gpu/README.md"].decode()
    assert "| byol | 2,050 images/s [1,900, 2,100] | bare passes | 0.9 | at least 2,000 images/s ✓ |" in table
    assert "out of memory" in table
    assert "tiny" not in table
    assert "1 rows of the small form are left out" in capsys.readouterr().out
    assert merge.main([str(came_back(came, [{**ROW, "device": "GPU B"}])), "--results", str(results)]) == 0
    assert (results / "gpu" / "README.md").read_text().count("| byol |") == 2


def test_an_error_does_not_replace_a_number(merge: ModuleType) -> None:
    error = {**{k: ROW[k] for k in ("what", "device", "torch", "small_form", "commit", "peak_gib")}, "error": "x"}
    assert merge.merged([ROW], [error]) == [ROW]
    assert merge.merged([error], [ROW]) == [ROW]


def test_kernels_of_another_network_stay(merge: ModuleType) -> None:
    texts = ["a, 64 px: a step takes 2 ms\nold\n", "b: a step takes 1 ms\nx\na, 64 px: a step takes 3 ms\nnew\n"]
    assert merge.kernel_tables(texts) == {
        "b": "b: a step takes 1 ms\nx\n",
        "a, 64 px": "a, 64 px: a step takes 3 ms\nnew\n",
    }


SWEEP = Sweep(
    data="digits",
    preset="digits-tiny",
    methods=("byol",),
    grid={},
    seeds=(0, 1),
    name="two",
    evaluate=(Evaluation(task="probe"),),
)


def job(folder: Path, number: int, **fields: Any) -> None:
    """job.json of a run as the worker writes it."""
    run = runs(SWEEP)[number]
    record = {"data": run.data, "config": run.config.as_dict(), "arm": run.arm, **fields}
    (folder / run.name).mkdir(parents=True, exist_ok=True)
    (folder / run.name / "job.json").write_text(json.dumps(record))


def test_runs_that_are_further_are_taken_once(merge: ModuleType, gpu: ModuleType, tmp_path: Path) -> None:
    came, store = tmp_path / "runs", tmp_path / "store"
    job(came, 0, sha256="a", evaluated=SWEEP.written(), minutes={"train": 2.0})
    job(came, 1)  # begun, and no more
    job(store, 0, sha256="a")
    gpu.pack(came, tmp_path / "study.tar")
    for taken in (1, 0):
        assert merge.merge_study(tmp_path / "study.tar", store, SWEEP)[0].startswith(f"study: {taken} runs taken")
        names = [run.name for run in runs(SWEEP)]
        assert "evaluated" in json.loads((store / names[0] / "job.json").read_text())
        assert sorted(path.name for path in store.iterdir()) == [names[0]]


def test_packed_runs_are_taken_and_packed(merge: ModuleType, gpu: ModuleType, tmp_path: Path) -> None:
    """A machine that began with the store's pack, did a run, and packed it, too."""
    came, store = tmp_path / "runs", tmp_path / "store"
    job(store, 0, sha256="a", evaluated=SWEEP.written())
    assert merge.packed_lines(store) == []
    assert [path.name for path in store.iterdir()] == ["runs.zip"]
    shutil.copytree(store, came)
    job(came, 1, sha256="b", evaluated=SWEEP.written())
    pack_runs(came)
    gpu.pack(came, tmp_path / "study.tar")
    for taken, there in ((1, 1), (0, 2)):
        told = merge.merge_study(tmp_path / "study.tar", store, SWEEP)
        assert told == [f"study: {taken} runs taken, {there} there already or not trained"]
        assert merge.packed_lines(store) == []
        assert [path.name for path in store.iterdir()] == ["runs.zip"]
        assert [state.stage for state in states(SWEEP, store, store)] == ["done", "done"]


def test_runs_of_another_configuration_or_list_are_refused(merge: ModuleType, gpu: ModuleType, tmp_path: Path) -> None:
    for change, message in (({"lr": 0.123}, "another run"), ({}, "two has not")):
        came = tmp_path / f"runs{len(change)}"
        job(came, 0, sha256="a")
        path = next(came.glob("*/job.json"))
        record = json.loads(path.read_text())
        record["config"] |= change
        path.write_text(json.dumps(record))
        if not change:
            path.parent.rename(came / "dino-seed=9")
        gpu.pack(came, tmp_path / "study.tar")
        with pytest.raises(CossError, match=message):
            merge.merge_study(tmp_path / "study.tar", tmp_path / "store", SWEEP)
        assert not (tmp_path / "store").exists()
