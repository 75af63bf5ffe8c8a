"""A sweep's page, from what is there: claims and scores where it has claims, else accuracy by what was varied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coss_eval.errors import UsageError
from coss_eval.reports import sweeps
from coss_eval.reports.claims import Claim, Finding, findings_in
from coss_eval.reports.estimates import Estimate
from coss_eval.reports.folders import read
from coss_eval.reports.results import Results
from coss_eval.store import Condition, Store
from coss_eval.store.runs import RESULTS
from coss_eval.sweeps.plan import Sweep, TrainingRun, read_sweep, read_values
from coss_eval.sweeps.state import Costs, State, Step, choices, in_order, states
from coss_eval.training.fields import build

STEPS: tuple[Step, ...] = ("train", "evaluate")


def report(sweep: Sweep, everything: list[State], out: Path) -> list[Path]:
    """Write the page on the runs that are done, the missing ones named; the paths written."""
    trials = _trials(everything, sweep, out)
    pilots = _pilots([state for state in everything if state.run.pilot])
    about = [f"Protocol: {'; '.join(_protocol(sweep))}."]
    if sweep.claims:
        about.append(still_to_do(everything))
        hours = run_hours(everything)
        return sweeps.write_study(trials, pilots, sweep.claims, out, title=_title(sweep), about=about, hours=hours)
    about.append(
        "Linear probe (strength chosen on held-out training images) and kNN on the test split, last checkpoint. All "
        "runs have the same epochs, not the same compute: the CO term adds work to every image."
    )
    return sweeps.write(trials, out, title=_title(sweep), about=about)


def still_to_do(everything: list[State]) -> str:
    """How many runs are done and what the others are expected to take."""
    runs = [state for state in everything if not state.run.pilot]
    trained = sum(state.stage in ("trained", "done") for state in runs)
    done = sum(state.stage == "done" for state in runs)
    text = f"{trained} of {len(runs)} runs are trained, {done} evaluated"
    if done == len(runs):
        return f"{text}."
    costs = Costs.of(everything)
    left = [steps_left(state, costs) for state in everything]
    parts = []
    for step, name in (("train", "training"), ("evaluate", "evaluating")):
        minutes = [steps[step] for steps in left if step in steps]
        known = sum(m for m in minutes if m is not None) / 60
        parts += [f"{name} the others about {known:.0f} hours"] if minutes and None not in minutes else []
    return f"**{text}**; " + (
        f"{' and '.join(parts)} of one machine." if parts else "nothing tells yet how long it takes."
    )


def list_lines(sweep: Sweep, everything: list[State]) -> list[str]:
    """The runs in their order for a terminal: number, stage, minutes that each step took or is expected to take.

    "running" says by whom; "lost" was begun, and nobody is at it now: the same sweep goes on with it.
    """
    costs = Costs.of(everything)
    lines = [f"{'run':>4}  {'stage':<12}{'train':>8}{'evaluate':>10}   minutes; ~ expected, ? not known yet"]
    for state in in_order(everything, train_first=sweep.train_first):
        left = steps_left(state, costs)
        train, evaluate = (_minutes(state, step, left) for step in ("train", "evaluate"))
        at = f"at epoch {state.epoch}/{state.run.config.epochs}" if state.stage == "begun" else ""
        about = f" ({', '.join(part for part in (at, state.held) if part)})" if at or state.held else ""
        lines.append(f"{state.run.number:>4}  {_shown(state):<12}{train:>8}{evaluate:>10}   {state.run.name}{about}")
    return [*lines, still_to_do(everything).replace("**", "")]


def _shown(state: State) -> str:
    """The stage as a list has it, where it matters whether somebody is at it now."""
    if state.held is not None:
        return "running"
    return "lost" if state.stage == "begun" else state.stage


def _minutes(state: State, step: Step, left: dict[Step, float | None]) -> str:
    if step in left:
        expected = left[step]
        return "?" if expected is None else f"~{expected:.0f}"
    return f"{state.minutes[step]:.0f}" if step in state.minutes else "-"


def steps_left(state: State, costs: Costs) -> dict[Step, float | None]:
    """Expected minutes by the steps that a run still needs."""
    if state.stage == "done":
        return {}
    steps: list[Step] = []
    steps += ["train"] if state.stage != "trained" else []
    steps += ["evaluate"] if not state.run.pilot else []
    return {step: costs.minutes(state, step) for step in steps}


def run_hours(everything: list[State]) -> dict[str, float]:
    """What a run of each arm is expected to take, training and evaluation, where finished ones tell."""
    found, costs = dict[str, float](), Costs.of(everything)
    for state in everything:
        minutes = [costs.minutes(replace(state, epoch=0), step) for step in STEPS]
        known = [m for m in minutes if m is not None]
        if not state.run.pilot and len(known) == len(minutes):
            found[_arm(state.run)] = sum(known) / 60
    return found


@dataclass(frozen=True, kw_only=True)
class ClaimFile:
    """A YAML of claims alone."""

    claims: tuple[Claim, ...]


def judge(what: str | Path, folder: Path, size: str | None = None) -> tuple[list[Finding], dict[str, float]]:
    """What a folder says of the claims in a YAML (a sweep's, or claims alone), and the hours that a run takes.

    ``folder`` is what ``coss-eval sweep`` wrote for a sweep, else a results folder. Raises UsageError in one line.
    """
    values = read_values(what, size)
    if "data" not in values:
        claims = build(ClaimFile, {"claims": [], **values}, "entry of the claims").claims
        results = Results(read(folder)[0])
        if not claims or not results.records:
            raise UsageError(f"no claims in {what}" if not claims else f"no finished cells in {folder}")
        return findings_in(claims, results), {}
    sweep = read_sweep(what, size)
    everything = states(sweep, folder, folder)
    if not sweep.claims or not folder.is_dir():
        raise UsageError(f"{what} has no claims" if not sweep.claims else f"there is no folder {folder}")
    if not any(state.record for state in everything):
        raise UsageError(
            f"{folder} has no run of the sweep {what}; give what coss-eval sweep wrote, or a YAML of claims alone"
        )
    trials = _trials(everything, sweep, folder)
    return sweeps.findings(trials, sweep.claims), run_hours(everything)


def _trials(everything: Sequence[State], sweep: Sweep, out: Path) -> list[sweeps.Trial]:
    """The runs that are no pilots with their scores: means over the same conditions, or gaps."""
    found = [(state, _results(state, out)) for state in everything if not state.run.pilot]
    among = {c.name: [at for _, r in found if r is not None for at in c.conditions(r)] for c in sweep.claims}
    return [_trial(state, results, sweep, among) for state, results in found]


def _results(state: State, out: Path) -> Results | None:
    """Of a run that is being evaluated, what is there already."""
    return Results(Store(out / state.run.name / RESULTS)) if state.stage in ("trained", "done") else None


def _trial(
    state: State, results: Results | None, sweep: Sweep, among: Mapping[str, Sequence[Condition]]
) -> sweeps.Trial:
    run = state.run
    label = None if results is None else _label(results, "probe")
    records = [] if results is None or label is None else results.cells("probe", label)
    scores = {
        m["metric"]: Estimate(m["value"], m["low"], m["high"], m["n"])
        for record in records
        for m in record["measurements"]
        if m["metric"] in sweeps.SCORES and not m["condition"]
    }
    begun = {cell["task"] for cell in results.pending} if results is not None and state.stage != "done" else set()
    values = {} if results is None else _values_of(results, [c for c in sweep.claims if c.task not in begun], among)
    arm = _arm(run) if sweep.claims else run.arm
    return sweeps.Trial(run.number, run.name, arm, run.varied, run.seed, state.stage, scores, values)


def _values_of(
    results: Results, claims: Sequence[Claim], among: Mapping[str, Sequence[Condition]]
) -> dict[str, Estimate]:
    """The scores of a run's one network."""
    found = {}
    for claim in claims:
        label = _label(results, claim.task)
        estimate = None if label is None else claim.of(results, label, among[claim.name])
        if estimate is not None:
            found[claim.name] = estimate
    return found


def _label(results: Results, task: str) -> str | None:
    """What a run's one network is called; None where a task has none, or several, as of weights that were replaced.

    It has the limit where tasks have others.
    """
    labels = results.measured(task)
    return labels[0] if len(labels) == 1 else None


def _arm(run: TrainingRun) -> str:
    """What claims call it: "co-byol", "co-byol crop_min_scale 0.8"."""
    return " ".join([run.arm, *(f"{name} {value}" for name, value in run.varied.items())])


def _pilots(states: list[State]) -> list[sweeps.Pilot]:
    chosen = choices(states)
    return [
        sweeps.Pilot(s.run.arm, s.run.varied, s.record.get("knn"), chosen.get(s.run.arm) == s.run.varied)
        for s in states
    ]


def _title(sweep: Sweep) -> str:
    if sweep.claims:
        return f"{sweep.name}, size {sweep.size}"
    methods = dict.fromkeys(method for block in sweep.all_blocks for method in block.methods)
    grid = dict.fromkeys(name for block in sweep.all_blocks for name in block.grid)
    return f"Sweep over {' and '.join(grid) or 'methods'}: {', '.join(methods)}"


def _protocol(sweep: Sweep) -> list[str]:
    fixed: dict[str, Any] = sweep.fixed
    made = [f"{count} thread{'s' * (count > 1)}" for count in [sweep.threads] if count]
    return [
        f"data {sweep.data}",
        f"preset {sweep.preset or 'none'}",
        *(f"{name} {value}" for name, value in fixed.items()),
        *([] if sweep.blocks else [f"seeds {', '.join(map(str, sweep.seeds))}"]),
        *([f"on {sweep.device}", *made] if sweep.device else made),
    ]
