"""Doing a sweep's runs on this machine: the next step that can be done and fits, again and again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from coss_eval import evaluation
from coss_eval.checkpoints.load import load_model, save_model
from coss_eval.data.dataset import Dataset
from coss_eval.data.open import load_dataset
from coss_eval.errors import CossError, UsageError
from coss_eval.runtime.device import resolve_device
from coss_eval.runtime.disk import Lock
from coss_eval.runtime.processes import process_group, rank, world_size
from coss_eval.runtime.provenance import made_with
from coss_eval.store.runs import JOB, MODEL, RESULTS, RUNS
from coss_eval.sweeps.plan import Evaluation, Sweep, TrainingRun, runs
from coss_eval.sweeps.report import report
from coss_eval.sweeps.state import (
    EPOCHS,
    LOCK,
    Costs,
    State,
    Step,
    in_order,
    learnt_knn,
    settled,
    states,
    training_minutes,
    write_job,
    write_json,
)
from coss_eval.tasks import task_class
from coss_eval.tasks.task import Task
from coss_eval.training.dry_run import dry_run
from coss_eval.training.fields import build
from coss_eval.training.loop import LAST, TrainingProgress, train_config

TIMED_STEPS = 50  # that fix the epochs of a sweep with run_minutes

Watcher = AbstractContextManager[Callable[[TrainingProgress], None] | None]


@dataclass
class Worker:
    """One call's way through a sweep. ``work`` holds the trainer's states while runs are trained.

    ``on_run`` gets each run with what happens to it; ``watch`` of a run's name is open while it trains and gives what
    is told its progress. Under torchrun all processes do the same step; the first one chooses, evaluates and writes.
    """

    sweep: Sweep
    out: Path
    work: Path
    data_root: Path | None = None
    device: str = "auto"
    minutes: float | None = None
    on_run: Callable[[TrainingRun, str], None] = lambda run, what: None
    on_note: Callable[[str], None] | None = None
    watch: Callable[[str], Watcher] = lambda name: nullcontext()
    failures: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)  # lines on runs that another process was at, and has not done

    def run(self, number: int | None = None) -> list[str]:
        """All steps that are left (or those of run ``number``), then the report; a line for each that failed.

        A run that another process is at is left to it, and named in ``held`` if it is not done at the end; one that was
        interrupted goes on from its last checkpoint.
        With ``minutes`` no step begins that is expected to end later.
        """
        with self._at_work(number):
            while (chosen := self._agree(number)) is not None:
                self._do(*chosen)
            if rank() == 0:
                everything = states(self.sweep, self.out, self.work)
                report(self.sweep, everything, self.out)
                self.held = [named(s.run) for s in everything if s.run.number in self._elsewhere and s.stage != "done"]
        return self.failures

    def step(self, number: int) -> bool:
        """The next step of run ``number`` alone, without the report, as one of many machines; whether it was taken."""
        with self._at_work(number):
            chosen = self._agree(number)
            if chosen is not None:
                self._do(*chosen)
            self.held = [named(run) for run in runs(self.sweep) if run.number in self._elsewhere]
        return chosen is not None

    def settle(self) -> None:
        """Only measure the epochs that fill the sweep's ``run_minutes``, where it has any and nobody has."""
        with self._at_work(None):
            pass

    @contextmanager
    def _at_work(self, number: int | None) -> Iterator[None]:
        with process_group(self.device) as own, _threads(self.sweep.threads):
            self._refuse_device(own, number)
            self._ends = None if self.minutes is None else time.monotonic() + 60 * self.minutes
            self._left_out: set[int] = set()  # failed, at another process, or too long
            self._elsewhere: set[int] = set()  # at another process
            self._told: set[tuple[int, str]] = set()
            self._settle()
            yield

    def _settle(self) -> None:
        """Fix the epochs of all runs by the speed of the first one, once for good."""
        wanted, path = self.sweep.run_minutes, self.out / EPOCHS
        if wanted is not None and not path.exists():
            first = next(run for run in runs(self.sweep) if not run.pilot)
            data = load_dataset(first.data, root=self.data_root)
            speed = dry_run(first.config, data, device=self.device, steps=TIMED_STEPS)
            epochs = max(1, int(60 * wanted / (speed.seconds / first.config.epochs)))
            if rank() == 0:
                made = {"epochs": epochs, "run_minutes": wanted, "images_per_second": speed.images_per_second}
                write_json(path, {**made, "run": first.name, **made_with(resolve_device(self.device))})
        self.sweep = settled(self.sweep, self.out)

    def _agree(self, number: int | None) -> tuple[State, Step] | None:
        """The next step, the same in every process: the first one chooses and takes the run's lock."""
        self._lock: Lock | None = None
        picked: list[Any] = [self._choose(number) if rank() == 0 else None]
        if world_size() > 1:
            dist.broadcast_object_list(picked)
        found: tuple[State, Step] | None = picked[0]
        return found

    def _choose(self, number: int | None) -> tuple[State, Step] | None:
        everything = states(self.sweep, self.out, self.work)
        if number is not None and not 1 <= number <= len(everything):
            raise UsageError(f"this sweep has runs 1 to {len(everything)}, not {number}; --list shows them")
        costs = Costs.of(everything)
        for state in in_order(everything, train_first=self.sweep.train_first and number is None):
            run, step = state.run, state.next_step
            if number not in (None, run.number) or run.number in self._left_out:
                continue
            if step is None:
                self._tell(run, "waits for its pilots" if state.stage == "waits" else "is done already")
            elif not self._fits(costs.minutes(state, step)):
                self._tell(run, f"is left out: {step} takes longer than what is left of the time")
            elif (lock := _lock(self.work / run.name)) is None:
                self._tell(run, "is being done by another process")
                self._elsewhere.add(run.number)
            else:
                self._lock = lock
                return state, step
            self._left_out.add(run.number)
        return None

    def _fits(self, minutes: float | None) -> bool:
        """A step of unknown length begins: it can go on later."""
        if self._ends is None:
            return True
        left = (self._ends - time.monotonic()) / 60
        return left > 0 if minutes is None else minutes <= left

    def _tell(self, run: TrainingRun, what: str) -> None:
        if (run.number, what) not in self._told:
            self._told.add((run.number, what))
            self.on_run(run, what)

    def _do(self, state: State, step: Step) -> None:
        run = state.run
        try:
            data = load_dataset(run.data, root=self.data_root)
            if step == "train":
                self.on_run(run, "goes on" if state.stage == "begun" else "is trained")
                self._train(state, data)
            elif rank() == 0:
                self.on_run(run, "is evaluated")
                self._evaluate(state, data)
        except (CossError, RuntimeError) as error:  # RuntimeError: torch's own, such as running out of memory
            self.failures.append(f"{named(run)}: {str(error).splitlines()[0]}")
            self._left_out.add(run.number)
        finally:
            if self._lock is not None:
                self._lock.release()
            if world_size() > 1:
                dist.barrier()

    def _train(self, state: State, data: Dataset) -> None:
        run, folder, made = state.run, self.out / state.run.name, self.work / state.run.name
        record = {**state.record, "data": run.data, "config": run.config.as_dict(), "arm": run.arm}
        if rank() == 0:
            write_json(folder / JOB, record)
        if not (made / MODEL).exists():
            with self.watch(run.name) as on_progress:
                options: dict[str, Any] = {"device": self.device, "on_progress": on_progress, "on_note": self.on_note}
                train_config(run.config, data, out=made, resume=True, **options)
        if rank() != 0:
            return
        if folder != made:
            shutil.copy2(made / "log.jsonl", folder / "log.jsonl")
        record["minutes"] = {"train": training_minutes(made, run.config)}
        if run.pilot:
            record["knn"] = learnt_knn(made)
            (made / MODEL).unlink()
        else:
            model = load_model(made / MODEL)
            save_model(model, folder / MODEL, dtype=torch.bfloat16 if self.sweep.bf16_weights else None)
            record["sha256"] = load_model(folder / MODEL).sha256
            if folder != made:
                (made / MODEL).unlink()
        write_json(folder / JOB, record)
        (made / LAST).unlink(missing_ok=True)  # last: it is what a run goes on from

    def _evaluate(self, state: State, data: Dataset) -> None:
        folder, started = self.out / state.run.name, time.monotonic()
        if not (folder / MODEL).exists():
            raise CossError(
                f"it is trained, and its weights are gone: put {folder / MODEL} back to evaluate it, or take the run "
                f"out of {folder if (folder / JOB).exists() else self.out / RUNS} to train it again"
            )
        model = replace(load_model(folder / MODEL), name=state.run.name)
        for wanted in self.sweep.evaluate:
            done = evaluation.evaluate(
                model, data, [task_of(wanted)], out=folder / RESULTS, limit=wanted.limit, device=self.device, quiet=True
            )
            if done.failures:
                raise CossError(done.failures[0])
            if done.held:  # by who evaluates into this folder beside the sweep
                self._left_out.add(state.run.number)
                self._elsewhere.add(state.run.number)
                return
        minutes = {**state.minutes, "evaluate": (time.monotonic() - started) / 60}
        evaluated = {"minutes": minutes, "sha256": model.sha256, "evaluated": self.sweep.written()}
        write_job(folder, {**state.record, **evaluated})
        kept = self.sweep.keep_weights
        if kept is not None and state.run.name not in kept:
            (folder / MODEL).unlink()

    def _refuse_device(self, own: torch.device, number: int | None) -> None:
        """Runs of one size are trained on one kind of device; what is trained may be evaluated on any."""
        wanted = self.sweep.device
        if wanted is None or own.type == wanted:
            return
        mine = [s for s in states(self.sweep, self.out, self.work) if number in (None, s.run.number)]
        if any(state.stage not in ("trained", "done") for state in mine):
            raise UsageError(
                f"the runs of {self.sweep.name} at size {self.sweep.size} are trained on {wanted} alone, and this is "
                f"{own.type}: no contrast mixes them; give --device {wanted}, or another --size"
            )


def named(run: TrainingRun) -> str:
    return f"{run.number} {run.name}"


def task_of(wanted: Evaluation) -> Task:
    """The task with its options. Raises UsageError for what it does not take."""
    made: Task = build(task_class(wanted.task), wanted.options, f"option of {wanted.task}")
    return made


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _lock(folder: Path) -> Lock | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Lock.take(folder / LOCK)
    except OSError as error:
        raise CossError(f"cannot write {folder}: {error.strerror}; give another --out") from error
