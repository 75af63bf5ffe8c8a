"""The pipe from models and data to stored measurements: completeness, resume, independence of the batch, gaps."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

import coss_eval as ce
from coss_eval import cli, evaluation
from coss_eval.checkpoints.load import make_model, save_model
from coss_eval.data.dataset import Dataset
from coss_eval.errors import CossError, UsageError
from coss_eval.models.model import Model
from coss_eval.runtime.live import TOGETHER as TOGETHER_IN
from coss_eval.runtime.processes import PARENT
from coss_eval.store import Store
from coss_eval.tasks.attacks.task import Attacks
from coss_eval.tasks.corruptions.task import Corruptions
from coss_eval.tasks.crops.task import Crops
from coss_eval.tasks.internal.task import Internal
from coss_eval.tasks.probe.task import Probe
from coss_eval.tasks.redundancy.task import Redundancy
from coss_eval.tasks.task import Task
from coss_eval.training.loop import train

TASKS: list[Task] = [
    Probe(),
    Corruptions(("gaussian_noise", "fog", "jpeg_compression"), (1, 5)),
    Attacks(eps={"linf": (0.5 / 255, 4 / 255), "l2": (0.1, 0.5)}, steps=5),
    Internal(levels=(0.3, 0.7), seeds=2),
    Crops((0.3,), ("top left",), (0.5,), (2,)),
    Redundancy(),
]


def small_digits() -> Dataset:
    data = ce.load_dataset("digits")
    assert data.train is not None
    return replace(data, train=data.train.limited(500, 0), test=data.test.limited(90, 0))


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return small_digits()


@pytest.fixture(scope="session")
def trained(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Model:
    out = tmp_path_factory.mktemp("trained")
    fields = {"holdout": 0.0, "epochs": 8, "batch_size": 25, "lr": 0.4, "crop_min_scale": 0.6}
    model = train("supervised", digits, preset="digits-tiny", out=out, device="cpu", **fields)
    assert ce.load_model(out / "model.safetensors").sha256 == model.sha256
    return model


@pytest.fixture(scope="session")
def full_run(trained: Model, digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> evaluation.Run:
    return ce.evaluate([trained, trained.untrained(0)], digits, TASKS, out=tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="session")
def network() -> Model:
    """For what does not depend on training."""
    return make_model("resnet18", stem="cifar", width=8)


def stored(path: Path) -> dict[str, list[dict[str, object]]]:
    return {record["key"]: record["measurements"] for record in Store(path).records()}


@pytest.mark.slow
def test_every_task_measures_every_model_with_intervals(full_run: evaluation.Run, trained: Model) -> None:
    table = full_run.table()
    assert full_run.failures == ()
    assert set(table["task"]) == {"probe", "corruptions", "attacks", "internal", "crops", "redundancy"}
    given = {trained.name, trained.untrained(0).name}
    assert set(table["model"]) == given | {f"{name}, untrained" for name in given}  # redundancy's own rows beside them
    clean = table[(table["corruption"] == "clean") & (table["metric"] == "accuracy")].set_index("model")["value"]
    assert clean[trained.name] > 0.8
    shares = table[table["metric"].isin(["accuracy", "robust_accuracy", "top1"])]
    assert ((shares["low"] <= shares["value"]) & (shares["value"] <= shares["high"])).all()


@pytest.mark.slow
def test_the_report_is_written(full_run: evaluation.Run) -> None:
    written = full_run.report()
    names = {path.name for path in written}
    assert {"report.md", "report.html"} <= names
    assert any(name.endswith(".tex") for name in names)
    assert any(name.endswith(".png") for name in names)
    assert "digits" in (full_run.path / "report.md").read_text()


@pytest.mark.slow
def test_robust_accuracy_never_rises_with_eps(full_run: evaluation.Run) -> None:
    table = full_run.table()
    attacks = table[(table["task"] == "attacks") & (table["metric"] == "robust_accuracy")]
    for _, curve in attacks.groupby(["model", "attack", "norm"]):
        values = curve.sort_values("eps")["value"].to_numpy()
        assert (np.diff(values) <= 0).all() or curve["attack"].iloc[0] == "fgsm"


@pytest.mark.slow
def test_a_finished_run_computes_nothing_again(full_run: evaluation.Run, trained: Model, digits: Dataset) -> None:
    def written() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns for pattern in ("cells*", "samples*") for path in full_run.path.glob(pattern)
        }

    before = written()
    assert sorted(path.suffix for path in before) == [".gz", ".npz"]  # a finished run packs itself
    planned = evaluation.plan([trained, trained.untrained(0)], digits, tasks=TASKS, out=full_run.path)
    assert planned.missing == 0
    assert len(planned.cells) == len(Store(full_run.path).records())
    evaluation.execute(planned)
    assert written() == before


@pytest.mark.slow
def test_a_packed_run_is_added_to_and_overwritten(trained: Model, digits: Dataset, tmp_path: Path) -> None:
    few = replace(digits, test=digits.test.limited(20, 0))
    fog = Corruptions(("fog",), (1,))
    before = ce.evaluate(trained, few, [fog], out=tmp_path).table()
    assert not (tmp_path / "cells").exists()
    stopped = ce.evaluate(trained, few, [Corruptions(("fog", "snow"), (1,))], out=tmp_path, budget_hours=0)
    assert stopped.failures
    assert ce.evaluate(trained, few, [Corruptions(("fog", "snow"), (1,))], out=tmp_path).failures == ()
    assert len(Store(tmp_path).records()) == 3
    again = ce.evaluate(trained, few, [fog], out=tmp_path, overwrite=True).table()
    assert not (tmp_path / "cells").exists()
    both = before.merge(again, on="key", suffixes=("", " again"))
    both = both[(both["condition"] == both["condition again"]) & (both["metric"] == both["metric again"])]
    assert (both["seconds"] != both["seconds again"]).all()  # computed anew
    assert (both["value"] == both["value again"]).all()
    assert len(both) == len(before)


def test_a_run_that_is_not_done_is_not_packed(network: Model, digits: Dataset, tmp_path: Path) -> None:
    few = replace(digits, test=digits.test.limited(20, 0))
    planned = evaluation.plan(network, few, tasks=[Corruptions(("fog", "snow"), (1,))], out=tmp_path)
    with planned.store.claim(planned.jobs[-1].keys[0]):  # another process is at the last cell
        assert evaluation.execute(planned).failures == ()
    assert len(list((tmp_path / "cells").glob("*.json"))) == planned.missing - 1
    assert not (tmp_path / "cells.jsonl.gz").exists()


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7])
def test_no_number_depends_on_the_batch_size(batch_size: int, trained: Model, digits: Dataset, tmp_path: Path) -> None:
    few = replace(digits, test=digits.test.limited(20, 0))
    tasks = [task for task in TASKS if not isinstance(task, Probe)]
    runs = [
        stored(ce.evaluate(trained, few, tasks, out=tmp_path / str(size), batch_size=size).path)
        for size in (64, batch_size)
    ]
    assert runs[0].keys() == runs[1].keys()
    for key, expected in runs[0].items():
        for one, other in zip(expected, runs[1][key], strict=True):
            assert one["condition"] == other["condition"]
            assert one["n"] == other["n"]
            # verdicts may flip where the margin is below 1e-4; on these 20 images none is
            assert one["value"] == pytest.approx(other["value"], abs=1e-4)


@pytest.mark.slow
def test_a_limit_is_in_the_key_and_in_every_record(trained: Model, digits: Dataset, tmp_path: Path) -> None:
    task = Corruptions(("fog",), (1,))
    ce.evaluate(trained, digits, [task], out=tmp_path)
    ce.evaluate(trained, digits, [task], out=tmp_path, limit=30)
    records = Store(tmp_path).records()
    assert sorted(str(r["protocol"]["data"]["limit"]) for r in records) == ["30", "30", "90", "90"]
    assert {m["n"] for r in records for m in r["measurements"]} == {30, 90}


@pytest.mark.slow
def test_a_failed_cell_is_a_gap_and_the_others_run(trained: Model, digits: Dataset, tmp_path: Path) -> None:
    broken = Internal(sites=("nowhere",), levels=(0.5,), seeds=1)
    with pytest.raises(UsageError, match="stage1"):
        ce.evaluate(trained, digits, [broken], out=tmp_path)
    no_train = replace(digits, train=None)
    untrained = trained.untrained(0)
    run = ce.evaluate(untrained, no_train, [Corruptions(("fog",), (1,)), Redundancy()], out=tmp_path)
    assert len(run.failures) == 2
    assert "train" in run.failures[0]
    assert {record["task"] for record in Store(tmp_path).records()} == {"redundancy"}


def test_the_same_weights_twice_are_refused(network: Model, digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="twice"):
        ce.evaluate([network, replace(network, name="again")], digits, out=tmp_path)


@pytest.mark.slow
def test_the_plan_names_an_assumed_normalisation(trained: Model, digits: Dataset, tmp_path: Path) -> None:
    assumed = "mean, std   (0.485 0.456 0.406), (0.229 0.224 0.225) (ASSUMED (ImageNet))"
    plain = make_model("resnet18", stem="cifar", width=8)
    lines = evaluation.plan([trained, plain], digits, tasks=[Redundancy()], out=tmp_path).lines()
    assert lines.count(assumed) == 1
    assert lines[lines.index(assumed) - 1].startswith(f"model       {plain.name}")


def test_no_tasks_are_not_all_tasks(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tasks is empty"):
        evaluation.plan(ce.load_model("pixels:8"), digits, tasks=[], out=tmp_path)


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(limit: int, network: Model, digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="limit"):
        ce.evaluate(network, digits, out=tmp_path, limit=limit)


def test_an_unwritable_folder_is_one_line(network: Model, digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CossError, match="--out"):
        ce.evaluate(network, digits, [Redundancy()], out=tmp_path / "file" / "results")


@pytest.mark.slow
def test_numbers_do_not_move_the_global_generator(trained: Model, digits: Dataset, tmp_path: Path) -> None:
    few = replace(digits, test=digits.test.limited(20, 0))
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    ce.evaluate(trained, few, TASKS, out=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_numpy).all()  # noqa: NPY002


SCRIPT = """
import sys
from dataclasses import replace
import coss_eval as ce
from coss_eval.tasks.corruptions.task import Corruptions
data = ce.load_dataset("digits")
data = replace(data, test=data.test.limited(60, 0))
names = ("gaussian_noise", "fog", "snow", "frost", "contrast", "brightness", "pixelate", "shot_noise")
run = ce.evaluate(sys.argv[1], data, [Corruptions(names)], out=sys.argv[2])
print(len(run.failures))
"""


def _start(checkpoint: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(checkpoint), str(out)]
    return subprocess.Popen(command, env=os.environ, text=True, stdout=subprocess.PIPE, start_new_session=True)


@pytest.fixture
def checkpoint(trained: Model, tmp_path: Path) -> Path:
    save_model(trained, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.slow
def test_kill_9_loses_at_most_the_cell_in_flight(checkpoint: Path, tmp_path: Path) -> None:
    cells = tmp_path / "out" / "cells"
    process = _start(checkpoint, tmp_path / "out")
    deadline = time.monotonic() + 120
    while len(list(cells.glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    survived = {path.stem: json.loads(path.read_bytes()) for path in cells.glob("*.json")}
    assert len(survived) >= 3
    assert all(content["measurements"] for content in survived.values())
    assert _start(checkpoint, tmp_path / "out").communicate(timeout=300)[0].strip() == "0"
    records = {record["key"]: record for record in Store(tmp_path / "out").records()}
    assert all(records[key]["seconds"] == content["seconds"] for key, content in survived.items())  # not done again
    assert len(records) == 9
    assert not cells.exists()
    uninterrupted = _start(checkpoint, tmp_path / "whole")
    uninterrupted.communicate(timeout=300)
    assert stored(tmp_path / "out") == stored(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_share_a_store(checkpoint: Path, tmp_path: Path) -> None:
    both = [_start(checkpoint, tmp_path / "out") for _ in range(2)]
    assert [process.communicate(timeout=300)[0].strip() for process in both] == ["0", "0"]
    assert len(Store(tmp_path / "out").records()) == 9
    assert len(Store(tmp_path / "out").runs()) == 2


TOGETHER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from test_evaluation import TASKS, small_digits
import coss_eval as ce
from coss_eval.models.hooks import counted
model, passed = ce.load_model(sys.argv[2]), []
with counted(model.backbone.global_, passed.append):
    run = ce.evaluate([model, model.untrained(0)], small_digits(), TASKS, out=sys.argv[3], device="cpu", quiet=True)
os.write(1, (json.dumps([sum(passed), *run.failures, *run.held]) + "\\n").encode())  # print writes twice
"""


