"""Results folders read as one, each network once and under one name, or the name that a person gives it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from coss_eval.errors import CossError, CossWarning, UsageError, shown, unknown_name
from coss_eval.reports.tables import as_written_now
from coss_eval.store import Record, SampleColumns, Store, StoreWarning, canonical_json
from coss_eval.store.runs import JOB, results_in, run_file

Weights = tuple[Any, Any]  # hash and architecture of a network


class Folders(Store):
    """The finished cells of several folders as one store, for reading: a cell that two of them have is there once.

    Networks of one name whose weights differ get the weights' hash behind it.
    """

    def __init__(
        self,
        records: list[Record],
        runs: list[Record],
        home: Mapping[str, Store],
        damage: Sequence[str] = (),
        former: Mapping[str, str] | None = None,
    ) -> None:
        """``former``: the names that models and methods had, by those that they have here."""
        super().__init__(next(iter(home.values())).path)
        self._records, self._made, self._home, self._damage = records, runs, home, damage
        self.former = former or {}

    @classmethod
    def of(cls, folders: Sequence[str | os.PathLike[str]]) -> Folders:
        """Everything in these folders. Raises CossError where they have no finished cell."""
        stores = [Store(folder) for folder in folders]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", StoreWarning)
            found = [(record, store) for store in stores for record in store.records()]
        damage = [str(w.message) for w in caught if issubclass(w.category, StoreWarning)]
        if not found:
            raise CossError(
                f"no finished cells in {', '.join(map(str, folders))}; give results folders that coss-eval has written"
            )
        home = {record["key"]: store for record, store in found}
        told = [run for each in _with_methods({store.path: store.runs() for store in stores}).values() for run in each]
        runs = sorted(told, key=lambda run: str(run.get("started", "")))
        once = {record["key"]: record for record, _ in found}
        records = as_written_now(once.values(), runs)  # under the name in the newest run
        old = once.keys() - {record["key"] for record in records}  # superseded, so that no report may miss them
        runs = [
            run | {"cells": [cell for cell in run["cells"] if cell["key"] not in old]} if "cells" in run else run
            for run in runs
        ]
        return cls(records, runs, home, damage)._called(_apart(records))

    @property
    def names(self) -> list[str]:
        """Of the models in the cells, and of the methods whose runs they are."""
        methods = [str(model["group"]) for run in self._made for model in run.get("models", []) if model.get("group")]
        return list(dict.fromkeys([*(str(record["model"]) for record in self._records), *methods]))

    def renamed(self, names: Mapping[str, str]) -> Folders:
        """The same with models and methods under new names. Raises UsageError for unknown names, and for one of two."""
        if (unknown := next((name for name in names if name not in self.names), None)) is not None:
            raise unknown_name("model to rename", unknown, self.names)
        new = [names.get(name, name) for name in self.names]
        if (twice := next((name for name in new if new.count(name) > 1), None)) is not None:
            raise UsageError(f"--rename would call two models {twice!r}; give each a name of its own")
        runs = [run | {"models": [_in_method(model, names) for model in run.get("models", [])]} for run in self._made]
        found = {_weights(r): names.get(str(r["model"]), str(r["model"])) for r in self._records}
        former = {new: self.former.get(old, old) for old, new in names.items()}
        return Folders(self._records, runs, self._home, self._damage, former)._called(found)

    def part(self, keys: Collection[str]) -> Folders:
        """These cells of it alone."""
        mine = [record for record in self._records if record["key"] in keys]
        return Folders(mine, self._made, self._home, self._damage, self.former)

    def records(self) -> list[Record]:
        """All finished cells; a StoreWarning for each that is damaged."""
        for line in self._damage:
            warnings.warn(line, StoreWarning, stacklevel=2)
        return self._records

    def runs(self) -> list[Record]:
        """All entries of the folders' run.json, oldest first."""
        return self._made

    def columns(self, key: str) -> SampleColumns | None:
        """Per-sample verdicts of a cell, from the folder that it was read in."""
        return self._home[key].columns(key)

    def _called(self, names: Mapping[Weights, str]) -> Folders:
        """Records and runs with each network under its name here."""
        old = {str(record["model"]): names[_weights(record)] for record in self._records}
        records = [record | {"model": names[_weights(record)]} for record in self._records]
        runs = [run | {"models": [_entry(model, names, old) for model in run.get("models", [])]} for run in self._made]
        return Folders(records, runs, self._home, self._damage, self.former)


def _with_methods(runs: Mapping[Path, list[Record]]) -> dict[Path, list[Record]]:
    """The runs of each folder, with method and seed of networks evaluated before checkpoints told them.

    What a study trained has its configuration in the job.json beside its results. The recipe is that of another run
    whose configuration differs in its seed alone; where no such run told it, only a method that all of these folders
    trained in one way is named, so that other runs of it stay grouped.
    """
    jobs = {path: job for path in runs if (job := _job(path.parent)) is not None}
    own = {path: canonical_json(job["config"] | {"seed": None}) for path, job in jobs.items()}
    weights = {path: str(job.get("sha256")) for path, job in jobs.items()}
    recipes = {
        own[path]: model["recipe"]
        for path in jobs
        for run in runs[path]
        for model in run.get("models", [])
        if "recipe" in model and model.get("sha256") == weights[path]
    }

    ways: dict[str, set[str]] = {}
    for path, job in jobs.items():
        ways.setdefault(str(job["config"]["method"]), set()).add(own[path])

    def told(path: Path, model: Record) -> Record:
        if path not in jobs or "group" in model or model.get("sha256") != weights[path]:
            return model
        config = jobs[path]["config"]
        if own[path] not in recipes and len(ways[str(config["method"])]) > 1:
            return model
        return model | {"group": config["method"], "seed": config["seed"], "recipe": recipes.get(own[path], own[path])}

    return {
        path: [run | {"models": [told(path, model) for model in run.get("models", [])]} for run in some]
        for path, some in runs.items()
    }


