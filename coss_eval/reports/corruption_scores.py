"""The corruptions' tables: accuracy, its means, the error and AlexNet's normalisation of it, each in one of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd

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
from coss_eval.reports.results import Estimate, Results, aligned, from_shares, mean
from coss_eval.reports.scores import Score, TaskScores, corrupted

TASK = "corruptions"
MeanOver = Callable[[Iterable[str]], Callable[[str], Estimate | None]]

SEEN_CAPTION = (
    f"Seen-like: what training augmentations resemble ({', '.join(name.replace('_', ' ') for name in SEEN_LIKE)}); "
    "unseen: the other 14 of the 19."
)
ERROR_CAPTION = "100 minus the accuracy; lower is better. Not normalised, so not to be called mCE."
MCE_CAPTION = (
    "Errors relative to AlexNet's, which is 100 (Hendrycks & Dietterich 2019), over the 15 corruptions; lower "
    "is better. Relative mCE takes the clean errors off first."
)


def corruptions(results: Results) -> list[TaskScores]:
    """Accuracy by corruption; its means over the benchmark and categories; seen-like and unseen; errors; mCE."""
    rows = results.rows(TASK)
    rows = rows[rows["metric"] == "accuracy"]
    present = {str(name) for name in rows["corruption"]}
    severities = sorted({int(s) for s in rows.loc[rows["corruption"] != "clean", "severity"]})

    def over(names: Iterable[str]) -> Callable[[str], Estimate | None]:
        wanted = [(name, severity) for name in names for severity in severities]
        return lambda label: mean([corrupted(results, label, *condition) for condition in wanted])

    shown = "1 to 5" if severities == [*SEVERITIES] else ", ".join(map(str, severities)) or "none yet"
    quantity = f"accuracy %, mean over severities {shown}"
    tables = [TaskScores(TASK, "Corruptions", quantity, _by_corruption(results, over))]
    if present >= set(BENCHMARK):
        means = [Score("all 15 (benchmark)", over(BENCHMARK))]
        means += [
            Score(category, over([name for name in BENCHMARK if CATEGORY[name] == category])) for category in CATEGORIES
        ]
        tables.append(TaskScores(TASK, "Mean corruption accuracy", quantity, means, name="corruptions_means"))
    if present >= set(NAMES):
        apart = [Score(name, over(members)) for name, members in _seen_and_unseen().items()]
        title = "Seen-like and unseen corruptions"
        tables.append(TaskScores(TASK, title, quantity, apart, SEEN_CAPTION, name="corruptions_seen"))
    if present >= set(BENCHMARK):
        errors = [
            _error("clean error", lambda label: corrupted(results, label, "clean", 0)),
            _error("mean corruption error (15)", over(BENCHMARK)),
        ]
        quantity = quantity.replace("accuracy", "error")
        tables.append(TaskScores(TASK, "Corruption error", quantity, errors, ERROR_CAPTION, name="corruptions_error"))
    normalised = [
        Score("mCE", lambda label: mean_corruption_error(results, label), lower_is_better=True),
        Score("relative mCE", lambda label: mean_corruption_error(results, label, relative=True), lower_is_better=True),
    ]
    if any(score.of(label) for score in normalised for label in results.labels):
        tables.append(TaskScores(TASK, "mCE", "% of AlexNet", normalised, MCE_CAPTION, name="corruptions_mce"))
    return tables


def mean_corruption_error(results: Results, label: str, *, relative: bool = False) -> Estimate | None:
    """(Relative) mCE: only where score.py defines it (ImageNet at 224 px with ImageNet-C's table)."""
    keys = [(name, severity) for name in BENCHMARK for severity in SEVERITIES]
    clean = [corrupted(results, label, "clean", 0)] if relative else []
    found = [*(corrupted(results, label, *key) for key in keys), *clean]
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
    return from_shares(value, pd.Series(shares, index=ids), known[0].data)


def _by_corruption(results: Results, over: MeanOver) -> list[Score]:
    rows = results.rows(TASK)
    present = [str(name) for name in dict.fromkeys(rows.loc[rows["metric"] == "accuracy", "corruption"])]
    named = [*(n for n in NAMES if n in present), *(n for n in present if n not in (*NAMES, "clean"))]
    group = {name: str(CATEGORY[name]) for name in BENCHMARK} | dict.fromkeys(VALIDATION, "held out for validation")
    clean = Score("clean", lambda label: corrupted(results, label, "clean", 0))
    return [clean, *(Score(n.replace("_", " "), over([n]), group=group.get(n, "other")) for n in named)]


def _seen_and_unseen() -> dict[str, tuple[str, ...]]:
    return {f"seen-like ({len(SEEN_LIKE)} of 19)": SEEN_LIKE, f"unseen ({len(UNSEEN)} of 19)": UNSEEN}


def _error(name: str, accuracy: Callable[[str], Estimate | None]) -> Score:
    """1 - accuracy, with its bounds and shares turned about."""

    def error(label: str) -> Estimate | None:
        found = accuracy(label)
        if found is None:
            return None
        low, high = (None if bound is None else 1 - bound for bound in (found.high, found.low))
        shares = None if found.shares is None else 1 - found.shares
        return Estimate(1 - found.value, low, high, found.n, shares, found.data)

    return Score(name, error, lower_is_better=True)
