"""What a store knows, as estimates: a value with its interval and, where samples exist, each image's share of it.

Every score here is linear in the images or has been made so (a ratio by its first-order terms), so that means over
conditions, areas, ratios and paired differences all follow from the shares: the image is the unit throughout. Several
runs of one method are an estimate of its own, made from each run's: there seeds and images are the units.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from coss_eval.errors import UsageError, unknown_name
from coss_eval.reports.groups import Groups
from coss_eval.reports.groups import find as find_groups
from coss_eval.reports.tables import (
    as_written_now,
    checkpoint_labels,
    model_order,
    ranked,
    task_place,
    tidy_records,
)
from coss_eval.statistics import (
    SEEDS_FOR_P,
    Difference,
    above_chance,
    clustered_wilson,
    contrast,
    contrast_error,
    detectable,
    mean_interval,
    paired_difference,
    unpaired,
)
from coss_eval.store import Condition, Record, Store, StoreWarning, column_name, own_column

Shares = pd.Series  # of floats, indexed by sample id


@dataclass(frozen=True)
class Estimate:
    """One number of one checkpoint. ``shares`` has it image by image (their mean is ``value``), where that is known.

    Of a method it is the mean over its ``runs``, each an estimate of its own; they are empty for one checkpoint.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    shares: Shares | None = None
    data: str | None = None  # fingerprint of the images: only shares of the same images are paired
    runs: tuple[Estimate, ...] = ()


class Results:
    """A store read once: its tidy frame, the labels of what it compares in order, and estimates by name.

    ``groups`` gives methods the patterns of their runs' names; runs whose own config says so are grouped without.
    """

    def __init__(self, store: Store, groups: Mapping[str, Sequence[str]] | None = None) -> None:
        self.store, self._patterns = store, groups or {}
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
    def checkpoints(self) -> list[str]:
        """Checkpoints in order. One with variants ("r18 [seed=1]") stands for its base, whose numbers it inherits."""
        texts = list(dict.fromkeys(self.frame["checkpoint"]))
        inherited = {base for text, base in self._base.items() if text != base}
        return [text for text in texts if text not in inherited]

    @cached_property
    def groups(self) -> Groups:
        """Checkpoints that are runs of one method. Raises UsageError for patterns that match nothing or mix."""
        return find_groups(self.checkpoints, self._labels, self.records, self.runs, self._patterns)

    @cached_property
    def labels(self) -> list[str]:
        """What tables compare, in order: methods where several of their runs are there, checkpoints otherwise."""
        group = {text: name for name, texts in self.groups.members.items() for text in texts}
        return list(dict.fromkeys(group.get(text, text) for text in self.checkpoints))

    def named(self, name: str, what: str) -> str:
        """The label that a person's ``name`` means: itself, a method's or a model's. Raises UsageError, naming them.

        A baseline of several labels is the last of them, which tables then name; all else must be one.
        """
        every = dict.fromkeys([*self.labels, *self.checkpoints])
        found = (
            [label for label in every if label == name]
            or [label for label in every if self.groups.methods.get(label) == name]
            or [label for label in self.checkpoints if name in self.models(label)]
        )
        found = found if what != "baseline" else [label for label in found if label in self.labels][-1:]
        if len(found) > 1:
            raise UsageError(f"the {what} {name!r} has several rows: {', '.join(found)}; name one of them")
        if not found:
            raise unknown_name(what, name, self.labels)
        return found[0]

    def members(self, label: str) -> tuple[str, ...]:
        """The checkpoints that a label stands for: a method's runs, or the one itself."""
        return self.groups.members.get(label, (label,))

    def models(self, label: str) -> set[str]:
        """The names of the models that a label stands for."""
        return {model for text in self._texts(label) for model, _ in self._sources.get(text, ())}

    def datasets(self, label: str) -> set[str]:
        """The names of the datasets that a label's numbers are of."""
        return {data for text in self._texts(label) for _, data in self._sources.get(text, ())}

    @cached_property
    def _sources(self) -> dict[str, set[tuple[str, str]]]:
        """Model and dataset of each checkpoint's cells."""
        found: dict[str, set[tuple[str, str]]] = {}
        for record in self.records:
            pair = str(record["model"]), str(record["protocol"].get("data", {}).get("name"))
            found.setdefault(self._labels[record["key"]].text, set()).add(pair)
        return found

    def _texts(self, label: str) -> set[str]:
        """The labels of the cells that a label's numbers are in."""
        return {text for member in self.members(label) for text in (member, self._base.get(member, member))}

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
        return [label for label in self.labels if found & self._texts(label)]

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
        mine = (r for r in self.records if self._labels[r["key"]].text in self._texts(label))
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
        mine = self._texts(label) if label is not None else set(self._base)
        return [r for r in self.records if r["task"] == task and self._labels[r["key"]].text in mine]

    def estimate(self, label: str, task: str, metric: str, /, **condition: Any) -> Estimate | None:
        """A stored measurement under its condition, with its samples; None where it is missing."""
        if label in self.groups.members:
            return self.pooled(label, lambda member: self.estimate(member, task, metric, **condition))
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

    def pooled(self, label: str, of: Callable[[str], Estimate | None]) -> Estimate | None:
        """What ``of`` gives for a checkpoint; for a method, what its runs' make together: a gap if one has none."""
        if label not in self.groups.members:
            return of(label)
        return pooled([of(member) for member in self.groups.members[label]])

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
        mine = (r for r in self.records if self._labels[r["key"]].text in self._texts(label))
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


