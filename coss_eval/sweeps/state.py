"""How far every run of a sweep is, from the files of its folder alone, and what its steps take."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from coss_eval.errors import CossError, UsageError
from coss_eval.runtime.disk import write_atomically
from coss_eval.store.runs import JOB, MODEL, Runs
from coss_eval.sweeps.plan import Sweep, TrainingRun, runs
from coss_eval.training.config import Config
from coss_eval.training.log import read
from coss_eval.training.loop import LAST

EPOCHS, LOCK = "epochs.json", "job.lock"
Step = Literal["train", "evaluate"]
Stage = Literal["waits", "missing", "begun", "trained", "done"]


@dataclass(frozen=True)
class State:
    """One run: ``waits`` (for pilots), missing, begun, trained, or done: evaluated as the sweep asks, or a pilot read.

    ``minutes`` are those that its steps took; ``epoch`` is the one that a begun run has reached. ``held`` says who
    is at it now ("process 12 on host"); a run that is begun and held by nobody is lost until it is gone on with.
    """

    run: TrainingRun
    stage: Stage
    record: Mapping[str, Any] = field(default_factory=dict)
    epoch: int = 0
    held: str | None = None

    @property
    def minutes(self) -> Mapping[Step, float]:
        found: Mapping[Step, float] = self.record.get("minutes", {})
        return found

    @property
    def next_step(self) -> Step | None:
        """What can be done for it now."""
        if self.stage in ("done", "waits"):
            return None
        return "evaluate" if self.stage == "trained" else "train"


def settled(sweep: Sweep, out: Path) -> Sweep:
    """The sweep with the epochs that were measured once for its ``run_minutes``, where they were."""
    path = out / EPOCHS
    if sweep.run_minutes is None or not path.exists():
        return sweep
    try:
        return replace(sweep, fixed={**sweep.fixed, "epochs": int(json.loads(path.read_bytes())["epochs"])})
    except (ValueError, TypeError, KeyError) as error:
        raise CossError(f"{path} is damaged; put back the one that the runs beside it were made with") from error


def states(sweep: Sweep, out: Path, work: Path) -> list[State]:
    """Every run in its order. Raises UsageError where a run's folder holds another configuration."""
    sweep, there = settled(sweep, out), Runs(out)
    pilots = [] if sweep.pilots is None else [_state(run, sweep, there, work) for run in runs(sweep) if run.pilot]
    return [_state(run, sweep, there, work) for run in runs(sweep, choices(pilots))]


def choices(pilots: list[State]) -> dict[str, dict[str, Any]]:
    """The trial with the highest kNN for every method whose pilots are all done; the first of equals."""
    found: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys(pilot.run.arm for pilot in pilots):
        mine = [pilot for pilot in pilots if pilot.run.arm == arm]
        if all(pilot.stage == "done" for pilot in mine):
            found[arm] = max(mine, key=lambda pilot: float(pilot.record["knn"])).run.varied
    return found


def in_order(everything: list[State], *, train_first: bool) -> list[State]:
    """By number; with ``train_first`` all training before any evaluation."""
    return sorted(everything, key=lambda state: (train_first and state.stage == "trained", state.run.number))


@dataclass(frozen=True)
class Costs:
    """What steps take by what finished ones took: medians by step and, where such a run is done, arm and pilot.

    Of training they are minutes an epoch, of evaluation minutes.
    """

    of_all: Mapping[Step, float]
    of_arm: Mapping[tuple[Step, str, bool], float]

    @classmethod
    def of(cls, everything: list[State]) -> Costs:
        one, all_ = dict[tuple[Step, str, bool], list[float]](), dict[Step, list[float]]()
        for state in everything:
            for step, minutes in state.minutes.items():
                value = minutes / state.run.config.epochs if step == "train" else minutes
                one.setdefault((step, state.run.arm, state.run.pilot), []).append(value)
                all_.setdefault(step, []).append(value)
        return cls({k: median(v) for k, v in all_.items()}, {k: median(v) for k, v in one.items()})

    def minutes(self, state: State, step: Step) -> float | None:
        """Minutes that a step is expected to take; None where none has been done.

        Runs of the same arm tell it; others, pilots too, by their number of images and epochs alone.
        """
        each = self.of_arm.get((step, state.run.arm, state.run.pilot), self.of_all.get(step))
        if each is None or step == "evaluate":
            return each
        return each * (state.run.config.epochs - state.epoch)


