"""Sweeps: what a YAML asks for, runs that are resumed, shared and left to others, and the report at any time."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from synthetic_runs import Writer

from coss_eval import cli
from coss_eval import sweeps as sweeping
from coss_eval.errors import CossError, UsageError
from coss_eval.reports import sweeps
from coss_eval.reports.drawing import style
from coss_eval.reports.estimates import Estimate
from coss_eval.reports.results import Results
from coss_eval.runtime.disk import Lock
from coss_eval.store import Store, StoreWarning
from coss_eval.sweeps import plan
from coss_eval.sweeps.packing import pack_runs
from coss_eval.sweeps.plan import read_sweep, runs
from coss_eval.sweeps.report import list_lines, report
from coss_eval.sweeps.state import states
from coss_eval.sweeps.work import Worker
from coss_eval.training.log import read as read_log

FIXED = {"size": 16, "width": 16, "epochs": 1, "warm_up_epochs": 0, "batch_size": 32, "probe_every": 0, "hidden": 32}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 16 px images, told apart by their colour."""
    root = tmp_path_factory.mktemp("data") / "colours"
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 10)):
        for label in range(3):
            folder = root / split / f"c{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (16, 16, 3)) + 80 * (np.arange(3) == label)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def written(images: Path, tmp_path: Path) -> Callable[..., Path]:
    """A sweep's YAML with some entries changed."""

    def write(**entries: Any) -> Path:
        grid = {"crop_min_scale": [0.2, 0.8]}
        default = {"data": str(images), "preset": "digits-tiny", "methods": ["byol"], "grid": grid, "fixed": FIXED}
        path = tmp_path / "sweep.yaml"
        path.write_text(
            yaml.safe_dump({k: v for k, v in {**default, **entries}.items() if v is not None}, sort_keys=False)
        )
        return path

    return write


def test_jobs_are_the_grid_by_methods_and_seeds(written: Callable[..., Path]) -> None:
    grid = {"crop_min_scale": [0.2, 0.8], "arch": ["resnet18", "rf29_resnet18"]}
    found = runs(read_sweep(written(methods=["byol", "co-byol"], grid=grid, seeds=[0, 7])))
    assert [job.number for job in found] == list(range(1, 17))
    assert len({job.name for job in found}) == 16
    assert [job.config.seed for job in found] == [0] * 8 + [7] * 8
    assert found[3].name == "co-byol-crop_min_scale=0.2-arch=rf29_resnet18-seed=0"
    assert (found[3].config.crop_min_scale, found[3].config.arch) == (0.2, "rf29_resnet18")
    assert found[3].config.epochs == 1


def test_a_sweep_without_a_grid_is_over_c_min(written: Callable[..., Path]) -> None:
    found = runs(read_sweep(written(grid=None)))
    assert [job.config.crop_min_scale for job in found] == [0.08, 0.2, 0.4, 0.6, 0.8]


@pytest.mark.parametrize("name", sweeping.shipped())
def test_shipped_sweeps_are_valid(name: str) -> None:
    assert len(runs(read_sweep(name))) >= 4


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"methods": None}, "methods"),
        ({"method": "byol"}, "methods"),
        ({"methods": "byol"}, "list"),
        ({"methods": ["co-byo"]}, "co-byol"),
        ({"preset": "digit-tiny"}, "digits-tiny"),
        ({"grid": {"crop_min_scal": [0.2]}}, "crop_min_scale"),
        ({"grid": {"crop_min_scale": 0.2}}, "list"),
        ({"grid": {"crop_min_scale": []}}, "list"),
        ({"grid": {"crop_min_scale": [0.2, 1.2]}}, "at most 1, got 1.2"),
        ({"grid": {"crop_min_scale": [0.0]}}, "above 0"),
        ({"grid": {"crop_min_scale": ["small"]}}, "small"),
        ({"grid": {"crop_min_scale": [0.2, 0.2]}}, "twice"),
        ({"grid": {"local_weight": [0.2]}}, "co-byol"),
        ({"fixed": {"epoch": 1}}, "epochs"),
        ({"fixed": {"seed": 1}}, "entries of its own"),
        ({"seeds": ["a"]}, "seed"),
        ({"claims": 2 * [{"name": "a", "source": "", "task": "probe", "metric": "top1", "margin": 0.0}]}, "called 'a'"),
    ],
)
def test_a_bad_sweep_is_one_line(entries: dict[str, Any], expected: str, written: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=expected) as caught:
        runs(read_sweep(written(**entries)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["methods: [byol", "- a\n- b\n", ""])
def test_what_is_no_sweep_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"bad\.yaml") as caught:
        read_sweep(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="crops"):
        read_sweep("crop")


