"""What a store knows, as estimates: a value with its interval and, where samples exist, each image's share of it.

Every score here is linear in the images or has been made so (a ratio by its first-order terms), so that means over
conditions, areas, ratios and paired differences all follow from the shares: the image is the unit throughout.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from coss_eval.reports.tables import (
    as_written_now,
    checkpoint_labels,
    model_order,
    ranked,
    task_place,
    tidy_records,
)
from coss_eval.statistics import Difference, above_chance, clustered_wilson, paired_difference
from coss_eval.store import Condition, Record, Store, StoreWarning, column_name, own_column

Shares = pd.Series  # of floats, indexed by sample id


@dataclass(frozen=True)
class Estimate:
    """One number of one checkpoint. ``shares`` has it image by image (their mean is ``value``), where that is known."""

    value: float
    low: float | None
    high: float | None
    n: int
    shares: Shares | None = None
    data: str | None = None  # fingerprint of the images: only shares of the same images are paired


class Results:
    """A store read once: its tidy frame, its checkpoints' labels in order, and estimates by name."""

    def __init__(self, store: Store) -> None:
        self.store = store
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", StoreWarning)
            self.runs = store.runs()
            self.records: list[Record] = as_written_now(store.records(), self.runs)
        self.warnings = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, StoreWarning)))
        self.frame = tidy_records(self.records, model_order(self.runs))
        self._samples: dict[str, pd.DataFrame | None] = {}
        self._labels = checkpoint_labels(self.records)
        self._base = {label.text: label.base for label in self._labels.values()}

    @cached_property
    def labels(self) -> list[str]:
        """Checkpoints in order. One with variants ("r18 [seed=1]") stands for its base, whose numbers it inherits."""
        texts = list(dict.fromkeys(self.frame["checkpoint"]))
        inherited = {base for text, base in self._base.items() if text != base}
        return [text for text in texts if text not in inherited]

    @cached_property
    def untrained(self) -> frozenset[str]:
        """The checkpoints that are networks as they were drawn, as the runs that made them say."""
        models = [model for run in self.runs for model in run.get("models", [])]
        names = {model["name"] for model in models if model.get("layout") == "untrained"}
        return frozenset(self.frame.loc[self.frame["model"].isin(names), "checkpoint"])

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks in the report's order."""
        return sorted(dict.fromkeys(self.frame["task"]), key=task_place)

    def rows(self, task: str) -> pd.DataFrame:
        """The tidy rows of a task."""
        return self.frame[self.frame["task"] == task]

    def measured(self, task: str) -> list[str]:
        """The checkpoints that have numbers of a task, their own or their base's, in order."""
        found = set(self.rows(task)["checkpoint"])
        return [label for label in self.labels if found & {label, self._base[label]}]

    def found(self, task: str) -> list[tuple[str, Condition]]:
        """What a task measured of any checkpoint: each metric and condition once, in the report's order."""
        return list(self._found.get(task, {}))

    def conditions(self, task: str, metric: str, **where: Any) -> list[Condition]:
        """The conditions that a metric was measured under, those of them that include ``where``."""
        return [c for name, c in self.found(task) if name == metric and c.includes(**where)]

    @cached_property
    def _found(self) -> dict[str, dict[tuple[str, Condition], None]]:
        found: dict[str, dict[tuple[str, Condition], None]] = {}
        for record in ranked(self.records, model_order(self.runs)):
            pairs = ((m["metric"], Condition(m["condition"])) for m in record["measurements"])
            found.setdefault(record["task"], {}).update(dict.fromkeys(pairs))
        return found

    def n_text(self, counts: Iterable[int], task: str | None = None) -> str:
        """ "n = 1000, limit": how many images, and whether the test split was cut to a subset."""
        found = sorted({int(count) for count in counts})
        rows = self.frame if task is None else self.rows(task)
        shown = " to ".join(map(str, found if len(found) < 3 else [found[0], found[-1]]))
        return f"n = {shown}" + (", limit" if rows["limit"].notna().any() else "")

    def heads(self, label: str) -> list[str]:
        """Where this checkpoint's logits came from."""
        mine = (r for r in self.records if self._labels[r["key"]].text in (label, self._base[label]))
        return sorted({record["head"] for record in mine if record["head"] is not None})

    def notes(self, task: str) -> list[str]:
        """What the cells of a task noted: what all checkpoints share, then the rest of each. Heads have a column."""
        noted: dict[str, dict[str, None]] = {}  # notes by checkpoint, each once, in order
        for record in sorted(self.cells(task), key=lambda r: r["notes"]):
            mine = noted.setdefault(self._labels[record["key"]].text, {})
            mine |= dict.fromkeys(record["notes"])
        first = next(iter(noted.values()), {})
        shared = [note for note in first if all(note in mine for mine in noted.values())]
        own = {label: [note for note in mine if note not in shared] for label, mine in noted.items()}
        order = dict.fromkeys(self.frame["checkpoint"])
        return [*shared, *(f"{label}: {'; '.join(own[label])}" for label in order if own.get(label))]

    def cells(self, task: str, label: str | None = None) -> list[Record]:
        """The stored cells of a task, of one checkpoint or of all."""
        mine = {label, self._base.get(label)} if label is not None else set(self._base)
        return [r for r in self.records if r["task"] == task and self._labels[r["key"]].text in mine]

    def estimate(self, label: str, task: str, metric: str, /, **condition: Any) -> Estimate | None:
        """A stored measurement under its condition, with its samples; None where it is missing."""
        wanted = Condition(condition)
        found = self._index.get((label, task, metric, wanted)) or self._index.get(
            (self._base.get(label, label), task, metric, wanted)
        )
        if found is None or found[1]["value"] is None:
            return None
        record, m = found
        own = self._verdicts(record["key"], own_column(metric, m["condition"]))
        data = record["protocol"].get("data", {}).get("fingerprint")
        if own is not None:
            return Estimate(m["value"], m["low"], m["high"], m["n"], own, data)
        # One condition may have several metrics. A column belongs to the one whose value is its mean; equal means are
        # no proof of it (mean per class on balanced classes), so also to one that its task could give an interval.
        name = column_name(metric, m["condition"])
        column = self._verdicts(record["key"], name) if m["low"] is not None else None
        if column is not None and abs(float(column.mean()) - m["value"]) > 1e-9:
            column = None
        return Estimate(m["value"], m["low"], m["high"], m["n"], column, data)

    @cached_property
    def _index(self) -> dict[tuple[str, str, str, Condition], tuple[Record, Record]]:
        """Record and measurement by checkpoint, task, metric and condition."""
        return {
            (self._labels[r["key"]].text, r["task"], m["metric"], Condition(m["condition"])): (r, m)
            for r in self.records
            for m in r["measurements"]
        }

    def image_labels(self, label: str, task: str) -> pd.Series | None:
        """The class number of each image by id, as a task's cells of a checkpoint hold it; None where none does."""
        found = (self._verdicts(cell["key"], "label") for cell in self.cells(task, label))
        known = next((labels for labels in found if labels is not None), None)
        return None if known is None else known.astype(int)

    def chance(self, label: str) -> float | None:
        """The accuracy of guessing, 1 / classes, on a checkpoint's images; None where the store does not tell."""
        mine = (r for r in self.records if self._labels[r["key"]].text in (label, self._base.get(label)))
        fingerprints = {record["protocol"].get("data", {}).get("fingerprint") for record in mine}
        found = {self._chances[fingerprint] for fingerprint in fingerprints if fingerprint in self._chances}
        return found.pop() if len(found) == 1 else None

    @cached_property
    def _chances(self) -> dict[str | None, float]:
        """Chance by the images' fingerprint: as cells or runs hold it, or solved for from what old ones hold."""
        told_by_runs = ((run.get("data", {}), run.get("data", {}).get("test", {})) for run in self.runs)
        found: dict[str | None, float] = {
            test["fingerprint"]: 1 / data["classes"] for data, test in told_by_runs if data.get("classes")
        }
        for record in self.records:
            told = [m["value"] for m in record["measurements"] if m["metric"] == "chance"]
            chance = told[0] if told else _solved_chance(record["measurements"])
            if chance is not None:
                found.setdefault(record["protocol"].get("data", {}).get("fingerprint"), chance)
        return found

    def _verdicts(self, key: str, column: str) -> Shares | None:
        if key not in self._samples:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", StoreWarning)
                self._samples[key] = self.store.samples(key)
            self.warnings += [str(w.message) for w in caught if issubclass(w.category, StoreWarning)]
        table = self._samples[key]
        return table[column].astype(float) if table is not None and column in table else None


