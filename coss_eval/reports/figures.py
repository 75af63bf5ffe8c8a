"""The figures of a report: what the tasks in it draw, and what is drawn of all of it, as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from coss_eval.reports import headline
from coss_eval.reports.by_task import task_report
from coss_eval.reports.drawing import forest, save, style
from coss_eval.reports.estimates import difference
from coss_eval.reports.layout import Number, Row
from coss_eval.reports.results import Results
from coss_eval.reports.scores import adjusted, comparable
from coss_eval.store import Store

MOST = 12  # models in one figure that can be told apart


def write(store: Store | Results, out: Path, *, baseline: str | None = None) -> list[Path]:
    """Draw what the store allows, as PNG and PDF under ``out``; the paths written."""
    results = store if isinstance(store, Results) else Results(store)
    paths = []
    makers: dict[str, Callable[[Results], Figure | None]]
    makers = {name: maker for task in results.tasks for name, (maker, _) in task_report(task).figures.items()}
    makers |= {name: partial(of, baseline=baseline) for name, (of, _) in OF_ALL.items()}
    for name, maker in makers.items():
        with style():
            figure = maker(results)
            if figure is not None:
                paths += save(figure, out / name)
    return paths


def differences(results: Results, baseline: str | None = None) -> Figure | None:
    """Every headline score's difference from the baseline with its interval and the p of its table."""
    base = baseline or results.labels[0]
    columns = comparable(headline.columns(results), results.labels)
    family = adjusted(columns, results.labels)
    rows = []
    for column in columns:
        for other in [label for label in results.labels if label != base][:MOST]:
            found = difference(column.of(other), column.of(base))
            if found is not None:
                p = family.get((column.group, column.name, other, base))
                number = Number(*found[:3], column.unit, p, signed=True, lower_is_better=column.lower_is_better)
                rows.append(Row(other, [number], column.name))
    return forest(rows, xlabel=f"difference from {base}") if rows else None


OF_ALL: Mapping[str, tuple[Callable[..., Figure | None], str]] = {
    "forest": (
        differences,
        "Differences from the baseline on the headline's scores. Bars: 95 %; filled: p < .05 after Holm's adjustment "
        f"over the headline. At most {MOST} models.",
    ),
}
