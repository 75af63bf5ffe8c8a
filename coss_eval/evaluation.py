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
from torch import nn

from coss_eval.code_identity import UNKNOWN, code_identity
from coss_eval.data.benchmark import Benchmark
from coss_eval.data.open import Dataset, load_dataset
from coss_eval.describe import normalisation_line
from coss_eval.errors import CossError, UsageError
from coss_eval.models.classifier import Classifier, to_float
from coss_eval.models.load import load_model, normalisation_check
from coss_eval.models.model import Model
from coss_eval.probes import resolve_device
from coss_eval.probes.behaviour import Behaviour, batch_dependence, observe, refusal
from coss_eval.probes.forward import exact_float32, finite_outputs, ready, seconds_of
from coss_eval.provenance import made_with
from coss_eval.reuse import Known, known
from coss_eval.store import Cell, Store
from coss_eval.tasks import NAMES, task_class
from coss_eval.tasks.task import Result, Settings, Subject, Task

if TYPE_CHECKING:
    import pandas as pd

Mine = tuple[Subject, str]  # a subject and the key of its cell, claimed by this process


@dataclass(frozen=True)
class Job:
    """One cell on all subjects that miss it and share a geometry, so that what they have in common is done once."""

    task: Task
    cell: Cell
    subjects: tuple[Subject, ...]
    keys: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.cell.task} {_short(self.cell.params)}".rstrip()


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
    skipped: list[str] = field(default_factory=list)  # what cannot be measured on these images, and why
    known: dict[str, Known] = field(default_factory=dict)  # each model's outputs beside those in the store, by name

    @property
    def missing(self) -> int:
        return sum(len(job.subjects) for job in self.jobs)

    def seconds(self) -> float | None:
        """An estimate for the missing cells: forward passes, timed on one batch, and the tasks' own work.

        None where a network takes no pass: its cells will say why.
        """
        try:
            per_image = {id(subject): _forward_seconds(subject) for subject in self.subjects} if self.jobs else {}
        except Exception:  # noqa: BLE001 - a network's own code may fail in any way, and is asked again by its cells
            return None
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
            *(f"SKIPPED     {line}" for line in self.skipped),
        ]

    def notes(self) -> list[str]:
        """What a person should know before the numbers: assumptions, warnings and what is left out."""
        assumed = [subject.model for subject in self.subjects if _assumed(subject.model)]
        return [
            *(f"{model.name}: {normalisation_line(model)}" for model in assumed),
            *self.warnings,
            *(f"skipped: {line}" for line in self.skipped),
        ]


@dataclass(frozen=True)
class Run:
    """A results folder after (or during) a run."""

    path: Path
    failures: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # lines on images that could not be read

    def table(self) -> pd.DataFrame:
        """One row a measurement: model, task, metric, condition, value, n, low, high.

        An untrained network that a task measured beside a model is a model of its own here, "NAME, untrained", and so
        is one that shares its name with others: "NAME [sha256=...]", "NAME [limit=100]".
        UsageError where the folder holds no finished cell.
        """
        from coss_eval.reports.tables import apart_from_untrained, tidy

        found = tidy(Store(self.path))
        if found.empty:
            why = f" ({self.failures[0]})" if self.failures else ""
            raise UsageError(f"no finished cells in {self.path}{why}; give a folder that evaluate has written into")
        return apart_from_untrained(found)

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
    allow_batch_dependent: bool = False,
    skip_impossible: bool | None = None,
) -> Plan:
    """What ``evaluate`` would do with the same arguments: the cells, those still missing, and warnings.

    ``skip_impossible`` leaves out, with a line, the tasks that these images allow for no number (probes without a
    training split); None does so where no tasks are named.
    """
    given = [models] if isinstance(models, str | Path | Model) else list(models)
    if not given:
        raise UsageError("no model to evaluate: give at least one checkpoint")
    dataset = data if isinstance(data, Dataset) else load_dataset(data)
    dataset.refuse_changed()
    if limit is not None:
        dataset = replace(dataset, test=dataset.test.limited(limit, seed))
    chosen = [task_class(task)() if isinstance(task, str) else task for task in tasks or NAMES]
    _refuse_unknown_code(chosen)
    if isinstance(dataset, Benchmark) and (others := [task.name for task in chosen if not task.reads_benchmarks]):
        raise UsageError(f"{dataset.name} holds corrupted images: it is for the task corruptions, not {others[0]}")
    settings = Settings(resolve_device(device), batch_size, seed, cache)
    # a model that was loaded earlier may have been changed in place since
    loaded = [model.identified() if isinstance(model, Model) else load_model(model) for model in given]
    store = Store(Path(out))
    seen = [_seen(Subject(model, dataset, settings), allow_batch_dependent) for model in _distinct_names(loaded)]
    runs = store.runs()
    planned = Plan(store, [subject for subject, _ in seen], [], [])
    planned.known = {s.model.name: known(s.model, s.image_size, found, runs) for s, found in seen}
    for task in chosen:
        planned.jobs += _jobs(planned, task, seed, overwrite, not tasks if skip_impossible is None else skip_impossible)
    if overwrite:
        planned.warnings += [line for one in planned.known.values() if (line := _left_over(one, store)) is not None]
    if planned.jobs:
        planned.warnings += [*dataset.warnings(), *_warnings(planned.subjects)]
    return planned


