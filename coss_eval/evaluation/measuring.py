"""One job: claim its cells, measure them, store what comes out; say in a line what failed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from torch import nn

from coss_eval.errors import CossError, CossWarning
from coss_eval.evaluation.planning import Job, Plan, protocol
from coss_eval.evaluation.progress import Course
from coss_eval.models.hooks import finite_outputs
from coss_eval.runtime.device import exact_float32
from coss_eval.runtime.memory import NO_CODE, give_memory_back, out_of_memory
from coss_eval.store import NoRoom
from coss_eval.tasks.task import Result, Subject

Mine = tuple[Subject, str]  # a subject and the key of its cell, claimed by this process


def run_job(planned: Plan, job: Job, failures: dict[str, str], course: Course) -> list[str]:
    """Claim what is missing and no other process is at, measure it, store it; the keys of what another is at.

    A line for each subject that failed goes to ``failures``.
    """
    with ExitStack() as stack:
        stack.enter_context(exact_float32())
        mine, held, able = list[Mine](), list[str](), list[Mine]()
        try:
            for subject, key in zip(job.subjects, job.keys, strict=True):
                if planned.is_done(key):
                    continue
                if stack.enter_context(planned.store.claim(key)) is None:
                    held.append(key)
                elif not planned.is_done(key):  # by whoever has just let go of it
                    mine.append((subject, key))
        except CossError as error:
            failures |= dict.fromkeys(job.keys, _failure(job, None, error))
            return []
        for subject, key in mine:
            try:
                _fit(planned, job, subject)
                able.append((subject, key))
            except Exception as error:  # noqa: BLE001 - a network's own code may fail in any way
                failures[key] = _failure(job, subject, error)
        with course.watch([subject for subject, _ in able]):
            failures |= _measure(planned, job, able)
    return held


def _fit(planned: Plan, job: Job, subject: Subject) -> None:
    """Have the subject's classifier, where the task needs one: where that fails, it is this subject's fault alone."""
    while job.task.uses_head:
        try:
            _ = subject.classifier
            return
        except Exception as error:
            if not (out_of_memory(error) and _halve(planned, job)):
                raise
        give_memory_back(planned.subjects[0].compute.device)


def _halve(planned: Plan, job: Job) -> bool:
    """Go on with half as many images at a time, and say so. False where it is one already, or a number depends on it.

    The error that told of it should be gone by the next attempt: its traceback holds what the failed pass made.
    """
    size = planned.subjects[0].compute.batch_size
    if size == 1 or any(subject.model.batch_size is not None for subject in planned.subjects):
        return False
    for subject in planned.subjects:
        subject.compute = replace(subject.compute, batch_size=size // 2)
        subject.refusal = None
    warnings.warn(
        f"out of memory with {size} images at a time ({job.label}): going on with {size // 2}, which changes no number",
        CossWarning,
        stacklevel=2,
    )
    return True


def _measure(planned: Plan, job: Job, mine: Sequence[Mine]) -> dict[str, str]:
    """Measure all at once; where one fails, those left one after the other, so that the fault stays its own.

    A line for each that failed, by its key.
    """
    failures, left, short = dict[str, str](), list(mine), False
    try:
        with ExitStack() as stack:
            watched = [stack.enter_context(finite_outputs(*_watched(job, subject))) for subject, _ in mine]
            started = time.perf_counter()
            results = job.task.run(job.cell, [subject for subject, _ in mine]) if mine else iter(())
            for result, bad in zip(results, watched, strict=True):
                subject, key = left[0]
                if where := bad():
                    error = CossError(f"its outputs hold NaN or infinity ({where}): check weights and normalisation")
                    failures[key] = _failure(job, subject, error)
                else:
                    _store(planned, job, subject, key, result, time.perf_counter() - started)
                del left[0]
    except NoRoom:
        raise
    except Exception as error:  # noqa: BLE001 - a network's own code may fail in any way
        short = bool(left) and out_of_memory(error) and _halve(planned, job)
        if not short and (len(mine) == 1 or not left):
            of = mine[0][0] if len(mine) == 1 else None
            return failures | dict.fromkeys((key for _, key in mine), _failure(job, of, error))
    if short:  # the error is gone, and with it what its traceback held
        give_memory_back(planned.subjects[0].compute.device)
        return failures | _measure(planned, job, left)
    for one in left:
        failures |= _measure(planned, job, [one])
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
        "head": subject.classifier.origin if job.task.uses_head else None,
        "notes": result.notes + subject.data.left_out(),
        "seconds": seconds,
    }
    outputs = planned.known[subject.model.name].name
    planned.store.write(key, record | ({"outputs": outputs} if outputs is not None else {}), result.samples)


def _failure(job: Job, subject: Subject | None, error: Exception) -> str:
    """ "corruptions fog of r18: out of memory": what was not done, and why in one line."""
    reason = str(error).partition("\n")[0]
    if not isinstance(error, CossError | RuntimeError) or not reason:  # RuntimeError: torch's own
        reason = f"{type(error).__name__}: {reason}"
    if NO_CODE in reason:
        reason += "; oneDNN found no memory, nor will it in this process: give the same command again, which goes on"
    return f"{job.label}{f' of {subject.model.name}' if subject is not None else ''}: {reason}"