def learnt_knn(log: Path) -> float:
    """kNN on held-out training images at the end of a finished run, from its log."""
    found = [line["knn"] for line in read(log) if line["kind"] == "probe"]
    if not found or found[-1] is None:
        raise CossError(f"{log} has no kNN of held-out images; a pilot needs holdout above 0 and probe_every above 0")
    return float(found[-1])


def training_minutes(log: Path, config: Config) -> float:
    """What a run's epochs took, interruptions left out: its steps by the median speed of its log."""
    lines = [line for line in read(log) if line["kind"] == "train"]
    rate = median(line["images_per_second"] for line in lines)
    return lines[-1]["step"] * config.batch_size / rate / 60 if rate else 0.0


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, indent=1).encode())
    except OSError as error:
        raise CossError(f"cannot write {path}: {error.strerror}; make room or give another --out") from error


def write_job(folder: Path, record: Mapping[str, Any]) -> None:
    """A run's job.json; one that was packed meanwhile is unpacked first, and none is packed while it is written."""
    there = Runs(folder.parent)
    with there.locked():
        there.unpack(folder.name)
        write_json(folder / JOB, record)


def _state(run: TrainingRun, sweep: Sweep, there: Runs, work: Path) -> State:
    if run.waits:
        return State(run, "waits")
    record = _job(run, there)
    if (run.pilot and "knn" in record) or ("sha256" in record and record.get("evaluated") == sweep.written()):
        return State(run, "done", record)
    held = held_by(work / run.name / LOCK)
    if "sha256" in record or (there.out / run.name / MODEL).exists():
        return State(run, "trained", record, held=held)
    if (work / run.name / LAST).exists():
        return State(run, "begun", record, _epochs_done(work / run.name), held)
    return State(run, "missing", record, held=held)


def held_by(lock: Path) -> str | None:
    """Who holds the lock that a file is, "process 12 on host"; None where nobody does. Nothing is written.

    Of this machine's processes it asks the kernel whether they live. Of another's it asks for a shared lock, for the
    moment of asking; where the file system has no locks, the file alone counts.
    """
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        number, _, host = os.read(descriptor, 4096).decode(errors="replace").strip().partition(" ")
        holder = f"process {number} on {host}" if number.isdecimal() and host else "a process that begins"
        if host == socket.gethostname() and number.isdecimal() and not _lives(int(number)):
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # BlockingIOError: it is held
        return holder
    finally:
        os.close(descriptor)
    return None


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another person's
        return True
    return True


def _epochs_done(folder: Path) -> int:
    lines = read(folder) if (folder / "log.jsonl").exists() else []
    return max([int(line["epoch"]) - 1 for line in lines if line["kind"] == "train"], default=0)


def _text(config: Mapping[str, Any] | Config) -> str:
    return json.dumps(config, sort_keys=True, default=vars)


def _job(run: TrainingRun, there: Runs) -> dict[str, Any]:
    """job.json; empty where there is none. Raises UsageError where it is another configuration's."""
    path = there.out / run.name / JOB
    try:
        record: dict[str, Any] = json.loads(there.read(run.name, JOB))
        same = _text(record["config"]) == _text(run.config)
        differences = [] if same else run.config.differences(Config.from_dict(record["config"]))
        data = record["data"]
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CossError(f"{path} is damaged; remove it to evaluate that run again") from error
    if data != run.data:
        differences.append(f"data: {run.data}, there {data}")
    if differences:
        raise UsageError(f"{path.parent} holds another run ({'; '.join(differences)}); give another --out")
    return record
