"""Which cells are missing, run their tasks, hand the measurements to the store."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coss_eval.data.benchmark import Benchmark
from coss_eval.data.open import Dataset, load_dataset
from coss_eval.describe import normalisation_line
from coss_eval.errors import CossError, UsageError
from coss_eval.models.classifier import to_float
from coss_eval.models.load import load_model, normalisation_check
from coss_eval.models.model import Model
from coss_eval.probes import resolve_device
from coss_eval.probes.forward import exact_float32, seconds_of
from coss_eval.provenance import made_with
from coss_eval.store import Cell, Store
from coss_eval.tasks import NAMES, task_class
from coss_eval.tasks.task import Settings, Subject, Task

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Job:
    """One cell on all subjects that miss it and share a geometry, so that what they have in common is done once."""

    task: Task
    cell: Cell
    subjects: tuple[Subject, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """Where a run is, sent before each job."""

    done: int
    total: int
    label: str


@dataclass
class Plan:
    """All that a run will do, known before any of it is done."""

    store: Store
    subjects: list[Subject]
    jobs: list[Job]
    cells: list[dict[str, str]]  # key, task and model of each, stored or not
    warnings: list[str] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return sum(len(job.subjects) for job in self.jobs)

    def seconds(self) -> float:
        """An estimate for the missing cells: forward passes, timed on one batch, and the tasks' own work."""
        per_image = {id(subject): _forward_seconds(subject) for subject in self.subjects} if self.jobs else {}
        total = 0.0
        for job in self.jobs:
            total += job.task.overhead(job.cell, job.subjects[0])
            total += sum(job.task.forwards(job.cell, subject) * per_image[id(subject)] for subject in job.subjects)
        return total

    def lines(self) -> list[str]:
        """The plan as plain lines for a terminal."""
        data = self.subjects[0].data
        limit = "" if data.test.limit is None else f", LIMITED to {len(data.test)}"
        per_task = Counter(job.cell.task for job in self.jobs for _ in job.subjects)
        todo = ", ".join(f"{task} {count}" for task, count in per_task.items()) or "nothing"
        return [
            *(line for subject in self.subjects for line in _model_lines(subject.model)),
            f"data        {data.name}: {len(data.test)} test images{limit}, {len(data.classes)} classes",
            f"geometry    {self.subjects[0].geometry}",
            f"device      {self.subjects[0].settings.device}, seed {self.subjects[0].settings.seed}",
            f"cells       {len(self.cells)}, of which {self.missing} to compute: {todo}",
            *(f"WARNING     {warning}" for warning in self.warnings),
        ]


@dataclass(frozen=True)
class Run:
    """A results folder after (or during) a run."""

    path: Path
    failures: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # lines on images that could not be read

    def table(self) -> pd.DataFrame:
        """One row a measurement: model, task, metric, condition, value, n, low, high."""
        from coss_eval.reports.tables import tidy

        return tidy(Store(self.path))

    def report(self, *, baseline: str | None = None) -> list[Path]:
        """Write report.md, report.html, tables/ and figures/ into the folder; the paths written."""
        from coss_eval import reports

        return reports.write(self.path, baseline=baseline)


def plan(
    models: str | Path | Model | Sequence[str | Path | Model],
    data: str | Path | Dataset,
    *,
    out: str | Path,
    tasks: Sequence[str | Task] | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    batch_size: int = 256,
    cache: bool = True,
    overwrite: bool = False,
) -> Plan:
    """What ``evaluate`` would do with the same arguments: the cells, those still missing, and warnings."""
    given = [models] if isinstance(models, str | Path | Model) else list(models)
    if not given:
        raise UsageError("no model to evaluate: give at least one checkpoint")
    dataset = data if isinstance(data, Dataset) else load_dataset(data)
    if limit is not None:
        dataset = replace(dataset, test=dataset.test.limited(limit, seed))
    chosen = [task_class(task)() if isinstance(task, str) else task for task in tasks or NAMES]
    if isinstance(dataset, Benchmark) and (others := [task.name for task in chosen if not task.reads_benchmarks]):
        raise UsageError(f"{dataset.name} holds corrupted images: it is for the task corruptions, not {others[0]}")
    settings = Settings(resolve_device(device), batch_size, seed, cache)
    loaded = [model if isinstance(model, Model) else load_model(model) for model in given]
    subjects = [Subject(model, dataset, settings) for model in _distinct_names(loaded)]
    store = Store(Path(out))
    cells: list[dict[str, str]] = []
    jobs: list[Job] = []
    for task in chosen:
        groups: dict[tuple[str, str], Job] = {}
        for subject in subjects:
            for cell in task.cells(subject, seed):
                key = store.key(protocol(task, subject), cell)
                cells.append({"key": key, "task": task.name, "model": subject.model.name})
                if not overwrite and store.read(key) is not None:
                    continue
                group = (str(subject.geometry), store.key({}, cell))
                job = groups.get(group, Job(task, cell, (), ()))
                groups[group] = replace(job, subjects=(*job.subjects, subject), keys=(*job.keys, key))
        jobs.extend(groups.values())
    return Plan(store, subjects, jobs, cells, [*dataset.warnings(), *_warnings(subjects)] if jobs else [])