def torchrun(count: int, script: Path, *args: object) -> subprocess.Popen[str]:
    """The script in so many processes, joined."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*start, str(script), *map(str, args)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_several_processes_give_the_numbers_of_one(
    count: int, checkpoint: Path, full_run: evaluation.Run, tmp_path: Path
) -> None:
    """Every task, every cell once and of all images; all of the processes had a part in it."""
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(TOGETHER)
    process = torchrun(count, script, Path(__file__).parent, checkpoint, out)
    told, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    passed = [json.loads(line) for line in told.splitlines()]
    assert len(passed) == count
    assert all(images > 0 and not gaps for images, *gaps in passed)
    assert [run.get("processes", 1) for run in Store(out).runs()] == [count]
    assert not (out / "cells").exists()  # nothing is missing, so it is packed
    together, alone = Store(out), Store(full_run.path)
    expected = stored(full_run.path)
    assert stored(out).keys() == expected.keys()
    for key, measurements in stored(out).items():
        for one, other in zip(measurements, expected[key], strict=True):
            assert {**one, "value": 0, "low": 0, "high": 0} == {**other, "value": 0, "low": 0, "high": 0}  # n, too
            assert one["value"] == pytest.approx(other["value"], abs=1e-4, nan_ok=True)
        mine, its = together.samples(key), alone.samples(key)
        assert (mine is None) == (its is None)
        if mine is not None and its is not None:
            pd.testing.assert_frame_equal(mine, its, atol=1e-4)


SPLIT = """
import json, sys
from dataclasses import replace
import coss_eval as ce
from coss_eval.evaluation.together import extract_together
from coss_eval.runtime.device import Compute
from coss_eval.runtime.processes import gathered, process_group
from coss_eval.tasks.task import Subject
data, seen = ce.load_dataset("digits"), []
train = data.train.limited(101)
with process_group("cpu") as own:
    compute = Compute(own, 16, on_images=lambda label, done, total: seen.append((done, total)))
    subject = Subject(ce.load_model("pixels:4"), data, compute)
    assert extract_together(subject, train)
    counts = gathered(seen[-1])
    found = subject.features(train)
    alone = ce.extract(subject.model, train, cache=False, device="cpu", quiet=True)
    equal = found.cached and found.ids.equal(alone.ids) and found.labels.equal(alone.labels)
    apart = (found.values["global"] - alone.values["global"]).abs().max().item()
