"""A grid of training runs, each probed: one YAML, resumable run by run, shared between processes, plotted at any time.

<out>/<run>/              what coss-eval train leaves: last.pt, log.jsonl, model.safetensors
            job.json      the configuration it was begun with; the weights' hash once it is trained
            job.lock      while a process is at this run
      results/            a results folder with every run's probes: coss-eval report reads it, too
      report.md runs.csv figures/ tables/
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from coss_eval import evaluation, training
from coss_eval._disk import Lock, write_atomically
from coss_eval.data.dataset import Dataset
from coss_eval.data.open import load_dataset
from coss_eval.errors import CossError, UsageError, unknown_name
from coss_eval.models.load import load_model
from coss_eval.reports import sweeps
from coss_eval.reports.results import Estimate
from coss_eval.store import Store
from coss_eval.tasks.probe import Probe
from coss_eval.training.config import Config, resolve
from coss_eval.training.fields import build
from coss_eval.training.loop import LAST, MODEL, Progress, train_config

Watcher = AbstractContextManager[Callable[[Progress], None] | None]

C_MIN = (0.08, 0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep's YAML says. ``grid`` varies fields of the training configuration, ``fixed`` sets others for all."""

    data: str
    methods: tuple[str, ...]
    preset: str | None = None
    grid: dict[str, Any] = field(default_factory=lambda: {"crop_min_scale": list(C_MIN)})
    fixed: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name, values in {"methods": self.methods, "seeds": self.seeds, **self.grid}.items():
            if not isinstance(values, list | tuple) or not values:
                raise UsageError(f"{name} of a sweep: expected a list such as [0.2, 0.4], got {values!r}")
        for name in ("method", "preset", "seed"):
            if name in self.grid or name in self.fixed:
                raise UsageError(f"{name} is not for grid or fixed: a sweep has entries of its own for it")


@dataclass(frozen=True)
class Job:
    """One run: its number from 1, and its configuration."""

    number: int
    config: Config
    varied: dict[str, Any]  # the grid's fields

    @property
    def name(self) -> str:
        """The name of its folder and of its model in reports."""
        parts = [self.config.method, *(f"{f}={value}" for f, value in self.varied.items()), f"seed={self.config.seed}"]
        return re.sub(r"[^\w.=,-]+", "-", " ".join(parts))


def read_sweep(what: str | Path) -> Sweep:
    """The sweep in a YAML file, or the shipped one of that name. Raises UsageError in one line for a bad one."""
    path = Path(what)
    if not path.is_file():
        if str(what) not in training.sweeps():
            raise unknown_name("sweep (no such file, and none of that name is shipped)", str(what), training.sweeps())
        path = Path(str(resources.files("coss_eval.training").joinpath("sweeps", f"{what}.yaml")))
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected entries such as data, methods and grid, got {type(values).__name__}")
    missing = [name for name in ("data", "methods") if name not in values]
    known = [f.name for f in fields(Sweep)]
    if missing:
        raise UsageError(f"{path} does not say {' and '.join(missing)}; a sweep has {', '.join(known)}")
    return build(Sweep, values, "entry of the sweep")


def jobs(sweep: Sweep) -> list[Job]:
    """All runs, numbered from 1, seed by seed, so that a first curve is complete early.

    Raises UsageError for methods, fields and values that the training configuration does not take.
    """
    grid = [[(name, tuple(v) if isinstance(v, list) else v) for v in values] for name, values in sweep.grid.items()]
    found: list[Job] = []
    for seed in sweep.seeds:
        for pairs in product(*grid):
            for method in sweep.methods:
                config = resolve(method, sweep.preset, **{**sweep.fixed, **dict(pairs), "seed": seed})
                found.append(Job(len(found) + 1, config, dict(pairs)))
    names = [job.name for job in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"the sweep has {twice} twice; give each method, value and seed once")
    return found


