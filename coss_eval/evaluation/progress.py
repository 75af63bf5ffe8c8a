"""How far a run is, and how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from coss_eval.evaluation.planning import Plan
from coss_eval.models.hooks import counted
from coss_eval.tasks.task import Subject

SELDOM = 0.5  # seconds between two words on one job
PRIOR = 0.05


@dataclass(frozen=True)
class Progress:
    """Where a run is, sent before each of its steps and now and then inside long ones.

    ``share`` of the estimated work is done; by that, ``seconds_left``; both are None where there is no estimate.
    """

    done: int
    total: int
    label: str
    share: float | None = None
    seconds_left: float | None = None


class Course:
    """How far a run is, by the estimated costs of its jobs; says so to ``on_progress``.

    What is left is the estimate for it times how long what is done took against its estimate, which weighs a little
    itself (``PRIOR`` of the whole): so a run begins at its plan's estimate and ends by its own clock.
    """

    def __init__(self, planned: Plan, on_progress: Callable[[Progress], None] | None) -> None:
        self._jobs, self._say = planned.jobs, on_progress
        self._costs = planned.costs if on_progress is not None else None
        self._started = self._said = time.monotonic()
        self._number, self._images, self._expected = 0, 0.0, 1.0

    def begin(self, number: int) -> None:
        """The job of that number, or the end."""
        if number < self._number:
            return  # a second look at what another process was at
        self._number, self._images = number, 0.0
        if number < len(self._jobs):
            job = self._jobs[number]
            self._expected = max(1.0, sum(job.task.forwards(job.cell, subject) for subject in job.subjects))
        self._tell()

    def watch(self, subjects: Sequence[Subject]) -> ExitStack:
        """Count the passes of these networks while it is open."""
        stack = ExitStack()
        if self._costs is not None:
            for subject in subjects:
                stack.enter_context(counted(subject.model.backbone.global_, self._count))
        return stack

    def _count(self, images: int) -> None:
        self._images += images
        if time.monotonic() - self._said >= SELDOM:
            self._tell()

    def _tell(self) -> None:
        if self._say is None:
            return
        self._said = time.monotonic()
        label = self._jobs[self._number].label if self._number < len(self._jobs) else "done"
        self._say(Progress(self._number, len(self._jobs), label, *self._share_and_left()))

    def _share_and_left(self) -> tuple[float | None, float | None]:
        if self._costs is None:
            return None, None
        total = sum(self._costs)
        here = self._costs[self._number] if self._number < len(self._costs) else 0.0
        done = sum(self._costs[: self._number]) + here * min(0.99, self._images / self._expected)
        passed, prior = self._said - self._started, PRIOR * total
        left = (total - done) * (passed + prior) / (done + prior) if total > 0 else 0.0
        return done / total if total > 0 else 0.0, left
