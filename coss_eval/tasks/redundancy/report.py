"""What a report shows of redundancy: similarities of the local representations, beside the untrained network's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.special import stdtrit  # not scipy.stats, which takes as long to import as pandas

from coss_eval.reports.drawing import WHOLE, Canvas, Figure, Look, legend, line, looks_in, stroke
from coss_eval.reports.estimates import Estimate, aligned, difference_within
from coss_eval.reports.headline import columns as headline_columns
from coss_eval.reports.layout import Number, Row, Table, Unit, broken
from coss_eval.reports.results import Results
from coss_eval.reports.scores import Column, Of, Score, TaskScores, explained, mean_of, plain_scores, spaced
from coss_eval.reports.task_report import TaskReport
from coss_eval.statistics import Difference, holm
from coss_eval.store import Condition

TASK = "redundancy"
METRICS = {
    "r2": "R² of the image mean",
    "icc": "ICC(1)",
    "local_global": "cosine with the global",
    "local_global_leave_one_out": "local-global cosine, leave one out",
    "rankme_global": "RankMe of the global",
    "lidar": "LiDAR",
    "gaussian_mutual_information": "Gaussian mutual information",
    "local_global_cka": "local-global CKA",
}
PERCENT = ("pixels_covered",)
NOTE = (
    "ReLU, padding and overlapping receptive fields may raise or lower these in any network: read each beside its "
    "untrained row. Zero padding marks each place of the grid in all images alike; rows with one mean taken off take "
    "that for redundancy or against it, rows per position, in the interior and by overlap have the mean of each place "
    "taken off. Below 0, locations of one image are less alike than those of two images."
)
TERMS = {
    "within": "mean cosine of two locations of one image, the data's mean taken off first",
    "between": "of two images, the baseline",
    "normalised": "(within - between)/(1 - between), 1 where the locations of an image are all equal",
    "R² of the image mean": "the share of the locations' variance that it explains, at least 1/L of L locations",
    "ICC(1)": "the same share as an intraclass correlation, without that floor",
    "local-global cosine, leave one out": "a location with the mean of its image's others",
    "cosine with the global": "a location with the network's own global representation",
    "participation ratio": "how many directions carry the variance between image means, within images or in total",
    "effective rank": "the same by the entropy of the singular values",
    "RankMe": "effective rank of the global representations (Garrido et al. 2023)",
    "LiDAR": "effective rank of what tells images apart, relative to the spread within them (Thilak et al. 2024)",
    "Gaussian mutual information": "nats that a location tells of another one of its image if both were Gaussian; "
    "compare at equal n and width",
    "local-global CKA": "linear CKA of the locations with their image's global (Kornblith et al. 2019), 1 where one is "
    "the other up to rotation and scale",
    "within overlapping": "each position's mean taken off, pairs of locations whose receptive fields overlap",
    "within disjoint": "likewise, pairs whose receptive fields do not",
    "position share": "of the variance, what the means of the grid positions make: padding, mostly",
    "rank-matched control": "in the first 16 principal directions scaled alike, so that networks of any rank compare",
    "pixels covered": "the share of the image's pixels, %, that lie in the receptive field of some location",
    "within at distance": "by steps on the grid between the two locations",
}
SIMILARITIES = ("within", "between", "normalised", "r2", "icc", "local_global_leave_one_out", "local_global")
BY_CLASS, STATISTICS = "normalised_per_position", ("mean", "sem", "count")
BOUNDED = (
    "normalised_per_position",
    "normalised_interior",
    "normalised_rank_matched",
    "within_overlapping",
    "within_disjoint",
    "normalised",
    "within",
    "between",
    "r2",
    "icc",
)


GROUPS = {  # what stands always beside one another: a heading for the rows by the ends of their names, in this order
    "_per_position": "the mean of each grid position taken off",
    "_interior": "the same, without the border of the grid",
    "_rank_matched": "the same, rank-matched control: the first 16 principal directions scaled alike",
    "overlap": "the same, pairs by their receptive fields",
    "": "one mean taken off for all positions, so that zero padding counts",
    "spectral": "directions and information, which depend on the number of images",
    "rest": "variance, fields, steps on the grid",
}
PROBE = {
    "local_accuracy": "accuracy of single locations",
    "vote_agreement": "pairs of locations that agree on the class",
    "vote_divergence": "Jensen-Shannon divergence of the locations, nats",
    "kept_accuracy": "accuracy",
    "kept_accuracy_area": "its mean over log k",
    "locations_for_90": "locations that keep 90 % of the accuracy",
    "diffused_accuracy": "accuracy",
}
PROBES = "redundancy_probe"
PROBED = (
    "The linear probe of the global representation, put to each location before pooling, to k random ones pooled (the "
    "same of an image for all k) and, fitted anew, to random subsets of the dimensions (3 at each share)."
)
OVERLAP = ("within_overlapping", "within_disjoint")
OF_NO_MEAN = ("position_share", "pixels_covered")


def _group(metric: str) -> str:
    """The entry of GROUPS that a metric of redundancy belongs to."""
    found = next((end for end in ("_per_position", "_interior", "_rank_matched") if metric.endswith(end)), "")
    if found or metric in SIMILARITIES:
        return found
    if metric in OVERLAP:
        return "overlap"
    return "rest" if metric in OF_NO_MEAN or "_at_distance_" in metric else "spectral"


def scores(results: Results) -> list[TaskScores]:
    """One row a metric, the untrained network's beside it."""
    found = [(m, condition.get("images")) for m, condition in results.found(TASK) if m not in PROBE]
    rows = []
    for metric, images in sorted(dict.fromkeys(found), key=lambda each: list(GROUPS).index(_group(each[0]))):
        group = _group(metric)
        shown = metric_name(metric.removesuffix(group)) + (f" (n = {images})" if images else "")
        for state in ("trained", "untrained"):
            if _conditions(results, metric, state, images):
                name, beside = (shown, False) if state == "trained" else (f"{shown}, untrained", True)
                unit: Unit = "percent" if metric in PERCENT else "plain"
                of = measured(results, metric, state, images)
                rows.append(Score(name, of, unit, GROUPS[group], reference=beside))
    terms = {term: text for term, text in TERMS.items() if any(term in f"{score.group} {score.name}" for score in rows)}
    caption = f"{NOTE} {explained(terms)}".strip()
    read = [(m, c) for m, c in results.found(TASK) if m in PROBE]
    probed = plain_scores(results, TASK, read, names=PROBE, words=_part)
    tables = [TaskScores(TASK, "Redundancy of the local representations", "value", rows, caption)]
    return [*tables, TaskScores(TASK, "Locations read by a probe", "value", probed, PROBED, PROBES)] if read else tables


