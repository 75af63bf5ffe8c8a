"""The figures of a report: what the tasks in it draw, as files."""

from __future__ import annotations

from pathlib import Path

from coss_eval.reports.by_task import task_report
from coss_eval.reports.drawing import save, style
from coss_eval.reports.results import Results
from coss_eval.store import Store


def write(store: Store | Results, out: Path) -> list[Path]:
    """Draw what the store allows, as PNG and PDF under ``out``; the paths written."""
    results = store if isinstance(store, Results) else Results(store)
    paths = []
    for task in results.tasks:
        for name, (maker, _) in task_report(task).figures.items():
            with style():
                figure = maker(results)
                if figure is not None:
                    paths += save(figure, out / name)
    return paths
