"""Error consistency (Geirhos, Meding and Wichmann 2020, arXiv 2006.16736): do two networks fail on the same images?

Cohen's kappa of their verdicts, from what a store has of each image: 0 where they agree as often as two independent
networks of their accuracies would, 1 where they are right and wrong together, below 0 where they take turns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from coss_eval.errors import CossError, UsageError
from coss_eval.reports.estimates import Estimate, Shares, aligned, from_shares, mean
from coss_eval.reports.layout import Entry, Number, Row, Table
from coss_eval.reports.layout import text as table_text
from coss_eval.reports.results import Results
from coss_eval.store import Condition, Store

ALL = "all conditions"
COLUMNS = ["a", "b", "task", "metric", "condition", "kappa", "low", "high", "agreement", "expected", "n"]

Checkpoint = tuple[str, Results, str]  # the name that it is shown by, where its numbers are, its label there


def consistency(*runs: str | os.PathLike[str]) -> pd.DataFrame:
    """Kappa of every two checkpoints in results folders, a row a condition that both have verdicts under.

    Columns: a, b (checkpoints), task, metric, condition, kappa, low, high (95 %, over images), agreement (share of
    images that both have right or both wrong), expected (by their accuracies alone), n. "all conditions" is the mean
    over a task's conditions but the clean one. Conditions under which the two saw other images are left out. Raises
    CossError for a folder without cells, UsageError where no two checkpoints have verdicts in common.
    """
    if not runs:
        raise UsageError("of which networks? give results folders: coss-eval consistency results/a results/b")
    rows = [row for one, other in combinations(_checkpoints(runs), 2) for row in _pair_rows(one, other)]
    if not rows:
        raise UsageError("no two checkpoints here have verdicts on the same images under one condition")
    return pd.DataFrame(rows, columns=COLUMNS)


def kappa(a: Estimate | None, b: Estimate | None) -> Estimate | None:
    """Cohen's kappa of two networks' verdicts, with each image's first-order share of it (delta method).

    The interval is that of Fleiss, Cohen and Everitt (1969), by Student's t. None where they saw other images, where a
    score is no verdict of right or wrong, and where chance alone agrees always.
    """
    verdicts = _verdicts(a, b)
    if a is None or verdicts is None:
        return None
    ids, table = verdicts
    agree = (table[:, 0] == table[:, 1]).astype(float)
    p, q = table.mean(0)
    expected = p * q + (1 - p) * (1 - q)
    if expected > 1 - 1e-12:
        return None
    value = float((agree.mean() - expected) / (1 - expected))
    of_expected = (2 * q - 1) * (table[:, 0] - p) + (2 * p - 1) * (table[:, 1] - q)
    shares = value + (agree - agree.mean() - (1 - value) * of_expected) / (1 - expected)
    found = from_shares(value, Shares(ids, shares), a.data)
    if found.low is None or found.high is None:
        return found
    return replace(found, low=max(-1.0, found.low), high=min(1.0, found.high))


def text(frame: pd.DataFrame, width: int | None = None) -> str:
    """Kappa for a terminal: a row a pair of checkpoints, a column a task's mean, or its only condition."""
    alone = frame.groupby(["a", "b", "task", "metric"])["a"].transform("size") == 1
    shown = frame[(frame["condition"] == ALL) | alone]
    names = list(dict.fromkeys(zip(shown["task"], shown["metric"], strict=True)))
    several = {task for task, _ in names if sum(task == other for other, _ in names) > 1}
    rows = []
    for (one, other), mine in shown.groupby(["a", "b"], sort=False):
        found = {(row["task"], row["metric"]): row for row in mine.to_dict("records")}
        entries: list[Entry] = [
            Number(found[name]["kappa"], found[name]["low"], found[name]["high"], "plain") if name in found else None
            for name in names
        ]
        rows.append(Row(f"{one} and {other}", entries))
    columns = [f"{task} {metric}" if task in several else task for task, metric in names]
    table = table_text(Table("consistency", "Error consistency", "Cohen's kappa", columns, rows), width)
    return f"{table}\n0: as often together as their accuracies make it; 1: right and wrong on the same images."


def _checkpoints(runs: Sequence[str | os.PathLike[str]]) -> list[Checkpoint]:
    found: list[Checkpoint] = []
    for run in runs:
        results = Results(Store(run))
        if not results.records:
            raise CossError(f"no finished cells in {os.fspath(run)}; give a results folder that coss-eval has written")
        found += [(label, results, label) for label in results.checkpoints]
    names = [name for name, _, _ in found]
    return [
        (f"{name}, {results.store.path.name}" if names.count(name) > 1 else name, results, label)
        for name, results, label in found
    ]


def _pair_rows(one: Checkpoint, other: Checkpoint) -> Iterator[dict[str, Any]]:
    (name_a, results_a, label_a), (name_b, results_b, label_b) = one, other
    for task in (task for task in results_a.tasks if task in results_b.tasks):
        by_metric: dict[str, list[tuple[Condition, Estimate]]] = {}
        for metric, condition in results_a.found(task):
            a = results_a.estimate(label_a, task, metric, **dict(condition))
            b = results_b.estimate(label_b, task, metric, **dict(condition))
            found = kappa(a, b)
            if found is None or a is None or b is None:
                continue
            by_metric.setdefault(metric, []).append((condition, found))
            yield _row(name_a, name_b, task, metric, str(condition), found, *_agreement(a, b))
        for metric, parts in by_metric.items():
            damaged = [found for condition, found in parts if not _clean(condition)]
            if len(parts) > 1 and (average := mean(damaged)) is not None:
                yield _row(name_a, name_b, task, metric, ALL, average, float("nan"), float("nan"))


def _row(
    a: str, b: str, task: str, metric: str, condition: str, found: Estimate, agreement: float, expected: float
) -> dict[str, Any]:
    values = (a, b, task, metric, condition, found.value, found.low, found.high, agreement, expected, found.n)
    return dict(zip(COLUMNS, values, strict=True))


def _clean(condition: Condition) -> bool:
    """Whether nothing is done to the image or the network: the corruption "clean", severity, level or eps 0."""
    return condition.get("corruption") == "clean" or 0 in [condition.get(name) for name in ("severity", "level", "eps")]


def _agreement(a: Estimate, b: Estimate) -> tuple[float, float]:
    """The share of images on which two verdicts agree, and what their means alone make of it."""
    verdicts = _verdicts(a, b)
    assert verdicts is not None
    _, table = verdicts
    p, q = table.mean(0)
    return float((table[:, 0] == table[:, 1]).mean()), float(p * q + (1 - p) * (1 - q))


def _verdicts(a: Estimate | None, b: Estimate | None) -> Any:
    """Ids (N,) and verdicts (N, 2) of the images that both saw; None where there are none, or no verdicts."""
    if a is None or b is None or a.data != b.data:
        return None
    columns = aligned([a, b])
    return columns if columns is not None and bool(np.isin(columns[1], (0.0, 1.0)).all()) else None