def _part(condition: Condition) -> list[str]:
    """How many locations or dimensions, in words."""
    keep, share = condition.get("keep"), condition.get("share")
    kept = [] if keep is None else [f"{keep} location{'s' if keep > 1 else ''}"]
    return kept + ([] if share is None else [f"1/{round(1 / share)} of the dimensions"])


def against_untrained(results: Results) -> Table | None:
    """Trained minus untrained, paired over the images, of every metric that has each image's own value.

    A row a metric, a column a checkpoint or method; p adjusted over each column (Holm).
    """
    metrics = sorted(
        dict.fromkeys(metric for metric, _ in results.found(TASK) if metric not in PROBE),
        key=lambda m: list(GROUPS).index(_group(m)),
    )
    found = {
        label: {
            m: _paired(*(measured(results, m, state)(label) for state in ("trained", "untrained"))) for m in metrics
        }
        for label in results.labels
    }
    found = {label: column for label, column in found.items() if any(column.values())}
    shown = [metric for metric in metrics if any(column[metric] is not None for column in found.values())]
    if not shown:
        return None
    columns = []
    for column in found.values():
        mine = [column[metric] for metric in shown]
        adjusted = holm([math.nan if d is None else d.p for d in mine])
        columns.append([None if d is None else _signed(d, p) for d, p in zip(mine, adjusted, strict=True)])
    rows = [
        Row(metric_name(metric.removesuffix(_group(metric))), [column[i] for column in columns], GROUPS[_group(metric)])
        for i, metric in enumerate(shown)
    ]
    n = results.n_text((d.n for column in found.values() for d in column.values() if d is not None), TASK)
    caption = (
        "Paired over the images, 95 %; the baseline between images is held fixed. p adjusted over a column (Holm)."
    )
    if results.groups.members:
        caption += " Of a method: of its runs' own differences, about new seeds and new images."
    title = "Redundancy: trained minus untrained"
    return Table("redundancy_against_untrained", title, f"trained minus untrained, {n}", list(found), rows, caption)


def _paired(one: Estimate | None, other: Estimate | None) -> Difference | None:
    """Their difference over the images that both saw, or over a method's seeds; None where neither is known."""
    if one is None or other is None or not (one.runs or aligned([one, other])):
        return None
    found = difference_within(one, other)
    return None if found is None or math.isnan(found.low) else found


def _signed(found: Difference, p: float) -> Number:
    return Number(found.difference, found.low, found.high, "plain", p=float(p), signed=True)


