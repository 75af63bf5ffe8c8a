"""Commands that evaluate checkpoints: all of them plan, say so, run and report."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from coss_eval import tasks as registry
from coss_eval.cli.app import EVALUATE, FAILED, HELD, TASK, app
from coss_eval.cli.flags import Chosen, CopyFlags, CorruptionDataFlags, DataFlags, ModelFlags, OfTask, RunFlags
from coss_eval.runtime.live import say, speaks
from coss_eval.tasks.entry import TaskEntry
from coss_eval.tasks.flags import BackendFlag

if TYPE_CHECKING:
    import torch

    from coss_eval.evaluation import Plan, Run
    from coss_eval.sweeps.on_ray import Cluster
    from coss_eval.tasks.corruptions.task import Corruptions
    from coss_eval.tasks.task import Task

MOST_NAME = 200  # bytes of a folder's name


def _evaluate(
    models: ModelFlags | None,
    data: DataFlags | None,
    run: RunFlags | None,
    tasks: Sequence[Task],
    *,
    skip_impossible: bool = False,
) -> int:
    """Plan, say so, run, report: what every evaluating command does, in a process for each device that is named."""
    from coss_eval.evaluation.run import PATIENCE
    from coss_eval.runtime.device import device_names, leave_busy_cores
    from coss_eval.runtime.processes import process_group, start_on_each

    run = run or RunFlags()
    cluster = run.where.cluster(run.device)
    if cluster is None and len(device_names(run.device)) > 1 and "WORLD_SIZE" not in os.environ:
        return start_on_each(device_names(run.device))
    # what nodes compute is only planned here
    with process_group(run.device if cluster is None else "cpu", patience=PATIENCE) as device:
        if device.type == "cpu" and cluster is None and "WORLD_SIZE" not in os.environ:  # else they share the cores
            leave_busy_cores(quiet=run.quiet)
        done = _planned_and_done(models, data, run, tasks, device, cluster, skip_impossible=skip_impossible)
    return 0 if done is None or not speaks() else _report(done, run.baseline)


def _planned_and_done(
    models: ModelFlags | None,
    data: DataFlags | None,
    run: RunFlags,
    tasks: Sequence[Task],
    device: torch.device,
    cluster: Cluster | None,
    *,
    skip_impossible: bool,
) -> Run | None:
    """What came of the run, in all of its processes; None for one that was to be shown only."""
    from coss_eval import evaluation
    from coss_eval.runtime.live import progress_line
    from coss_eval.runtime.processes import one_goes_ahead, world_size

    loaded = (models or ModelFlags()).load()
    dataset = (data or DataFlags()).open()
    out = run.out or Path("results") / _folder_name([dataset.name, *(model.name for model in loaded)])
    with one_goes_ahead():
        planned = evaluation.plan(
            loaded,
            dataset,
            out=out,
            tasks=tasks,
            limit=run.limit,
            seed=run.seed,
            device=device,
            batch_size=run.batch_size,
            cache=not run.no_cache,
            overwrite=run.overwrite,
            allow_batch_dependent=run.allow_batch_dependent,
            skip_impossible=skip_impossible,
        )
    if (not run.quiet or run.dry_run) and speaks():
        _show_plan(planned, out, world_size(), cluster)
    if run.dry_run:
        return None
    with progress_line(quiet=run.quiet or not speaks()) as on_progress:
        if cluster is None:
            return evaluation.execute(planned, budget_hours=run.budget_hours, on_progress=on_progress, together=True)
        from coss_eval.sweeps.on_ray import execute_on_ray

        return execute_on_ray(planned, cluster, budget_hours=run.budget_hours, on_progress=on_progress)


def _report(done: Run, baseline: str | None) -> int:
    """What is missing, the headline and where the report is; the exit code."""
    from coss_eval.runtime.live import say_report
    from coss_eval.store import Store

    _say_gaps(done)  # before the report, which may find nothing to show
    if Store(done.path).holds_cells():
        say("")
        say(_headline(done.path, baseline))
        say("")
        say_report(done.path / "report.md", "report.html, figures/ and, for every number, tables/*.csv")
    elif not done.held:
        say(f"nothing was measured, so there is no report in {done.path}")
        return FAILED
    return FAILED if done.failures else HELD if done.held else 0


def _say_gaps(done: Run) -> None:
    """A line for each cell that could not be measured, and why."""
    for line in done.skipped:
        say(f"SKIPPED     {line}")
    for line in done.left_out:
        say(f"LEFT OUT    {line}")
    for failure in done.failures:
        say(f"NOT DONE    {failure}")
    for line in done.held:
        say(f"ELSEWHERE   {line}")


def _folder_name(names: Sequence[str]) -> str:
    """The names joined; of many the first, how many more, and a digest of all, as file systems take 255 bytes."""
    joined = "-".join(names).replace("/", "-")
    if len(joined.encode()) <= MOST_NAME:
        return joined
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    first = "-".join(names[:2]).replace("/", "-").encode()[:MOST_NAME].decode(errors="ignore")
    return f"{first}-and-{max(0, len(names) - 2)}-more-{digest}"


def _show_plan(planned: Plan, out: Path, processes: int, cluster: Cluster | None) -> None:
    from coss_eval.evaluation.run import estimate

    for subject in planned.subjects:
        if subject.model.report is not None:
            say("\n".join([f"checkpoint  {subject.model.name}", *subject.model.report.lines()]))
    say("\n".join(planned.lines()))
    if processes > 1:
        say(f"processes   {processes}, which share the cells: each takes the next one that nobody is at")
    say(f"out         {out}")
    if cluster is not None:  # nothing here says how fast a node is
        say(f"engine      Ray{'' if cluster.address is None else f' at {cluster.address}'}\n")
        return
    say(f"estimate    {estimate(planned, processes=processes)}\n")


def _headline(path: Path, baseline: str | None) -> str:
    from coss_eval import reports
    from coss_eval.runtime.live import width
    from coss_eval.store import Store

    reports.write(path, baseline=baseline)
    return reports.headline_text(Store(path), width())


@app.command(group=EVALUATE)
def robustness(
    *,
    tasks: Chosen = (),
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    run: RunFlags | None = None,
    backend: OfTask[BackendFlag] = "native",
) -> int:
    """Evaluate checkpoints with every task that the images allow, and write the report.

    Without a training split no probe can be fitted: checkpoints then need a head of their own for the dataset's
    classes, and the task probe is skipped, with a line that says so.

    Parameters
    ----------
    tasks
        Names from coss-eval list tasks, or package.module:Class for tasks of yours [default: all].
    """
    return _evaluate(models, data, run, _made(tasks, backend), skip_impossible=True)


@app.command(group=EVALUATE)
def evaluate(
    *,
    tasks: Chosen = (),
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    run: RunFlags | None = None,
    backend: OfTask[BackendFlag] = "native",
) -> int:
    """Evaluate checkpoints with the tasks named by --tasks (all by default).

    Parameters
    ----------
    tasks
        Names from coss-eval list tasks, or package.module:Class for tasks of yours [default: all].
    """
    return _evaluate(models, data, run, _made(tasks, backend))


def _made(names: Sequence[str], backend: BackendFlag) -> list[Task]:
    """The tasks of these names, all where there are none."""
    chosen = [registry.entry(name) for name in names or registry.entries()]
    return [entry.make(**({"backend": backend} if "backend" in entry.option_names else {})) for entry in chosen]


def _make(entry: TaskEntry, options: Any) -> Task:
    """The task with the options that the command line gave; None where it gave none."""
    given = {} if options is None else {name: getattr(options, name) for name in entry.option_names}
    return entry.make(**given)


def _command_of(entry: TaskEntry) -> Callable[..., int]:
    """The command that evaluates one task."""

    def command(
        *,
        options: Any = None,
        models: ModelFlags | None = None,
        data: DataFlags | None = None,
        run: RunFlags | None = None,
    ) -> int:
        return _evaluate(models, data, run, [_make(entry, options)])

    return command


def _corruptions(
    *,
    options: Any = None,
    copy: CopyFlags | None = None,
    models: ModelFlags | None = None,
    data: CorruptionDataFlags | None = None,
    run: RunFlags | None = None,
) -> int:
    """Evaluate, or write what would be evaluated."""
    models, data, run = models or ModelFlags(), data or CorruptionDataFlags(), run or RunFlags()
    task: Any = _make(registry.entry("corruptions"), options)
    _refuse_unknown(task, data)
    if copy is not None and copy.write is not None:
        return _write_copy(copy.write, copy.layout, task, models, data, run)
    return _evaluate(models, data, run, [task])


def _refuse_unknown(task: Corruptions, data: DataFlags) -> None:
    """UsageError for a corruption that neither the package nor a ready-made set has, before a network is read."""
    from coss_eval.corruptions.names import find
    from coss_eval.corruptions.registry import CORRUPTIONS
    from coss_eval.data.benchmark import Benchmark

    words = [name for name in task.names if isinstance(name, str) and ":" not in name and name not in CORRUPTIONS]
    dataset = data.open() if words else None
    for word in words:
        if not isinstance(dataset, Benchmark) or word not in dataset.severities:
            find(word)


def _add_commands() -> None:
    """A command for each task: its options are the flags, and their docstring is the help."""
    own = {"corruptions": _corruptions}  # commands that do more than evaluate
    for entry in registry.built_in():
        command = own.get(entry.name) or _command_of(entry)
        command.__doc__ = entry.options.__doc__
        command.__annotations__["options"] = Annotated[entry.options | None, Parameter(name="*", group=TASK)]
        app.command(command, name=entry.name, group=EVALUATE)


def _write_copy(
    out: Path,
    layout: Literal["npy", "folders"] | None,
    task: Corruptions,
    models: ModelFlags,
    data: DataFlags,
    run: RunFlags,
) -> int:
    """The corrupted copy that --write asks for, in the geometry of --ckpt where one is given."""
    from dataclasses import replace

    from coss_eval.evaluation import Progress
    from coss_eval.probes import resolve_device
    from coss_eval.runtime.live import progress_line, say
    from coss_eval.tasks.corruptions.write import Copy, write_copy

    dataset = data.open()
    if run.limit is not None:
        dataset = replace(dataset, test=dataset.test.limited(run.limit, run.seed))
    geometry = models.load()[0].preprocessing.geometry if models.ckpt else models.geometry()
    chosen = layout or ("npy" if dataset.test.native_size else "folders")
    copy = Copy(dataset, out, task, chosen, geometry, run.seed, resolve_device(run.device), run.batch_size)
    with progress_line(quiet=run.quiet) as show:
        written, there = write_copy(copy, None if show is None else lambda *now: show(Progress(*now)))
    say(f"{out}: {len(copy.split)} images, {written} corruptions written, {there} were there ({chosen})")
    return 0


_add_commands()