def run(
    sweep: Sweep,
    out: Path,
    *,
    number: int | None = None,
    data_root: Path | None = None,
    device: str = "auto",
    on_job: Callable[[Job, str], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    watch: Callable[[str], Watcher] | None = None,
) -> list[str]:
    """Train and probe the runs that are missing (or run ``number`` only), then write the report on what is there.

    A run that another process is at is left to it; one that was interrupted goes on from its last checkpoint.
    ``on_job`` gets each run with "begins", "is done already" or "is being done by another process"; ``watch`` of a
    run's name is open while it trains and gives what is told its progress. Returns a line for each run that failed;
    the others still run.
    """
    planned = list(zip(jobs(sweep), progress(sweep, out), strict=True))
    if number is not None and not 1 <= number <= len(planned):
        raise UsageError(f"this sweep has runs 1 to {len(planned)}, not {number}; --list shows them")
    failures: list[str] = []
    data: Dataset | None = None
    tell = on_job or (lambda job, what: None)
    for job, trial in planned:
        if number not in (None, job.number):
            continue
        if trial.scores:
            tell(job, "is done already")
            continue
        data = data or load_dataset(sweep.data, root=data_root)
        lock = _lock(out / job.name)
        if lock is None:
            tell(job, "is being done by another process")
            continue
        tell(job, "begins")
        try:
            with watch(job.name) if watch else nullcontext() as on_progress:
                options = {"device": device, "on_progress": on_progress, "on_note": on_note}
                _run_job(job, sweep, data, out, options)
        except (CossError, RuntimeError) as error:  # RuntimeError: torch's own, such as running out of memory
            failures.append(f"{job.number} {job.name}: {str(error).splitlines()[0]}")
        finally:
            lock.release()
    report(sweep, out)
    return failures


def progress(sweep: Sweep, out: Path) -> list[sweeps.Trial]:
    """Every run with its state ("done", "begun", "missing") and, where it is done, what its probes found.

    Raises UsageError where a run's folder holds another configuration.
    """
    probed: dict[str, dict[str, Estimate]] = {}  # by the weights' hash
    for record in Store(out / "results").records():
        if record["task"] == "probe":
            found = probed.setdefault(record["protocol"]["model"]["sha256"], {})
            for m in record["measurements"]:
                if m["metric"] in sweeps.SCORES and not m["condition"]:
                    found[m["metric"]] = Estimate(m["value"], m["low"], m["high"], m["n"])
    trials = []
    for job in jobs(sweep):
        found = probed.get(_begun_as(job, sweep, out).get("sha256", ""), {})
        scores = found if found.keys() == sweeps.SCORES.keys() else {}
        state = "done" if scores else "begun" if (out / job.name / LAST).exists() else "missing"
        trials.append(sweeps.Trial(job.number, job.name, job.config.method, job.varied, job.config.seed, state, scores))
    return trials


def report(sweep: Sweep, out: Path) -> list[Path]:
    """Write the report on the runs that are done, the missing ones named; the paths written."""
    fixed = [f"{name} {value}" for name, value in sweep.fixed.items()]
    seeds = f"seeds {', '.join(map(str, sweep.seeds))}"
    protocol = [f"data {sweep.data}", f"preset {sweep.preset or 'none'}", *fixed, seeds]
    about = [
        f"Protocol: {'; '.join(protocol)}.",
        "Linear probe (strength chosen on held-out training images) and kNN on the test split, last checkpoint. All "
        "runs have the same epochs, not the same compute: the CO term adds work to every image.",
    ]
    title = f"Sweep over {' and '.join(sweep.grid)}: {', '.join(sweep.methods)}"
    return sweeps.write(progress(sweep, out), out, title=title, about=about)


def _run_job(job: Job, sweep: Sweep, data: Dataset, out: Path, options: dict[str, Any]) -> None:
    """Train (with ``options`` of the trainer), probe, and mark the run as done."""
    folder, record = out / job.name, {"data": sweep.data, "config": job.config.as_dict()}
    _begun_as(job, sweep, out)
    _write_json(folder / "job.json", record)
    if (folder / MODEL).exists():
        model = load_model(folder / MODEL)
    else:
        model = train_config(job.config, data, out=folder, resume=True, **options)
    named = replace(model, name=job.name)
    done = evaluation.evaluate(named, data, [Probe(fractions=())], out=out / "results", device=options["device"])
    if done.failures:
        raise CossError(done.failures[0])
    _write_json(folder / "job.json", {**record, "sha256": model.sha256})


def _begun_as(job: Job, sweep: Sweep, out: Path) -> dict[str, Any]:
    """job.json; empty where there is none. Raises UsageError where it is another configuration's."""
    path = out / job.name / "job.json"
    if not path.exists():
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        differences = job.config.differences(Config.from_dict(record["config"]))
        data = record["data"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CossError(f"{path} is damaged; remove it to probe that run again") from error
    if data != sweep.data:
        differences.append(f"data: {sweep.data}, there {data}")
    if differences:
        raise UsageError(f"{path.parent} holds another run ({'; '.join(differences)}); give another --out")
    return record


def _lock(folder: Path) -> Lock | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Lock.take(folder / "job.lock")
    except OSError as error:
        raise CossError(f"cannot write {folder}: {error.strerror}; give another --out") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    try:
        write_atomically(path, json.dumps(content, indent=1).encode())
    except OSError as error:
        raise CossError(f"cannot write {path}: {error.strerror}; make room or give another --out") from error
