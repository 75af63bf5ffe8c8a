"""What a sweep's YAML says: its runs in the order of their value, pilots first, and how they are evaluated.

A small sweep is one block: methods by seeds by a grid. A study has several ``blocks`` of unlike runs, ``pilots`` that
choose fields of the configuration for each method, ``claims`` that were fixed before any run, and other ``sizes``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib import resources
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from coss_eval.errors import UsageError, unknown_name
from coss_eval.reports.claims import Claim
from coss_eval.sweeps import shipped
from coss_eval.training.config import Config, resolve
from coss_eval.training.fields import build, read_yaml
from coss_eval.training.methods import split_name

C_MIN = (0.08, 0.2, 0.4, 0.6, 0.8)
MOST_RUNS = 100_000  # of a sweep: a grid of a few short lists has more than anybody can name or do
FIRST_SIZE = "cpu"  # the entries at the top of the file


@dataclass(frozen=True, kw_only=True)
class Block:
    """Runs that belong together: methods by seeds by a grid of fields of the training configuration.

    ``arm`` is what reports call them, the method where it is left out; needed where two blocks have one method.
    Entries that are left out are the sweep's own; ``fixed`` adds to the sweep's. ``epochs_share`` is for runs that
    cost more an epoch: the share of the epochs that makes their compute equal.
    """

    methods: tuple[str, ...]
    arm: str | None = None
    data: str | None = None
    preset: str | None = None
    grid: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    epochs_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.epochs_share <= 1:
            raise UsageError(f"epochs_share is a share of the sweep's epochs, above 0 to 1, got {self.epochs_share:g}")
        _refuse_what_is_no_list({"methods": self.methods, "seeds": self.seeds or (0,), **self.grid})
        _refuse_entries_of_their_own(self.grid, self.fixed)
        if self.arm is not None and len(self.methods) > 1:
            raise UsageError(f"the arm {self.arm} has {len(self.methods)} methods; give each method a block of its own")


@dataclass(frozen=True, kw_only=True)
class Pilots:
    """Short runs that choose fields for each method, by kNN on held-out training images at their last epoch.

    ``trials`` by method, the same number for each; what is chosen for a method holds for it with the CO term, too.
    """

    trials: dict[str, Any]
    epochs: int
    seed: int = 0

    def __post_init__(self) -> None:
        _refuse_what_is_no_list(self.trials)
        counts = {method: len(trials) for method, trials in self.trials.items()}
        if len(set(counts.values())) > 1:
            raise UsageError(f"pilots: every method needs the same number of trials, got {counts}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One task with its options, on so many test images (a fixed, class-balanced subset; None: all)."""

    task: str
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All that a YAML says. ``grid`` varies fields of the training configuration, ``fixed`` sets others for all.

    ``run_minutes`` fixes the epochs of every run by what the first one's fill on the first machine (state.settled).
    ``device`` ("cpu" or "cuda") and ``threads`` are what every run is made with, so that no contrast mixes them.
    ``train_first``: everything is trained before anything is evaluated. ``bf16_weights`` halves the files that are
    kept; what is evaluated is the file. ``keep_weights`` names the runs whose weights stay (None: all).
    """

    data: str
    methods: tuple[str, ...] = ()
    preset: str | None = None
    grid: dict[str, Any] | None = None
    fixed: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    blocks: tuple[Block, ...] = ()
    pilots: Pilots | None = None
    run_minutes: float | None = None
    evaluate: tuple[Evaluation, ...] = (Evaluation(task="probe", options={"fractions": []}),)
    claims: tuple[Claim, ...] = ()
    device: str | None = None
    threads: int | None = None
    train_first: bool = False
    bf16_weights: bool = False
    keep_weights: tuple[str, ...] | None = None
    name: str = ""
    size: str = FIRST_SIZE

    def __post_init__(self) -> None:
        _refuse_what_is_no_list({"seeds": self.seeds, **(self.grid or {})})
        _refuse_entries_of_their_own(self.grid or {}, self.fixed)
        if self.blocks and (self.methods or self.grid is not None):
            raise UsageError("methods and grid belong into the blocks of a sweep that has blocks")
        if not self.blocks and not self.methods:
            raise UsageError("a sweep needs methods, such as [byol, co-byol], or blocks of them")

    @property
    def all_blocks(self) -> tuple[Block, ...]:
        """The blocks; a sweep without has one of its own methods and grid, by default over c_min."""
        grid = {"crop_min_scale": list(C_MIN)} if self.grid is None else self.grid
        return self.blocks or (Block(methods=self.methods, grid=grid),)

    def written(self) -> dict[str, Any]:
        """How each run is evaluated, as JSON has it."""
        return {"evaluate": [asdict(evaluation) for evaluation in self.evaluate]}


@dataclass(frozen=True)
class TrainingRun:
    """One run: its number from 1 and its configuration, of which pilots have yet to choose parts while it waits."""

    number: int
    arm: str
    data: str
    seed: int
    config: Config
    varied: dict[str, Any]  # the grid's fields, or the trial's
    pilot: bool = False
    waits: bool = False

    @property
    def name(self) -> str:
        """The name of its folder and of its model in reports."""
        parts = ["pilot"] * self.pilot + [self.arm, *(f"{f}={value}" for f, value in self.varied.items())]
        return re.sub(r"[^\w.=,-]+", "-", " ".join([*parts, f"seed={self.seed}"]))


def read_sweep(what: str | Path, size: str | None = None) -> Sweep:
    """The sweep in a YAML file, or the shipped one of that name, at one of its sizes.

    Raises UsageError in one line for a bad one.
    """
    values = read_values(what, size)
    if "data" not in values:
        raise UsageError(f"{what} does not say data; a sweep has {', '.join(f.name for f in fields(Sweep))}")
    own = {"name": Path(what).stem, "size": size or FIRST_SIZE}
    return build(Sweep, values | own, "entry of the sweep")


def read_values(what: str | Path, size: str | None = None) -> dict[str, Any]:
    """The entries of a YAML file, or of the shipped sweep of that name, at one of its sizes. Raises UsageError."""
    path = Path(what)
    if not path.is_file():
        what = str(what).removesuffix(".yaml")
        if what not in shipped():
            raise unknown_name("sweep (no such file, and none of that name is shipped)", str(what), shipped())
        path = Path(str(resources.files("coss_eval.sweeps").joinpath(f"{what}.yaml")))
    values = read_yaml(path, str(path))
    if not isinstance(values, dict):
        found = "an empty file" if values is None else type(values).__name__
        raise UsageError(f"{path}: expected entries such as claims, or data, methods and grid, got {found}")
    sizes = values.pop("sizes", {})
    if not isinstance(sizes, dict) or not all(isinstance(entries, dict) for entries in sizes.values()):
        raise UsageError(f"{path}: sizes has names with entries such as data and fixed, got {str(sizes)[:80]}")
    if size not in (None, FIRST_SIZE):
        if size not in sizes:
            raise unknown_name("size of the sweep", str(size), [FIRST_SIZE, *sizes])
        values |= sizes[size]
    _refuse_bad_claims(values.get("claims"))
    return values


def _refuse_bad_claims(claims: Any) -> None:
    """UsageError for an entry of ``claims`` that lacks what every claim must say, or the name of another."""
    needed = [f.name for f in fields(Claim) if f.default is MISSING and f.default_factory is MISSING]
    dicts = [(i, c) for i, c in enumerate(claims if isinstance(claims, list) else [], 1) if isinstance(c, dict)]
    for i, claim in dicts:
        lacking = [name for name in needed if name not in claim]
        if lacking:
            called = f"{i} ({claim['name']})" if "name" in claim else str(i)
            raise UsageError(f"claim {called} lacks {', '.join(lacking)}; a claim says {', '.join(needed)}")
    names = [str(claim["name"]) for _, claim in dicts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two claims are called {twice!r}: scores go by these names; give each one of its own")


def runs(sweep: Sweep, chosen: Mapping[str, Mapping[str, Any]] | None = None) -> list[TrainingRun]:
    """All runs, numbered from 1 in the order in which they are to be done.

    A method's pilots stand before its first run. In a block it goes seed by seed, so that a first curve or pair is
    complete early. ``chosen``: what the pilots found, by method; runs for which it is missing wait.
    Raises UsageError for methods, fields and values that the training configuration does not take.
    """
    _refuse_too_many(sweep)
    found: list[TrainingRun] = []
    piloted: set[str] = set()

    def add(arm: str, data: str, config: Config, varied: dict[str, Any], *, pilot: bool, waits: bool = False) -> None:
        found.append(TrainingRun(len(found) + 1, arm, data, config.seed, config, varied, pilot, waits))

    for block in sweep.all_blocks:
        for base in dict.fromkeys(split_name(method)[0] for method in block.methods):
            if sweep.pilots is None or base not in sweep.pilots.trials or base in piloted:
                continue
            piloted.add(base)
            for trial in sweep.pilots.trials[base]:
                own = {**sweep.fixed, **trial, "epochs": sweep.pilots.epochs, "seed": sweep.pilots.seed}
                config = resolve(base, block.preset or sweep.preset, **own)
                add(base, block.data or sweep.data, config, dict(trial), pilot=True)
        for seed, pairs, method in product(block.seeds or sweep.seeds, _grid(block.grid), block.methods):
            base = split_name(method)[0]
            waits = base in piloted and base not in (chosen or {})
            best = dict((chosen or {}).get(base, {}))
            own = {**sweep.fixed, **best, **block.fixed, **pairs, "seed": seed}
            config = resolve(method, block.preset or sweep.preset, **own)
            config = replace(config, epochs=max(1, round(block.epochs_share * config.epochs)))
            add(block.arm or method, block.data or sweep.data, config, pairs, pilot=False, waits=waits)
    twice = next((name for name, count in Counter(run.name for run in found).items() if count > 1), None)
    if twice is not None:
        raise UsageError(
            f"the sweep has {twice} twice; give each method, value and seed once, and an arm to blocks of one method"
        )
    return found


def _refuse_too_many(sweep: Sweep) -> None:
    """UsageError before a run is made: a short file can ask for more than memory holds."""
    each = [
        len(block.seeds or sweep.seeds) * len(block.methods) * prod(map(len, block.grid.values()))
        for block in sweep.all_blocks
    ]
    if sum(each) > MOST_RUNS:
        raise UsageError(f"the sweep has {sum(each):,} runs, at most {MOST_RUNS:,} are taken; make its grid smaller")


def _grid(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the fields' values."""
    pairs = [[(name, tuple(v) if isinstance(v, list) else v) for v in values] for name, values in grid.items()]
    return [dict(each) for each in product(*pairs)]


def _refuse_what_is_no_list(entries: Mapping[str, Any]) -> None:
    for name, values in entries.items():
        if not isinstance(values, list | tuple) or not values:
            raise UsageError(f"{name} of a sweep: expected a list such as [0.2, 0.4], got {values!r}")


def _refuse_entries_of_their_own(*parts: Mapping[str, Any]) -> None:
    for name in ("method", "preset", "seed"):
        if any(name in part for part in parts):
            raise UsageError(f"{name} is not for grid or fixed: a sweep has entries of its own for it")