def stages(sweep: plan.Sweep, out: Path) -> list[str]:
    return [state.stage for state in states(sweep, out, out)]


@pytest.mark.slow
def test_from_one_run_to_all_with_a_report_each_time(written: Callable[..., Path], tmp_path: Path) -> None:
    sweep, out = read_sweep(written(methods=["byol", "co-byol"])), tmp_path / "out"
    told: list[str] = []

    def run(number: int | None = None) -> list[str]:
        told.clear()
        tell = lambda one, what: told.append(f"{one.number} {what}")  # noqa: E731
        assert Worker(sweep, out, out, device="cpu", on_run=tell).run(number) == []
        return told

    assert stages(sweep, out) == ["missing"] * 4
    assert run(number=2) == ["2 is trained", "2 is evaluated", "2 is done already"]
    report = (out / "report.md").read_text()
    assert "3 of 4 runs are missing" in report
    assert "1 byol-crop_min_scale=0.2-seed=0 (missing)" in report
    assert (out / "figures" / "sweep.png").exists()

    lock = Lock.take(_folder(out / "byol-crop_min_scale=0.8-seed=0") / "job.lock")
    assert lock is not None
    done = [f"{number} {what}" for number in (1, 4) for what in ("is trained", "is evaluated", "is done already")]
    assert [line for line in run() if line[0] in "14"] == done
    assert {"2 is done already", "3 is being done by another process"} <= set(told)
    lock.release()
    assert [line for line in run() if "already" not in line] == ["3 is trained", "3 is evaluated"]

    report = (out / "report.md").read_text()
    assert "missing" not in report
    assert "| crop_min_scale 0.8 |" in report
    rows = list(csv.DictReader((out / "runs.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["done"] * 4
    assert all(float(row["top1_low"]) <= float(row["top1"]) <= float(row["top1_high"]) for row in rows)
    for one in runs(sweep):
        assert {record["model"] for record in Store(out / one.name / "results").records()} == {one.name}
        assert not (out / one.name / "last.pt").exists()  # a finished run needs no trainer's state

    other = read_sweep(written(methods=["byol", "co-byol"], fixed={**FIXED, "lr": 0.3}))
    with pytest.raises(UsageError, match=r"lr: 0.3, there 0.2.*--out"):
        Worker(other, out, out, device="cpu").run()
    with pytest.raises(UsageError, match="1 to 4, not 5"):
        Worker(sweep, out, out, device="cpu").run(5)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_the_list_tells_who_is_at_a_run_and_which_are_lost_and_writes_nothing(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    grid, out = {"crop_min_scale": [0.2, 0.4, 0.6, 0.8]}, tmp_path / "out"
    sweep = read_sweep(written(grid=grid, fixed={**FIXED, "epochs": 5}))
    held, lost, killed, _ = (_folder(out / run.name) for run in runs(sweep))
    for folder in (held, lost):
        (folder / "last.pt").write_bytes(b"")
        (folder / "log.jsonl").write_text(json.dumps({"kind": "train", "step": 9, "epoch": 3}) + "\n")
    script = "import sys, time; from pathlib import Path; from coss_eval.runtime.disk import Lock\n"
    script += "lock = Lock.take(Path(sys.argv[1])); print(flush=True); time.sleep(100)"
    holders = [
        subprocess.Popen([sys.executable, "-c", script, str(folder / "job.lock")], stdout=subprocess.PIPE)
        for folder in (held, killed)
    ]
    for holder in holders:
        assert holder.stdout is not None
        assert holder.stdout.readline()
    holders[1].kill()  # its lock's file stays
    holders[1].wait()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    lines = list_lines(sweep, states(sweep, out, out))
    holders[0].kill()
    holders[0].wait()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert [line.split()[1] for line in lines[1:5]] == ["running", "lost", "missing", "missing"]
    assert f"(at epoch 2/5, process {holders[0].pid} on {socket.gethostname()})" in lines[1]
    assert "(at epoch 2/5)" in lines[2]
    assert [state.held for state in states(sweep, out, out)] == [None] * 4


def test_long_lists_take_seconds(written: Callable[..., Path], tmp_path: Path) -> None:
    """A thousand runs, two thirds done: what each costs does not grow with their number."""
    grid, out = {"crop_min_scale": [0.1 + i / 1000 for i in range(500)]}, tmp_path
    sweep = read_sweep(written(grid=grid, seeds=[0, 1]))
    for run in runs(sweep)[:600]:
        record = {"data": run.data, "config": run.config.as_dict(), "sha256": "0", "evaluated": sweep.written()}
        (_folder(out / run.name) / "job.json").write_text(json.dumps(record | {"minutes": {"train": 2, "evaluate": 1}}))
    started = time.process_time()
    lines = list_lines(sweep, states(sweep, out, out))
    assert time.process_time() - started < 5
    assert [line.split()[1] for line in lines[1:-1]] == ["done"] * 600 + ["missing"] * 400
    assert "600 of 1000 runs are trained, 600 evaluated; training the others about 13 hours and" in lines[-1]


def test_a_run_that_another_process_holds_is_named_with_an_exit_code(
    written: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = written(), tmp_path / "out"
    name = runs(read_sweep(str(path)))[0].name
    lock = Lock.take(_folder(out / name) / "job.lock")
    assert lock is not None
    monkeypatch.setattr(sys, "argv", ["coss-eval", "sweep", str(path), "--job", "1", "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3
    assert f"ELSEWHERE   1 {name} is at another process" in capsys.readouterr().out
    lock.release()


def test_the_page_alone_is_of_what_is_there(
    written: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["coss-eval", "sweep", str(written()), "--page", "--out"]
    (tmp_path / "out").mkdir()
    for out, code, told in (("out", 0, "report      "), ("elsewhere", 2, "is no folder: give that of the sweep")):
        monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / out)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == code
        assert told in "".join(capsys.readouterr())
    assert "runs are missing" in (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_others_run(written: Callable[..., Path], tmp_path: Path) -> None:
    sweep = read_sweep(written(grid={"lr": [1e30, 0.1]}))
    failures = Worker(sweep, tmp_path / "out", tmp_path / "out", device="cpu").run()
    assert len(failures) == 1
    assert "step" in failures[0]
    assert stages(sweep, tmp_path / "out")[1] == "done"


@pytest.mark.slow
def test_a_killed_run_goes_on(written: Callable[..., Path], tmp_path: Path) -> None:
    path, out = written(grid={"crop_min_scale": [0.2]}, fixed={**FIXED, "epochs": 6}), tmp_path / "out"
    script = "import sys; from coss_eval.cli import main; sys.argv[0] = 'coss-eval'; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "sweep", str(path), "--out", str(out), "--device", "cpu"],
        env=os.environ,
        start_new_session=True,
    )
    folder = out / "byol-crop_min_scale=0.2-seed=0"
    deadline = time.monotonic() + 60
    while not (folder / "last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    sweep = read_sweep(path)
    assert stages(sweep, out) == ["begun"]
    assert Worker(sweep, out, out, device="cpu").run() == []
    assert stages(sweep, out) == ["done"]
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


@pytest.mark.slow
def test_torchrun_works_on_one_run_at_a_time(written: Callable[..., Path], tmp_path: Path) -> None:
    """Two processes share every run: the scores are those of one process, and no run is taken twice."""
    path = written(methods=["byol"], grid={"crop_min_scale": [0.2, 0.8]}, fixed={**FIXED, "precision": "fp32"})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for count in ("1", "2"):
        command = [*launch, count, "-m", "coss_eval", "sweep", str(path), "--device", "cpu"]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / count)], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
    sweep = read_sweep(path)
    assert stages(sweep, tmp_path / "2") == ["done", "done"]
    for run in runs(sweep):
        losses = [
            [line["loss"] for line in read_log(tmp_path / count / run.name) if line["kind"] == "train"]
            for count in ("1", "2")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        starts = [line for line in read_log(tmp_path / "2" / run.name) if line["kind"] == "start"]
        assert len(starts) == 1


STUDY = {
    "grid": None,
    "methods": None,
    "threads": 1,
    "device": "cpu",
    "train_first": True,
    "bf16_weights": True,
    "fixed": {**FIXED, "holdout": 0.2, "probe_every": 1},
    "pilots": {"epochs": 1, "trials": {"byol": [{"lr": 0.2}, {"lr": 1.0e-6}]}},
    "blocks": [
        {"methods": ["byol", "co-byol"], "seeds": [0, 1]},
        {"methods": ["co-byol"], "arm": "no local weight", "fixed": {"local_weight": 0.0}, "seeds": [0]},
    ],
    "evaluate": [
        {"task": "probe", "options": {"fractions": []}},
        {
            "task": "internal",
            "limit": 15,
            "options": {"sites": ["prepool"], "kinds": ["channel"], "levels": [0.5, 0.9]},
        },
    ],
    "claims": [
        {"name": "linear", "source": "table 1", "task": "probe", "metric": "top1", "margin": 0.01},
        {
            "name": "masks",
            "source": "table 3",
            "task": "internal",
            "metric": "accuracy",
            "where": {"site": "prepool", "level": [0.5, 0.9]},
            "margin": 0.01,
        },
    ],
    "sizes": {"gpu": {"device": "cuda", "train_first": False}},
}


@pytest.mark.slow
def test_a_study_pilots_trains_evaluates_and_reports(written: Callable[..., Path], tmp_path: Path) -> None:
    path, out, work = written(**STUDY), tmp_path / "out", tmp_path / "work"
    sweep = read_sweep(path)
    assert [state.stage for state in states(sweep, out, work)] == ["missing"] * 2 + ["waits"] * 5
    told: list[str] = []
    tell = lambda one, what: told.append(f"{one.number} {what}")  # noqa: E731
    assert Worker(sweep, out, work, device="cpu", on_run=tell, minutes=60).run() == []
    order = [line for line in told if "is trained" in line or "is evaluated" in line]
    assert order == [f"{n} is trained" for n in range(1, 8)] + [f"{n} is evaluated" for n in range(3, 8)]

    done = states(sweep, out, work)
    assert [state.stage for state in done] == ["done"] * 7
    knn = {state.run.config.lr: state.record["knn"] for state in done if state.run.pilot}
    best = max(knn, key=lambda lr: knn[lr])
    assert {state.run.config.lr for state in done if not state.run.pilot} == {best}
    assert done[6].run.config.local is not None
    assert done[6].run.config.local.local_weight == 0
    kept = sorted(file.name for file in (out / "byol-seed=0").iterdir())
    assert kept == ["job.json", "log.jsonl", "model.safetensors", "results"]
    assert not list(work.rglob("*.pt"))
    assert not list(work.rglob("*.safetensors"))

    records = [
        Store(out / f"{method}-seed={seed}" / "results").records() for method in ("co-byol", "byol") for seed in (0, 1)
    ]
    masked = [
        np.mean([m["value"] for r in each for m in r["measurements"] if r["task"] == "internal" and _damaged(m)])
        for each in records
    ]
    report = (out / "report.md").read_text()
    difference = 100 * (np.mean(masked[:2]) - np.mean(masked[2:]))
    row = next(line for line in report.splitlines() if line.startswith("| 2 masks"))
    assert f"| {difference:+.1f} [".replace("-", "−").replace("+0.0", "0.0") in row
    assert "5 of 5 runs are trained, 5 evaluated." in report
    assert (out / "figures" / "scores.png").exists()

    with pytest.raises(UsageError, match="on cuda alone, and this is cpu"):
        Worker(read_sweep(path, "gpu"), tmp_path / "other", work, device="cpu").run()
    job = out / "byol-seed=0" / "job.json"
    record = json.loads(job.read_text())
    job.write_text(json.dumps({key: value for key, value in record.items() if key != "evaluated"}))
    assert Worker(read_sweep(path, "gpu"), out, work, device="cpu").run() == []  # trained there, evaluated anywhere
    assert json.loads(job.read_text())["evaluated"] == record["evaluated"]
    with pytest.raises(UsageError, match="size of the sweep"):
        read_sweep(path, "gp")
    changed = read_sweep(written(**STUDY | {"evaluate": STUDY["evaluate"][:1]}))
    assert [state.stage for state in states(changed, out, work)][2:] == ["trained"] * 5  # asks for another evaluation

    assert Worker(sweep, out, work, device="cpu").run() == []
    page = (out / "report.md").read_bytes()
    records = Store(out / "byol-seed=0" / "results").records()
    assert set(pack_runs(out).values()) == {None}
    assert sorted(file.name for file in out.rglob("*.json*")) == []
    assert [state.stage for state in states(sweep, out, work)] == ["done"] * 7
    assert Worker(sweep, out, work, device="cpu").run() == []  # nothing is done, and the page is written
    assert (out / "report.md").read_bytes() == page
    assert Worker(changed, out, work, device="cpu").run(3) == []  # from its weights, in a folder of its own again
    assert json.loads((out / "byol-seed=0" / "job.json").read_text())["evaluated"] == changed.written()
    assert Store(out / "byol-seed=0" / "results").records() == records
    with pytest.warns(StoreWarning, match="newer than its packed form"):
        assert pack_runs(out) == {"byol-seed=0": None}
    assert [state.stage for state in states(changed, out, work)][2:] == ["done"] + ["trained"] * 4

    (out / "byol-seed=1" / "model.safetensors").unlink()
    (failure,) = Worker(changed, out, work, device="cpu").run(5)
    assert failure.startswith("5 byol-seed=1: it is trained, and its weights are gone: put ")
    assert failure.endswith(f"or take the run out of {out / 'runs.zip'} to train it again")
    assert "5 of 5 runs are trained, 1 evaluated" in (out / "report.md").read_text()
    assert row.rpartition(" | ")[0].rpartition(" | ")[0] in (out / "report.md").read_text()  # what was measured stays


def test_a_score_of_a_claim_is_over_the_same_conditions_for_every_run(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    """One run is half evaluated, one was evaluated under less, one has results of weights that it had before."""
    open_claim = {"name": "corrupted", "source": "", "task": "corruptions", "metric": "accuracy", "margin": 0.0}
    linear = open_claim | {"name": "linear", "task": "probe", "metric": "top1"}
    sweep = read_sweep(written(grid={}, seeds=[0, 1, 2, 3], claims=[open_claim, linear]))
    whole, half, less, replaced = runs(sweep)
    done = {"sha256": "0", "evaluated": sweep.written()}
    for run, names, more in (
        (whole, ["fog", "frost"], done),
        (half, ["fog", "frost"], {"sha256": "0"}),
        (less, ["fog"], done),
        (replaced, ["fog", "frost"], done),
    ):
        record = {"data": run.data, "config": run.config.as_dict(), **more}
        (_folder(tmp_path / run.name) / "job.json").write_text(json.dumps(record))
        writer = Writer(Store(tmp_path / run.name / "results"), run.name, 0.5)
        writer.corruptions(names)
        writer.probe()
    results = Store(tmp_path / half.name / "results")
    results.record_run({"cells": [{"key": key, "task": "corruptions", "model": half.name} for key in ["0" * 20]]})
    Writer(Store(tmp_path / replaced.name / "results"), "before", 2.0).probe()
    (found,) = [line for line in _page(sweep, tmp_path).splitlines() if line.startswith("| byol ")]
    values = Results(Store(tmp_path / whole.name / "results"))
    shown = 100 * values.rows("corruptions")["value"].mean()
    assert found.startswith(f"| byol (3 seeds) | {shown:.1f} ["), found
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["corrupted"]) for row in rows] == [True, False, False, True]
    assert [bool(row["linear"]) for row in rows] == [bool(row["top1"]) for row in rows] == [True, True, True, False]


def _page(sweep: plan.Sweep, out: Path) -> str:
    report(sweep, states(sweep, out, out), out)
    return (out / "report.md").read_text()


def _damaged(measurement: dict[str, Any]) -> bool:
    return measurement["metric"] == "accuracy" and measurement["condition"]["level"] in (0.5, 0.9)


def test_only_what_fits_begins(written: Callable[..., Path], tmp_path: Path) -> None:
    """By what finished runs took: 30 minutes a run of one epoch, so none fits into 20."""
    sweep, out = read_sweep(written()), tmp_path / "out"
    first, second = runs(sweep)
    folder = _folder(out / first.name)
    record = {"data": first.data, "config": first.config.as_dict(), "minutes": {"train": 30.0, "evaluate": 1.0}}
    (folder / "job.json").write_text(json.dumps(record | {"sha256": "0", "evaluated": sweep.written()}))
    told: list[str] = []
    Worker(
        sweep, out, out, device="cpu", minutes=20, on_run=lambda run, what: told.append(f"{run.number} {what}")
    ).run()
    assert told == ["1 is done already", "2 is left out: train takes longer than what is left of the time"]
    assert not (out / second.name / "log.jsonl").exists()


def trial(method: str, c_min: float, seed: int, value: float | None, **varied: Any) -> sweeps.Trial:
    scores = {} if value is None else {s: Estimate(value, value - 0.05, value + 0.05, 100) for s in sweeps.SCORES}
    state = "missing" if value is None else "done"
    return sweeps.Trial(1, "x", method, {"crop_min_scale": c_min, **varied}, seed, state, scores)


def test_seeds_are_the_unit_where_there_are_several() -> None:
    one = sweeps.summary([trial("byol", 0.2, 0, 0.5)], "top1")
    assert one is not None
    assert (one.low, one.high) == (0.45, 0.55)
    three = sweeps.summary([trial("byol", 0.2, seed, v) for seed, v in enumerate((0.5, 0.52, 0.54, None))], "top1")
    assert three is not None
    assert three.value == pytest.approx(0.52)
    assert three.high - three.value == pytest.approx(4.303 * 0.02 / 3**0.5, rel=1e-3)  # Student's t, 2 df


def test_the_table_has_a_gap_where_no_run_is_done_and_heads_the_other_fields() -> None:
    trials = [
        trial(method, c_min, 0, None if (method, c_min) == ("byol", 0.8) else 0.5, arch=arch)
        for arch in ("rf17_resnet18", "rf29_resnet18")
        for c_min in (0.8, 0.2)
        for method in ("byol", "co-byol")
    ]
    table = sweeps.table(trials, "top1")
    assert [(row.group, row.name) for row in table.rows] == [
        (arch, f"crop_min_scale {c}") for arch in ("rf17_resnet18", "rf29_resnet18") for c in ("0.2", "0.8")
    ]
    assert table.gaps == 2
    with style():
        assert len(sweeps.draw(trials).axes) == 2


@pytest.mark.parametrize("varied", [{}, {"arch": "resnet18"}, {"arch": "resnet34"}])
def test_figures_of_any_grid_are_drawn(varied: dict[str, Any], tmp_path: Path) -> None:
    scores = trial("", 0.2, 0, 0.5).scores
    trials = [sweeps.Trial(i, "x", method, varied, 0, "done", scores) for i, method in enumerate(("byol", "dino"))]
    paths = sweeps.write(trials, tmp_path, title="Sweep", about=["about"])
    assert all(path.exists() for path in paths)


@pytest.mark.slow
def test_epochs_that_fit_are_measured_once(written: Callable[..., Path], tmp_path: Path) -> None:
    """Of the first run's speed: half of what fits into twice the time, and the same for whoever comes later."""
    entries = {"methods": ["byol"], "grid": {"crop_min_scale": [0.2]}, "fixed": {**FIXED, "epochs": 400}}
    out = tmp_path / "out"
    assert Worker(read_sweep(written(**entries, run_minutes=0.01)), out, out, device="cpu").run() == []
    kept = json.loads((out / "epochs.json").read_text())
    steps = 90 // 32  # an epoch
    assert kept["epochs"] == pytest.approx(0.6 * kept["images_per_second"] / (32 * steps), abs=1)
    slower = read_sweep(written(**entries, run_minutes=1.0))  # what was measured stays
    assert [state.run.config.epochs for state in states(slower, out, out)] == [kept["epochs"]]
    (out / "epochs.json").write_text("{")
    with pytest.raises(CossError, match="damaged"):
        states(slower, out, out)
