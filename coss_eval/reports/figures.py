"""The figures of a report: accuracy by severity, eps, masking level and crop, and redundancy beside the untrained.

Bands are the estimates' 95 % intervals. A condition that was not measured is a break in its line.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coss_eval.corruptions.names import BENCHMARK, NAMES, SEVERITIES
from coss_eval.reports.drawing import (
    Look,
    grid,
    label_edges,
    label_ends,
    legend,
    line,
    looks,
    marks,
    percent,
    save,
    style,
)
from coss_eval.reports.results import Estimate, Results, mean
from coss_eval.reports.scores import (
    CROP_FAMILIES,
    attack_families,
    attack_name,
    attack_rows,
    corrupted,
    crop_rows,
    eps_text,
    mean_of,
    metric_name,
    norm_name,
    site_order,
)
from coss_eval.store import Store

CROP_AXES = {
    "area": "crop, share of the area",
    "position": "position of the crop",
    "resolution": "scale of the image",
    "pooled": "crops pooled",
}


def write(store: Store | Results, out: Path) -> list[Path]:
    """Draw what the store allows, as PNG and PDF under ``out``; the paths written."""
    results = store if isinstance(store, Results) else Results(store)
    paths = []
    for name, maker in FIGURES.items():
        with style():
            figure = maker(results)
            if figure is not None:
                paths += save(figure, out / name)
    return paths


BOUNDED = (
    "normalised_per_position",
    "normalised_interior",
    "within_overlapping",
    "within_disjoint",
    "normalised",
    "within",
    "between",
    "r2",
    "icc",
)


def looks_in(results: Results, task: str) -> dict[str, Look]:
    """The looks of those that a task was measured for, the same as in every other figure."""
    look = looks(results.labels)
    return {label: look[label] for label in results.measured(task)}


def corruptions_by_severity(results: Results) -> Figure | None:
    """A small panel a corruption, clean accuracy at 0."""
    names = [name for name in NAMES if name in set(results.rows("corruptions").get("corruption", ()))]
    if not names:
        return None
    columns = min(5, len(names))
    figure, axes = grid(-(-len(names) // columns), columns, height=1.15)
    look = looks_in(results, "corruptions")
    for axis, name in zip(axes.flat, names, strict=False):
        axis.set_title(name.replace("_", " ") + ("" if name in BENCHMARK else " *"))
        axis.set_xticks([0, *SEVERITIES])
        for label in look:
            points = [corrupted(results, label, "clean", 0)] + [corrupted(results, label, name, s) for s in SEVERITIES]
            line(axis, [0, *SEVERITIES], points, look[label])
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    percent(axes)
    note = "; * held out for validation" if any(name not in BENCHMARK for name in names) else ""
    label_edges(figure, f"severity (0: clean{note})", "accuracy, %")
    legend(figure, look)
    return figure


def corruptions_mean(results: Results) -> Figure | None:
    """The mean over the benchmark's corruptions by severity; bands have the images as clusters."""
    look = looks_in(results, "corruptions")
    lines = {
        label: [corrupted(results, label, "clean", 0)]
        + [mean([corrupted(results, label, name, severity) for name in BENCHMARK]) for severity in SEVERITIES]
        for label in look
    }
    incomplete = [label for label, points in lines.items() if None in points[1:]]
    lines = {label: points for label, points in lines.items() if label not in incomplete}
    if not lines:
        return None
    figure, axes = grid(1, 1, height=2.4, width=4.2)
    for label, points in lines.items():
        line(axes[0, 0], [0, *SEVERITIES], points, look[label])
    percent(axes)
    axes[0, 0].set(xlabel="severity (0: clean)", ylabel="accuracy, mean of 15 corruptions, %")
    label_ends(axes[0, 0], lines, look)
    if incomplete:
        note = textwrap.fill(f"left out, not all 15 × 5 measured: {', '.join(incomplete)}", 66)
        axes[0, 0].set_title(note, fontsize=6.5, color="#777777")
    return figure