def _jobs(planned: Plan, task: Task, seed: int, overwrite: bool, skip: bool) -> list[Job]:
    """The task's missing cells, one job for all subjects that share a geometry; what there is goes into the plan."""
    store, groups = planned.store, dict[tuple[str, str], Job]()
    for subject in planned.subjects:
        if skip and (reason := task.impossible(subject)) is not None:
            planned.skipped.append(f"{task.name} of {subject.model.name}: {reason}")
            continue
        for cell in task.cells(subject, seed):
            key = store.key(protocol(task, subject), cell)
            planned.cells.append({"key": key, "task": task.name, "model": subject.model.name})
            stored = None if overwrite else store.read(key)
            if stored is not None:
                planned.known[subject.model.name].check(stored)
                continue
            group = (str(subject.geometry), store.key({}, cell))
            job = groups.get(group, Job(task, cell, (), ()))
            groups[group] = replace(job, subjects=(*job.subjects, subject), keys=(*job.keys, key))
    return list(groups.values())


def _refuse_unknown_code(tasks: Sequence[Task]) -> None:
    for task in tasks:
        if code_identity([type(task)]) == UNKNOWN:
            raise UsageError(
                f"the source code of the task {type(task).__name__} cannot be read, so its numbers could not be told "
                "from those of another version: give the class a version (version = 1), raised when its numbers change"
            )


def _seen(subject: Subject, allow_batch_dependent: bool) -> tuple[Subject, Behaviour | None]:
    """The subject, its batch size a part of its identity where it has to be, and what its network does; None where it
    takes no images.
    """
    try:
        found = observe(subject.model, subject.image_size, subject.settings.device)
    except Exception:  # noqa: BLE001 - a network's own code may fail in any way; its cells fail in the same and say how
        return subject, None
    what = batch_dependence(found)
    if what is None:
        return subject, found
    if not allow_batch_dependent:
        raise UsageError(refusal(subject.model, what))
    model = replace(subject.model, batch_size=subject.settings.batch_size)
    return replace(subject, model=model), None  # its outputs are no sign of who it is