print(json.dumps([counts, equal, apart]), flush=True)
"""


def what_each_tells(script: str, count: int, folder: Path) -> list[Any]:
    """The JSON that each of so many processes prints, started as by one command."""
    joined = {**os.environ, TOGETHER_IN: str(folder), PARENT: str(os.getpid()), "WORLD_SIZE": str(count)}
    numbered = [joined | {"RANK": str(number), "LOCAL_RANK": str(number)} for number in range(count)]
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    processes = [subprocess.Popen(command, env=one, text=True, stdout=pipe, stderr=pipe) for one in numbered]
    told = []
    for process in processes:
        text, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        told.append(json.loads(text))
    return told


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_features_are_of_each_image_once(count: int, tmp_path: Path) -> None:
    """101 images divide by no number of processes; all find the same rows in the cache."""
    for counts, equal, apart in what_each_tells(SPLIT, count, tmp_path):
        assert sum(done for done, _ in counts) == 101
        assert all(done == total for done, total in counts)
        assert equal
        assert apart < 1e-6


APART = """
import json, os
from pathlib import Path
import coss_eval as ce
from coss_eval.runtime.processes import apart, gathered, process_group
out = Path(os.environ["COSS_TOGETHER"]) / os.environ["RANK"]
small = {"width": 4, "epochs": 1, "warm_up_epochs": 0, "batch_size": 32, "probe_every": 0}
with apart() as place:
    images = ce.load_dataset("digits").train.limited(64)
    ce.train("simclr", images, out=out, device="cpu", quiet=True, **small)
