"""Which checkpoints of a store are runs of one method, that differ in their training seed alone."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any

from coss_eval.errors import UsageError
from coss_eval.reports.tables import Label
from coss_eval.store import Record, canonical_json

OWN = ("sha256", "code")  # what two runs of one method may differ in
_VERSION = "version of the task"


@dataclass(frozen=True)
class Groups:
    """``members``: the checkpoints of each method by what tables call it; ``warnings``.

    ``methods``: the plain names of these, and of the checkpoints that are the only run of their method.
    """

    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def given(labels: Iterable[str]) -> dict[str, list[str]]:
    """Patterns by method from texts such as "CO-BYOL (ours)=runs/co-*/model.safetensors". Raises UsageError."""
    found: dict[str, list[str]] = {}
    for text in labels:
        name, sign, pattern = text.partition("=")  # the first: runs of a sweep are called byol-seed=0
        if not sign or not name.strip() or not pattern.strip():
            raise UsageError(
                f'expected --label "NAME=PATHS", such as "CO-BYOL=runs/co-*/model.safetensors", got {text!r}'
            )
        found.setdefault(name.strip(), []).append(pattern.strip())
    return found


def find(
    checkpoints: Sequence[str],
    labels: Mapping[str, Label],
    records: Sequence[Record],
    runs: Iterable[Record],
    patterns: Mapping[str, Sequence[str]],
) -> Groups:
    """The groups among ``checkpoints``, which ``labels`` (by a cell's key) name.

    A model belongs to the method that ``patterns`` gives it (of its name, or of the file it was read from), else to the
    one that its newest run recorded with its seed. Raises UsageError for a pattern that matches nothing or mixes
    protocols; checkpoints whose own config says so are then left apart, with a warning.
    """
    known = _said(labels, records, runs)
    shown = {label.text: label for label in labels.values()}
    named = methods_of([shown[text].model for text in checkpoints], patterns)
    found: dict[str, list[str]] = {}
    methods: dict[str, str] = {}
    for text in checkpoints:
        label = shown[text]
        said = known[text].get("group")
        method = named.get(label.model, None if said in patterns else said)  # patterns name all runs of their method
        if method is not None:
            found.setdefault(f"{method}{label.suffix}", []).append(text)
            methods[f"{method}{label.suffix}"] = str(method)
    members: dict[str, tuple[str, ...]] = {}
    names: dict[str, str] = {}
    warnings = []
    for group, texts in found.items():
        if len(texts) < 2:
            several = any(len(more) > 1 for one, more in found.items() if methods[one] == methods[group])
            if several or methods[group] in patterns:
                alike = f"no other run of {methods[group]} was evaluated like that; evaluate all alike in a new folder"
                warnings.append(f"{texts[0]} is not grouped: {alike}.")
            else:
                names[texts[0]] = methods[group]
            continue
        seeds = [seed for text in texts if (seed := known[text].get("seed")) is not None]
        reason = _unlike(texts, labels, records)
        if methods[group] in patterns and reason is not None:
            raise UsageError(f"--label {methods[group]}: {reason}; name runs of one method that were evaluated alike")
        if methods[group] not in patterns and reason is None:
            recipes = {known[text].get("recipe") for text in texts}
            reason = "two of them have one seed" if len(set(seeds)) < len(seeds) else None
            reason = "they were trained in different ways" if len(recipes) > 1 else reason
        if reason is not None:
            warnings.append(f"{group}: {', '.join(texts)} are not grouped: {reason}. Name groups with --label.")
            continue
        title = f"{group} ({len(texts)} seeds)"
        members[title], names[title] = tuple(texts), methods[group]
    return Groups(members, names, tuple(warnings))


def _said(labels: Mapping[str, Label], records: Sequence[Record], runs: Iterable[Record]) -> dict[str, Record]:
    """What the newest run says of each checkpoint's weights, by label; old runs tell networks by their names alone."""
    models = [model for run in runs for model in run.get("models", [])]
    by_weights = {(model["sha256"], model.get("arch")): model for model in models if "sha256" in model}
    by_name = {str(model["name"]): model for model in models if "sha256" not in model}
    found: dict[str, Record] = {}
    for record in records:
        label, own = labels[record["key"]], record["protocol"].get("model", {})
        found[label.text] = by_weights.get((own.get("sha256"), own.get("arch"))) or by_name.get(label.model, {})
    return found


def matching(patterns: Mapping[str, Sequence[str]], models: Sequence[str]) -> dict[str, list[str]]:
    """The methods and their patterns that match one of these models: of several stores, each has some of them."""
    found = {
        method: [pattern for pattern in mine if any(fnmatchcase(m, one) for m in models for one in _names(pattern))]
        for method, mine in patterns.items()
    }
    return {method: mine for method, mine in found.items() if mine}


def methods_of(models: Sequence[str], patterns: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The method of each model that a pattern names. Raises UsageError for one that matches none, or two that do."""
    found: dict[str, str] = {}
    for method, mine in patterns.items():
        for pattern in mine:
            matching = [model for model in models if any(fnmatchcase(model, one) for one in _names(pattern))]
            if not matching:
                shown = ", ".join(dict.fromkeys(models))
                raise UsageError(f"--label {method}={pattern} matches no model; there are {shown}")
            twice = next((model for model in matching if found.get(model, method) != method), None)
            if twice is not None:
                raise UsageError(f"--label: {twice} is in {found[twice]} and in {method}; give it to one of them")
            found |= dict.fromkeys(matching, method)
    return found


def _names(pattern: str) -> set[str]:
    """A pattern of names, or of the files that models are called after: runs/co-*/model.safetensors is co-*."""
    path = PurePath(pattern)
    stem = path.stem if path.suffix else path.name
    return {pattern, path.parent.name} if stem == "model" else {pattern, stem, f"{path.parent.name}/{stem}"}


def _unlike(texts: Sequence[str], labels: Mapping[str, Label], records: Sequence[Record]) -> str | None:
    """How the checkpoints' protocols differ: "corruptions: backend differs"; None where they do not."""
    by_text: dict[str, dict[tuple[str, str], set[str]]] = {text: {} for text in texts}
    for record in records:
        label = labels[record["key"]]
        for text in {label.text, label.base} & set(texts):
            for name, value in _facts(record).items():
                by_text[text].setdefault((record["task"], name), set()).add(value)
    first, *others = by_text.values()
    for other in others:
        for key in first.keys() & other.keys():
            if len(first[key]) == len(other[key]) == 1 and first[key] != other[key]:
                return f"{key[0]}: {key[1]} differs"
    return None


def differing(asked: Iterable[tuple[Hashable, Record]]) -> list[str]:
    """How cells that measured the same differ in their parameters: "attacks: steps differs: 20 and 5".

    ``asked``: each cell with what it measured. A parameter that one of them does not tell is no difference.
    """
    found: dict[Hashable, list[Record]] = {}
    for measured, record in asked:
        found.setdefault(measured, []).append(record)
    alike = {tuple(record["key"] for record in records): records for records in found.values()}
    values: dict[tuple[str, str], dict[str, None]] = {}
    for records in alike.values():
        params = [record["params"] | {_VERSION: record.get("algorithm_version", 1)} for record in records]
        for name in sorted(set(params[0]).intersection(*params)):
            if any(one[name] != params[0][name] for one in params):
                shown = values.setdefault((records[0]["task"], name), {})
                shown |= dict.fromkeys(_plain(one[name]) for one in params)
    return [f"{task}: {name} differs: {' and '.join(shown)}" for (task, name), shown in values.items()]


def _plain(value: Any) -> str:
    """A setting for reading: "0.1, 0.5"; no brackets of a programming language."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:.6g}" if isinstance(value, float) else "none" if value is None else str(value)


def _facts(record: Record) -> dict[str, str]:
    """What all runs of a method must have alike."""
    protocol = record["protocol"]
    model = {name: value for name, value in protocol.get("model", {}).items() if name not in OWN}
    data = {name: protocol.get("data", {}).get(name) for name in ("name", "split", "limit", "fingerprint")}
    facts = {**record["params"], **data, "geometry": protocol.get("geometry"), "architecture": model.get("arch")}
    facts |= {_VERSION: record.get("algorithm_version", 1)}
    return {name: canonical_json(value) for name, value in facts.items()}
