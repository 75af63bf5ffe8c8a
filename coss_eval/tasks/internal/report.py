"""What a report shows of damage inside the network: areas under accuracy over the level, by kind and site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coss_eval.reports.drawing import WHOLE, Canvas, chance_in, label_edges, legend, lines, looks_in, panels, percent
from coss_eval.reports.estimates import Estimate, area, difference_within
from coss_eval.reports.layout import Entry, Number, Row, Table, Unit
from coss_eval.reports.relate import WHAT_FOLLOWS
from coss_eval.reports.results import Results
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
# what is drawn at each location, and the kind that does alike to all locations: coss_eval.internal.KINDS has them, too,
# but imports torch
CONTROLS = {"noise": "noise-shared", "location": "channel", "element": "channel"}
BITS = {f"{1 / (2**bits - 1):.6g}": f"{bits} bits" for bits in range(1, 17)}  # of a grid, by the text of its level
GRIDS = ("quantised", "weight-quantised")
PAIRS = {"noise": "noise", "location": "locations / channels masked", "element": "activations / channels masked"}
CONTROLS_CAPTION = (
    "What is drawn independently at each location averages out under pooling by the root of their number, whether or "
    "not the locations are redundant; what is alike at all does not. Neither alone says anything of redundancy. Before "
    "pooling the kept locations are pooled alone, while masked channels are scaled up with --rescale only. "
    "Differences are paired over the images, 95 %. " + WHAT_FOLLOWS
)


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
    rows = [score for score in rows if any(score.of(label) for label in results.family)]
    caption = (
        "Area under the curve over the level: the share masked, the noise relative to the channels' or weights' "
        f"deviation, or a grid's step as a share of the range; the mean over the masks' seeds. Kept: {KEPT}."
    )
    return [TaskScores(TASK, "Corruption inside the network", "area under accuracy %", rows, caption)]


def kinds_of(conditions: Sequence[Condition]) -> list[str]:
    return sorted({str(condition["kind"]) for condition in conditions})


def sites_of(conditions: Sequence[Condition]) -> list[str]:
    """Sites from the input to the output."""
    return sorted({str(condition["site"]) for condition in conditions}, key=_depth)


def _depth(site: str) -> tuple[int, int, str]:
    """The stem, stages and blocks by number, before pooling, the global one, and the network's weights."""
    late = {"stem": -1, "prepool": 1, "pool": 2, "global": 3, "network": 4}
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


def controls(results: Results) -> Table | None:
    """What is drawn at each location beside its control, and how much more of it is survived, paired over images."""
    conditions = results.conditions(TASK, "accuracy")
    kinds = kinds_of(conditions)
    rows = []
    for label in results.labels:
        for kind, control in CONTROLS.items():
            for site in sites_of(conditions) if kind in kinds and control in kinds else ():
                both = [results.conditions(TASK, "accuracy", kind=each, site=site) for each in (kind, control)]
                if levels_of(both[0]) != levels_of(both[1]):  # areas over other levels do not compare
                    continue
                apart, alike = (kept_area(results, each)(label) for each in both)
                more = difference_within(apart, alike)
                if apart is not None and alike is not None and more is not None:
                    entries: list[Entry] = [
                        *map(_share, (apart, alike)),
                        Number(more.difference, more.low, more.high, signed=True),
                    ]
                    rows.append(Row(f"{PAIRS[kind]}, {site}", entries, label))
    n = results.n_text(results.rows(TASK)["n"], TASK)
    return Table("internal_controls", "Independent at each location, and alike at all", f"area kept %, {n}", [
        "independent", "alike at all locations", "difference"
    ], rows, CONTROLS_CAPTION) if rows else None  # fmt: skip


def _share(estimate: Estimate) -> Number:
    return Number(estimate.value, estimate.low, estimate.high)


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
                rows.append(score_row(results, Score(site, of, unit, f"{kind} at {level_text(kind, level)}: {what}")))
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


def level_text(kind: str, level: float) -> str:
    """ "level 0.5", or "4 bits" for the step of a grid that has so many."""
    return BITS.get(f"{level:.6g}", f"level {level:.6g}") if kind in GRIDS else f"level {level:g}"


def by_level(results: Results, canvas: Canvas = WHOLE) -> Figure | None:
    """A panel a kind of damage and site, a row a kind where that fits; the mean over the masks' seeds."""
    conditions = results.conditions(TASK, "accuracy")
    look = looks_in(results, TASK, canvas)
    if not conditions or not look:
        return None
    shown = [
        (kind, site)
        for kind in kinds_of(conditions)
        for site in sites_of([c for c in conditions if c.includes(kind=kind)])  # weights have one, a vector no places
    ]
    most = max(sum(kind == other for other, _ in shown) for kind, _ in shown)
    figure, axes = panels(len(shown), width=canvas.inches(), height=1.4, least=1.2, most=most)
    for axis, (kind, site) in zip(axes, shown, strict=True):
        here = results.conditions(TASK, "accuracy", kind=kind, site=site)
        levels = levels_of(here)
        axis.set_title(f"{site}: {spaced(kind)}")
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.xaxis.set_major_formatter("{x:g}")
        at = [at_level(results, here, level) for level in levels]
        lines(axis, levels, {label: [of(label) for of in at] for label in look}, look)
    percent(axes, chance_in(results, look))
    label_edges(figure, "level (share masked, noise, or step of a grid)", "accuracy, %")
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
    tables=(controls, damage),
    figures={
        "internal_by_level": (
            by_level,
            "Accuracy by the level of damage inside the network; mean over the masks. Bands: 95 %.",
        )
    },
    headline=headline,
)
