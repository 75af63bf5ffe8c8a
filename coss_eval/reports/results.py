"""What a store knows, read once: who is compared, what was measured of them, and estimates by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np
import pandas as pd

from coss_eval.errors import UsageError, unknown_name
from coss_eval.reports.estimates import Estimate, Shares, pooled
from coss_eval.reports.folders import Folders, chosen
from coss_eval.reports.groups import Groups, differing
from coss_eval.reports.groups import find as find_groups
from coss_eval.reports.tables import (
    as_written_now,
    checkpoint_labels,
    framed,
    model_order,
    ranked,
    task_place,
)
from coss_eval.store import Condition, Record, Store, StoreWarning, column_name, own_column

Measured = tuple[Any, ...]  # task, metric and condition of a measurement


class Results:
    """A store read once: its tidy frame, the labels of what it compares in order, and estimates by name.

    ``groups`` gives methods the patterns of their runs' names; runs whose own config says so are grouped without.
    ``models`` are names or globs of what is shown, in that order: all by default.
    """

    def __init__(
        self, store: Store, groups: Mapping[str, Sequence[str]] | None = None, models: Sequence[str] = ()
    ) -> None:
        self.store, self._patterns, self._shown = store, groups or {}, models
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", StoreWarning)
            self.runs = store.runs()
            stored = store.records()
        self.records: list[Record] = as_written_now(stored, self.runs)
        self.superseded = {record["key"] for record in stored} - {record["key"] for record in self.records}
        self.warnings = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, StoreWarning)))
        self._labels = checkpoint_labels(self.records)
        self._ranked = ranked(self.records, model_order(self.runs), self._labels)
        self.frame = framed(self._ranked, self._labels)
        self.made: dict[str, Any] = {}  # what reports make of all of it and need again, by name
        self._samples: dict[str, dict[str, Shares]] = {}
        self._ids: list[pd.Index] = []  # each once: columns of the same ids align at a glance
        self._estimates: dict[tuple[str, str, str, str], Estimate | None] = {}
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
        """What tables show, in order; differences of all in ``family`` are adjusted together, whatever is shown."""
        return chosen(self._shown, {label: self.names(label) for label in self.family})

    @cached_property
    def family(self) -> list[str]:
        """What can be compared, in order: methods where several of their runs are there, checkpoints otherwise."""
        group = {text: name for name, texts in self.groups.members.items() for text in texts}
        return list(dict.fromkeys(group.get(text, text) for text in self.checkpoints))

    def named(self, name: str, what: str) -> str:
        """The label that a person's ``name`` means: itself, a method's or a model's. Raises UsageError, naming them.

        A baseline of several labels is the last of them, which tables then name; all else must be one.
        """
        found = self.rows_of(name, what)
        found = found if what != "baseline" else [label for label in found if label in self.labels][-1:]
        if len(found) > 1:
            raise UsageError(f"the {what} {name!r} has several rows: {', '.join(found)}; name one of them")
        if not found:
            raise unknown_name(what, name, self.labels)
        return found[0]

    def rows_of(self, name: str, what: str) -> list[str]:
        """All labels that a person's ``name`` means: itself, a method's or a model's. Raises UsageError for none."""
        every = dict.fromkeys([*self.labels, *self.checkpoints])
        found = (
            [label for label in every if label == name]
            or [label for label in every if self.groups.methods.get(label) == name]
            or [label for label in self.checkpoints if name in self.models(label)]
            or [label for label in every if name in self.names(label)]  # as it was called
        )
        if not found:
            raise unknown_name(what, name, self.labels)
        return found

    def members(self, label: str) -> tuple[str, ...]:
        """The checkpoints that a label stands for: a method's runs, or the one itself."""
        return self.groups.members.get(label, (label,))

    def names(self, label: str) -> set[str]:
        """All names that a label goes by: itself, its method, its models, and what these were called."""
        now = {label, self.groups.methods.get(label, label), *self.models(label)}
        former = self.store.former if isinstance(self.store, Folders) else {}
        return now | {former[name] for name in now & former.keys()}

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

    def _cells_of(self, label: str) -> Iterable[Record]:
        """The cells that a label's numbers are in."""
        return (record for text in self._texts(label) for record in self._by_text.get(text, ()))

    @cached_property
    def _by_text(self) -> dict[str, list[Record]]:
        """The cells of each checkpoint, in the store's order."""
        found: dict[str, list[Record]] = {}
        for record in self.records:
            found.setdefault(self._labels[record["key"]].text, []).append(record)
        return found

    @cached_property
    def untrained(self) -> frozenset[str]:
        """The checkpoints that are networks as they were drawn, as the runs that made them say."""
        models = [model for run in self.runs for model in run.get("models", [])]
        names = {model["name"] for model in models if model.get("layout") == "untrained"}
        return frozenset(self.frame.loc[self.frame["model"].isin(names), "checkpoint"])

    def asked(self, label: str) -> Iterator[tuple[Measured, Record]]:
        """What was measured of a label, each with its cell."""
        return (pair for text in self._texts(label) for pair in self._asked.get(text, ()))

    @cached_property
    def _asked(self) -> dict[str, list[tuple[Measured, Record]]]:
        """What was measured of each checkpoint."""
        found: dict[str, list[tuple[Measured, Record]]] = {}
        for (text, *measured), (record, _) in self._index.items():
            found.setdefault(text, []).append((tuple(measured), record))
        return found

    @cached_property
    def unlike(self) -> list[str]:
        """How checkpoints whose numbers of the same images stand beside each other were measured differently.

        Those whose labels tell it ("r18 [steps=5]") are left out.
        """
        return differing(
            ((*measured, record["protocol"].get("data", {}).get("fingerprint")), record)
            for label in self.labels
            for measured, record in self.asked(label)
            if self._labels[record["key"]].text == self._labels[record["key"]].base
        )

    @property
    def pending(self) -> list[Record]:
        """The cells that runs planned and that are not there: key, task, model."""
        done = {record["key"] for record in self.records} | self.superseded
        planned = {cell["key"]: cell for run in self.runs for cell in run.get("cells", ())}
        return [cell for key, cell in planned.items() if key not in done]

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
        wanted = Condition(where)
        return [c for name, c in self.found(task) if name == metric and wanted.within(c)]

    @cached_property
    def _found(self) -> dict[str, dict[tuple[str, Condition], None]]:
        found: dict[str, dict[tuple[str, Condition], None]] = {}
        for record in self._ranked:
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
        return sorted({record["head"] for record in self._cells_of(label) if record["head"] is not None})

    def notes(self, task: str) -> tuple[list[str], dict[str, dict[str, str]]]:
        """What the cells of a task noted: what all checkpoints share, and the rest by what it says and by checkpoint.

        Notes that differ in their numbers alone say one thing, with "…" for a number: {"strength …": {"r18": "0.1"}}.
        Heads have a column.
        """
        noted: dict[str, dict[str, None]] = {}  # notes by checkpoint, each once, in order
        for record in sorted(self.cells(task), key=lambda r: r["notes"]):
            mine = noted.setdefault(self._labels[record["key"]].text, {})
            mine |= dict.fromkeys(record["notes"])
        first = next(iter(noted.values()), {})
        shared = [note for note in first if all(note in mine for mine in noted.values())]
        own: dict[str, dict[str, list[str]]] = {}
        for label, mine in noted.items():
            for note in mine:
                if note not in shared:
                    own.setdefault(_NUMBER.sub("…", note), {}).setdefault(label, []).append(note)
        return shared, dict(told for notes in own.values() for told in _told_apart(notes))

    def checkpoints_of(self, task: str) -> list[str]:
        """The checkpoints whose cells of a task there are, in order, with what tells variants apart."""
        return list(dict.fromkeys(self.rows(task)["checkpoint"]))

    def cells(self, task: str, label: str | None = None) -> list[Record]:
        """The stored cells of a task, of one checkpoint or of all."""
        mine = self.records if label is None else sorted(self._cells_of(label), key=itemgetter("key"))
        return [record for record in mine if record["task"] == task]

    def estimate(self, label: str, task: str, metric: str, /, **condition: Any) -> Estimate | None:
        """A stored measurement under its condition, with its samples; None where it is missing. Read once."""
        key = label, task, metric, repr(condition)
        if key not in self._estimates:
            self._estimates[key] = self._read(label, task, metric, condition)
        return self._estimates[key]

    def _read(self, label: str, task: str, metric: str, condition: Mapping[str, Any]) -> Estimate | None:
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
        if column is not None and abs(float(column.values.mean()) - m["value"]) > 1e-9:
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
        return None if known is None else pd.Series(known.values.astype(int), index=known.ids)

    def chance(self, label: str) -> float | None:
        """The accuracy of guessing, 1 / classes, on a checkpoint's images; None where the store does not tell."""
        fingerprints = {record["protocol"].get("data", {}).get("fingerprint") for record in self._cells_of(label)}
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
            self._samples[key] = self._read_samples(key)
        return self._samples[key].get(column)

    def _read_samples(self, key: str) -> dict[str, Shares]:
        """A cell's samples by column. Verdicts take a byte an image, as a report holds on to all that it has read."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", StoreWarning)
            found = self.store.columns(key)
        self.warnings += [str(w.message) for w in caught if issubclass(w.category, StoreWarning)]
        if found is None:
            return {}
        ids = next((known for known in self._ids if np.array_equal(known, found.ids)), None)
        if ids is None:
            ids = pd.Index(found.ids, name="id")
            self._ids.append(ids)
        return {
            name: Shares(ids, values if values.dtype == bool else values.astype(float))
            for name, values in found.values.items()
        }


_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])")


def _told_apart(notes: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Notes alike but for numbers, in those numbers that all checkpoints have: each with "…" for the others, and these.

    "yes" stands for a note that has no others.
    """
    numbers = {label: [tuple(_NUMBER.findall(note)) for note in mine] for label, mine in notes.items()}
    between = _NUMBER.split(next(iter(notes.values()))[0])
    first = next(iter(numbers.values()))
    sets = [[{found[i] for found in mine} for mine in numbers.values()] for i in range(len(first[0]))]
    varying = [i for i, of_labels in enumerate(sets) if any(one != of_labels[0] for one in of_labels)]

    def fixed(found: Sequence[str]) -> tuple[str, ...]:
        return tuple("…" if i in varying else number for i, number in enumerate(found))

    for shown in dict.fromkeys(map(fixed, first)):
        own = {label: [found for found in mine if fixed(found) == shown] for label, mine in numbers.items()}
        texts = {
            label: [", ".join(found[i] for i in varying) or "yes" for found in mine] for label, mine in own.items()
        }
        words = "".join(part for pair in zip(between, (*shown, ""), strict=True) for part in pair)
        yield words, {label: "; ".join(dict.fromkeys(mine)) for label, mine in texts.items()}


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