with process_group("cpu"):
    both = gathered((place, (out / "model.safetensors").exists()))
print(json.dumps(both), flush=True)
"""


@pytest.mark.slow
def test_processes_train_apart_and_then_meet(tmp_path: Path) -> None:
    """As the demonstration's do: were they joined already, the second one would write no model."""
    assert what_each_tells(APART, 2, tmp_path) == 2 * [[[[0, 2], True], [[1, 2], True]]]


def test_a_cell_that_another_process_holds_is_named_with_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are done; when it is free the same command finds all in order."""
    out = tmp_path / "out"
    words = ["crops", "--ckpt", "pixels:4", "--data", "digits", "--limit", "20", "--out", str(out)]

    def run() -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["coss-eval", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr().out

    planned = evaluation.plan("pixels:4", "digits", tasks=["crops"], out=out, limit=20)
    assert planned.missing == 4
    with planned.store.claim(planned.jobs[0].keys[0]):
        code, told = run()
    assert code == 3
    assert f"ELSEWHERE   crops area of raw pixels (4 px) is at process {os.getpid()} on " in told
    assert len(Store(out).records()) == 3
    code, told = run()
    assert code == 0
    assert "ELSEWHERE" not in told
    assert len(Store(out).records()) == 4


LASTING = """
import os, time
from pathlib import Path
from coss_eval.store import Cell, Measurement
from coss_eval.tasks.task import Result, Task
class Lasting(Task):
    'Waits, and says who does.'
    name, uses_head = "lasting", False
    def cells(self, subject, seed):
        return [Cell(self.name, {"number": number}) for number in range(400)]
    def measure(self, cell, subject):
        Path(os.environ["AT"], str(os.getpid())).touch()
        if os.environ.get("FAILS") == os.environ.get("RANK"):
            os._exit(7)
        time.sleep(0.2)
        return Result([Measurement("value", 1.0, 1)])
