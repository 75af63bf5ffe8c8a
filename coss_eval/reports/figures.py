"""The figures of a report: accuracy by severity, by eps and by masking level, and redundancy beside the untrained.

Every figure is a Figure object drawn under coss.mplstyle on Agg: pyplot and the caller's settings stay untouched.
Bands are the estimates' 95 % intervals. A condition that was not measured is a break in its line.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib import rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from coss_eval.corruptions.names import BENCHMARK, NAMES, SEVERITIES
from coss_eval.reports.results import Estimate, Results, mean
from coss_eval.reports.scores import (
    attack_families,
    attack_rows,
    corrupted,
    eps_text,
    mean_of,
    metric_name,
    norm_name,
    site_order,
)
from coss_eval.store import Store

MARKERS = "os^Dvph"
DASHES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
WIDTH = 7.0  # inches: the text width of a two-column page


class Look(NamedTuple):
    """How one checkpoint is drawn in every figure."""

    color: str
    marker: str
    dashes: Literal["-", "--", ":"]


def write(store: Store | Results, out: Path) -> list[Path]:
    """Draw what the store allows, as PNG and PDF under ``out``; the paths written."""
    from coss_eval.reports.files import write_file

    results = store if isinstance(store, Results) else Results(store)
    paths = []
    for name, maker in FIGURES.items():
        with style():
            figure = maker(results)
            if figure is None:
                continue
            for kind in ("png", "pdf"):
                buffer = io.BytesIO()
                metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
                figure.savefig(buffer, format=kind, metadata=metadata)
                paths.append(write_file(out / f"{name}.{kind}", buffer.getvalue()))
    return paths


@contextmanager
def style() -> Iterator[None]:
    """coss.mplstyle alone for a while, whatever the caller's settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(rc_params_from_file(Path(__file__).with_name("coss.mplstyle"), use_default_template=False))
        yield


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """One look a checkpoint; untrained networks are grey and dashed, so that they read as the reference they are."""
    colors = [entry["color"] for entry in mpl.rcParams["axes.prop_cycle"]]
    found, number = {}, 0
    for label in labels:
        if "untrained" in label.lower():
            found[label] = Look("#8a8a8a", "o", "--")
            continue
        dashes = DASHES[number // len(colors) % len(DASHES)]
        found[label] = Look(f"#{colors[number % len(colors)].lstrip('#')}", MARKERS[number % len(MARKERS)], dashes)
        number += 1
    return found


def corruptions_by_severity(results: Results) -> Figure | None:
    """A small panel a corruption, clean accuracy at 0."""
    names = [name for name in NAMES if name in set(results.rows("corruptions").get("corruption", ()))]
    if not names:
        return None
    columns = min(5, len(names))
    figure, axes = _grid(-(-len(names) // columns), columns, height=1.15)
    look = looks(results.labels)
    for axis, name in zip(axes.flat, names, strict=False):
        axis.set_title(name.replace("_", " ") + ("" if name in BENCHMARK else " *"))
        axis.set_xticks([0, *SEVERITIES])
        for label in results.labels:
            points = [corrupted(results, label, "clean", 0)] + [corrupted(results, label, name, s) for s in SEVERITIES]
            _line(axis, [0, *SEVERITIES], points, look[label])
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    _percent(axes)
    note = "; * held out for validation" if any(name not in BENCHMARK for name in names) else ""
    _label_edges(figure, f"severity (0: clean{note})", "accuracy, %")
    _legend(figure, look)
    return figure


def corruptions_mean(results: Results) -> Figure | None:
    """The mean over the benchmark's corruptions by severity; bands have the images as clusters."""
    look = looks(results.labels)
    lines = {
        label: [corrupted(results, label, "clean", 0)]
        + [mean([corrupted(results, label, name, severity) for name in BENCHMARK]) for severity in SEVERITIES]
        for label in results.labels
    }
    incomplete = [label for label, points in lines.items() if None in points[1:]]
    lines = {label: points for label, points in lines.items() if label not in incomplete}
    if not lines:
        return None
    figure, axes = _grid(1, 1, height=2.4, width=4.2)
    for label, points in lines.items():
        _line(axes[0, 0], [0, *SEVERITIES], points, look[label])
    _percent(axes)
    axes[0, 0].set(xlabel="severity (0: clean)", ylabel="accuracy, mean of 15 corruptions, %")
    _label_ends(axes[0, 0], lines, look)
    if incomplete:
        axes[0, 0].set_title(
            f"left out, not all 15 × 5 measured: {', '.join(incomplete)}", fontsize=6.5, color="#777777"
        )
    return figure


def attacks_by_eps(results: Results) -> Figure | None:
    """A panel an attack and norm; eps on a logarithmic axis, with the clean accuracy at its left."""
    families = attack_families(results)
    if not families:
        return None
    figure, axes = _grid(1, len(families), height=1.9)
    look = looks(results.labels)
    for axis, (attack, norm) in zip(axes.flat, families, strict=True):
        family = attack_rows(results, attack, norm)
        eps = sorted({float(e) for e in family["eps"]} - {0.0})
        at = np.log2(eps) if eps else np.zeros(0)
        x = [at[0] - 1.5, *at] if len(at) else [0.0]
        axis.set_title(f"{attack.upper()}, {norm_name(norm)}")
        for label in results.labels:
            points = [mean_of(results, "attacks", family[family["eps"] == e])(label) for e in (0.0, *eps)]
            _line(axis, x[1:], points[1:], look[label])
            _line(axis, x[:1], points[:1], look[label])
            _line(axis, x[:2], points[:2], Look(look[label].color, "", ":"))  # the axis has no scale here
        axis.set_xticks(x, ["0", *(eps_text(e, norm).removesuffix("/255") for e in eps)])
        axis.set_xlabel("eps, in 255ths" if norm == "linf" else "eps")
    _percent(axes)
    axes[0, 0].set_ylabel("robust accuracy, %")
    _legend(figure, look)
    return figure


def internal_by_level(results: Results) -> Figure | None:
    """A row a kind of damage, a column a site; the mean over the masks' seeds."""
    rows = results.rows("internal")
    rows = rows[rows["metric"] == "accuracy"] if len(rows) else rows
    if rows.empty:
        return None
    kinds, sites = sorted(set(rows["kind"])), sorted(set(rows["site"]), key=site_order)
    figure, axes = _grid(len(kinds), len(sites), height=1.4)
    look = looks(results.labels)
    for i, kind in enumerate(kinds):
        for axis, site in zip(axes[i], sites, strict=True):
            here = rows[(rows["kind"] == kind) & (rows["site"] == site)]
            levels = sorted({float(level) for level in here["level"]})
            axis.set_title(f"{site}: {kind.replace('_', ' ')}")
            axis.xaxis.set_major_locator(MaxNLocator(3))
            axis.xaxis.set_major_formatter("{x:g}")
            for label in results.labels:
                points = [mean_of(results, "internal", here[here["level"] == level])(label) for level in levels]
                _line(axis, levels, points, look[label])
    _percent(axes)
    _label_edges(figure, "level (share masked, or noise)", "accuracy, %")
    _legend(figure, look)
    return figure


def redundancy(results: Results) -> Figure | None:
    """Similarities of the locals, one row a metric; a hollow mark is the same network untrained."""
    rows = results.rows("redundancy")
    bounded = [m for m in ("within", "between", "normalised", "r2", "icc") if m in set(rows["metric"])]
    labels = [label for label in results.labels if label in set(rows["checkpoint"])]
    if not bounded or not labels:
        return None
    figure, axes = _grid(1, 1, height=0.25 + len(bounded) * (0.14 + 0.11 * len(labels)), width=4.6)
    axis, look = axes[0, 0], looks(results.labels)
    states = rows["weights"].fillna("trained") if "weights" in rows else np.full(len(rows), "trained")
    for i, metric in enumerate(bounded):
        for j, label in enumerate(labels):
            y = i + 0.7 * ((j + 0.5) / len(labels) - 0.5)
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
    _legend(figure, {label: look[label] for label in labels})
    return figure


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "corruptions_by_severity": corruptions_by_severity,
    "corruptions_mean": corruptions_mean,
    "attacks_by_eps": attacks_by_eps,
    "internal_by_level": internal_by_level,
    "redundancy": redundancy,
}


def _grid(rows: int, columns: int, *, height: float, width: float = WIDTH) -> tuple[Figure, Any]:
    """A figure with its axes as an array (rows, columns); ``height`` is a panel's, in inches."""
    figure = Figure(figsize=(width, rows * height + 0.5), layout="constrained")
    return figure, figure.subplots(rows, columns, sharey=True, squeeze=False)


def _line(axis: Axes, x: Sequence[float], points: Sequence[Estimate | None], look: Look) -> None:
    nan = float("nan")
    y = [100 * p.value if p is not None else nan for p in points]
    low = [100 * p.low if p is not None and p.low is not None else nan for p in points]
    high = [100 * p.high if p is not None and p.high is not None else nan for p in points]
    axis.fill_between(x, low, high, color=look.color, alpha=0.16, linewidth=0)
    axis.plot(x, y, color=look.color, marker=look.marker, linestyle=look.dashes)


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


def _percent(axes: Any) -> None:
    top = max(axis.dataLim.y1 for axis in axes.flat if axis.get_visible() and axis.has_data())
    for axis in axes.flat:
        axis.set_ylim(0, min(102.0, top * 1.06))
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.margins(x=0.04)


def _label_edges(figure: Figure, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize="medium")
    figure.supylabel(y, fontsize="medium")


def _legend(figure: Figure, look: dict[str, Look]) -> None:
    """One legend above all panels, in as many columns as fit."""
    handles = [Line2D([], [], color=one.color, marker=one.marker, linestyle=one.dashes) for one in look.values()]
    widths = [0.55 + 0.062 * len(label) for label in look]  # inches
    fits = len(look) if sum(widths) < figure.get_figwidth() else int(figure.get_figwidth() / max(widths))
    columns = max(1, fits)
    figure.legend(handles, list(look), loc="outside upper left", ncols=columns, columnspacing=1.4, borderaxespad=0)


def _label_ends(axis: Axes, lines: dict[str, list[Estimate | None]], look: dict[str, Look]) -> None:
    """The checkpoints' names at the ends of their lines, moved apart where they would overlap."""
    ends = {label: [p for p in points if p is not None][-1].value * 100 for label, points in lines.items()}
    bottom, top = axis.get_ylim()
    gap = 0.07 * (top - bottom)
    heights: list[float] = []
    for label in sorted(ends, key=lambda label: ends[label]):
        y = max(ends[label], heights[-1] + gap if heights else bottom)
        heights.append(y)
        axis.annotate(
            label, (1.02, y), xycoords=("axes fraction", "data"), color=look[label].color, va="center", fontsize=7.5
        )
