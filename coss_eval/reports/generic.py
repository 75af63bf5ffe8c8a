"""The report of a task that has none of its own: all of its rows with intervals, and a figure of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from matplotlib.axes import Axes

from coss_eval.reports.drawing import WHOLE, WIDTH, Canvas, Figure, legend, line, looks_in, marks
from coss_eval.reports.results import Results
from coss_eval.reports.scores import TaskScores, mean_of, plain_scores, plain_words, spaced, unit_of
from coss_eval.reports.task_report import TaskReport
from coss_eval.store import Condition

MOST_PANELS = 12  # all numbers are in the table


def generic_report(task: str) -> TaskReport:
    """A table of a row a metric and condition, and values over the numeric condition where there is one."""
    caption = "Values by condition, means over seeds. Bands and bars: 95 %."
    return TaskReport(scores=partial(scores, task=task), figures={task: (partial(figure, task=task), caption)})


def scores(results: Results, task: str) -> list[TaskScores]:
    """One row for each metric and condition; seeds of one condition are averaged over."""
    rows = plain_scores(results, task, results.found(task))
    quantity = "value" if any(score.unit == "plain" for score in rows) else "accuracy %"
    return [TaskScores(task, task.capitalize(), quantity, rows)]


def figure(results: Results, canvas: Canvas = WHOLE, *, task: str) -> Figure | None:
    """A panel a metric and whatever else varies: lines over the numeric condition, or marks where there is none."""
    shown, look = _panels(results, task)[:MOST_PANELS], looks_in(results, task, canvas)
    if not shown or not look:
        return None
    width = canvas.inches(min(WIDTH, 1 + 2.6 * min(3, len(shown))))
    columns = max(1, min(3, len(shown), int(width / 1.5)))
    rows = -(-len(shown) // columns)
    drawn = Figure(figsize=(width, 0.5 + 1.9 * rows), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False)
    for axis, panel in zip(axes.flat, shown, strict=False):
        places = panel.prepare(axis)
        ofs = [mean_of(results, task, panel.metric, same) for same in panel.points.values()]
        percent = unit_of(results, task, panel.metric) == "percent"
        axis.set_ylabel("%" if percent else "value")
        for number, label in enumerate(look):
            draw, beside = (marks, 0.12 * number) if panel.across is None else (line, 0.0)
            draw(
                axis, [x + beside for x in places], [of(label) for of in ofs], look[label], scale=100 if percent else 1
            )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    legend(drawn, look)
    return drawn


@dataclass(frozen=True)
class _Panel:
    """One metric over the condition ``across``, under what is ``fixed``; over all its conditions where that is None."""

    metric: str
    fixed: Condition
    across: str | None
    points: dict[Condition, list[Condition]] = field(default_factory=dict)  # each with its seeds

    def prepare(self, axis: Axes) -> Sequence[float]:
        """Title and label the axis; where the points stand on it."""
        axis.set_title(", ".join([spaced(self.metric), *plain_words(self.fixed)]))
        if self.across is not None:
            axis.set_xlabel(spaced(self.across))
            return [point[self.across] for point in self.points]
        names = [", ".join(plain_words(point)) for point in self.points]
        axis.set_xticks(range(len(names)), names, rotation=90 if len(names) > 2 else 0)
        return range(len(names))


def _panels(results: Results, task: str) -> list[_Panel]:
    panels: dict[tuple[str, Condition, str | None], _Panel] = {}
    for metric in dict.fromkeys(metric for metric, _ in results.found(task)):
        conditions = results.conditions(task, metric)
        name = _numeric(conditions)
        for condition in sorted(conditions, key=lambda c: c.get(name, 0.0)) if name else conditions:
            seedless = condition.without("seed")
            across = name if name in seedless else None
            fixed = Condition() if name is None else seedless.without(name)
            panel = panels.setdefault((metric, fixed, across), _Panel(metric, fixed, across))
            panel.points.setdefault(seedless, []).append(condition)
    return list(panels.values())


def _numeric(conditions: Sequence[Condition]) -> str | None:
    """The condition that takes the most values, all of them numbers; None where none takes two."""
    values: dict[str, set[object]] = {}
    for condition in conditions:
        for name, value in condition.without("seed").items():
            values.setdefault(name, set()).add(value)
    numeric = [n for n, found in values.items() if len(found) > 1 and all(isinstance(v, int | float) for v in found)]
    return max(numeric, key=lambda name: len(values[name]), default=None)