"""


class Started(NamedTuple):
    """A command with three processes that share cells which would take long."""

    command: subprocess.Popen[str]
    processes: set[int]
    out: Path

    def end(self) -> tuple[int, str]:
        """The exit code and what was said on standard error; nobody is left."""
        _, said = self.command.communicate(timeout=120)
        deadline = time.monotonic() + 60
        while any(map(_lives, self.processes)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(_lives, self.processes))
        return self.command.returncode, said


def _lives(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.fixture
def lasting(tmp_path: Path) -> Callable[..., Started]:
    (tmp_path / "lasting.py").write_text(LASTING)
    (tmp_path / "at").mkdir()

    def start(**environment: str) -> Started:
        words = ["evaluate", "--tasks", "lasting:Lasting", "--ckpt", "pixels:4", "--data", "digits", "--limit", "20"]
        words += ["--device", "cpu,cpu,cpu", "--out", str(tmp_path / "out"), "--quiet"]
        paths = os.pathsep.join([str(tmp_path), *sys.path])
        shared = {**os.environ, "PYTHONPATH": paths, "AT": str(tmp_path / "at"), **environment}
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "coss_eval", *words]

        def heard() -> None:  # a shell has what it runs in the background ignore Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        where = {"env": shared, "cwd": tmp_path, "preexec_fn": heard}
        process = subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe, **where)
        deadline = time.monotonic() + 240
        while len(found := list((tmp_path / "at").iterdir())) < 3 - len(environment) and time.monotonic() < deadline:
            time.sleep(0.1)
        return Started(process, {int(path.name) for path in found}, tmp_path / "out")

    return start


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")


@pytest.mark.slow
@needs_proc
def test_an_interrupt_ends_all_processes_and_is_told_once(lasting: Callable[..., Started]) -> None:
    started = lasting()
    started.command.send_signal(signal.SIGINT)
    code, said = started.end()
    assert code == 128 + signal.SIGINT
    assert said.count("coss-eval:") == said.count("coss-eval: stopped") == 1
    assert not list(started.out.rglob("*.lock"))


@pytest.mark.slow
@needs_proc
def test_the_end_of_one_process_ends_the_others_and_is_told_once(lasting: Callable[..., Started]) -> None:
    started = lasting()
    os.kill(max(started.processes), signal.SIGKILL)
    code, said = started.end()
    assert code == 128 + signal.SIGKILL
    assert said.count("coss-eval:") == said.count("was ended by SIGKILL, and the others were stopped") == 1


@pytest.mark.slow
@needs_proc
def test_a_failing_process_is_named(lasting: Callable[..., Started]) -> None:
    code, said = lasting(FAILS="1").end()
    assert code == 7
    assert said.count("coss-eval:") == said.count("process 2 of 3, on cpu, ended with exit code 7") == 1


@pytest.mark.slow
@needs_proc
def test_processes_do_not_outlive_the_command(lasting: Callable[..., Started]) -> None:
    started = lasting()
    started.command.kill()
    started.end()


@pytest.mark.slow
def test_a_wrong_call_on_several_devices_is_told_once(tmp_path: Path) -> None:
    words = ["crops", "--ckpt", str(tmp_path / "none.pth"), "--data", "digits", "--device", "cpu,cpu,cpu"]
    command = [sys.executable, "-m", "coss_eval", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert done.stderr.count("does not exist") == done.stderr.count("coss-eval:") == 1


@pytest.mark.slow
def test_a_model_built_by_hand_runs_through_all_tasks(digits: Dataset, tmp_path: Path) -> None:
    model = make_model("timm:vit_tiny_patch16_224", img_size=32)
    few = replace(digits, test=digits.test.limited(20, 0))
    run = ce.evaluate(model, few, TASKS, out=tmp_path)
    assert run.failures == ()


def test_an_estimate_leaves_a_moved_network_fit_for_attacks(network: Model, digits: Dataset, tmp_path: Path) -> None:
    """A move to another device makes new parameters, here played by one to another dtype and back."""
    backbone = copy.deepcopy(network.backbone)
    backbone.to = lambda *_, **__: type(backbone).to(type(backbone).to(backbone, torch.float64), torch.float32)
    plan = evaluation.plan(replace(network, backbone=backbone), digits, tasks=[TASKS[0]], out=tmp_path)
    assert plan.seconds() > 0
    assert not any(parameter.is_inference() for parameter in backbone.parameters())


class Greedy(torch.nn.Module):
    """Raises what torch raises when memory runs out, for more than ``most`` images at once."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.convolution = most, torch.nn.Conv2d(3, 8, 5, stride=4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > self.most:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return self.convolution(pixels).relu().mean((2, 3))


