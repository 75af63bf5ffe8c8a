"""What a report shows of damage inside the network: areas under accuracy over the level, by kind and site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coss_eval.reports.drawing import chance_in, grid, label_edges, legend, line, looks_in, percent
from coss_eval.reports.layout import Row, Table, Unit
from coss_eval.reports.results import Results, area
from coss_eval.reports.scores import (
    KEPT,
    Column,
    Of,
    Score,
    TaskScores,
    further_table,
    kept_of,
    mean_of,
    score_row,
    spaced,
)
from coss_eval.reports.task_report import TaskReport
from coss_eval.store import Condition

TASK = "internal"


def scores(results: Results) -> list[TaskScores]:
    """Areas under accuracy over the level of damage, by kind and site; the masks' seeds are averaged over."""
    conditions = results.conditions(TASK, "accuracy")
    makers: dict[str, Callable[[Results, Sequence[Condition]], Of]] = {"accuracy": area_of, "kept": kept_area}
    rows = [
        Score(
            site, of(results, results.conditions(TASK, "accuracy", kind=kind, site=site)), group=f"{kind}, {quantity}"
        )
        for quantity, of in makers.items()
        for kind, site in product(kinds_of(conditions), sites_of(conditions))
    ]
    rows = [score for score in rows if any(score.of(label) for label in results.labels)]
    caption = (
        "Area under the curve over the level: the share masked, or the noise relative to the channels' deviation; the "
        f"mean over the masks' seeds. Kept: {KEPT}."
    )
    return [TaskScores(TASK, "Corruption inside the network", "area under accuracy %", rows, caption)]


def kinds_of(conditions: Sequence[Condition]) -> list[str]:
    return sorted({str(condition["kind"]) for condition in conditions})


def sites_of(conditions: Sequence[Condition]) -> list[str]:
    """Sites from the input to the output."""
    return sorted({str(condition["site"]) for condition in conditions}, key=_depth)


def _depth(site: str) -> tuple[int, int, str]:
    """The stem, stages and blocks by number, before pooling, the global one."""
    late = {"stem": -1, "prepool": 1, "pool": 2, "global": 3}
    digits = "".join(filter(str.isdigit, site))
    return late.get(site, 0), int(digits or 0), site


def levels_of(conditions: Sequence[Condition]) -> list[float]:
    return sorted({float(condition["level"]) for condition in conditions})


def at_level(results: Results, conditions: Sequence[Condition], level: float, metric: str = "accuracy") -> Of:
    """The mean over the masks' seeds at one level."""
    return mean_of(results, TASK, metric, [c for c in conditions if c.includes(level=level)])


def area_of(results: Results, conditions: Sequence[Condition]) -> Of:
    """The area over levels, each the mean over its seeds."""
    levels = levels_of(conditions)
    at = [at_level(results, conditions, level) for level in levels]
    return lambda label: area(levels, [of(label) for of in at])


def kept_area(results: Results, conditions: Sequence[Condition]) -> Of:
    """The share kept of ``area_of``; clean is level 0."""
    return kept_of(results, area_of(results, conditions), at_level(results, conditions, 0))


def damage(results: Results) -> Table | None:
    """The share kept and the signal-to-noise ratio at the middle level of each kind of damage, by site."""
    rows: list[Row] = []
    whats: dict[str, tuple[str, Unit]] = {
        "accuracy": ("kept, %", "percent"),
        "snr_db": ("signal-to-noise ratio, dB", "plain"),
    }
    for metric, (what, unit) in whats.items():
        for kind in kinds_of(results.conditions(TASK, metric)):
            conditions = results.conditions(TASK, metric, kind=kind)
            levels = [level for level in levels_of(conditions) if level]
            if not levels:
                continue
            level = levels[len(levels) // 2]
            for site in sites_of(conditions):
                here = [condition for condition in conditions if condition.includes(site=site)]
                of = at_level(results, here, level, metric)
                if metric == "accuracy":
                    of = kept_of(results, of, at_level(results, here, 0))
                rows.append(score_row(results, Score(site, of, unit, f"{kind} at level {level:g}: {what}")))
    return further_table(
        results,
        TASK,
        None,
        rows,
        name="internal_levels",
        title="Damage by site",
        corner="at the middle level",
        caption=f"Kept: {KEPT}. Signal-to-noise: variance of the clean global representation over "
        "the mean squared change. Means over the masks' seeds; all levels are in measurements.csv.",
    )


def by_level(results: Results) -> Figure | None:
    """A row a kind of damage, a column a site; the mean over the masks' seeds."""
    conditions = results.conditions(TASK, "accuracy")
    if not conditions:
        return None
    kinds, sites = kinds_of(conditions), sites_of(conditions)
    figure, axes = grid(len(kinds), len(sites), height=1.4)
    look = looks_in(results, TASK)
    for axis, (kind, site) in zip(axes.flat, product(kinds, sites), strict=True):
        here = results.conditions(TASK, "accuracy", kind=kind, site=site)
        axis.set_visible(bool(here))  # a vector has no locations
        if not here:
            continue
        levels = levels_of(here)
        axis.set_title(f"{site}: {spaced(kind)}")
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.xaxis.set_major_formatter("{x:g}")
        for label in look:
            line(axis, levels, [at_level(results, here, level)(label) for level in levels], look[label])
    percent(axes, chance_in(results, look))
    label_edges(figure, "level (share masked, or noise)", "accuracy, %")
    legend(figure, look)
    return figure


def headline(results: Results) -> list[Column]:
    """The share kept under masking: of the area over the levels, before pooling or at the last site."""
    terms = {"kept": KEPT, "masked": "area under accuracy over the share masked before pooling"}
    columns = []
    for kind in ("channel", "location"):
        sites = sites_of(results.conditions(TASK, "accuracy", kind=kind))
        if sites:
            site = "prepool" if "prepool" in sites else sites[-1]
            of = kept_area(results, results.conditions(TASK, "accuracy", kind=kind, site=site))
            columns.append(Column(f"kept, {kind}s masked", of, terms=terms))
    return columns


REPORT = TaskReport(
    scores=scores,
    tables=(damage,),
    figures={
        "internal_by_level": (
            by_level,
            "Accuracy by the level of damage inside the network; mean over the masks. Bands: 95 %.",
        )
    },
    headline=headline,
)
