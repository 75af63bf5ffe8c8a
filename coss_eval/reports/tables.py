"""The store as one tidy table, and the names its checkpoints go by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from coss_eval.store import Condition, Record, Store, canonical_json, column_name
from coss_eval.tasks import entries

# what tells two sets of numbers of one checkpoint apart wherever the store holds more than one value of it
ALWAYS_SHOWN = ("data", "split", "limit")

COLUMNS_BEFORE = ["checkpoint", "model", "task", "metric"]
COLUMNS_AFTER = ["value", "low", "high", "n", "limit", "data", "head", "seconds", "condition", "key"]


class Label(NamedTuple):
    """What a cell's checkpoint is called: ``text``, and ``base`` where the store has it under one protocol only.

    ``text`` is the ``model``'s name and what tells it apart; ``suffix`` is the latter without the weights' own hash.
    """

    text: str
    base: str
    model: str
    suffix: str


def tidy(store: Store) -> pd.DataFrame:
    """One row a measurement; checkpoints in the order of the runs that measured them, tasks in the report's order.

    Columns: checkpoint (the model's name, with what tells it apart where the store holds several protocols of it),
    model, task, metric, one column a condition (corruption, severity, eps ...), value, low, high (fractions), n, limit
    (None where the whole split was used), data, head, seconds, condition (the text that names its samples), key.
    """
    runs = store.runs()
    return tidy_records(as_written_now(store.records(), runs), model_order(runs))


def as_written_now(records: Iterable[Record], runs: Iterable[Record]) -> list[Record]:
    """The records with each network under the name that its newest run gave it, and ``head`` in all of them.

    A cell belongs to the weights, whatever their file was called: moved or renamed, they stay one row. Cells that a
    newer version of their task measured again are left out.
    """
    records = list(records)
    old = superseded(records)
    records = [record for record in records if record["key"] not in old]
    models = [model for run in runs for model in run.get("models", [])]
    names = {(model.get("sha256"), model.get("arch")): model["name"] for model in models}
    named: list[Record] = []
    for record in records:
        model = record["protocol"].get("model", {})
        name = names.get((model.get("sha256"), model.get("arch")), record["model"])
        named.append({**_with_head(record), "model": name})
    return named


def superseded(records: Sequence[Record]) -> set[str]:
    """Keys of the cells that a newer version of their task measured again.

    That is with the same network and images in the same way, and the same parameters or more: a new version may have
    given a name to what was fixed before. One that its numbers are told apart by asks another question: a probe of few
    labels is none of all.
    """
    versions: dict[str, set[int]] = {}
    for record in records:
        versions.setdefault(record["task"], set()).add(_version(record))
    asked: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if len(versions[record["task"]]) > 1:
            asked.setdefault((record["task"], canonical_json(record["protocol"])), []).append(record)
    return {
        old["key"]
        for alike in asked.values()
        for old in alike
        if any(_version(new) > _version(old) and _asks_again(new, old) for new in alike)
    }


def _asks_again(new: Record, old: Record) -> bool:
    added = new["params"].keys() - old["params"].keys()
    return old["params"].items() <= new["params"].items() and not any(
        added & m["condition"].keys() for m in new["measurements"]
    )


def _version(record: Record) -> int:
    return int(record.get("algorithm_version", 1))


def _with_head(record: Record) -> Record:
    """Older versions noted where the logits came from: "head: own head"."""
    if "head" in record:
        return {"notes": [], **record}
    noted = [note for note in record.get("notes", []) if note.startswith("head: ")]
    others = [note for note in record.get("notes", []) if note not in noted]
    head = noted[0].removeprefix("head: ") if noted else (record["protocol"].get("head") or {}).get("head")
    return {**record, "head": head, "notes": others}


def model_order(runs: Iterable[Record]) -> list[str]:
    """The models' names as the runs gave them, each once."""
    return list(dict.fromkeys(str(model["name"]) for run in runs for model in run.get("models", [])))


def apart_from_untrained(frame: pd.DataFrame) -> pd.DataFrame:
    """The tidy frame with every network under a name of its own.

    That is the checkpoint's where a model's name stands for several (other weights, another limit), and one of their
    own for the untrained networks that tasks measured beside a model. Else whoever groups by name averages them.
    """
    named = frame.copy()
    several = frame.groupby(["model", "task"])["checkpoint"].transform("nunique") > 1
    named.loc[several, "model"] = frame.loc[several, "checkpoint"]
    if "weights" not in frame:
        return named
    untrained = frame["weights"] == "untrained"
    for column in ("checkpoint", "model"):
        named.loc[untrained, column] = named.loc[untrained, column] + ", untrained"
    return named


# pandas takes columns out of the middle until the rest fits a terminal: what a person looks for stands at both ends
_FIRST = ("value", "metric", "low", "high", "n")
_LAST = ("condition", "limit", "task", "model")


def for_reading(frame: pd.DataFrame) -> pd.DataFrame:
    """The tidy frame with the columns in an order that shows the values on a narrow terminal."""
    between = [name for name in frame.columns if name not in (*_FIRST, *_LAST)]
    return frame[[*_FIRST, *between, *_LAST]]


def wide(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a task, metric and condition, a column a model, from a frame that is ``apart_from_untrained``.

    A trained and an untrained network stand in one row: which it is, their names say.
    """
    told = frame["condition"].str.replace(r",?\bweights=(un)?trained\b", "", regex=True).str.lstrip(",")
    rows = frame.assign(condition=told.where(told != "", frame["metric"]))
    found = rows.pivot(index=["task", "metric", "condition"], columns="model", values="value")
    places = rows.drop_duplicates(["task", "metric", "condition"])
    order = pd.MultiIndex.from_frame(places[["task", "metric", "condition"]])
    return found.reindex(index=order, columns=list(dict.fromkeys(rows["model"])))


def per_image(store: Store, task: str | None = None) -> pd.DataFrame:
    """What the store holds of each image: a row an image (by its id), a column a model, task and condition.

    Verdicts are 1.0 and 0.0; NaN where a cell is not about the image. The columns' names are those of ``wide``, or the
    metric and the condition where several metrics have one ("entropy: corruption=fog,severity=3").
    """
    frame = apart_from_untrained(tidy(store))
    frame = frame if task is None else frame[frame["task"] == task]
    columns: dict[tuple[str, str, str], pd.Series] = {}
    for key, rows in frame.groupby("key", sort=False):
        table = store.samples(str(key))
        if table is not None:
            first = rows.iloc[0]
            for name in table.columns.drop("label", errors="ignore"):
                columns[str(first["model"]), str(first["task"]), str(name)] = table[name].astype(float)
    found = pd.DataFrame(columns)
    found.columns = pd.MultiIndex.from_tuples([*columns], names=["model", "task", "condition"])
    return found.rename_axis(index="id")


def tidy_records(records: Sequence[Record], names: Iterable[str] = ()) -> pd.DataFrame:
    """``tidy`` of records that were read already; models appear in the order of ``names``, the others after them."""
    labels = checkpoint_labels(records)
    return framed(ranked(records, names, labels), labels)


def framed(records: Sequence[Record], labels: Mapping[str, Label]) -> pd.DataFrame:
    """The tidy frame of records in their order, whose checkpoints are called by ``labels``."""
    rows = [row for record in records for row in _rows(record, labels[record["key"]].text)]
    conditions = dict.fromkeys(name for r in records for m in r["measurements"] for name in m["condition"])
    frame = pd.DataFrame(rows, columns=[*COLUMNS_BEFORE, *conditions, *COLUMNS_AFTER])
    return frame.astype({"value": float, "low": float, "high": float})


def ranked(records: Sequence[Record], names: Iterable[str], labels: Mapping[str, Label]) -> list[Record]:
    """The records in a report's order: models by ``names``, the others after them, then tasks, then parameters."""
    order = {name: i for i, name in enumerate(dict.fromkeys([*names, *sorted(str(r["model"]) for r in records)]))}

    def rank(record: Record) -> tuple[object, ...]:
        place = task_place(record["task"])
        return order[str(record["model"])], labels[record["key"]].text, place, canonical_json(record["params"])

    return sorted(records, key=rank)


def task_place(task: str) -> tuple[int, str]:
    """Where a task stands in a report: the known ones in their order, others after them by name."""
    known = list(entries())
    return known.index(task) if task in known else len(known), task


def _rows(record: Record, label: str) -> Iterable[dict[str, Any]]:
    data = record["protocol"].get("data", {})
    shared = {
        "checkpoint": label,
        "model": record["model"],
        "task": record["task"],
        "limit": data.get("limit"),
        "data": data.get("name"),
        "head": record["head"],
        "seconds": record.get("seconds"),
        "key": record["key"],
    }
    for m in record["measurements"]:
        yield m["condition"] | m | shared | {"condition": column_name(m["metric"], m["condition"])}


def checkpoint_labels(records: Sequence[Record]) -> dict[str, Label]:
    """A display name for the checkpoint of each cell, by key.

    Cells share a label only if their numbers may stand in one row. Where a store holds one measurement twice (another
    limit, backend, seed, or other weights under the same name), the label gains what differs: "r18 [limit=100]".
    """
    facts = {record["key"]: _facts(record) for record in records}
    everywhere = {name for name in ALWAYS_SHOWN if _varies(facts.values(), name)}
    differing = _differing(records, facts)
    labels = {}
    for record in records:
        model, own = str(record["model"]), facts[record["key"]]
        more = differing.get((model, record["task"]), set())
        text, base = _named(model, own, everywhere | more), _named(model, own, everywhere)
        labels[record["key"]] = Label(text, base, model, _named("", own, (everywhere | more) - {"sha256"}))
    return labels


def _differing(records: Sequence[Record], facts: Mapping[str, dict[str, str]]) -> dict[tuple[str, str], set[str]]:
    """For each model and task, the facts in which cells with the same measurement differ."""
    twins: dict[tuple[str, str, str, Condition], set[str]] = {}
    for record in records:
        for m in record["measurements"]:
            name = (str(record["model"]), record["task"], m["metric"], Condition(m["condition"]))
            twins.setdefault(name, set()).add(record["key"])
    found: dict[tuple[str, str], set[str]] = {}
    for (model, task, *_), keys in twins.items():
        group = [facts[key] for key in keys]
        found.setdefault((model, task), set()).update(name for name in set().union(*group) if _varies(group, name))
    return found


def _facts(record: Record) -> dict[str, str]:
    """Everything a cell's numbers depend on, flat and short."""
    protocol = record["protocol"]
    data, model = protocol.get("data", {}), protocol.get("model", {})
    facts: dict[str, Any] = dict(record["params"])
    facts |= {"algorithm_version": record.get("algorithm_version", 1), "geometry": protocol.get("geometry")}
    facts |= {name: data.get(name) for name in ("split", "limit", "fingerprint")} | {"data": data.get("name")}
    facts |= {"head": (protocol.get("head") or {}).get("head")}
    facts |= {**model, **(model.get("preprocessing") or {}), "preprocessing": None}  # mean, std ...: each by itself
    facts |= {"sha256": str(model.get("sha256", ""))[:8]}
    facts |= {"task_code": protocol["code"]} if "code" in protocol else {}
    texts = {name: value if isinstance(value, str) else canonical_json(value) for name, value in facts.items()}
    return {name: text if len(text) <= 32 else f"{text[:22]}… {_digest(text)}" for name, text in texts.items()}


def _digest(text: str) -> str:
    """Texts that begin alike are told apart by it."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _varies(facts: Iterable[dict[str, str]], name: str) -> bool:
    return len({fact.get(name) for fact in facts}) > 1


def _named(model: str, facts: dict[str, str], shown: set[str]) -> str:
    text = ", ".join(f"{name}={facts[name]}" for name in sorted(shown) if name in facts)
    return f"{model} [{text}]" if text else model
