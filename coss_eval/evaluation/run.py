"""Which cells are missing, run their tasks, hand the measurements to the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coss_eval.checkpoints.as_model import ModelLike
from coss_eval.data.as_dataset import DatasetLike
from coss_eval.errors import CossError, UsageError
from coss_eval.evaluation.facts import data_facts, model_facts
from coss_eval.evaluation.measuring import run_job
from coss_eval.evaluation.planning import Job, Plan, plan
from coss_eval.evaluation.progress import Course, Progress
from coss_eval.evaluation.together import most_expensive_first, prepare
from coss_eval.runtime import live
from coss_eval.runtime.live import duration, progress_line
from coss_eval.runtime.processes import first_says, gathered, one_goes_ahead, process_group, rank, world_size
from coss_eval.runtime.provenance import made_with
from coss_eval.store import NoRoom, Store
from coss_eval.tasks.task import Task

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PATIENCE = timedelta(days=7)  # with which processes wait for each other: a last cell, or a probe, may take hours


@dataclass(frozen=True, repr=False)
class Run:
    """A results folder after (or during) a run."""

    path: Path
    failures: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # lines on images that could not be read
    held: tuple[str, ...] = ()  # lines on cells that another process was at when this one had no more to do

    def __repr__(self) -> str:
        cells = Store(self.path).records()
        models, tasks = len({cell["model"] for cell in cells}), len({cell["task"] for cell in cells})
        done = [f"{_count(models, 'model')}, {_count(tasks, 'task')}, {_count(len(cells), 'cell')}"]
        lines = {"not done": self.failures, "skipped": self.skipped, "on images left out": self.left_out}
        lines |= {"at another process": self.held}
        parts = (done if cells else ["no finished cells"]) + [
            f"{len(some)} {name}" for name, some in lines.items() if some
        ]
        return f"Run({self.path}: {'; '.join(parts)})"

    def _repr_html_(self) -> str:
        """In a notebook: the headline table, and what is missing."""
        from coss_eval import reports

        told = [*self.failures, *self.held, *self.skipped, *self.left_out]
        lines = "".join(f"<br>{escape(line)}" for line in told)
        shown = reports.headline_html(Store(self.path)) if Store(self.path).holds_cells() else ""
        return f"<div><b>{escape(repr(self))}</b>{lines}{shown}</div>"

    def table(self, *, wide: bool = False) -> pd.DataFrame:
        """One row a measurement: value, metric, low, high, n, its condition, task, model and what else is known.

        ``wide``: the values alone, one row a task, metric and condition and one column a model. An untrained network
        that a task measured beside a model is a model of its own here, "NAME, untrained". UsageError where the folder
        holds no finished cell.
        """
        from coss_eval.reports import tables

        found = tables.apart_from_untrained(tables.tidy(self._store()))
        return tables.wide(found) if wide else tables.for_reading(found)

    def per_image(self, task: str | None = None) -> pd.DataFrame:
        """What is stored of each image: a row an image (its id), a column a model, task and condition.

        Verdicts are 1.0 and 0.0, NaN where a cell is not about the image; of one ``task`` or of all. UsageError where
        the folder holds no finished cell.
        """
        from coss_eval.reports import tables

        return tables.per_image(self._store(), task)

    def _store(self) -> Store:
        store = Store(self.path)
        if not store.holds_cells():
            why = f" ({self.failures[0]})" if self.failures else ""
            raise UsageError(f"no finished cells in {self.path}{why}; give a folder that evaluate has written into")
        return store

    def report(
        self,
        *,
        baseline: str | None = None,
        models: Sequence[str] = (),
        rename: Mapping[str, str] | None = None,
        out: str | Path | None = None,
    ) -> list[Path]:
        """Write report.md, report.html, tables/ and figures/ into the folder, or ``out``; the paths written.

        ``models`` are names or globs of what to show, in that order; ``rename`` gives models other names.
        """
        from coss_eval import reports

        return reports.write(self.path, out=out, baseline=baseline, models=models, rename=rename)

    def plot(
        self, name: str, *, width: float | None = None, models: Sequence[str] = (), baseline: str | None = None
    ) -> Figure:
        """One of the report's figures as a matplotlib Figure, ``width`` inches wide: see ``coss-eval figures``.

        ``models``: those shown [default: all]; ``baseline``: what differences refer to [default: the first]. UsageError
        for an unknown name, which lists those that the folder has.
        """
        from coss_eval.reports import figures
        from coss_eval.reports.results import Results

        results = Results(Store(self.path))
        return figures.draw(results, name, figures.canvas_of(results, width=width, models=models, baseline=baseline))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def evaluate(
    models: ModelLike | Sequence[ModelLike],
    data: DatasetLike,
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
    quiet: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Run:
    """Measure one or several models on a dataset and keep every number in the folder ``out``.

    Cells already stored are not computed again (unless ``overwrite``): the same call goes on where it stopped.
    ``tasks`` are names or Task instances with options of their own; all by default. ``limit`` takes a seeded
    class-balanced subset of the test split and marks every table with it. After ``budget_hours`` no new cell begins.
    Give a dataset opened with ``skip_bad_images`` to leave out files that cannot be decoded.
    Where memory runs out, half as many images go through a network at a time, with a warning; numbers do not change.
    Where the disk is full the run stops. A cell that fails leaves a gap and is named in ``Run.failures``; the others
    still run. Without ``tasks``, those that the images do not allow are left out and named in ``Run.skipped``. Networks
    whose outputs for an image depend on its batch are refused; ``allow_batch_dependent`` measures them, with the batch
    size in their cells' keys.
    ``models`` and ``data``: what ``as_model`` and ``as_dataset`` take, or several models. An estimate and a progress
    line are shown, but not with ``quiet`` or where ``on_progress`` takes their place. ``on_note`` gets each line that a
    person should know: an assumed normalisation, warnings, failures; ``ce.evaluate`` warns with them unless ``quiet``.
    An interrupt keeps every finished cell.
    Several processes share the cells: those that work on one folder, and those that torchrun starts, in which each
    calls this. Then ``device`` is the name of each one's ("cuda:0,1") or "cuda" for all; the first process keeps the
    run's provenance and shows progress, and all get the same Run. Cells that yet another process is at when nothing
    else is left are named in ``Run.held``: the same call, later, finds them done or does them.

    >>> import tempfile, coss_eval as ce
    >>> run = ce.evaluate("pixels:8", "digits", ["crops"], out=tempfile.mkdtemp(), limit=20, cache=False)
    >>> sorted(set(run.table()["metric"]))
    ['accuracy', 'chance', 'stability']
    """
    alone = world_size() > 1  # a group of the caller's own, in which others may be at something else
    with process_group(device, patience=PATIENCE) as own:
        with nullcontext() if alone else one_goes_ahead():
            planned = plan(
                models,
                data,
                out=out,
                tasks=tasks,
                limit=limit,
                seed=seed,
                device=own,
                batch_size=batch_size,
                cache=cache,
                overwrite=overwrite,
                allow_batch_dependent=allow_batch_dependent,
            )
        tell = on_note or (lambda line: None)
        for note in planned.notes():
            tell(note)
        quiet = quiet or on_progress is not None or not live.speaks()
        if planned.jobs and not quiet:
            about = estimate(planned, processes=1 if alone else world_size())
            live.tell(f"{planned.missing} of {len(planned.cells)} cells to compute; estimate {about}")
        with progress_line(quiet=quiet or not planned.jobs) as line:
            try:
                show = on_progress or line
                run = execute(planned, budget_hours=budget_hours, on_progress=show, together=not alone)
            except KeyboardInterrupt:
                kept = f"every finished cell is kept in {planned.store.path}"
                tell(f"interrupted: {kept}; the same call goes on from there")
                raise
    for failure in [*run.failures, *run.held]:
        tell(f"not done: {failure}")
    return run


def estimate(planned: Plan, *, processes: int = 1) -> str:
    """How long the missing cells take, in words."""
    seconds = planned.seconds()
    return "unknown: a first attempt failed; its cells say how" if seconds is None else duration(seconds / processes)


@dataclass
class Outcome:
    """What one process has to say of its way through the cells, by their keys."""

    failures: dict[str, str] = field(default_factory=dict)  # a line each
    held: set[str] = field(default_factory=set)  # those that another process was at when no others were left
    stopped: str | None = None  # why no more cells were begun
    full: bool = False  # whether that is a full disk, which stops all
    left_out: list[str] = field(default_factory=list)  # lines on images that could not be read


def execute(
    planned: Plan,
    *,
    budget_hours: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    together: bool = False,
) -> Run:
    """Compute the missing cells of a plan, storing each as it is done, and pack the folder when all are there.

    ``together``: all joined processes (see ``process_group``) call this, each with the same plan on its own device, and
    get the same Run; they share the cells as ``together`` says, the first writes what is of the whole run.
    """
    if not planned.cells:
        raise UsageError(f"nothing can be measured: {'; '.join(planned.skipped)}")
    if budget_hours is not None and not budget_hours >= 0:  # NaN is no budget
        raise UsageError(f"expected a budget of 0 hours or more, got {budget_hours}")
    together = together and world_size() > 1
    entry = provenance(planned) | ({"processes": world_size()} if together else {})
    if not together:
        planned.store.record_run(entry)
        return ended(planned, entry, [work(planned, budget_hours, on_progress)])
    if rank() == 0:
        planned.store.record_run(entry)
    prepare(planned)
    most_expensive_first(planned)
    outcomes = gathered(work(planned, budget_hours, on_progress))
    done = first_says(ended(planned, entry, outcomes) if rank() == 0 else None)
    assert done is not None  # of the first
    return done


def work(
    planned: Plan, budget_hours: float | None, on_progress: Callable[[Progress], None] | None, *, used: float = 0.0
) -> Outcome:
    """One process's way through the cells: those that no other is at, until it has seen others at all that are left.

    ``used`` hours of the budget are gone already.
    """
    started, course, outcome = time.monotonic(), Course(planned, on_progress), Outcome()
    left = [*enumerate(planned.jobs)]
    while left and outcome.stopped is None:
        before, busy = left, list[tuple[int, Job]]()
        for number, job in before:
            if budget_hours is not None and time.monotonic() - started > 3600 * (budget_hours - used):
                outcome.stopped = f"budget of {budget_hours} h used up"
                break
            course.begin(number)
            try:
                held = run_job(planned, job, outcome.failures, course)
            except NoRoom as error:
                outcome.stopped, outcome.full = f"{error}. Stopped, as nothing more could be stored", True
                break
            if held:
                busy.append((number, job.of(held)))
        outcome.held = {key for _, job in busy for key in job.keys}
        left = [] if outcome.held == {key for _, job in before for key in job.keys} else busy
    course.begin(len(planned.jobs))
    outcome.left_out = planned.subjects[0].data.left_out()  # known once the images have been read
    return outcome


def ended(planned: Plan, entry: dict[str, Any], outcomes: Sequence[Outcome]) -> Run:
    """What all processes made of the run: completes its provenance, packs its folder where nothing is missing."""
    failed = {key: line for outcome in outcomes for key, line in outcome.failures.items()}
    held = {key for outcome in outcomes for key in outcome.held}
    missing = {key: job for job in planned.jobs for key in job.keys if key not in failed and not planned.is_done(key)}
    failures = [*dict.fromkeys(failed.values())]
    stopped = [outcome.stopped for outcome in outcomes if outcome.stopped is not None]
    if unbegun := [job.cell.task for key, job in missing.items() if key not in held and stopped]:
        names = ", ".join(dict.fromkeys(unbegun))
        failures.append(f"{stopped[0]}: {_count(len(unbegun), 'cell')} left ({names})")
    if left_out := max((outcome.left_out for outcome in outcomes), key=len, default=[]):
        planned.store.amend_run(entry, {"left_out": left_out})
    if not failures and all(planned.store.read(cell["key"]) is not None for cell in planned.cells):
        try:
            planned.store.pack()  # where it declines, say as another process is at work, the folder is as good
        except CossError as error:
            failures.append(str(error))
    elsewhere = tuple(_elsewhere(planned, key, job) for key, job in missing.items() if key in held)
    return Run(planned.store.path, tuple(failures), tuple(planned.skipped), tuple(left_out), elsewhere)


def _elsewhere(planned: Plan, key: str, job: Job) -> str:
    """ "corruptions fog of r18 is at process 12 on host"."""
    of = dict(zip(job.keys, job.subjects, strict=True))[key].model.name
    return f"{job.label} of {of} is at {planned.store.holder(key) or 'another process, which has left it unfinished'}"


def provenance(planned: Plan) -> dict[str, Any]:
    """What run.json keeps of a run: enough to repeat it."""
    compute, data = planned.subjects[0].compute, planned.subjects[0].data
    return {
        **made_with(compute.device),
        "seed": planned.seed,
        "batch_size": compute.batch_size,
        "data": data_facts(data),
        "models": [
            {
                **model_facts(subject.model),
                **({"outputs": new} if (new := planned.known[subject.model.name].record) is not None else {}),
            }
            for subject in planned.subjects
        ],
        "warnings": planned.warnings,
        "cells": planned.cells,  # so that a report can show what is missing
    }


def compare(
    run_a: Run | str | Path,
    run_b: Run | str | Path,
    *,
    force: bool = False,
    models: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Differences between the models of two runs, or of "folder::model", with intervals and p-values, a row a score.

    Different images or protocols are refused, unless ``force`` is given: then warnings name them. ``models`` are names
    or globs of those to show, in that order, which changes no p; ``rename`` gives models other names.
    """
    from coss_eval.reports.compare import compare as differences

    sides = (run.path if isinstance(run, Run) else Path(run) for run in (run_a, run_b))
    return differences(*sides, force=force, models=models, rename=rename)
