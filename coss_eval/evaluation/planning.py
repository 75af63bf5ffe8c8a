"""Which cells a call consists of, which of them are missing, and what a person should know before they are computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from coss_eval.checkpoints.as_model import ModelLike, as_model
from coss_eval.checkpoints.load import normalisation_check
from coss_eval.checkpoints.normalisation import normalisation_line, normalisation_note
from coss_eval.data.as_dataset import DatasetLike, dataset_of
from coss_eval.data.benchmark import Benchmark
from coss_eval.errors import UsageError
from coss_eval.evaluation.reuse import Known, known
from coss_eval.models.classifier import to_float
from coss_eval.models.model import Model
from coss_eval.probes import resolve_device
from coss_eval.probes.behaviour import IMAGES, Behaviour, batch_dependence, observe, refusal
from coss_eval.probes.forward import ready
from coss_eval.runtime.code_identity import UNKNOWN, code_identity
from coss_eval.runtime.device import Compute, seconds_of
from coss_eval.runtime.memory import bytes_for_gradients
from coss_eval.store import Cell, Store
from coss_eval.tasks import entries, entry
from coss_eval.tasks.task import Subject, Task


@dataclass(frozen=True)
class Job:
    """One cell on all subjects that miss it and share a geometry, so that what they have in common is done once."""

    task: Task
    cell: Cell
    subjects: tuple[Subject, ...]
    keys: tuple[str, ...]

    def of(self, keys: Sequence[str]) -> Job:
        """The same on those subjects alone whose cells have these keys."""
        chosen = [pair for pair in zip(self.subjects, self.keys, strict=True) if pair[1] in keys]
        return replace(self, subjects=tuple(subject for subject, _ in chosen), keys=tuple(key for _, key in chosen))

    @property
    def label(self) -> str:
        return f"{self.cell.task} {_short(self.cell.params)}".rstrip()


@dataclass
class Plan:
    """All that a run will do, known before any of it is done."""

    store: Store
    subjects: list[Subject]
    jobs: list[Job]
    seed: int
    cells: list[dict[str, str]]  # key, task and model of each, stored or not
    warnings: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # what cannot be measured on these images, and why
    known: dict[str, Known] = field(default_factory=dict)  # each model's outputs beside those in the store, by name
    replaced: dict[str, dict[str, Any]] = field(default_factory=dict)  # records that are to be computed again, by key

    @property
    def missing(self) -> int:
        return sum(len(job.subjects) for job in self.jobs)

    def is_done(self, key: str) -> bool:
        """Whether the cell was stored by now, by any process, since the plan was made or before."""
        return self.store.read(key) != self.replaced.get(key)

    @cached_property
    def costs(self) -> list[float] | None:
        """An estimate of the seconds of each job: forward passes, timed on one batch, and the task's own work.

        None where a network takes no pass, or a task's own work fails: their cells will say why.
        """
        try:
            per_image = {id(subject): _forward_seconds(subject) for subject in self.subjects} if self.jobs else {}
            return [
                job.task.overhead(job.cell, job.subjects[0])
                + sum(job.task.forwards(job.cell, subject) * per_image[id(subject)] for subject in job.subjects)
                for job in self.jobs
            ]
        except Exception:  # noqa: BLE001 - a person's own code may fail in any way, and is asked again by its cells
            return None

    def seconds(self) -> float | None:
        """An estimate for the missing cells; None where a network takes no pass."""
        return None if self.costs is None else sum(self.costs)

    def lines(self) -> list[str]:
        """The plan as plain lines for a terminal."""
        data = self.subjects[0].data
        limit = "" if data.test.limit is None else "LIMITED to "
        geometry = self.subjects[0].geometry.items()
        per_task = Counter(job.cell.task for job in self.jobs for _ in job.subjects)
        todo = ", ".join(f"{task} {count}" for task, count in per_task.items()) or "nothing"
        return [
            *(line for subject in self.subjects for line in _model_lines(subject.model)),
            f"data        {data.name}: {limit}{len(data.test)} test images, {len(data.classes)} classes",
            f"geometry    {', '.join(f'{name} {_plain(value)}' for name, value in geometry)}",
            f"device      {self.subjects[0].compute.device}, seed {self.seed}",
            f"cells       {len(self.cells)}, of which {self.missing} to compute: {todo}",
            *([f"steps       {len(self.jobs)}, a cell of all models each"] if len(self.jobs) < self.missing else []),
            *(memory_lines(self.subjects) if self.jobs else []),
            *(f"WARNING     {warning}" for warning in self.warnings),
            *(f"SKIPPED     {line}" for line in self.skipped),
        ]

    def notes(self) -> list[str]:
        """What a person should know before the numbers: assumptions, warnings and what is left out."""
        assumed = [subject.model for subject in self.subjects if _assumed(subject.model)]
        return [
            *map(normalisation_note, assumed),
            *self.warnings,
            *(f"skipped: {line}" for line in self.skipped),
        ]


def plan(
    models: ModelLike | Sequence[ModelLike],
    data: DatasetLike,
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
    loaded, dataset = loaded_models(models), dataset_of(data)
    dataset.refuse_changed()
    if limit is not None:
        dataset = replace(dataset, test=dataset.test.limited(limit, seed))
    if tasks is not None and not tasks:
        raise UsageError("tasks is empty; name some, or leave it out for all")
    chosen = [entry(task).make() if isinstance(task, str) else task for task in tasks or entries()]
    _refuse_unknown_code(chosen)
    if isinstance(dataset, Benchmark) and (others := [task.name for task in chosen if not task.reads_benchmarks]):
        raise UsageError(f"{dataset.name} holds corrupted images: it is for the task corruptions, not {others[0]}")
    compute = Compute(resolve_device(device), batch_size, cache)
    store = Store(Path(out))
    seen = [_seen(Subject(model, dataset, compute), allow_batch_dependent) for model in loaded]
    runs = store.runs()
    planned = Plan(store, [subject for subject, _ in seen], [], seed, [])
    planned.known = {s.model.name: known(s.model, s.image_size, found, runs) for s, found in seen}
    for task in chosen:
        planned.jobs += _jobs(planned, task, seed, overwrite, not tasks if skip_impossible is None else skip_impossible)
    if overwrite:
        planned.warnings += [line for one in planned.known.values() if (line := _left_over(one, store)) is not None]
    if planned.jobs:
        _refuse_crowds(planned.jobs)
        planned.warnings += [*dataset.warnings(), *_warnings(planned.subjects)]
    return planned


def _jobs(planned: Plan, task: Task, seed: int, overwrite: bool, skip: bool) -> list[Job]:
    """The task's missing cells, one job for all subjects that share a geometry; what there is goes into the plan."""
    store, groups = planned.store, dict[tuple[str, str], Job]()
    for subject in planned.subjects:
        if skip and (reason := task.impossible(subject)) is not None:
            planned.skipped.append(f"{task.name} of {subject.model.name}: {reason}")
            continue
        planned.skipped += [f"{task.name} of {subject.model.name}: {line}" for line in task.left_out(subject)]
        for cell in task.cells(subject, seed):
            key = store.key(protocol(task, subject), cell)
            planned.cells.append({"key": key, "task": task.name, "model": subject.model.name})
            stored = store.finished(key)
            if stored is not None and not overwrite:
                planned.known[subject.model.name].check(stored)
                continue
            if (old := stored or store.read(key)) is not None:  # perhaps one whose samples are damaged
                planned.replaced[key] = old
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
    crowd = _crowd(subject) if allow_batch_dependent else 0  # else only where there is something to compute
    try:
        found = observe(subject.model, subject.image_size, subject.compute.device, crowd)
    except Exception:  # noqa: BLE001 - a network's own code may fail in any way; its cells fail in the same and say how
        return subject, None
    what = batch_dependence(found)
    if what is None:
        return subject, found
    if not allow_batch_dependent:
        raise UsageError(refusal(subject.model, what))
    model = replace(subject.model, batch_size=subject.compute.batch_size)
    return replace(subject, model=model), None  # its outputs are no sign of who it is