def mean(parts: Sequence[Estimate | None], weights: Sequence[float] | None = None) -> Estimate | None:
    """The (weighted) mean over conditions of one checkpoint; None, a gap, if any is missing.

    Interval: image-clustered Wilson for means of verdicts, Student's on the images' shares otherwise; none without
    samples, since conditions that share images are not independent. Weights sum to 1.
    """
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    if len(known) == 1:
        return known[0]
    w = np.full(len(known), 1 / len(known)) if weights is None else np.asarray(weights, dtype=float)
    value = float(np.dot(w, [part.value for part in known]))
    n, data = min(part.n for part in known), known[0].data
    columns = aligned(known)
    if columns is None:
        return Estimate(value, None, None, n, data=data)
    ids, table = columns
    shares = pd.Series(table @ w, index=ids)
    if bool(np.isin(table, (0.0, 1.0)).all()) and bool((w >= 0).all()):
        low, high = clustered_wilson(table if weights is None else (table @ w).clip(0, 1))
        return Estimate(value, low, high, len(ids), shares, data)
    return from_shares(value, shares, data)


def area(levels: Sequence[float], parts: Sequence[Estimate | None]) -> Estimate | None:
    """Trapezoidal area under the estimates over ``levels`` (rising), divided by their range."""
    x = np.asarray(levels, dtype=float)
    if len(x) < 2:
        return None
    steps = np.diff(x) / (x[-1] - x[0])
    return mean(parts, np.concatenate([[0.0], steps / 2]) + np.concatenate([steps / 2, [0.0]]))


