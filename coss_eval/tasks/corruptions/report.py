"""What a report shows of the corruptions: accuracy, its means, the error and AlexNet's normalisation of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

from coss_eval.corruptions.names import (
    BENCHMARK,
    CATEGORIES,
    CATEGORY,
    NAMES,
    SEEN_LIKE,
    SEVERITIES,
    UNSEEN,
    VALIDATION,
)
from coss_eval.corruptions.score import Errors, Value, mce, relative_mce
from coss_eval.errors import UsageError
from coss_eval.reports.differences import difference_map
from coss_eval.reports.drawing import (
    WHOLE,
    Canvas,
    Figure,
    chance_in,
    label_edges,
    label_ends,
    legend,
    lines,
    looks_in,
    panels,
    percent,
)
from coss_eval.reports.estimates import Estimate, Shares, aligned, difference, from_shares, kept, mean, shifted
from coss_eval.reports.layout import Table, Unit, broken
from coss_eval.reports.results import Results
from coss_eval.reports.scores import KEPT, Column, Of, Score, TaskScores, further_table, score_row, spaced
from coss_eval.reports.task_report import TaskReport
from coss_eval.store import Condition

TASK = "corruptions"
FEW = 4  # corruptions that have a column each in the headline
MeanOver = Callable[[Iterable[str]], Of]

SEEN_CAPTION = (
    f"Seen-like: what training augmentations resemble ({', '.join(name.replace('_', ' ') for name in SEEN_LIKE)}); "
    f"unseen: the other {len(UNSEEN)} of the {len(NAMES)}."
)
ERROR_CAPTION = "100 minus the accuracy; lower is better. Not normalised, so not to be called mCE."
CALIBRATION: dict[str, tuple[str, Unit]] = {
    "ece": ("expected calibration error, %", "percent"),
    "nll": ("negative log likelihood, nats", "plain"),
    "brier": ("Brier score (0 to 2)", "plain"),
}
CALIBRATION_CAPTION = (
    "Of the logits as they are: no temperature is fitted, and a linear probe's confidence is that of its chosen "
    "strength. Calibration error: 15 bins of equal mass; it is biased upwards where images are few, which its interval "
    "(reflected bootstrap over images) takes off. Intervals of means are the means of the conditions' intervals: on "
    "the wide side."
)
MCE_CAPTION = (
    f"Errors relative to AlexNet's, which is 100 (Hendrycks & Dietterich 2019), over the {len(BENCHMARK)} corruptions; "
    "lower is better. Relative mCE takes the clean errors off first."
)


def corrupted(results: Results, label: str, name: str, severity: int) -> Estimate | None:
    """Accuracy under one corruption at one severity."""
    return results.estimate(label, TASK, "accuracy", corruption=name, severity=severity)


def clean(results: Results, label: str) -> Estimate | None:
    """Accuracy on the images as they are, of the classifier that the robustness tasks use."""
    return corrupted(results, label, "clean", 0)


def scores(results: Results) -> list[TaskScores]:
    """Accuracy by corruption; its means over the benchmark and categories; seen-like and unseen; errors; mCE."""
    conditions = results.conditions(TASK, "accuracy")
    present = list(dict.fromkeys(str(condition["corruption"]) for condition in conditions))
    severities = sorted({int(c["severity"]) for c in conditions if not c.includes(corruption="clean")})

    def over(names: Iterable[str]) -> Of:
        wanted = [(name, severity) for name in names for severity in severities]
        return lambda label: mean([corrupted(results, label, *condition) for condition in wanted])

    shown = "1 to 5" if severities == [*SEVERITIES] else ", ".join(map(str, severities)) or "none yet"
    quantity = f"accuracy %, mean over severities {shown}"
    tables = [TaskScores(TASK, "Corruptions", quantity, _by_corruption(results, present, over))]
    if set(present) >= set(BENCHMARK):
        means = [Score(f"all {len(BENCHMARK)} (benchmark)", over(BENCHMARK))]
        means += [
            Score(category, over([name for name in BENCHMARK if CATEGORY[name] == category])) for category in CATEGORIES
        ]
        tables.append(TaskScores(TASK, "Mean corruption accuracy", quantity, means, name="corruptions_means"))
    if set(present) >= set(NAMES):
        apart = [Score(name, over(members)) for name, members in _seen_and_unseen().items()]
        title = "Seen-like and unseen corruptions"
        tables.append(TaskScores(TASK, title, quantity, apart, SEEN_CAPTION, name="corruptions_seen"))
    if set(present) >= set(BENCHMARK):
        errors = [
            _error("clean error", partial(clean, results)),
            _error(f"mean corruption error ({len(BENCHMARK)})", over(BENCHMARK)),
        ]
        quantity = quantity.replace("accuracy", "error")
        tables.append(TaskScores(TASK, "Corruption error", quantity, errors, ERROR_CAPTION, name="corruptions_error"))
    normalised = [
        Score("mCE", lambda label: mean_corruption_error(results, label), lower_is_better=True),
        Score("relative mCE", lambda label: mean_corruption_error(results, label, relative=True), lower_is_better=True),
    ]
    if any(score.of(label) for score in normalised for label in results.family):
        tables.append(TaskScores(TASK, "mCE", "% of AlexNet", normalised, MCE_CAPTION, name="corruptions_mce"))
    return tables


def mean_corruption_error(results: Results, label: str, *, relative: bool = False) -> Estimate | None:
    """(Relative) mCE: only where score.py defines it (ImageNet at 224 px with ImageNet-C's table)."""
    return results.pooled(label, lambda member: _mean_corruption_error(results, member, relative=relative))


def _mean_corruption_error(results: Results, label: str, *, relative: bool) -> Estimate | None:
    keys = [(name, severity) for name in BENCHMARK for severity in SEVERITIES]
    found = [corrupted(results, label, *key) for key in keys] + ([clean(results, label)] if relative else [])
    known = [estimate for estimate in found if estimate is not None]
    cell = next((r for r in results.cells(TASK, label) if "table" in r["params"]), None)
    if len(known) < len(found) or cell is None:
        return None
    params, protocol = cell["params"], cell["protocol"]
    side = protocol.get("geometry", {}).get("size")
    sides = {int(s) for s in (side if isinstance(side, list) else [side]) if s is not None}
    source = params.get("source", protocol["data"]["name"])
    where: dict[str, Any] = {"dataset": source, "side": max(sides, default=0), "table": params["table"]}

    def score(errors: Errors[Value], clean_error: Value) -> Value:
        return relative_mce(errors, clean_error, **where) if relative else mce(errors, **where)

    try:
        value = score({key: 1 - e.value for key, e in zip(keys, known, strict=False)}, 1 - known[-1].value)
    except UsageError:  # not defined on this data
        return None
    columns = aligned(known)
    if columns is None:
        return Estimate(value, None, None, min(e.n for e in known), data=known[0].data)
    ids, table = columns
    shares = score({key: 1 - table[:, i] for i, key in enumerate(keys)}, 1 - table[:, -1])
    return from_shares(value, Shares(ids, shares), known[0].data)


def _by_corruption(results: Results, present: Iterable[str], over: MeanOver) -> list[Score]:
    named = [*(n for n in NAMES if n in present), *(n for n in present if n not in (*NAMES, "clean"))]
    group = {name: str(CATEGORY[name]) for name in BENCHMARK} | dict.fromkeys(VALIDATION, "held out for validation")
    first = Score("clean", partial(clean, results))
    return [first, *(Score(spaced(n), over([n]), group=group.get(n, "other")) for n in named)]


def _seen_and_unseen() -> dict[str, tuple[str, ...]]:
    return {
        f"seen-like ({len(SEEN_LIKE)} of {len(NAMES)})": SEEN_LIKE,
        f"unseen ({len(UNSEEN)} of {len(NAMES)})": UNSEEN,
    }


def _error(name: str, accuracy: Of) -> Score:
    """1 - accuracy, with its bounds and shares turned about."""

    def error(label: str) -> Estimate | None:
        found = accuracy(label)
        if found is None:
            return None
        return shifted(found, 1.0, slope=-1.0)

    return Score(name, error, lower_is_better=True)


def calibration(results: Results) -> Table | None:
    """Calibration error, likelihood and Brier score: clean, by severity, and over all that was measured of both."""
    conditions = [c for c in results.conditions(TASK, "ece") if not c.includes(corruption="clean")]
    severities = sorted({int(c["severity"]) for c in conditions})
    names = list(dict.fromkeys(str(c["corruption"]) for c in conditions))
    taken = [*BENCHMARK] if set(names) >= set(BENCHMARK) else names
    rows = []
    for metric, (title, unit) in CALIBRATION.items():
        scores = {"clean": over_conditions(results, metric, [Condition(corruption="clean", severity=0)])}
        for severity in severities:
            scores[f"severity {severity}"] = over_conditions(results, metric, _under(taken, [severity]))
        scores["all severities"] = over_conditions(results, metric, _under(taken, severities))
        if metric == "ece":
            scores |= {spaced(name): over_conditions(results, metric, _under([name], severities)) for name in names}
        found = [Score(name, of, unit, title, lower_is_better=True) for name, of in scores.items()]
        rows += [score_row(results, score) for score in found if any(map(score.of, results.labels))]
    means = f"Severities: means over the benchmark's {len(BENCHMARK)} corruptions." if taken == [*BENCHMARK] else ""
    return further_table(
        results,
        TASK,
        [*CALIBRATION],
        rows,
        name="calibration",
        title="Calibration",
        corner="lower is better",
        caption=f"{CALIBRATION_CAPTION} {means}".strip(),
    )


def over_conditions(results: Results, metric: str, conditions: Sequence[Condition]) -> Of:
    """The mean of what is no mean of the images' verdicts; a gap unless all conditions are there.

    Its bounds are the means of the conditions' bounds, which hold whatever the conditions have in common.
    """

    def of(label: str) -> Estimate | None:
        found = [results.estimate(label, TASK, metric, **condition) for condition in conditions]
        known = [estimate for estimate in found if estimate is not None]
        if not known or len(known) < len(found):
            return None
        value, n = sum(e.value for e in known) / len(known), min(e.n for e in known)
        bounded = [(e.low, e.high) for e in known if e.low is not None and e.high is not None]
        if len(bounded) < len(known):
            return Estimate(value, None, None, n, data=known[0].data)
        low, high = (sum(bounds) / len(known) for bounds in zip(*bounded, strict=True))
        return Estimate(value, low, high, n, data=known[0].data)

    return of


def _under(names: Iterable[str], severities: Iterable[int]) -> list[Condition]:
    return [Condition(corruption=name, severity=severity) for name in names for severity in severities]


def by_severity(results: Results, canvas: Canvas = WHOLE) -> Figure | None:
    """A small panel a corruption, clean accuracy at 0."""
    present = {condition["corruption"] for condition in results.conditions(TASK, "accuracy")}
    names = [name for name in NAMES if name in present]
    look = looks_in(results, TASK, canvas)
    if not names or not look:
        return None
    figure, axes = panels(len(names), width=canvas.inches(), height=1.15, least=1.0)
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(spaced(name) + ("" if name in BENCHMARK else "\xa0*"))  # never on a line of its own
        axis.set_xticks([0, *SEVERITIES])
        points = {
            label: [clean(results, label)] + [corrupted(results, label, name, s) for s in SEVERITIES] for label in look
        }
        lines(axis, [0, *SEVERITIES], points, look)
    percent(axes, chance_in(results, look))
    note = "; * held out for validation" if any(name not in BENCHMARK for name in names) else ""
    label_edges(figure, f"severity (0: clean{note})", "accuracy, %")
    legend(figure, look)
    return figure


def by_mean_severity(results: Results, canvas: Canvas = WHOLE) -> Figure | None:
    """The mean over the benchmark's corruptions by severity; bands have the images as clusters."""
    look = looks_in(results, TASK, canvas)
    points = {
        label: [clean(results, label)]
        + [mean([corrupted(results, label, name, severity) for name in BENCHMARK]) for severity in SEVERITIES]
        for label in look
    }
    incomplete = [label for label, own in points.items() if None in own[1:]]
    points = {label: own for label, own in points.items() if label not in incomplete}
    if not points:
        return None
    figure = Figure(figsize=(canvas.inches(4.2), 2.9), layout="constrained")
    axis = figure.subplots()
    lines(axis, [0, *SEVERITIES], points, look)
    percent([axis], chance_in(results, look))
    axis.set(xlabel="severity (0: clean)", ylabel=f"accuracy, mean of {len(BENCHMARK)} corruptions, %")
    label_ends(axis, points, look)
    if incomplete:
        left_out = f"left out, not all {len(BENCHMARK)} × {len(SEVERITIES)} measured: {', '.join(incomplete)}"
        note = "\n".join(broken(left_out, int(figure.get_figwidth() * 15)))
        axis.set_title(note, fontsize=6.5, color="#777777")
    return figure


def differences(results: Results, canvas: Canvas = WHOLE) -> Figure | None:
    """A heat map: a row a corruption, a column a model, the difference from the baseline over all severities."""
    look = looks_in(results, TASK, canvas)
    shown = canvas.shown(results.measured(TASK))
    base = canvas.baseline or (shown[0] if shown else None)
    others = [label for label in shown if label != base]
    if base not in look or not others:
        return None
    conditions = [c for c in results.conditions(TASK, "accuracy") if not c.includes(corruption="clean")]
    severities = sorted({int(c["severity"]) for c in conditions})
    present = {str(c["corruption"]) for c in conditions}
    names = ["clean", *(name for name in NAMES if name in present)]

    def over(label: str, name: str) -> Estimate | None:
        if name == "clean":
            return clean(results, label)
        return mean([corrupted(results, label, name, severity) for severity in severities])

    found = [[difference(over(label, name), over(base, name)) for label in others] for name in names]
    if not any(entry is not None for row in found for entry in row):
        return None
    titles = [spaced(name) for name in names]
    return difference_map(titles, others, found, width=canvas.width, quantity=f"accuracy minus {base}, points")


def headline(results: Results) -> list[Column]:
    """Clean, the mean over the benchmark, a gap unless all its conditions are there, and the share kept of it.

    Where a run has a few corruptions only, each has a column of its own: a mean of whatever there is has no meaning.
    """

    @cache  # two columns need it
    def benchmark(label: str) -> Estimate | None:
        return mean([corrupted(results, label, name, severity) for name in BENCHMARK for severity in SEVERITIES])

    def share(label: str) -> Estimate | None:
        return kept(benchmark(label), clean(results, label), results.chance(label))

    terms = {
        "clean top-1": "of the classifier named under head",
        "corrupted": f"mean over the benchmark's {len(BENCHMARK)} corruptions and {len(SEVERITIES)} severities",
        "kept": KEPT,
    }
    of: dict[str, Of] = {"clean top-1": partial(clean, results), "corrupted": benchmark, "kept": share}
    columns = [
        Column(name, of[name], terms={name: text}, place=-(name == "clean top-1")) for name, text in terms.items()
    ]
    return [*columns, *_few(results)]


def _few(results: Results) -> list[Column]:
    """A column for each corruption where these are few; a mean over all severities that were measured."""
    conditions = [c for c in results.conditions(TASK, "accuracy") if not c.includes(corruption="clean")]
    names = list(dict.fromkeys(str(c["corruption"]) for c in conditions))
    severities = sorted({int(c["severity"]) for c in conditions})
    if len(names) > FEW:
        return []
    text = f"accuracy, mean over severities {', '.join(map(str, severities))}"

    def over(name: str) -> Of:
        return lambda label: mean([corrupted(results, label, name, severity) for severity in severities])

    return [Column(spaced(name), over(name), terms={spaced(name): text}) for name in names]


REPORT = TaskReport(
    scores=scores,
    tables=(calibration,),
    figures={
        "corruptions_by_severity": (by_severity, "Accuracy by severity for each corruption. Bands: 95 % (Wilson)."),
        "corruptions_mean": (
            by_mean_severity,
            f"Mean over the benchmark's {len(BENCHMARK)} corruptions by severity. Bands: 95 %, images as clusters.",
        ),
        "corruptions_differences": (
            differences,
            "Differences from the baseline in accuracy, mean over severities, in points; bold: the 95 % interval "
            "leaves 0 out (not adjusted: the table has p).",
        ),
    },
    headline=headline,
)
