"""What a report shows of the probes: a table of all of them, and each protocol's top-1 in the headline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from coss_eval.reports.estimates import Estimate, as_share
from coss_eval.reports.results import Results
from coss_eval.reports.scores import Column, Score, TaskScores, mean_of, plain_scores, plain_words
from coss_eval.reports.task_report import TaskReport
from coss_eval.statistics import wilson
from coss_eval.store import Condition

TASK = "probe"
METRICS = {
    "top1": "linear probe top-1",
    "top5": "linear probe top-5",
    "mean_per_class": "linear probe, mean per class",
    "sgd_top1": "SGD linear probe top-1",
    "sgd_top5": "SGD linear probe top-5",
    "sgd_mean_per_class": "SGD linear probe, mean per class",
    "knn_top1": "kNN top-1",
    "knn_top5": "kNN top-5",
    "knn_mean_per_class": "kNN, mean per class",
}


def scores(results: Results) -> list[TaskScores]:
    """One row for each metric and share of the labels; the mean per class where it is not the top-1.

    It is where classes are of one size, up to the rounding of the images.
    """
    rows = plain_scores(
        results,
        TASK,
        results.found(TASK),
        names=METRICS,
        words=_words,
        unit="percent",
        of=lambda metric, conditions: partial(_bounded, results, metric, conditions),
    )
    kept = [row for row in rows if not _repeats(row, rows, results.checkpoints)]
    same = "Classes are of one size: a mean per class that is not shown is the top-1."
    return [TaskScores(TASK, "Probes", "accuracy %", kept, same if len(kept) < len(rows) else "")]


def _repeats(row: Score, rows: Sequence[Score], labels: Sequence[str]) -> bool:
    """Whether a mean per class is the top-1 of every checkpoint."""
    name = row.name.replace(", mean per class", " top-1")
    top1 = next((other for other in rows if other.name == name != row.name), None)
    if top1 is None:
        return False
    pairs = [(row.of(label), top1.of(label)) for label in labels]
    return all((a is None and b is None) or (a and b and abs(a.value - b.value) < 1e-9) for a, b in pairs)


def _bounded(results: Results, metric: str, conditions: Sequence[Condition], label: str) -> Estimate | None:
    """A metric with what its cells leave out: older ones have bounds and verdicts of the top-1 alone.

    The mean per class is the top-1 where classes are of one size, its images are then the same; the top-5 is a share.
    """
    found = mean_of(results, TASK, metric, conditions)(label)
    if found is None:
        return None
    if found.runs:
        pooled = results.pooled(label, partial(_bounded, results, metric, conditions))
        return None if pooled is None else as_share(pooled)  # these all are, whatever is stored of the images
    of_classes = metric.endswith("mean_per_class")
    top1 = mean_of(results, TASK, metric.replace("mean_per_class", "top1"), conditions)(label) if of_classes else None
    if top1 is not None and abs(top1.value - found.value) < 1e-9:
        return replace(top1, value=found.value)
    if found.low is not None or not metric.endswith("top5"):
        return found
    low, high = wilson(found.value * found.n, found.n)
    return replace(found, low=low, high=high)


def _words(condition: Condition) -> list[str]:
    labels = [f"{100 * float(condition['labels']):g} % of the labels"] if "labels" in condition else []
    return labels + plain_words(condition.without("labels"))


def headline(results: Results) -> list[Column]:
    """Top-1 of each protocol; the linear probe's is the classifier's own, too, where no task measured that itself."""

    def top1(name: str, metric: str, *, text: str = "", beside: str = "", **condition: int) -> Column:
        of = partial(results.estimate, **condition)
        terms = {name.partition(",")[0]: text} if text else {}
        return Column(name, lambda label: of(label, TASK, metric), terms=terms, beside=beside)

    lengths = sorted({int(c["epochs"]) for c in results.conditions(TASK, "sgd_top1") if "epochs" in c})
    classified = any(map(results.heads, results.labels))  # nothing but probes was run elsewhere
    return [
        *([top1("clean top-1", "top1", text="of the classifier named under head")] if classified else []),
        top1("linear probe", "top1", text="logistic regression on the images as they are", beside="clean top-1"),
        *(
            top1(f"SGD linear probe, {n} epochs", "sgd_top1", text="trained on random crops and flips", epochs=n)
            for n in lengths
        ),
        top1("kNN", "knn_top1"),
    ]


REPORT = TaskReport(scores=scores, headline=headline)