def attacks_by_eps(results: Results) -> Figure | None:
    """A panel an attack and norm; eps on a logarithmic axis, with the clean accuracy at its left."""
    families = attack_families(results)
    if not families:
        return None
    columns = min(len(families), 3)
    figure, axes = grid(-(-len(families) // columns), columns, height=1.9)
    look = looks_in(results, "attacks")
    for axis in axes.flat[len(families) :]:
        axis.set_visible(False)
    for axis, (attack, norm) in zip(axes.flat, families, strict=False):
        family = attack_rows(results, attack, norm)
        eps = sorted({float(e) for e in family["eps"]} - {0.0})
        at = np.log2(eps) if eps else np.zeros(0)
        x = [at[0] - 1.5, *at] if len(at) else [0.0]
        axis.set_title(f"{attack_name(attack)}, {norm_name(norm)}")
        for label in look:
            points = [mean_of(results, "attacks", family[family["eps"] == e])(label) for e in (0.0, *eps)]
            line(axis, x[1:], points[1:], look[label])
            line(axis, x[:1], points[:1], look[label])
            line(axis, x[:2], points[:2], Look(look[label].color, "", ":"))  # the axis has no scale here
        axis.set_xticks(x, ["0", *(eps_text(e, norm).removesuffix("/255") for e in eps)])
        axis.set_xlabel("eps, in 255ths" if norm == "linf" else "eps")
    percent(axes)
    for axis in axes[:, 0]:
        axis.set_ylabel("robust accuracy, %")
    legend(figure, look)
    return figure


def internal_by_level(results: Results) -> Figure | None:
    """A row a kind of damage, a column a site; the mean over the masks' seeds."""
    rows = results.rows("internal")
    rows = rows[rows["metric"] == "accuracy"] if len(rows) else rows
    if rows.empty:
        return None
    kinds, sites = sorted(set(rows["kind"])), sorted(set(rows["site"]), key=site_order)
    figure, axes = grid(len(kinds), len(sites), height=1.4)
    look = looks_in(results, "internal")
    for i, kind in enumerate(kinds):
        for axis, site in zip(axes[i], sites, strict=True):
            here = rows[(rows["kind"] == kind) & (rows["site"] == site)]
            axis.set_visible(not here.empty)  # a vector has no locations
            if here.empty:
                continue
            levels = sorted({float(level) for level in here["level"]})
            axis.set_title(f"{site}: {kind.replace('_', ' ')}")
            axis.xaxis.set_major_locator(MaxNLocator(3))
            axis.xaxis.set_major_formatter("{x:g}")
            for label in look:
                points = [mean_of(results, "internal", here[here["level"] == level])(label) for level in levels]
                line(axis, levels, points, look[label])
    percent(axes)
    label_edges(figure, "level (share masked, or noise)", "accuracy, %")
    legend(figure, look)
    return figure


def crops(results: Results) -> Figure | None:
    """Accuracy above, cosine with the full image below; a column a family: area, position, resolution, pooled."""
    families = [family for family in CROP_FAMILIES if crop_rows(results, family, "accuracy")]
    if not families:
        return None
    figure = Figure(figsize=(1 + 1.5 * len(families), 3.6), layout="constrained")
    axes = figure.subplots(2, len(families), sharey="row", sharex="col", squeeze=False)
    look = looks_in(results, "crops")
    for column, family in zip(axes.T, families, strict=True):
        for axis, metric in zip(column, ("accuracy", "stability"), strict=True):
            groups = crop_rows(results, family, metric)
            x = _crop_axis(axis, family, [value for value, _ in groups])
            for number, label in enumerate(look):
                points = [mean_of(results, "crops", rows)(label) for _, rows in groups]
                draw, beside = (marks, 0.12 * number) if family == "position" else (line, 0.0)
                draw(axis, [at + beside for at in x], points, look[label], scale=100 if metric == "accuracy" else 1)
        column[1].set_xlabel(CROP_AXES[family])
    percent(axes[:1])
    axes[0, 0].set_ylabel("accuracy, %")
    axes[1, 0].set_ylabel("cosine with the full image")
    legend(figure, look)
    return figure


def _crop_axis(axis: Axes, family: str, values: Sequence[float | str]) -> Sequence[float]:
    """Where the values stand on the axis, which is labelled there."""
    if family == "position":
        axis.set_xticks(range(len(values)), ["".join(word[0].upper() for word in str(v).split()) for v in values])
        return range(len(values))
    x = [float(value) for value in values]
    if family == "area":
        axis.xaxis.set_major_locator(MaxNLocator(4))
    else:
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [f"{value:g}" for value in x])
        axis.minorticks_off()
    return x


def redundancy(results: Results) -> Figure | None:
    """Similarities of the locals, one row a metric; a hollow mark is the same network untrained."""
    rows = results.rows("redundancy")
    bounded = [metric for metric in BOUNDED if metric in set(rows["metric"])]
    look = looks_in(results, "redundancy")
    if not bounded or not look:
        return None
    figure, axes = grid(1, 1, height=0.25 + len(bounded) * (0.14 + 0.11 * len(look)), width=4.6)
    axis = axes[0, 0]
    states = rows["weights"].fillna("trained") if "weights" in rows else np.full(len(rows), "trained")
    for i, metric in enumerate(bounded):
        for j, label in enumerate(look):
            y = i + 0.7 * ((j + 0.5) / len(look) - 0.5)
            untrained, trained = (
                mean_of(results, "redundancy", rows[(rows["metric"] == metric) & (states == state)])(label)
                for state in ("untrained", "trained")
            )
            _dumbbell(axis, y, untrained, trained, look[label])
    axis.set_yticks(range(len(bounded)), [metric_name(metric) for metric in bounded])
    axis.set(xlabel="cosine or share (hollow: the same network untrained)", ylim=(len(bounded) - 0.5, -0.5))
    axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", visible=True)
    axis.tick_params(axis="y", length=0)
    legend(figure, look)
    return figure


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "corruptions_by_severity": corruptions_by_severity,
    "corruptions_mean": corruptions_mean,
    "attacks_by_eps": attacks_by_eps,
    "internal_by_level": internal_by_level,
    "crops": crops,
    "redundancy": redundancy,
}


def _dumbbell(axis: Axes, y: float, untrained: Estimate | None, trained: Estimate | None, look: Look) -> None:
    if untrained is not None and trained is not None:
        axis.plot([untrained.value, trained.value], [y, y], color=look.color, linewidth=0.8, alpha=0.5)
    if untrained is not None:
        axis.plot(
            untrained.value, y, look.marker, markerfacecolor="white", markeredgecolor=look.color, markeredgewidth=1
        )
    if trained is not None:
        axis.plot(trained.value, y, look.marker, color=look.color, markersize=5)
        if trained.low is not None and trained.high is not None:
            axis.plot([trained.low, trained.high], [y, y], color=look.color, linewidth=2)
