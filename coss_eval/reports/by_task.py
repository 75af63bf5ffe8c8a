"""Which tables each task has in a report."""

from __future__ import annotations

from coss_eval.reports import scores
from coss_eval.reports.corruption_scores import corruptions
from coss_eval.reports.results import Results
from coss_eval.reports.scores import TaskScores


def task_scores(results: Results, task: str) -> list[TaskScores]:
    """The tables of a task, the main one first; a task that has none of its own gets a row a measurement."""
    if task == "corruptions":
        return corruptions(results)
    makers = {
        "attacks": scores.attacks,
        "internal": scores.internal,
        "crops": scores.crops,
        "redundancy": scores.redundancy,
    }
    return [makers[task](results) if task in makers else scores.listed(results, task)]
