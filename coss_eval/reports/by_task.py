"""Finds what a report shows of a task: what its own report.py gives, or a generic table and figure."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from coss_eval.reports.generic import generic_report
from coss_eval.reports.task_report import TaskReport
from coss_eval.tasks import built_in


@cache
def task_report(task: str) -> TaskReport:
    """The report of the task called ``task``."""
    if task not in {entry.name for entry in built_in()}:
        return generic_report(task)
    found: TaskReport = import_module(f"coss_eval.tasks.{task}.report").REPORT
    return found