def _left_over(one: Known, store: Store) -> str | None:
    """Whether cells that this call does not compute again are those of a network with other outputs."""
    if not any(one.shares.values()):
        return None
    return (
        f"{one.model.name} gives other outputs than when results were stored: what this call does not compute again in "
        f"{store.path} is the former network's; give another --out to keep them apart"
    )


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
    allow_batch_dependent: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Run:
    """Measure one or several models on a dataset and keep every number in the folder ``out``.

    Cells already stored are not computed again (unless ``overwrite``): the same call goes on where it stopped.
    ``tasks`` are names or Task instances with options of their own; all by default. ``limit`` takes a seeded
    class-balanced subset of the test split and marks every table with it. After ``budget_hours`` no new cell begins.
    Give a dataset opened with ``skip_bad_images`` to leave out files that cannot be decoded.
    A cell that fails leaves a gap and is named in ``Run.failures``; the others still run. Without ``tasks``, those that
    the images do not allow are left out and named in ``Run.skipped``. Networks whose outputs for an image depend on its
    batch are refused; ``allow_batch_dependent`` measures them, with the batch size in their cells' keys.
    ``on_note`` gets each line that a person should know: an assumed normalisation, warnings, failures.
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
        allow_batch_dependent=allow_batch_dependent,
    )
    tell = on_note or (lambda line: None)
    for note in planned.notes():
        tell(note)
    run = execute(planned, overwrite=overwrite, budget_hours=budget_hours, on_progress=on_progress)
    for failure in run.failures:
        tell(f"not done: {failure}")
    return run


def execute(
    planned: Plan,
    *,
    overwrite: bool = False,
    budget_hours: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Compute the missing cells of a plan, storing each as it is done, and pack the folder when all are there."""
    if not planned.cells:
        raise UsageError(f"nothing can be measured: {'; '.join(planned.skipped)}")
    entry = provenance(planned)
    planned.store.record_run(entry)
    started = time.monotonic()
    failures: list[str] = []
    for number, job in enumerate(planned.jobs):
        if budget_hours is not None and time.monotonic() - started > budget_hours * 3600:
            failures.append(f"budget of {budget_hours} h used up: {len(planned.jobs) - number} jobs not begun")
            break
        if on_progress is not None:
            on_progress(Progress(number, len(planned.jobs), job.label))
        failures += _run_job(planned, job, overwrite)
    if on_progress is not None:
        on_progress(Progress(len(planned.jobs), len(planned.jobs), "done"))
    if left_out := planned.subjects[0].data.left_out():  # known once the images have been read
        planned.store.amend_run(entry, {"left_out": left_out})
    if not failures and all(planned.store.read(cell["key"]) is not None for cell in planned.cells):
        try:
            planned.store.pack()  # where it declines, say as another process is at work, the folder is as good
        except CossError as error:
            failures.append(str(error))
    return Run(planned.store.path, tuple(failures), tuple(planned.skipped), tuple(left_out))


def _run_job(planned: Plan, job: Job, overwrite: bool) -> list[str]:
    """Claim what no other process is at, measure it, store it; a line for each subject that failed."""
    store = planned.store
    with ExitStack() as stack:
        stack.enter_context(exact_float32())
        try:
            mine = [
                (subject, key)
                for subject, key in zip(job.subjects, job.keys, strict=True)
                if stack.enter_context(store.claim(key)) and (overwrite or store.read(key) is None)
            ]
        except CossError as error:
            return [_failure(job, None, error)]
        failures, able = list[str](), list[Mine]()
        for subject, key in mine:
            try:
                if job.task.uses_head:
                    _ = subject.classifier  # fitted now: where that fails, it is this subject's fault alone
                able.append((subject, key))
            except Exception as error:  # noqa: BLE001 - a network's own code may fail in any way
                failures.append(_failure(job, subject, error))
        return failures + _measure(planned, job, able)


def _measure(planned: Plan, job: Job, mine: Sequence[Mine]) -> list[str]:
    """Measure all at once; where one fails, those left one after the other, so that the fault stays its own."""
    failures, left = list[str](), list(mine)
    try:
        with ExitStack() as stack:
            watched = [stack.enter_context(finite_outputs(*_watched(job, subject))) for subject, _ in mine]
            started = time.perf_counter()
            results = job.task.run(job.cell, [subject for subject, _ in mine]) if mine else iter(())
            for result, bad in zip(results, watched, strict=True):
                subject, key = left[0]
                if where := bad():
                    error = CossError(f"its outputs hold NaN or infinity ({where}): check weights and normalisation")
                    failures.append(_failure(job, subject, error))
                else:
                    _store(planned, job, subject, key, result, time.perf_counter() - started)
                del left[0]
    except Exception as error:  # noqa: BLE001 - a network's own code may fail in any way
        if len(mine) == 1 or not left:
            return [*failures, _failure(job, mine[0][0] if len(mine) == 1 else None, error)]
        for one in left:
            failures += _measure(planned, job, [one])
    return failures