def pooled(runs: Sequence[Estimate | None]) -> Estimate | None:
    """The mean over a method's runs, about new seeds and new images (new seeds alone where no images are known).

    None, a gap, if a run has none.
    """
    known = [run for run in runs if run is not None]
    if len(known) < len(runs) or not known:
        return None
    values = by_run([known])[0]
    about = contrast([(1.0, values)])
    low, high = (None, None) if np.isnan(about.low) else (about.low, about.high)
    n, data = min(run.n for run in known), known[0].data
    found = Estimate(float(values.mean()), low, high, n, data=data, runs=tuple(known))
    verdicts = all(run.shares is not None and run.shares.between(0, 1).all() for run in known)
    return as_share(found) if verdicts else found  # a log-likelihood of .9 in all runs may be 1.2 in the next


def as_share(estimate: Estimate) -> Estimate:
    """The estimate of what lies in [0, 1], its bounds there."""
    if estimate.low is None or estimate.high is None:
        return estimate
    return replace(estimate, low=max(0.0, estimate.low), high=min(1.0, estimate.high))


def by_run(groups: Sequence[Sequence[Estimate]]) -> list[NDArray[np.float64]]:
    """The values of each group's runs, (S, N) over the images that all have; (S,) where those are not known."""
    everything = [run for runs in groups for run in runs]
    columns = aligned(everything) if len({run.data for run in everything}) == 1 else None
    if columns is None:
        return [np.array([run.value for run in runs]) for runs in groups]
    ends = np.cumsum([len(runs) for runs in groups])[:-1]
    return [part.T for part in np.split(columns[1], ends, axis=1)]


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
    if known[0].runs:
        return pooled([mean(parts, weights) for parts in zip(*(part.runs for part in known), strict=True)])
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
    if top.runs:
        return pooled([ratio(*pair) for pair in zip(top.runs, bottom.runs, strict=True)])
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
    if damaged is not None and clean is not None and damaged.runs:
        return pooled([kept(*pair, chance) for pair in zip(damaged.runs, clean.runs, strict=True)])
    if damaged is None or clean is None or chance is None or not above_chance(clean.value, chance, clean.n):
        return None
    return ratio(shifted(damaged, -chance), shifted(clean, -chance))