def greedy(most: int) -> Greedy:
    network = Greedy(most)
    with torch.no_grad():
        weight = network.convolution.weight
        weight.copy_(torch.linspace(-1, 1, weight.numel()).sin().view_as(weight))
        network.convolution.bias.zero_()
    return network


def test_a_batch_is_halved_where_memory_runs_out(digits: Dataset, tmp_path: Path) -> None:
    """The probe's fit as well as the tasks; the numbers are those of small batches, and every cell is there."""
    tasks = [Probe(), Crops((0.3,), ("top left",), (0.5,), (2,))]
    how = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "name": "greedy"}
    with pytest.warns(ce.errors.CossWarning, match="out of memory with") as told:
        short = ce.evaluate(
            ce.as_model(greedy(40), **how), digits, tasks, out=tmp_path / "a", batch_size=256, cache=False, quiet=True
        )
    halved = [str(one.message).partition(" (")[0] for one in told if "out of memory" in str(one.message)]
    assert halved == [f"out of memory with {size} images at a time" for size in (256, 128, 64)]
    small = ce.evaluate(
        ce.as_model(greedy(1000), **how), digits, tasks, out=tmp_path / "b", batch_size=32, cache=False, quiet=True
    )
    assert not short.failures
    assert [r["measurements"] for r in Store(short.path).records()] == [
        r["measurements"] for r in Store(small.path).records()
    ]


