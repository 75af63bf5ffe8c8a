"""What a report shows of a task, which each task's own report.py gives as REPORT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coss_eval.reports.layout import Table
from coss_eval.reports.results import Results
from coss_eval.reports.scores import Column, TaskScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from coss_eval.reports.drawing import Canvas


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """Functions of the results; what they give none of is left out.

    ``scores``: the task's tables, the main one first, whose title is the section's; checkpoints are compared in them.
    ``tables``: further ones. ``files``: tables too long to be shown, written as CSV alone. ``figures``: by file name,
    with their captions; they are given what to draw for as well. ``headline``: the columns there.
    """

    scores: Callable[[Results], list[TaskScores]]
    tables: tuple[Callable[[Results], Table | None], ...] = ()
    files: tuple[Callable[[Results], Table | None], ...] = ()
    figures: Mapping[str, tuple[Callable[[Results, Canvas], Figure | None], str]] = field(default_factory=dict)
    headline: Callable[[Results], list[Column]] = lambda results: []