def shifted(estimate: Estimate, constant: float, slope: float = 1.0) -> Estimate:
    """slope * estimate + constant, its bounds and shares with it."""
    bounds = [None if bound is None else slope * bound + constant for bound in (estimate.low, estimate.high)]
    low, high = bounds if slope > 0 else bounds[::-1]
    shares = None if estimate.shares is None else slope * estimate.shares + constant
    runs = tuple(shifted(run, constant, slope) for run in estimate.runs)
    return Estimate(slope * estimate.value + constant, low, high, estimate.n, shares, estimate.data, runs)


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
    interval = mean_interval(shares.to_numpy())
    shift = value - interval.difference
    return Estimate(value, interval.low + shift, interval.high + shift, len(shares), shares, data)


def difference(a: Estimate | None, b: Estimate | None) -> Difference | None:
    """a - b over the images that both saw; interval and p are NaN where they cannot be compared.

    Two checkpoints are paired over images; where only their intervals are known, these make a wider one, without p. Two
    methods are compared over seeds and images (``contrast``), without p where one has fewer seeds than ``SEEDS_FOR_P``;
    a method and a single checkpoint cannot be.
    """
    if a is None or b is None:
        return None
    if a.runs or b.runs:
        return _between_methods(a, b)
    columns = aligned([a, b]) if a.data == b.data else None
    if columns is None:
        one, other = _bounds(a), _bounds(b)
        if a.data != b.data or one is None or other is None:
            return _unknown(a, b)
        return Difference(*unpaired(one, other), float("nan"), min(a.n, b.n))
    _, table = columns
    return paired_difference(table[:, 0], table[:, 1])


def _between_methods(a: Estimate, b: Estimate) -> Difference:
    if min(len(a.runs), len(b.runs)) < 2 or a.data != b.data:
        return _unknown(a, b)
    values = by_run([a.runs, b.runs])
    found = contrast([(1.0, values[0]), (-1.0, values[1])])
    few = min(len(a.runs), len(b.runs)) < SEEDS_FOR_P
    n = values[0].shape[1] if values[0].ndim == 2 else min(a.n, b.n)
    return found._replace(n=n, p=float("nan") if few else found.p)


def difference_within(a: Estimate | None, b: Estimate | None) -> Difference | None:
    """a - b of one label: of a method it is that of its runs' own differences, each of one network with itself."""
    if a is None or b is None or not a.runs:
        return difference(a, b)
    own = [mean(pair, (1.0, -1.0)) for pair in zip(a.runs, b.runs, strict=True)]
    values = by_run([[one for one in own if one is not None]])[0]
    found = contrast([(1.0, values)])
    n = values.shape[1] if values.ndim == 2 else min(a.n, b.n)
    return found._replace(n=n, p=float("nan") if len(own) < SEEDS_FOR_P else found.p)


def could_have_seen(a: Estimate | None, b: Estimate | None) -> float | None:
    """The difference that these images, or these seeds and images, would show 8 times in 10; None where not known.

    Nor is it where nothing differs: two that agree on every image have seen nothing.
    """
    if a is None or b is None:
        return None
    if a.runs or b.runs:
        if min(len(a.runs), len(b.runs)) < 2 or a.data != b.data:
            return None
        values = by_run([a.runs, b.runs])
        return detectable(*contrast_error([(1.0, values[0]), (-1.0, values[1])])[1:]) or None
    columns = aligned([a, b]) if a.data == b.data else None
    if columns is None or len(columns[0]) < 2:
        return None
    apart = columns[1][:, 0] - columns[1][:, 1]
    return detectable(float(apart.std(ddof=1)) / np.sqrt(len(apart)), len(apart) - 1.0) or None


def _unknown(a: Estimate, b: Estimate) -> Difference:
    return Difference(a.value - b.value, float("nan"), float("nan"), float("nan"), min(a.n, b.n))


def _bounds(estimate: Estimate) -> tuple[float, float, float] | None:
    if estimate.low is None or estimate.high is None:
        return None
    return estimate.value, estimate.low, estimate.high


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
