"""A sweep's report: accuracy by what was varied in training, for each method; a figure, tables and a CSV of the runs.

Imports no torch. One run has its images' interval (Wilson); several seeds of one setting have their mean and Student's
interval over the seeds, since the seed is the unit when methods are compared.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coss_eval.reports import layout
from coss_eval.reports.claims import Claim, Finding, claims_table, finding_of_runs, scores_table
from coss_eval.reports.drawing import (
    WHOLE,
    WIDTH,
    Canvas,
    Figure,
    label_edges,
    legend,
    line,
    looks,
    marks,
    panels,
    save,
    settle,
    style,
)
from coss_eval.reports.estimates import Estimate
from coss_eval.reports.files import write_file
from coss_eval.reports.latex import latex
from coss_eval.reports.layout import Number, Row, Table
from coss_eval.statistics import spread

SCORES = {"top1": "linear probe top-1", "knn_top1": "kNN top-1"}
EVERY_RUN = "A dot a run; below the dots the mean over seeds with Student's 95 % interval, from two runs on."
NEXT = 6  # how many of a study's missing runs its page names
AXES = {"crop_min_scale": "smallest training crop c_min, share of the image's area"}


@dataclass(frozen=True)
class Trial:
    """One training run: its method, the values of the fields that the sweep varies, and what its probes found."""

    number: int
    name: str
    method: str
    varied: Mapping[str, Any]
    seed: int
    state: str
    scores: Mapping[str, Estimate]  # by the names in SCORES; empty until it is done
    values: Mapping[str, Estimate] = field(default_factory=dict)  # by the names of claims


@dataclass(frozen=True)
class Pilot:
    """One trial of a pilot: its method, the fields that it tried, and kNN on held-out training images."""

    method: str
    tried: Mapping[str, Any]
    knn: float | None
    chosen: bool


def write(trials: Sequence[Trial], out: Path, *, title: str, about: Sequence[str]) -> list[Path]:
    """report.md, runs.csv and, once a run is done, figures/sweep.* and tables/*.csv, *.tex in ``out``; their paths.

    ``about``: lines on data, preset and fixed fields for the head of the report.
    """
    paths = [write_file(out / "runs.csv", _runs_csv(trials))]
    missing = [trial for trial in trials if not trial.scores]
    parts = [f"# {title}", *about]
    if missing:
        few = len(missing) <= 12
        listed = ", ".join(f"{t.number} {t.name} ({t.state})" if few else str(t.number) for t in missing)
        parts.append(f"> **{len(missing)} of {len(trials)} runs are missing** (numbers of --job): {listed}")
    if len(missing) < len(trials):
        with style():
            paths += save(settle(draw(trials)), out / "figures" / "sweep")
        parts.append("![Accuracy by what was varied in training](figures/sweep.png)")
    for score in SCORES:
        shown = table(trials, score)
        paths.append(write_file(out / "tables" / f"{shown.name}.csv", layout.to_csv(shown)))
        paths.append(write_file(out / "tables" / f"{shown.name}.tex", latex(shown)))
        parts += [f"## {shown.title}", layout.markdown(shown), f"<sub>{shown.footnote}</sub>"]
    return [write_file(out / "report.md", "\n\n".join(parts) + "\n"), *paths]


def write_study(
    trials: Sequence[Trial],
    pilots: Sequence[Pilot],
    claims: Sequence[Claim],
    out: Path,
    *,
    title: str,
    about: Sequence[str],
    hours: Mapping[str, float],
) -> list[Path]:
    """report.md, runs.csv, tables and, once a run is done, figures/scores.* of a sweep with claims; their paths.

    ``hours``: what a run of each arm takes, where it is known.
    """
    arms = list(dict.fromkeys(trial.method for trial in trials))
    scores = {c.name: {arm: _values(trials, arm, c.name) for arm in arms} for c in claims}
    begun = [arm for arm in arms if any(found[arm] for found in scores.values())]
    distinct = [c for i, c in enumerate(claims) if all(c.measured != other.measured for other in claims[:i])]
    planned = {arm: sum(trial.method == arm for trial in trials) for arm in arms}
    tables = [
        claims_table(findings(trials, claims), planned, hours),
        *([scores_table(distinct, scores, begun)] if begun else []),
        *([pilots_table(pilots)] if pilots else []),
    ]
    paths = [write_file(out / "runs.csv", _runs_csv(trials, [claim.name for claim in claims]))]
    parts = [f"# {title}", *about]
    for shown in tables:
        paths.append(write_file(out / "tables" / f"{shown.name}.csv", layout.to_csv(shown)))
        paths.append(write_file(out / "tables" / f"{shown.name}.tex", latex(shown)))
        parts += [f"## {shown.title}", layout.markdown(shown), f"<sub>{shown.footnote}</sub>"]
    if begun:
        with style():
            paths += save(settle(draw_scores(distinct, scores, begun)), out / "figures" / "scores")
        parts += ["## Every run", "![Scores of every run by method](figures/scores.png)", f"<sub>{EVERY_RUN}</sub>"]
    if waiting := [arm for arm in arms if arm not in begun]:
        parts += ["## Planned, and not measured yet", f"{'; '.join(waiting)}."]
    sources = [f"{i}. {claim.name}: {claim.source}" for i, claim in enumerate(claims, 1)]
    parts += ["## Where the claims are made", "\n".join(sources)]
    missing = [trial for trial in trials if trial.state != "done"]
    if missing:
        listed = ", ".join(f"{trial.number} {trial.name} ({trial.state})" for trial in missing[:NEXT])
        parts += ["## Not done yet", f"{len(missing)} runs; the next ones, with their numbers for --job: {listed}."]
    return [write_file(out / "report.md", "\n\n".join(parts) + "\n"), *paths]


def pilots_table(pilots: Sequence[Pilot]) -> Table:
    """A row a trial: what it tried, kNN on held-out training images, and which was chosen."""
    rows = []
    for pilot in pilots:
        tried = ", ".join(f"{name} {_text(value)}" for name, value in pilot.tried.items())
        shown = None if pilot.knn is None else Number(pilot.knn)
        rows.append(Row(tried, [shown, "chosen" if pilot.chosen else ""], pilot.method))
    caption = "Chosen on held-out training images at the last epoch, without the CO term; no test image was seen."
    return Table("pilots", "Pilots", "kNN %", ["kNN, held-out training images", ""], rows, caption)


def draw_scores(
    claims: Sequence[Claim], scores: Mapping[str, Mapping[str, Sequence[float]]], arms: Sequence[str]
) -> Figure:
    """A panel a claim's score: every run a dot, the mean over seeds with its interval beside it."""
    columns = min(3, len(claims))
    rows = -(-len(claims) // columns)
    figure = Figure(figsize=(WIDTH, 0.6 + rows * (0.9 + 0.22 * len(arms))), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    look = looks(arms)
    for axis, claim in zip(axes.flat, claims, strict=False):
        scale = 100 if claim.percent else 1
        for y, arm in enumerate(arms):
            values = [scale * value for value in scores[claim.name][arm]]
            axis.plot(
                values, [y] * len(values), color=look[arm].color, marker=".", markersize=5, linestyle="", alpha=0.6
            )
            if len(values) > 1:
                over = spread(values)
                axis.hlines(y + 0.25, over.low, over.high, color=look[arm].color)
                axis.plot(over.mean, y + 0.25, color=look[arm].color, marker=look[arm].marker)
        axis.set_title(claim.name + (", %" if claim.percent else ""))
        axis.set_yticks(range(len(arms)), arms)
        axis.set_ylim(len(arms) - 0.4, -0.6)
    for axis in list(axes.flat)[len(claims) :]:
        axis.set_visible(False)
    return figure


def findings(trials: Sequence[Trial], claims: Sequence[Claim]) -> list[Finding]:
    """What the runs that are done say of each claim."""
    return [
        finding_of_runs(claim, {arm: _estimates(trials, arm, claim.name) for arm in claim.contrast}) for claim in claims
    ]


def _estimates(trials: Sequence[Trial], arm: str, score: str) -> list[Estimate]:
    return [trial.values[score] for trial in trials if trial.method == arm and score in trial.values]


def _values(trials: Sequence[Trial], arm: str, score: str) -> list[float]:
    return [estimate.value for estimate in _estimates(trials, arm, score)]


def table(trials: Sequence[Trial], score: str) -> Table:
    """One row a setting, a column a method; a setting of which a seed is missing is shown with the seeds it has."""
    methods = list(dict.fromkeys(trial.method for trial in trials))
    across, settings = _across(trials), _settings(trials)
    rows = [
        Row(
            f"{across} {_text(setting[across])}" if across else "all runs",
            [_number(summary(_runs(trials, method, setting), score)) for method in methods],
            panel,
        )
        for panel in _panels(settings, across)
        for setting in settings
        if _panel(setting, across) == panel
    ]
    sizes = sorted({trial.scores[score].n for trial in trials if score in trial.scores})
    corner = f"accuracy %, n = {' to '.join(map(str, sizes))}" if sizes else "accuracy %"
    return Table(f"sweep_{score}", SCORES[score], corner, methods, rows, _about_intervals(trials))


def summary(runs: Sequence[Trial], score: str) -> Estimate | None:
    """One setting of one method: its run's estimate, or the mean over its seeds; None where none is done."""
    found = [run.scores[score] for run in runs if score in run.scores]
    if len(found) < 2:
        return found[0] if found else None
    over = spread([estimate.value for estimate in found])
    return Estimate(over.mean, max(0.0, over.low), min(1.0, over.high), found[0].n)


def stored(folder: Path) -> list[Trial]:
    """The runs of a sweep's folder, as its runs.csv has them; none where there is no such file."""
    path = folder / "runs.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    known = {"job", "run", "method", "seed", "state", "n", *(f"{s}{part}" for s in SCORES for part in _PARTS)}
    fields = [name for name in (rows[0] if rows else ()) if name not in known]
    return [
        Trial(
            int(row["job"]),
            row["run"],
            row["method"],
            {name: _value(row[name]) for name in fields},
            int(row["seed"]),
            row["state"],
            {s: _estimate(row, s) for s in SCORES if row[s]},
        )
        for row in rows
    ]


_PARTS = ("", "_low", "_high")


def _estimate(row: Mapping[str, str], score: str) -> Estimate:
    value, low, high = (float(row[f"{score}{part}"]) for part in _PARTS)
    return Estimate(value, low, high, int(row["n"]))


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def stored_figure(folder: Path, canvas: Canvas = WHOLE) -> Figure | None:
    """Accuracy by what a sweep varied, c_min mostly, from its folder; None where no run with a probe is there."""
    done = [trial for trial in stored(folder) if trial.scores]
    return draw(done, canvas) if done and done[0].varied else None


def draw(trials: Sequence[Trial], canvas: Canvas = WHOLE) -> Figure:
    """Linear-probe accuracy over what is varied, a line a method; a panel for each setting of the other fields.

    Bands: over seeds where a setting has several, else over images.
    """
    across, settings = _across(trials), _settings(trials)
    shown = _panels(settings, across)
    width = canvas.inches(min(WIDTH, 1.4 + 2.2 * len(shown)))
    figure, axes = panels(len(shown), width=width, height=2.4, least=1.5, most=4)
    look = looks(list(dict.fromkeys(trial.method for trial in trials)))
    for axis, panel in zip(axes, shown, strict=True):
        axis.set_title(panel)
        here = [setting for setting in settings if _panel(setting, across) == panel]
        values = [setting.get(across or "", "all runs") for setting in here]
        numeric = all(isinstance(value, int | float) for value in values)
        if not numeric:
            axis.set_xticks(range(len(values)), [_text(value) for value in values])
        elif len(values) < 8:
            axis.set_xticks(values, [_text(value) for value in values])
        for i, method in enumerate(look):
            points = [summary(_runs(trials, method, setting), "top1") for setting in here]
            if numeric:
                line(axis, values, points, look[method])
            else:
                marks(axis, [x + 0.12 * i for x in range(len(values))], points, look[method])
    low, high = axes[0].get_ylim()  # shared; not from 0, as what is compared lies close together
    axes[0].set_ylim(max(0.0, low), min(101.0, high))
    label_edges(figure, AXES.get(across or "", across or ""), "linear probe top-1, %")
    legend(figure, look)
    return figure


def _settings(trials: Sequence[Trial]) -> list[Mapping[str, Any]]:
    """The values of the varied fields, each setting once; numbers rise."""
    found: list[Mapping[str, Any]] = []
    for trial in trials:
        if trial.varied not in found:
            found.append(trial.varied)
    across = _across(trials)
    numeric = across and all(isinstance(setting[across], int | float) for setting in found)
    return sorted(found, key=lambda setting: setting[across]) if numeric and across else found


def _across(trials: Sequence[Trial]) -> str | None:
    """The field along the axis: c_min where it is varied, else the first that has several values."""
    fields = list(trials[0].varied)
    several = [name for name in fields if any(t.varied.get(name) != trials[0].varied[name] for t in trials)]
    if "crop_min_scale" in several:
        return "crop_min_scale"
    return next(iter([*several, *fields]), None)


def _panels(settings: Sequence[Mapping[str, Any]], across: str | None) -> list[str]:
    return list(dict.fromkeys(_panel(setting, across) for setting in settings))


def _panel(setting: Mapping[str, Any], across: str | None) -> str:
    """The other fields' values: a panel's title and a table's heading."""
    return ", ".join(_text(v) if isinstance(v, str) else f"{f} {_text(v)}" for f, v in setting.items() if f != across)


def _runs(trials: Sequence[Trial], method: str, setting: Mapping[str, Any]) -> list[Trial]:
    return [trial for trial in trials if trial.method == method and trial.varied == setting]


def _about_intervals(trials: Sequence[Trial]) -> str:
    done = [trial for trial in trials if trial.scores]
    keys = [(trial.method, *map(str, trial.varied.items())) for trial in done]
    counts = sorted({keys.count(key) for key in keys})
    if max(counts, default=1) == 1:
        return "One seed: brackets are 95 % intervals over the test images (Wilson) and say nothing of other seeds."
    seeds = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]])))
    return (
        f"Means over {seeds} seeds with Student's 95 % interval over the seeds; a single seed has its images' (Wilson)."
    )


def _runs_csv(trials: Sequence[Trial], claims: Sequence[str] = ()) -> str:
    """One row a run: what it was trained with, its probes with intervals over images, the scores of claims."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = [f"{score}{part}" for score in SCORES for part in ("", "_low", "_high")]
    fields = list(dict.fromkeys(name for trial in trials for name in trial.varied))
    writer.writerow(["job", "run", "method", *fields, "seed", "state", "n", *columns, *claims])
    for trial in trials:
        found = [trial.scores.get(score) for score in SCORES]
        values = [v for e in found for v in ((e.value, e.low, e.high) if e else ("", "", ""))]
        n = next((e.n for e in found if e), "")
        varied = [_text(trial.varied.get(name, "")) for name in fields]
        own = [e.value if (e := trial.values.get(claim)) else "" for claim in claims]
        writer.writerow([trial.number, trial.name, trial.method, *varied, trial.seed, trial.state, n, *values, *own])
    return buffer.getvalue()


def _number(estimate: Estimate | None) -> Number | None:
    return None if estimate is None else Number(estimate.value, estimate.low, estimate.high)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
