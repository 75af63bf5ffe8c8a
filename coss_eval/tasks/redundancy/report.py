"""What a report shows of redundancy: similarities of the local representations, beside the untrained network's."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coss_eval.reports.drawing import Look, grid, legend, looks_in
from coss_eval.reports.layout import Unit
from coss_eval.reports.results import Estimate, Results
from coss_eval.reports.scores import Column, Of, Score, TaskScores, explained, mean_of, spaced
from coss_eval.reports.task_report import TaskReport
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
    "pixels covered": "the share of the image's pixels, %, that lie in the receptive field of some location",
    "within at distance": "by steps on the grid between the two locations",
}
SIMILARITIES = ("within", "between", "normalised", "r2", "icc", "local_global_leave_one_out", "local_global")
BOUNDED = (
    "normalised_per_position",
    "normalised_interior",
    "within_overlapping",
    "within_disjoint",
    "normalised",
    "within",
    "between",
    "r2",
    "icc",
)


CENTRINGS = {  # what the ends of their names say, in the order of the table
    "_per_position": "the mean of each grid position taken off",
    "_interior": "the same, without the border of the grid",
    "": "one mean taken off for all positions, so that zero padding counts",
    "rest": "pairs by their receptive fields, variance, ranks, information",
}


def _centring(metric: str) -> str:
    """The entry of CENTRINGS that a metric of redundancy belongs to."""
    found = next((end for end in ("_per_position", "_interior") if metric.endswith(end)), "")
    return found if found or metric in SIMILARITIES else "rest"


def scores(results: Results) -> list[TaskScores]:
    """One row a metric, the untrained network's beside it."""
    metrics = dict.fromkeys(metric for metric, _ in results.found(TASK))
    rows = []
    for metric in sorted(metrics, key=lambda each: list(CENTRINGS).index(_centring(each))):
        ending, heading = _centring(metric), CENTRINGS[_centring(metric)]
        for state in ("trained", "untrained"):
            if _conditions(results, metric, state):
                shown = metric_name(metric.removesuffix(ending)) if state == "trained" else "… untrained network"
                unit: Unit = "percent" if metric in PERCENT else "plain"
                rows.append(Score(shown, measured(results, metric, state), unit, heading))
    terms = {term: text for term, text in TERMS.items() if any(score.name.startswith(term) for score in rows)}
    caption = f"{NOTE} {explained(terms)}".strip()
    return [TaskScores(TASK, "Redundancy of the local representations", "value", rows, caption)]


def metric_name(metric: str) -> str:
    return METRICS.get(metric) or spaced(metric)


def measured(results: Results, metric: str, state: str) -> Of:
    """A metric of the trained or the untrained network."""
    return mean_of(results, TASK, metric, _conditions(results, metric, state))


def _conditions(results: Results, metric: str, state: str) -> list[Condition]:
    mine = (c for c in results.conditions(TASK, metric) if c.get("weights", "trained") == state)
    return [c for c in mine if "distance" not in c]  # old results had a row a distance: in measurements.csv


def similarities(results: Results) -> Figure | None:
    """Similarities of the locals, one row a metric; a hollow mark is the same network untrained."""
    bounded = [metric for metric in BOUNDED if results.conditions(TASK, metric)]
    look = looks_in(results, TASK)
    if not bounded or not look:
        return None
    figure, axes = grid(1, 1, height=0.25 + len(bounded) * (0.14 + 0.11 * len(look)), width=4.6)
    axis = axes[0, 0]
    for i, metric in enumerate(bounded):
        for j, label in enumerate(look):
            y = i + 0.7 * ((j + 0.5) / len(look) - 0.5)
            untrained, trained = (measured(results, metric, state)(label) for state in ("untrained", "trained"))
            _dumbbell(axis, y, untrained, trained, look[label])
    axis.set_yticks(range(len(bounded)), [metric_name(metric) for metric in bounded])
    axis.set(xlabel="cosine or share (hollow: the same network untrained)", ylim=(len(bounded) - 0.5, -0.5))
    axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", visible=True)
    axis.tick_params(axis="y", length=0)
    legend(figure, look)
    return figure


def _dumbbell(axis: Axes, y: float, untrained: Estimate | None, trained: Estimate | None, look: Look) -> None:
    if untrained is not None and trained is not None:
        axis.plot([untrained.value, trained.value], [y, y], color=look.color, linewidth=0.8, alpha=0.5)
    if untrained is not None:
        axis.plot(
            untrained.value, y, look.marker, markerfacecolor="white", markeredgecolor=look.color, markeredgewidth=1
        )
    if trained is not None:
        axis.plot(trained.value, y, look.marker, color=look.color, markersize=5)
        if trained.low is not None and trained.high is not None:
            axis.plot([trained.low, trained.high], [y, y], color=look.color, linewidth=2)


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
        )
        for name, (metric, text) in (known or {"redundancy, one mean": single}).items()
        for end, state in (("", "trained"), (", untrained", "untrained"))
    ]


REPORT = TaskReport(
    scores=scores,
    figures={
        "redundancy": (
            similarities,
            "Redundancy of the local representations, beside the same network untrained (hollow); per position: "
            "the mean of each grid position taken off. Bars: 95 %.",
        )
    },
    headline=headline,
)
