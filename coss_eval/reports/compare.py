"""Two runs side by side: paired differences between their checkpoints, with intervals, p-values and warnings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd

from coss_eval.errors import CossError, UsageError
from coss_eval.reports import headline
from coss_eval.reports.by_task import task_report
from coss_eval.reports.layout import Number, Row, Table
from coss_eval.reports.layout import text as table_text
from coss_eval.reports.results import Results, difference
from coss_eval.reports.scores import Score
from coss_eval.statistics import holm
from coss_eval.store import Store

COLUMNS = [
    "task",
    "group",
    "score",
    "a",
    "b",
    "value_a",
    "value_b",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "n",
    "unit",
]


def compare(run_a: str | os.PathLike[str], run_b: str | os.PathLike[str]) -> pd.DataFrame:
    """b minus a, paired over the images that both saw: one row a score that both runs have.

    Checkpoints of the same name are paired; a run with one checkpoint is paired with every one of the other. Columns:
    task, group, score, a, b (checkpoints), value_a, value_b, difference, low, high, p, p_holm (over the pair's task),
    n, unit. Accuracies are fractions. ``attrs["warnings"]`` says what makes the two hard to compare. p compares two
    CHECKPOINTS; methods are compared over training seeds (statistics.contrast).
    Raises CossError for a folder without cells, UsageError where no checkpoints can be paired.
    """
    a, b = (_results(path) for path in (run_a, run_b))
    frames = []
    for label_a, label_b in _pairs(a, b):
        for task in ["headline", *(task for task in a.tasks if task in b.tasks)]:
            frames.append(_task_rows(a, b, label_a, label_b, task))
    frames = [one for one in frames if len(one)]
    if not frames:
        raise UsageError(f"no score in common: {a.store.path} has {', '.join(a.tasks)}, the other {', '.join(b.tasks)}")
    frame = pd.concat(frames, ignore_index=True)
    frame.attrs |= {"warnings": _warnings(a, b), "runs": [results.store.path.name for results in (a, b)]}
    return frame


def text(frame: pd.DataFrame) -> str:
    """The comparison for a terminal: a table a task, headed by the two checkpoints; warnings first."""
    lines = [f"WARNING  {warning}" for warning in frame.attrs.get("warnings", [])]
    for (label_a, label_b, task), rows in frame.groupby(["a", "b", "task"], sort=False):
        entries = [
            Row(
                row["score"],
                [
                    Number(row["value_a"], unit=row["unit"]),
                    Number(row["value_b"], unit=row["unit"]),
                    Number(row["difference"], row["low"], row["high"], row["unit"], p=row["p_holm"], signed=True),
                ],
                row["group"],
            )
            for row in rows.to_dict("records")
        ]
        counts = sorted(set(rows["n"]))
        n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
        columns = [str(label_a), str(label_b), "difference"]
        if label_a == label_b:
            columns[:2] = [f"{label_a}, {run}" for run in frame.attrs["runs"]]
        lines.append(table_text(Table(str(task), str(task), f"{task}, {n}", columns, entries)) + "\n")
    lines.append(
        "Differences are the second minus the first, paired over images; p is adjusted over each table (Holm)."
    )
    return "\n".join(lines)


def _results(path: str | os.PathLike[str]) -> Results:
    results = Results(Store(path))
    if not results.records:
        raise CossError(f"no finished cells in {os.fspath(path)}; give a results folder that coss-eval has written")
    return results


def _pairs(a: Results, b: Results) -> Iterator[tuple[str, str]]:
    shared = [label for label in a.labels if label in b.labels]
    if len(a.labels) == 1 or len(b.labels) == 1:
        yield from ((left, right) for left in a.labels for right in b.labels)
    elif shared:
        yield from ((label, label) for label in shared)
    else:
        raise UsageError(
            f"no checkpoint to pair: the first run has {', '.join(a.labels)}, the second {', '.join(b.labels)}; "
            "give runs that share names or have one checkpoint each"
        )


def _task_rows(a: Results, b: Results, label_a: str, label_b: str, task: str) -> pd.DataFrame:
    left, right = ({(s.group, s.name): s for s in _scores(results, task)} for results in (a, b))
    rows: list[dict[str, Any]] = []
    for key, score in left.items():
        one = score.of(label_a)
        other = right[key].of(label_b) if key in right else None
        found = difference(other, one)
        if one is None or other is None or found is None:
            continue
        group, name = key
        rows.append(
            {"task": task, "group": group, "score": name, "a": label_a, "b": label_b}
            | {"value_a": one.value, "value_b": other.value}
            | dict(zip(("difference", "low", "high", "p", "n"), found, strict=True))
            | {"unit": score.unit}
        )
    adjusted = holm([row["p"] for row in rows])
    return pd.DataFrame([row | {"p_holm": float(p)} for row, p in zip(rows, adjusted, strict=True)], columns=COLUMNS)


def _scores(results: Results, task: str) -> list[Score]:
    if task == "headline":
        return [*headline.columns(results)]
    main, *others = task_report(task).scores(results)
    return main.scores + [replace(score, group=score.group or spec.title) for spec in others for score in spec.scores]


def _warnings(a: Results, b: Results) -> list[str]:
    """Why a difference may not be the checkpoints' own: other images, limits, protocols or device types."""
    found = [*a.warnings, *b.warnings]
    one, other = _facts(a), _facts(b)
    for name in one:
        if one[name] != other[name]:
            found.append(f"{name} differ: {', '.join(one[name])} and {', '.join(other[name])}")
    for task in a.tasks:
        left, right = (_protocol(results, task) for results in (a, b))
        differing = sorted(name for name in left.keys() & right.keys() if left[name] != right[name])
        found += [f"{task}: {name} differs: {left[name]} and {right[name]}" for name in differing]
    return list(dict.fromkeys(found))


def _facts(results: Results) -> dict[str, list[str]]:
    """What all of a run's numbers rest on."""
    protocols = [record["protocol"] for record in results.records]
    values = {
        "datasets": [protocol.get("data", {}).get("name") for protocol in protocols],
        "images (fingerprints)": [protocol.get("data", {}).get("fingerprint") for protocol in protocols],
        "limits": [protocol.get("data", {}).get("limit") for protocol in protocols],
        "geometries": [protocol.get("geometry") for protocol in protocols],
        "device types": [str(run["device"]).split(":")[0] for run in results.runs if run.get("device")],
    }
    return {name: sorted(set(map(str, some))) for name, some in values.items()}


def _protocol(results: Results, task: str) -> dict[str, str]:
    """The parameters that all cells of a task share."""
    values: dict[str, set[str]] = {}
    for cell in results.cells(task):
        for name, value in (cell["params"] | {"algorithm_version": cell.get("algorithm_version")}).items():
            values.setdefault(name, set()).add(str(value))
    return {name: value.pop() for name, value in values.items() if len(value) == 1}