def _watched(job: Job, subject: Subject) -> list[nn.Module]:
    """Where every number of a subject passes through: its representation, and the head in use."""
    backbone = subject.model.backbone
    return [backbone.global_, subject.classifier.head] if job.task.uses_head else [backbone.global_]


def _store(planned: Plan, job: Job, subject: Subject, key: str, result: Result, seconds: float) -> None:
    record = {
        "protocol": protocol(job.task, subject),
        "cell": job.cell,
        "model": subject.model.name,
        "measurements": result.measurements,
        "notes": result.notes
        + subject.data.left_out()
        + ([f"head: {subject.classifier.origin}"] if job.task.uses_head else []),
        "seconds": seconds,
    }
    outputs = planned.known[subject.model.name].name
    planned.store.write(key, record | ({"outputs": outputs} if outputs is not None else {}), result.samples)


def _failure(job: Job, subject: Subject | None, error: Exception) -> str:
    """ "corruptions fog of r18: out of memory": what was not done, and why in one line."""
    reason = str(error).partition("\n")[0]
    if not isinstance(error, CossError | RuntimeError) or not reason:  # RuntimeError: torch's own
        reason = f"{type(error).__name__}: {reason}"
    return f"{job.label}{f' of {subject.model.name}' if subject is not None else ''}: {reason}"


def protocol(task: Task, subject: Subject) -> dict[str, Any]:
    """All that the numbers of a task on this subject depend on, beside the cell's own parameters."""
    test = subject.data.test
    record: dict[str, Any] = {
        "model": subject.model.protocol(),
        "data": {"name": subject.data.name, "split": test.name, "fingerprint": test.fingerprint, "limit": test.limit},
        "geometry": subject.geometry,
    }
    record |= {"head": subject.head_protocol()} if task.uses_head else {}
    code = code_identity([type(task)])
    return record if code is None else record | {"code": code}


def provenance(planned: Plan) -> dict[str, Any]:
    """What run.json keeps of a run: enough to repeat it."""
    settings, data = planned.subjects[0].settings, planned.subjects[0].data
    return {
        **made_with(settings.device),
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "data": {
            "name": data.name,
            "classes": len(data.classes),
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
                **({"outputs": new} if (new := planned.known[subject.model.name].record) is not None else {}),
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
    line = f"model       {model.name}: {model.arch}, {model.sha256[:12]}"
    return [line, *([normalisation_line(model)] if _assumed(model) else [])]


def _assumed(model: Model) -> bool:
    return model.preprocessing.source.startswith("ASSUMED")


def _warnings(subjects: list[Subject]) -> list[str]:
    """Gross mismatches between a network's normalisation and the pixels it is given."""
    images = next(subjects[0].batches(subjects[0].data.test.subset(range(min(64, len(subjects[0].data.test)))))).images
    found = []
    for subject in subjects:
        try:
            warning = normalisation_check(subject.model, images)
        except (RuntimeError, AssertionError, ValueError):  # it takes no such images: its cells say so
            continue
        found += [] if warning is None else [f"{subject.model.name}: {warning}"]
    return found


def _forward_seconds(subject: Subject) -> float:
    """Seconds a forward pass takes for one image, up-sampling included, timed on one small batch."""
    split, device, model = subject.data.test, subject.settings.device, subject.model
    images = next(subject.batches(split.subset(range(min(32, len(split)))))).images
    network = Classifier(model.backbone, nn.Identity(), model.preprocessing, origin="no head")
    with ready(network, device), torch.inference_mode():  # moved outside it: parameters moved inside get no gradients
        return seconds_of(partial(network, to_float(images)), device) / len(images)


def _short(params: dict[str, Any]) -> str:
    """The parameters that tell one cell of a task from the next, for the progress line."""
    shown = ("corruption", "attack", "norm", "site", "kind", "family", "weights", "method")
    return " ".join(str(params[name]) for name in shown if name in params)