def _crowd(subject: Subject) -> int:
    """How many images the largest batch of a run has."""
    splits = [split for split in (subject.data.test, subject.data.train) if split is not None]
    return min(subject.compute.batch_size, max(map(len, splits)))


def _refuse_crowds(jobs: Sequence[Job]) -> None:
    """UsageError where an image's outputs depend on its batch from some size on that the run's own batches have."""
    for subject in {subject.model.name: subject for job in jobs for subject in job.subjects}.values():
        if subject.model.batch_size is not None or _crowd(subject) <= IMAGES:
            continue
        try:
            found = observe(subject.model, subject.image_size, subject.compute.device, _crowd(subject))
        except Exception:  # noqa: BLE001 - as above: its cells fail in the same way
            continue
        if (what := batch_dependence(found)) is not None:
            raise UsageError(refusal(subject.model, what))


def _left_over(one: Known, store: Store) -> str | None:
    """Whether cells that this call does not compute again are those of a network with other outputs."""
    if not any(one.shares.values()):
        return None
    return (
        f"{one.model.name} gives other outputs than when results were stored: what this call does not compute again in "
        f"{store.path} is the former network's; give another --out to keep them apart"
    )


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


def loaded_models(models: ModelLike | Sequence[ModelLike]) -> list[Model]:
    """One model or several, as ``as_model`` takes them, under the identity of what they are now and distinct names."""
    given: list[ModelLike] = [*models] if isinstance(models, list | tuple) else [models]  # type: ignore[list-item]
    if not given:
        raise UsageError("no model to evaluate: give at least one checkpoint")
    # a model that was loaded earlier may have been changed in place since
    return distinct_names([model.identified() if isinstance(model, Model) else as_model(model) for model in given])