def by_class(results: Results) -> Table | None:
    """Normalised redundancy of each class's images, trained and untrained: classes in the dataset's order, from 0.

    A method has a column a run: an interval over a class's images is about one network.
    """
    columns: dict[str, pd.DataFrame] = {}
    for label in results.checkpoints:
        classes = results.image_labels(label, TASK)
        for state in ("trained", "untrained"):
            found = measured(results, BY_CLASS, state)(label)
            if classes is not None and found is not None and found.shares is not None:
                shares = found.shares.series().groupby(classes.reindex(found.shares.ids))
                columns[label if state == "trained" else f"{label}, untrained"] = shares.agg(list(STATISTICS))
    if not columns:
        return None
    numbers = sorted({number for column in columns.values() for number in column.index})
    rows = [Row(f"class {number}", [_of_class(column, number) for column in columns.values()]) for number in numbers]
    corner = f"{metric_name(BY_CLASS)}, mean over the class's images"
    return Table("redundancy_by_class", "Redundancy by class", corner, list(columns), rows)


def _of_class(column: pd.DataFrame, number: int) -> Number | None:
    """Mean and Student's interval over a class's images; no interval for a single one."""
    if number not in column.index:
        return None
    mean, error, n = column.loc[[number]].to_numpy(dtype=float)[0].tolist()
    if n < 2:
        return Number(mean, unit="plain")
    half = float(stdtrit(n - 1, 0.975)) * error
    return Number(mean, mean - half, mean + half, "plain")


def with_accuracy(results: Results) -> Table | None:
    """Rank correlation over images of their redundancy with each accuracy of the headline, a column a network.

    Spearman's coefficient; the interval is Fisher's with Bonett and Wright's variance (2000), (1 + r^2 / 2)/(n - 3).
    """
    others = [column for column in headline_columns(results) if column.unit == "percent" and not column.reference]
    found: dict[str, dict[str, Number]] = {}
    for label in results.checkpoints:
        own = measured(results, BY_CLASS, "trained")(label)
        if own is not None and own.shares is not None:
            pairs = {column.name: _ranked(own.shares.series(), column.of(label)) for column in others}
            found[label] = {name: number for name, number in pairs.items() if number is not None}
    names = [c.name for c in others if any(c.name in mine for mine in found.values())]
    if not names:
        return None
    rows = [Row(name, [mine.get(name) for mine in found.values()]) for name in names]
    caption = (
        f"Over the images that both saw: {metric_name(BY_CLASS)} of an image with whether it is classified rightly "
        "(its share of conditions). Below 0, images whose locations are alike are the harder ones. Fisher's interval; "
        "exploratory, without p. An image's contrast, size and clutter may move both."
    )
    title = "Redundancy and accuracy, image by image"
    return Table("redundancy_with_accuracy", title, "Spearman's coefficient", list(found), rows, caption)


def _ranked(redundancy: pd.Series, score: Estimate | None) -> Number | None:
    """The correlation of an image's redundancy with its share; None where there are none, or all are alike."""
    if score is None or score.shares is None or abs(float(score.shares.values.mean()) - score.value) > 1e-6:
        return None
    both = pd.concat([redundancy, score.shares.series()], axis=1, join="inner")
    n = len(both)
    if n < 10 or both.nunique().min() < 2:
        return None
    r = float(both.corr(method="spearman").to_numpy()[0, 1])
    half = 1.96 * math.sqrt((1 + r * r / 2) / (n - 3))
    z = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12))
    return Number(r, math.tanh(z - half), math.tanh(z + half), "plain", signed=True)


def metric_name(metric: str) -> str:
    return METRICS.get(metric) or spaced(metric)


def measured(results: Results, metric: str, state: str, images: int | None = None) -> Of:
    """A metric of the trained or the untrained network; ``images`` where it is that of so many alone."""
    return mean_of(results, TASK, metric, _conditions(results, metric, state, images))


def _conditions(results: Results, metric: str, state: str, images: int | None = None) -> list[Condition]:
    mine = (c for c in results.conditions(TASK, metric) if c.get("weights", "trained") == state)
    # old results had a row a distance: in measurements.csv
    return [c for c in mine if "distance" not in c and c.get("images") == images]