def _job(folder: Path) -> Record | None:
    """The job of a study's run, which has its configuration; None where the folder is no such run, or an older one."""
    try:
        job = json.loads(run_file(folder, JOB))
    except (OSError, ValueError):
        return None
    config = job.get("config") if isinstance(job, dict) else None
    return job if isinstance(config, dict) and {"method", "seed"} <= config.keys() else None


def _in_method(model: Record, names: Mapping[str, str]) -> Record:
    """A run's entry of a model, its method under another name."""
    return model | {"group": names.get(str(model["group"]), model["group"])} if model.get("group") else model


def _entry(model: Record, names: Mapping[Weights, str], old: Mapping[str, str]) -> Record:
    """A run's entry of a model under its name; old runs tell networks by their names alone."""
    own = (model.get("sha256"), model.get("arch"))
    return model | {"name": names.get(own, old.get(str(model["name"]), model["name"]))}


def _weights(record: Record) -> Weights:
    model = record["protocol"].get("model", {})
    return model.get("sha256"), model.get("arch")


def _apart(records: Sequence[Record]) -> dict[Weights, str]:
    """A name of its own for each network: its own where that is the only one, else with the weights' hash."""
    names = {_weights(record): str(record["model"]) for record in records}
    held = list(names.values())
    return {w: name if held.count(name) == 1 else f"{name} ({str(w[0])[:8]})" for w, name in names.items()}


def read(*folders: str | os.PathLike[str], rename: Mapping[str, str] | None = None) -> list[Store]:
    """Results folders, each by itself, with models under other names where ``rename`` has any of its.

    One without cells of its own, such as a study's, stands for all inside it. Raises UsageError for a name that is in
    none of them.
    """
    if not rename:
        return [_one(folder) for folder in folders]
    found = [Folders.of(results_folders([folder])) for folder in folders]
    known = [name for each in found for name in each.names]
    if (unknown := next((name for name in rename if name not in known), None)) is not None:
        raise unknown_name("model to rename", unknown, known)
    return [each.renamed({old: new for old, new in rename.items() if old in each.names}) for each in found]


def _one(folder: str | os.PathLike[str]) -> Store:
    """The store of a folder, or of all inside it; one that is not there, or empty, is told by whoever reads it."""
    store = Store(folder)
    inside = [] if store.holds_cells() else _with_cells(folder)
    return Folders.of(inside) if inside else store


def _with_cells(folder: str | os.PathLike[str]) -> list[Path]:
    return [path for path in results_in(Path(folder)) if Store(path).holds_cells()]


def results_folders(folders: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The folders that hold finished cells: those given, or in the place of one without, all inside it.

    A folder without any is left out with a warning where others have some: results/* also names what heatmaps and
    similarity drew. Raises CossError for a folder that is not there, and where none has any.
    """
    found: list[Path] = []
    without: list[str] = []
    for folder in map(Path, folders):
        mine = [folder] if Store(folder).holds_cells() else _with_cells(folder)
        if not mine and not folder.is_dir():
            raise CossError(f"there is no folder {folder}; give a results folder that coss-eval has written")
        if not mine:
            without.append(str(folder))
        found += mine
    if without and not found:
        raise CossError(f"no finished cells in {', '.join(without)}; give a results folder that coss-eval has written")
    if without:
        warnings.warn(f"left out, without finished cells: {', '.join(without)}", CossWarning, stacklevel=2)
    return list(dict.fromkeys(found))


def own_folder(store: Store) -> Path:
    """Where what is made of a results folder lies by default: in itself. Raises UsageError for a packed run."""
    if store.is_packed_run:
        raise UsageError(f"{store.path} lies packed in a runs.zip, which takes no report; give a folder with --out")
    return store.path


def renames(texts: Iterable[str]) -> dict[str, str]:
    """New names by old ones from texts such as "model-3=CO-BYOL (ours)". Raises UsageError."""
    found: dict[str, str] = {}
    for text in texts:
        old, sign, new = text.rpartition("=")
        if not sign or not old.strip() or not new.strip():
            raise UsageError(f'expected --rename "OLD=NEW", such as "model-3=CO-BYOL (ours)", got {text!r}')
        found[old.strip()] = new.strip()
    return found


def chosen(patterns: Sequence[str], called: Mapping[str, Collection[str]]) -> list[str]:
    """The labels that names or globs choose, in the order given; all of them where there are no patterns.

    ``called`` has the names that each label goes by. Raises UsageError for a pattern that matches none.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        mine = [label for label, names in called.items() if pattern in names]
        mine = mine or [label for label, names in called.items() if any(fnmatchcase(name, pattern) for name in names)]
        if not mine and any(character in pattern for character in "*?["):
            raise UsageError(f"{pattern} matches no model; there are {shown([*called])}")
        if not mine:
            raise unknown_name("model", pattern, called)
        found |= dict.fromkeys(mine)
    return [*found] if patterns else [*called]