def evaluate(
    models: str | Path | Model | Sequence[str | Path | Model],
    data: str | Path | Dataset,
    tasks: Sequence[str | Task] | None = None,
    *,
    out: str | Path,
    limit: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    batch_size: int = 256,
    cache: bool = True,
    overwrite: bool = False,
    budget_hours: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Measure one or several models on a dataset and keep every number in the folder ``out``.

    Cells already stored are not computed again (unless ``overwrite``): the same call goes on where it stopped.
    ``tasks`` are names or Task instances with options of their own; all by default. ``limit`` takes a seeded
    class-balanced subset of the test split and marks every table with it. After ``budget_hours`` no new cell begins.
    Give a dataset opened with ``skip_bad_images`` to leave out files that cannot be decoded.
    A cell that fails leaves a gap and is named in ``Run.failures``; the others still run.
    """
    planned = plan(
        models,
        data,
        out=out,
        tasks=tasks,
        limit=limit,
        seed=seed,
        device=device,
        batch_size=batch_size,
        cache=cache,
        overwrite=overwrite,
    )
    return execute(planned, overwrite=overwrite, budget_hours=budget_hours, on_progress=on_progress)


def execute(
    planned: Plan,
    *,
    overwrite: bool = False,
    budget_hours: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Compute the missing cells of a plan, storing each as it is done, and pack the folder when all are there."""
    entry = provenance(planned)
    planned.store.record_run(entry)
    started = time.monotonic()
    failures: list[str] = []
    for number, job in enumerate(planned.jobs):
        if budget_hours is not None and time.monotonic() - started > budget_hours * 3600:
            failures.append(f"budget of {budget_hours} h used up: {len(planned.jobs) - number} jobs not begun")
            break
        label = f"{job.cell.task} {_short(job.cell.params)}"
        if on_progress is not None:
            on_progress(Progress(number, len(planned.jobs), label))
        try:
            _run_job(planned.store, job, overwrite)
        except (CossError, RuntimeError) as error:  # RuntimeError: torch's own, such as running out of memory
            failures.append(f"{label}: {str(error).splitlines()[0]}")
    if on_progress is not None:
        on_progress(Progress(len(planned.jobs), len(planned.jobs), "done"))
    if left_out := planned.subjects[0].data.left_out():  # known once the images have been read
        planned.store.amend_run(entry, {"left_out": left_out})
    if not failures and all(planned.store.read(cell["key"]) is not None for cell in planned.cells):
        try:
            planned.store.pack()  # where it declines, say as another process is at work, the folder is as good
        except CossError as error:
            failures.append(str(error))
    return Run(planned.store.path, tuple(failures), tuple(left_out))


def _run_job(store: Store, job: Job, overwrite: bool) -> None:
    """Claim what no other process is at, measure it, store it."""
    with ExitStack() as stack:
        stack.enter_context(exact_float32())
        mine = [
            (subject, key)
            for subject, key in zip(job.subjects, job.keys, strict=True)
            if stack.enter_context(store.claim(key)) and (overwrite or store.read(key) is None)
        ]
        if not mine:
            return
        started = time.perf_counter()
        for (subject, key), result in zip(mine, job.task.run(job.cell, [s for s, _ in mine]), strict=True):
            record = {
                "protocol": protocol(job.task, subject),
                "cell": job.cell,
                "model": subject.model.name,
                "measurements": result.measurements,
                "notes": result.notes
                + subject.data.left_out()
                + ([f"head: {subject.classifier.origin}"] if job.task.uses_head else []),
                "seconds": time.perf_counter() - started,
            }
            store.write(key, record, result.samples)


def protocol(task: Task, subject: Subject) -> dict[str, Any]:
    """All that the numbers of a task on this subject depend on, beside the cell's own parameters."""
    test = subject.data.test
    record: dict[str, Any] = {
        "model": subject.model.protocol(),
        "data": {"name": subject.data.name, "split": test.name, "fingerprint": test.fingerprint, "limit": test.limit},
        "geometry": subject.geometry,
    }
    return record | ({"head": subject.head_protocol()} if task.uses_head else {})


def provenance(planned: Plan) -> dict[str, Any]:
    """What run.json keeps of a run: enough to repeat it."""
    settings, data = planned.subjects[0].settings, planned.subjects[0].data
    return {
        **made_with(settings.device),
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "data": {
            "name": data.name,
            "test": {"n": len(data.test), "fingerprint": data.test.fingerprint, "limit": data.test.limit},
            "train": None
            if data.train is None
            else {"n": len(data.train), "fingerprint": data.train.known_fingerprint},
        },
        "models": [
            {
                "name": subject.model.name,
                **subject.model.protocol(),
                "layout": subject.model.layout,
                "normalisation_source": subject.model.preprocessing.source,
                "report": None if subject.model.report is None else subject.model.report.as_dict(),
            }
            for subject in planned.subjects
        ],
        "warnings": planned.warnings,
        "cells": planned.cells,  # so that a report can show what is missing
    }


def compare(run_a: Run | str | Path, run_b: Run | str | Path) -> pd.DataFrame:
    """Paired differences between the models of two runs, with intervals and p-values, one row a condition."""
    from coss_eval.reports.compare import compare as paired

    return paired(*(run.path if isinstance(run, Run) else Path(run) for run in (run_a, run_b)))


def _distinct_names(models: list[Model]) -> list[Model]:
    """Models with names that tell them apart: a repeated name gets its weights' hash."""
    counts = Counter(model.name for model in models)
    named = [m if counts[m.name] == 1 else replace(m, name=f"{m.name} ({m.sha256[:8]})") for m in models]
    identities = Counter(str(model.protocol()) for model in named)
    twice = [model.name for model in named if identities[str(model.protocol())] > 1]
    if twice:
        raise UsageError(f"the same weights with the same settings are given twice: {', '.join(twice)}; give each once")
    return named


def _model_lines(model: Model) -> list[str]:
    """What is evaluated, and the normalisation where nobody says it."""
    assumed = model.preprocessing.source.startswith("ASSUMED")
    line = f"model       {model.name}: {model.arch}, {model.sha256[:12]}"
    return [line, *([normalisation_line(model)] if assumed else [])]


def _warnings(subjects: list[Subject]) -> list[str]:
    """Gross mismatches between a network's normalisation and the pixels it is given."""
    images = next(subjects[0].batches(subjects[0].data.test.subset(range(min(64, len(subjects[0].data.test)))))).images
    found = ((subject.model.name, normalisation_check(subject.model, images)) for subject in subjects)
    return [f"{name}: {warning}" for name, warning in found if warning is not None]


def _forward_seconds(subject: Subject) -> float:
    """Seconds a forward pass takes for one image, timed on one small batch."""
    split, device = subject.data.test, subject.settings.device
    images = next(subject.batches(split.subset(range(min(32, len(split)))))).images
    backbone = subject.model.backbone.to(device)  # outside inference mode: parameters moved inside get no gradients
    with torch.inference_mode():
        return seconds_of(partial(backbone, to_float(images)), device) / len(images)


def _short(params: dict[str, Any]) -> str:
    """The parameters that tell one cell of a task from the next, for the progress line."""
    shown = ("corruption", "attack", "norm", "site", "kind", "family", "weights", "method")
    return " ".join(str(params[name]) for name in shown if name in params)