def similarities(results: Results, canvas: Canvas = WHOLE) -> Figure | None:
    """Similarities of the locals, one row a metric; a hollow mark is the same network untrained."""
    bounded = [metric for metric in BOUNDED if results.conditions(TASK, metric)]
    look = looks_in(results, TASK, canvas)
    if not bounded or not look:
        return None
    height = 0.8 + len(bounded) * (0.14 + 0.11 * len(look))
    figure = Figure(figsize=(canvas.inches(4.6), min(height, 20.0)), layout="constrained")
    axis = figure.subplots()
    for i, metric in enumerate(bounded):
        for j, label in enumerate(look):
            y = i + 0.7 * ((j + 0.5) / len(look) - 0.5)
            untrained, trained = (measured(results, metric, state)(label) for state in ("untrained", "trained"))
            _dumbbell(axis, y, untrained, trained, look[label])
    axis.autoscale_view()
    room = int(figure.get_figwidth() * 72 * 0.36 / 3.7)
    axis.set_yticks(range(len(bounded)), ["\n".join(broken(metric_name(metric), room)) for metric in bounded])
    axis.set(ylim=(len(bounded) - 0.5, -0.5))
    axis.set_xlabel("\n".join(broken("cosine or share (hollow: the same network untrained)", int(1.6 * room))))
    axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", visible=True)
    axis.tick_params(axis="y", length=0)
    legend(figure, look)
    return figure


BY_DISTANCE = ("within_per_position", "within")  # the latter where a run from before centring has no other


def by_distance(results: Results, canvas: Canvas = WHOLE) -> Figure | None:
    """Mean cosine of two locations of one image by the steps between them on the grid; dotted: untrained."""
    look = looks_in(results, TASK, canvas)
    for metric in BY_DISTANCE:
        found = {m for m, _ in results.found(TASK) if m.startswith(f"{metric}_at_distance_")}
        steps = sorted(int(name.rpartition("_")[2]) for name in found)
        if len(steps) > 1 and look:
            return _over_distance(results, canvas, metric, steps, look)
    return None


def _over_distance(
    results: Results, canvas: Canvas, metric: str, steps: Sequence[int], look: Mapping[str, Look]
) -> Figure:
    figure = Figure(figsize=(canvas.inches(4.2), 2.6), layout="constrained")
    axis = figure.subplots()
    for label, one in look.items():
        trained, untrained = (
            [measured(results, f"{metric}_at_distance_{step}", state)(label) for step in steps]
            for state in ("trained", "untrained")
        )
        dotted = one._replace(dashes=(0, (1, 1.6)), marker="")
        line(axis, steps, untrained, dotted, scale=1)
        line(axis, steps, trained, one, scale=1)
    axis.axhline(0, color="#555555", linewidth=0.7, zorder=0)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.set_xlabel("steps on the grid between two locations")
    centred = "each place's mean taken off" if metric == BY_DISTANCE[0] else "one mean taken off"
    axis.set_ylabel(f"mean cosine\n({centred})")
    legend(figure, look)
    return figure


def _dumbbell(axis: Axes, y: float, untrained: Estimate | None, trained: Estimate | None, look: Look) -> None:
    if untrained is not None and trained is not None:
        stroke(axis, [untrained.value, trained.value], [y, y], color=look.color, linewidth=0.8, alpha=0.5)
    mark = {"marker": look.marker or ".", "linestyle": ""}
    if untrained is not None:
        hollow = {"markerfacecolor": "white", "markeredgecolor": look.color, "markeredgewidth": 1}
        stroke(axis, [untrained.value], [y], **mark, **hollow)
    if trained is not None:
        stroke(axis, [trained.value], [y], **mark, color=look.color, markersize=5)
        if trained.low is not None and trained.high is not None:
            stroke(axis, [trained.low, trained.high], [y, y], color=look.color, linewidth=2)


def headline(results: Results) -> list[Column]:
    """Normalised redundancy beside the untrained network's: centred per grid position, or as old results have it."""
    alike = {
        "redundancy": "how alike an image's locations are: (within - between)/(1 - between) cosine, "
        "0 as of two images; the mean of each grid position is taken off first, unless one mean is named"
    }
    named = {
        "redundancy": ("normalised_per_position", ""),
        "redundancy, interior": (
            "normalised_interior",
            "without the border of the grid, where zero padding makes locations alike",
        ),
    }
    known = {name: each for name, each in named.items() if results.conditions(TASK, each[0])}
    single = ("normalised", "as measured before positions were centred: zero padding moves it")
    return [
        Column(
            f"{name}{end}",
            measured(results, metric, state),
            "plain",
            terms=alike | ({name: text} if text else {}),
            reference=state == "untrained",
        )
        for name, (metric, text) in (known or {"redundancy, one mean": single}).items()
        for end, state in (("", "trained"), (", untrained", "untrained"))
    ]


REPORT = TaskReport(
    scores=scores,
    tables=(against_untrained, with_accuracy),
    files=(by_class,),
    figures={
        "redundancy": (
            similarities,
            "Redundancy of the local representations, beside the same network untrained (hollow); per position: "
            "the mean of each grid position taken off. Bars: 95 %.",
        ),
        "redundancy_distance": (
            by_distance,
            "Redundancy by distance: the mean cosine of two locations of one image by the steps between them on the "
            "grid; dotted: the same network untrained.",
        ),
    },
    headline=headline,
)
