"""The rows and columns of tables, as scores that any checkpoint may have or lack, and what tasks make them from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from coss_eval.reports.estimates import Estimate, difference, kept, mean
from coss_eval.reports.layout import Number, Row, Table, Unit
from coss_eval.reports.results import Results
from coss_eval.statistics import all_pairs, holm
from coss_eval.store import Condition

Of = Callable[[str], Estimate | None]  # a checkpoint's estimate by its label; None: a gap

KEPT = (
    "(accuracy - chance)/(clean accuracy - chance), chance = 1/classes; none where the clean accuracy is within 3 "
    "standard errors of chance, or results from older versions do not tell the number of classes"
)


@dataclass(frozen=True)
class Score:
    """One row of a table: what it is called and its estimate for a checkpoint (None: a gap), computed once.

    Names differ within a group. A ``reference`` stands beside another score, as the untrained network's redundancy
    does: it is the same network's for most checkpoints, so no difference of it is shown or tested.
    """

    name: str
    of: Of
    unit: Unit = "percent"
    group: str = ""
    lower_is_better: bool = False
    reference: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", cache(self.of))


@dataclass(frozen=True, kw_only=True)
class Column(Score):
    """One column of the headline, with the ``terms`` of its name explained.

    Columns stand in the order of their tasks, those of a lower ``place`` before all others. Where two tasks give a
    column of one name, a checkpoint has the first one's number that there is. A column is left out where it repeats the
    numbers of the one called ``beside``.
    """

    terms: Mapping[str, str] = field(default_factory=dict)
    place: int = 0
    beside: str = ""


@dataclass(frozen=True)
class TaskScores:
    """The rows of one table of a task, and what the numbers in it are."""

    task: str
    title: str
    quantity: str  # heads the table: "accuracy %"
    scores: list[Score]
    caption: str = ""
    name: str = ""  # the table's; the task's own where it is the task's main table

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.task)


def comparable(scores: Sequence[Score], labels: Sequence[str]) -> list[Score]:
    """The scores whose differences can have an interval: shares of images, and what has an interval of its own.

    References are left out.
    """
    found = [(score, [score.of(label) for label in labels]) for score in scores if not score.reference]
    return [s for s, ofs in found if s.unit == "percent" or any(e is not None and e.low is not None for e in ofs)]


class Comparisons:
    """Holm's p of every comparison in one table: of all pairs of ``labels`` on all ``scores``, whatever is shown of it.

    So a comparison has one p, whichever label is the baseline. NaN, where there is no p, counts for nothing.
    """

    def __init__(self, scores: Sequence[Score], labels: Sequence[str]) -> None:
        pairs = np.triu_indices(len(labels), 1)
        found = [_p_of_pairs([score.of(label) for label in labels]) for score in scores]
        adjusted = holm(np.concatenate([p[pairs] for p in found])) if found else np.zeros(0)
        for p, own in zip(found, adjusted.reshape(len(found), len(pairs[0])), strict=True):
            p[pairs] = p.T[pairs] = own
        self._p = {(score.group, score.name): p for score, p in zip(scores, found, strict=True)}
        self._place = {label: i for i, label in enumerate(labels)}

    def p(self, score: Score, one: str, other: str) -> float | None:
        """The p of two labels on a score, in either order; None for what is not in the table."""
        p = self._p.get((score.group, score.name))
        if p is None or one not in self._place or other not in self._place:
            return None
        return float(p[self._place[one], self._place[other]])


def _p_of_pairs(estimates: Sequence[Estimate | None]) -> NDArray[np.float64]:
    """p of every two (M, M); NaN where there is none.

    Checkpoints that saw the same images are compared all at once: of 34, there are 561 pairs on each row of a table.
    """
    plain = [(i, e.data, e.shares) for i, e in enumerate(estimates) if e and e.shares is not None and not e.runs]
    alike = [(i, shares) for i, data, shares in plain if data == plain[0][1] and shares.ids is plain[0][2].ids]
    places = [i for i, _ in alike]
    p = np.full((len(estimates), len(estimates)), math.nan)
    if len(alike) > 1:
        p[np.ix_(places, places)] = all_pairs(np.array([shares.values for _, shares in alike]).T.astype(float))
    together = set(places) if len(alike) > 1 else set()
    for i, j in combinations(range(len(estimates)), 2):
        found = None if {i, j} <= together else difference(estimates[i], estimates[j])
        if found is not None:
            p[i, j] = p[j, i] = found.p
    return p


def plain_scores(
    results: Results,
    task: str,
    found: Iterable[tuple[str, Condition]],
    *,
    names: Mapping[str, str] | None = None,
    words: Callable[[Condition], list[str]] | None = None,
    unit: Unit | None = None,
    of: Callable[[str, Sequence[Condition]], Of] | None = None,
) -> list[Score]:
    """A row for each metric and condition of ``found``; the seeds of one condition are averaged over (or see ``of``).

    ``names`` says what the metrics are called and their order, ``words`` what a condition is called. Without ``unit``,
    shares of images are percent.
    """
    names, words = names or {}, words or plain_words
    groups: dict[tuple[str, Condition], list[Condition]] = {}
    for metric, condition in found:
        groups.setdefault((metric, condition.without("seed")), []).append(condition)
    place = {name: i for i, name in enumerate(names)}
    scores = []
    for metric, condition in sorted(groups, key=lambda g: (place.get(g[0], len(place)), len(g[1]) > 0)):  # stable
        same = groups[metric, condition]
        name = ", ".join([names.get(metric) or spaced(metric), *words(condition)])
        found_of = mean_of(results, task, metric, same) if of is None else of(metric, same)
        scores.append(Score(name, found_of, unit or unit_of(results, task, metric)))
    return scores


def plain_words(condition: Condition) -> list[str]:
    """A condition for reading: area=0.2,flipped=yes is "area 0.2" and "flipped yes"."""
    return [f"{name} {text}" for name, text in condition.texts().items()]


def unit_of(results: Results, task: str, metric: str) -> Unit:
    """Percent for what is right or wrong of each image, as the stored samples have it; plain for all else."""
    pairs = ((label, condition) for condition in results.conditions(task, metric) for label in results.checkpoints)
    found = (results.estimate(label, task, metric, **condition) for label, condition in pairs)
    shares = next((e.shares for e in found if e is not None and e.shares is not None), None)
    return "percent" if shares is not None and shares.are_verdicts else "plain"


def spaced(name: str) -> str:
    return name.replace("_", " ")


def explained(terms: Mapping[str, str]) -> str:
    """ "PGD: robust accuracy, Linf · ..."."""
    return " · ".join(f"{term}: {text}" for term, text in terms.items()) + "." if terms else ""


def mean_of(results: Results, task: str, metric: str, conditions: Sequence[Condition]) -> Of:
    """The mean over the conditions (seeds, mostly), which a checkpoint must all have."""
    return lambda label: mean([results.estimate(label, task, metric, **condition) for condition in conditions])


def kept_of(results: Results, damaged: Of, clean: Of) -> Of:
    """The share kept, of each checkpoint: see KEPT."""
    return lambda label: kept(damaged(label), clean(label), results.chance(label))


def score_row(results: Results, score: Score) -> Row:
    """A score of all checkpoints as a line of a further table."""
    found = [score.of(label) for label in results.labels]
    entries = [None if e is None else Number(e.value, e.low, e.high, score.unit) for e in found]
    return Row(score.name, entries, score.group)


def further_table(
    results: Results,
    task: str,
    metrics: Sequence[str] | None,
    rows: Sequence[Row],
    *,
    name: str,
    title: str,
    corner: str,
    caption: str,
) -> Table | None:
    """A table beside a task's own, with the n of ``metrics`` (None: of all) in its corner; None where it has no row."""
    measured = results.rows(task)
    measured = measured if metrics is None else measured[measured["metric"].isin(metrics)]
    n = results.n_text(measured["n"], task)
    return Table(name, title, f"{corner}, {n}", results.labels, rows, caption) if rows else None