def ratio(top: Estimate | None, bottom: Estimate | None) -> Estimate | None:
    """top / bottom of one checkpoint. Its shares are the first-order terms (delta method) about the ratio."""
    if top is None or bottom is None or bottom.value <= 0:
        return None
    value = top.value / bottom.value
    columns = aligned([top, bottom])
    if columns is None:
        return Estimate(value, None, None, min(top.n, bottom.n), data=top.data)
    ids, table = columns
    shares = value + (table[:, 0] - value * table[:, 1]) / bottom.value
    return from_shares(value, pd.Series(shares, index=ids), top.data)


def kept(damaged: Estimate | None, clean: Estimate | None, chance: float | None) -> Estimate | None:
    """(damaged - chance) / (clean - chance) of one checkpoint: the share of its accuracy above chance that remains.

    None where the clean accuracy is within three standard errors of chance, or chance is not known.
    """
    if damaged is None or clean is None or chance is None or not above_chance(clean.value, chance, clean.n):
        return None
    return ratio(_less(damaged, chance), _less(clean, chance))


def _less(estimate: Estimate, constant: float) -> Estimate:
    """The estimate minus a constant."""
    low, high = (None if bound is None else bound - constant for bound in (estimate.low, estimate.high))
    shares = None if estimate.shares is None else estimate.shares - constant
    return Estimate(estimate.value - constant, low, high, estimate.n, shares, estimate.data)


def _solved_chance(measurements: Sequence[Record]) -> float | None:
    """Chance from an accuracy a, the clean one c and the stored r = (a - chance)/(c - chance), if it is 1 / a count."""
    values = {
        (m["metric"], m["condition"].get("level"), m["condition"].get("seed")): m["value"]
        for m in measurements
        if m["metric"] in ("accuracy", "relative_accuracy") and "level" in m["condition"]
    }
    for (metric, level, seed), r in values.items():
        a, c = values.get(("accuracy", level, seed)), values.get(("accuracy", 0.0, seed))
        if metric != "relative_accuracy" or None in (a, c, r) or abs(1 - r) < 0.01:
            continue
        chance = float((a - r * c) / (1 - r))
        if 0 < chance <= 0.51 and abs(1 / chance - round(1 / chance)) < 1e-3 / chance:
            return 1 / round(1 / chance)
    return None


def from_shares(value: float, shares: Shares, data: str | None) -> Estimate:
    """An estimate whose interval is Student's on its images' shares."""
    interval = paired_difference(shares.to_numpy()[:, None], np.zeros((len(shares), 1)))
    shift = value - interval.difference
    return Estimate(value, interval.low + shift, interval.high + shift, len(shares), shares, data)


def difference(a: Estimate | None, b: Estimate | None) -> Difference | None:
    """a - b, paired over the images that both saw; interval and p are NaN where they cannot be paired."""
    if a is None or b is None:
        return None
    columns = aligned([a, b]) if a.data == b.data else None
    if columns is None:
        return Difference(a.value - b.value, float("nan"), float("nan"), float("nan"), min(a.n, b.n))
    _, table = columns
    return paired_difference(table[:, 0], table[:, 1])


def aligned(parts: Sequence[Estimate]) -> tuple[pd.Index, NDArray[np.float64]] | None:
    """Ids (N,) and shares (N, C) of the images that all parts have; None where one has no shares."""
    series = [part.shares for part in parts if part.shares is not None]
    if len(series) < len(parts):
        return None
    ids = series[0].index
    for one in series[1:]:
        if not one.index.equals(ids):
            ids = ids.intersection(one.index)
    if len(ids) == 0:
        return None
    return ids, np.column_stack([one.reindex(ids).to_numpy() for one in series])