def test_what_fits_at_no_size_is_a_gap(digits: Dataset, tmp_path: Path) -> None:
    model = make_model("resnet18", stem="cifar", width=4)

    def refuse(*_: object) -> None:
        raise MemoryError("Unable to allocate 4 GiB")

    model.backbone.register_forward_pre_hook(refuse)
    with pytest.warns(ce.errors.CossWarning, match="going on with 1,"):
        run = evaluation.evaluate(model, digits, [Probe()], out=tmp_path, batch_size=4, cache=False, quiet=True)
    assert any("MemoryError" in failure for failure in run.failures)


FULL_DISK = """
import resource, sys
import coss_eval as ce
from coss_eval.tasks.crops.task import Crops
calls = []
class Counted(Crops):
    version = 1
    def run(self, cell, subjects):
        calls.append(cell)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # from here on the disk is full
        return super().run(cell, subjects)
run = ce.evaluate("pixels:4", "digits", [Counted((0.3,), ("top left",), (0.5,), (2,)), "probe"], out=sys.argv[1],
                  limit=20, cache=False, quiet=True)
print(len(calls), *run.failures, sep="|")
"""


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_names_what_is_left(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "out"], capture_output=True, text=True, timeout=240, check=True
    )
    calls, *failures = done.stdout.strip().split("|")
    assert calls == "1"
    assert "nothing more could be stored" in failures[-1]
    assert "(crops, probe)" in failures[-1]


def test_a_plan_says_the_memory_that_gradients_need(trained: Model, digits: Dataset, tmp_path: Path) -> None:
    """A ResNet keeps more of an image than its 12 kB of pixels, in proportion to the batch."""
    lines = [
        line
        for size in (100, 200)
        for line in evaluation.plan(trained, digits, out=tmp_path, tasks=["crops"], batch_size=size).lines()
        if line.startswith("memory")
    ]
    assert len(lines) == 2
    per_image = [float(line.split("(")[1].split(" MB")[0]) for line in lines]
    assert per_image[0] == per_image[1] > 0.05


LONG = """
import resource
import coss_eval as ce
from coss_eval.store import Cell
from coss_eval.tasks.crops.task import Crops
class Many(Crops):
    version = 1
    def cells(self, subject, seed):
        (cell, *_) = super().cells(subject, seed)
        return [Cell(cell.task, cell.params | {"number": number}) for number in range(200)]
    def measure(self, cell, subject):
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return super().measure(cell, subject)
peaks = []
import sys
tasks = [Many((0.3,), ("top left",), (0.5,), (2,))]
run = ce.evaluate("pixels:8", "digits", tasks, out=sys.argv[1], limit=100, quiet=True)
assert not run.failures, run.failures
print(len(peaks), (peaks[-1] - peaks[50]) / 1024)
"""


@pytest.mark.slow
def test_200_cells_in_one_process_keep_memory_flat(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LONG, tmp_path / "out"], capture_output=True, text=True, timeout=600, check=True
    )
    cells, grown = done.stdout.split()
    assert int(cells) == 200
    assert float(grown) < 16  # MB from the 50th cell to the last