def distinct_names(models: list[Model]) -> list[Model]:
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
    line = f"model       {model.name}: {model.arch}, weights {model.sha256[:12]}"
    return [line, *([normalisation_line(model)] if _assumed(model) else [])]


def _plain(value: object) -> str:
    """ "32 x 32" for a list of sides."""
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def _assumed(model: Model) -> bool:
    return model.preprocessing.said_by is None


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
    split, device, model = subject.data.test, subject.compute.device, subject.model
    images = next(subject.batches(split.subset(range(min(32, len(split)))))).images
    network = model.encoder()
    with ready(network, device), torch.inference_mode():  # moved outside it: parameters moved inside get no gradients
        return seconds_of(partial(network, to_float(images)), device) / len(images)


def memory_lines(subjects: Sequence[Subject]) -> list[str]:
    """What the largest network would need for a batch, measured on one image; none where no network takes one."""
    needed = []
    for subject in subjects:
        try:
            needed.append(_gradient_bytes(subject))
        except Exception:  # noqa: BLE001 - a network's own code may fail in any way; its cells will say how
            continue
    if not needed:
        return []
    size = subjects[0].compute.batch_size
    return [
        f"memory      about {_giga(size * max(needed))} for {size} images at a time in tasks that need gradients "
        f"({max(needed) / 1e6:.1f} MB an image); where it runs out, half as many are taken"
    ]


def _giga(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def _gradient_bytes(subject: Subject) -> int:
    """Bytes that a forward pass keeps of one image for its gradients, up-sampling included."""
    images = next(subject.batches(subject.data.test.subset([0]))).images
    network = subject.model.encoder()
    with ready(network, subject.compute.device):
        pixels = to_float(images).requires_grad_()
        return bytes_for_gradients(partial(network, pixels))


def _short(params: dict[str, Any]) -> str:
    """The parameters that tell one cell of a task from the next, for the progress line."""
    shown = ("corruption", "attack", "norm", "site", "kind", "family", "weights", "method")
    return " ".join(str(params[name]) for name in shown if name in params)
