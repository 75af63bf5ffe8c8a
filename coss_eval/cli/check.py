"""`coss-eval check`: does this checkpoint fit this dataset? Key report, shapes, one small batch through every task."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from coss_eval import evaluation, tasks
from coss_eval.data.benchmark import Benchmark
from coss_eval.data.open import Dataset
from coss_eval.errors import CossError
from coss_eval.evaluation.planning import memory_lines
from coss_eval.models.classifier import to_float
from coss_eval.models.model import Model
from coss_eval.runtime.device import Compute, leave_busy_cores, resolve_device
from coss_eval.runtime.live import say
from coss_eval.tasks.task import Subject, Task

IMAGES = 32  # of the test split; the training split gives ten times as many to the probes


def check(models: list[Model], data: Dataset, *, names: Sequence[str] = (), device: str = "auto") -> int:
    """Print what was recognised and run every task (or those of ``names``) on a few images, keeping nothing.

    Exit code 1 if one fails.
    """
    if resolve_device(device).type == "cpu":
        leave_busy_cores()
    small = replace(
        data,
        test=data.test.limited(IMAGES, 0),
        train=None if data.train is None else data.train.limited(max(10 * IMAGES, 2 * len(data.classes)), 0),
    )
    for model in models:
        say(f"model       {model.name}")
        say("\n".join(model.report.lines() if model.report else [f"arch        {model.arch}"]))
        say("\n".join(_shapes(model, small)))
    entries = [tasks.entry(name) for name in names or tasks.entries()]
    subjects = [Subject(model, small, Compute(resolve_device(device))) for model in models]
    for line in memory_lines(subjects):
        say(line)
    chosen = [entry.make(**entry.small) for entry in entries]
    if isinstance(data, Benchmark):
        chosen = [task for task in chosen if task.reads_benchmarks]
    failed = _run(models, small, chosen, device)
    say(
        "NOT OK: see the lines above"
        if failed
        else f"ok: the same call with robustness measures all {len(data.test)} test images"
    )
    return 1 if failed else 0


def _run(models: list[Model], small: Dataset, chosen: Sequence[Task], device: str) -> bool:
    """Run each task and say how it went; whether one failed. What no run would begin with is said once, not by task."""
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        plan = partial(evaluation.plan, models, small, out=scratch, device=device, cache=False, skip_impossible=True)
        try:
            plan(tasks=chosen)
        except CossError as error:
            say(str(error))
            return True
        for task in chosen:
            started = time.perf_counter()
            try:
                planned = plan(tasks=[task])
                failures = evaluation.execute(planned).failures if planned.cells else ()
            except CossError as error:
                failures = (str(error),)
            seconds = time.perf_counter() - started
            verdict = failures[0] if failures else f"ok, {len(planned.cells)} cells"
            if not failures and planned.skipped:
                verdict = f"{verdict if planned.cells else 'skipped'}; {planned.skipped[0]}"
            say(f"{task.name:<12}{verdict} ({seconds:.1f} s)")
            failed |= bool(failures)
    return failed


@torch.inference_mode()
def _shapes(model: Model, data: Dataset) -> list[str]:
    batch = next(data.test.batches(model.preprocessing.geometry, batch_size=4))
    classifier = model.encoder()
    local, global_ = classifier.represent(to_float(batch.images))
    return [
        f"pixels      {tuple(batch.images.shape)} uint8, normalised by {model.preprocessing.source}",
        f"local       {tuple(local.shape)} (B, L, D)",
        f"global      {tuple(global_.shape)} (B, D')",
    ]
