"""The headline: one row a checkpoint, one column a kind of robustness, as the tasks give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coss_eval.reports.by_task import task_report
from coss_eval.reports.results import Results
from coss_eval.reports.scores import Column, Of, explained


def columns(results: Results) -> list[Column]:
    """The columns in their order, without those that no checkpoint has or that repeat the one they stand beside."""
    if "headline" not in results.made:
        results.made["headline"] = _columns(results)
    return list(results.made["headline"])


def _columns(results: Results) -> list[Column]:
    given = [column for task in results.tasks for column in task_report(task).headline(results)]
    found: dict[str, Column] = {}
    for column in sorted(given, key=lambda column: column.place):  # stable: by task
        known = found.get(column.name)
        found[column.name] = column if known is None else replace(known, of=_first(known.of, column.of))
    values = {name: [e and e.value for e in map(column.of, results.family)] for name, column in found.items()}
    return [
        column
        for name, column in found.items()
        if values[name] != values.get(column.beside) and any(value is not None for value in values[name])
    ]


def _first(one: Of, other: Of) -> Of:
    return lambda label: found if (found := one(label)) is not None else other(label)


def caption(shown: Sequence[Column]) -> str:
    """What the words in these columns' names mean."""
    return explained({term: text for column in shown for term, text in column.terms.items()})
