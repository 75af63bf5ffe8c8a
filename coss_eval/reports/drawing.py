"""What figures share: one look a checkpoint, the style, lines with their bands, and the files they become.

Every figure is a Figure object drawn under coss.mplstyle on Agg: pyplot and the caller's settings stay untouched.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Collection, Iterator, Sequence
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

from coss_eval.errors import UsageError
from coss_eval.reports.estimates import Estimate
from coss_eval.reports.files import write_file
from coss_eval.reports.layout import Number, Row
from coss_eval.reports.results import Results

MARKERS = "os^Dvph"
DASHES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
WIDTH = 7.0  # inches: the text width of a two-column page


class Look(NamedTuple):
    """How one checkpoint is drawn in every figure."""

    color: str
    marker: str
    dashes: Literal["-", "--", ":"]


@contextmanager
def style() -> Iterator[None]:
    """coss.mplstyle alone for a while, whatever the caller's settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(rc_params_from_file(Path(__file__).with_name("coss.mplstyle"), use_default_template=False))
        yield


def looks(labels: Sequence[str], untrained: Collection[str] = ()) -> dict[str, Look]:
    """One look a checkpoint; untrained networks are grey and dashed, so that they read as the reference they are."""
    colors = [entry["color"] for entry in mpl.rcParams["axes.prop_cycle"]]
    found, number = {}, 0
    for label in labels:
        if label in untrained:
            found[label] = Look("#8a8a8a", "o", "--")
            continue
        dashes = DASHES[number // len(colors) % len(DASHES)]
        found[label] = Look(f"#{colors[number % len(colors)].lstrip('#')}", MARKERS[number % len(MARKERS)], dashes)
        number += 1
    return found


def looks_in(results: Results, task: str) -> dict[str, Look]:
    """The looks of those that a task was measured for, the same as in every other figure."""
    look = looks(results.labels, results.untrained)
    return {label: look[label] for label in results.measured(task)}


def save(figure: Figure, stem: Path) -> list[Path]:
    """The figure as stem.png and stem.pdf, without dates, so that the same figure is the same file; the paths."""
    paths = []
    for kind in ("png", "pdf"):
        buffer = io.BytesIO()
        metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
        figure.savefig(buffer, format=kind, metadata=metadata)
        paths.append(write_file(stem.with_name(f"{stem.name}.{kind}"), buffer.getvalue()))
    return paths


def grid(rows: int, columns: int, *, height: float, width: float = WIDTH) -> tuple[Figure, Any]:
    """A figure with its axes as an array (rows, columns); ``height`` is a panel's, in inches."""
    figure = Figure(figsize=(width, rows * height + 0.5), layout="constrained")
    return figure, figure.subplots(rows, columns, sharey=True, squeeze=False)


def line(axis: Axes, x: Sequence[float], points: Sequence[Estimate | None], look: Look, *, scale: float = 100) -> None:
    """Values over ``x`` with a band of their intervals; a gap breaks the line. ``scale`` 100 is for percent."""
    y, low, high = _scaled(points, scale)
    axis.fill_between(x, low, high, color=look.color, alpha=0.16, linewidth=0)
    axis.plot(x, y, color=look.color, marker=look.marker, linestyle=look.dashes)


def marks(axis: Axes, x: Sequence[float], points: Sequence[Estimate | None], look: Look, *, scale: float = 100) -> None:
    """Values that no line joins, as their places have no order, with bars for their intervals."""
    y, low, high = _scaled(points, scale)
    axis.vlines(x, low, high, color=look.color, linewidth=1, alpha=0.6)
    axis.plot(x, y, color=look.color, marker=look.marker, linestyle="")


def _scaled(points: Sequence[Estimate | None], scale: float) -> tuple[list[float], list[float], list[float]]:
    """Values and the bounds of their intervals, NaN where there is none."""
    bounds = [(p.value, p.low, p.high) if p is not None else (None, None, None) for p in points]
    value, low, high = ([math.nan if b is None else scale * b for b in column] for column in zip(*bounds, strict=True))
    return value, low, high


def percent(axes: Any, chance: float | None = None) -> None:
    """All panels on one scale from 0 to a little above the highest value, with a line where guessing stands."""
    top = max(axis.dataLim.y1 for axis in axes.flat if axis.get_visible() and axis.has_data())
    for axis in axes.flat:
        axis.set_ylim(0, min(102.0, top * 1.06))
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.margins(x=0.04)
        if chance is not None and axis.get_visible():
            axis.axhline(100 * chance, color="#555555", linewidth=0.7, linestyle=(0, (1, 2)), zorder=0, gid="chance")


def chance_in(results: Results, look: Collection[str]) -> float | None:
    """The accuracy of guessing on the images of all that is drawn; None where it is not known or not one."""
    found = {results.chance(label) for label in look}
    return found.pop() if len(found) == 1 else None


def label_edges(figure: Figure, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize="medium")
    figure.supylabel(y, fontsize="medium")


def legend(figure: Figure, look: dict[str, Look]) -> None:
    """One legend above all panels, in as many columns as fit."""
    handles = [Line2D([], [], color=one.color, marker=one.marker, linestyle=one.dashes) for one in look.values()]
    widths = [0.55 + 0.062 * len(label) for label in look]  # inches
    fits = len(look) if sum(widths) < figure.get_figwidth() else int(figure.get_figwidth() / max(widths))
    columns = max(1, fits)
    figure.legend(handles, list(look), loc="outside upper left", ncols=columns, columnspacing=1.4, borderaxespad=0)


def label_ends(axis: Axes, lines: dict[str, list[Estimate | None]], look: dict[str, Look]) -> None:
    """The checkpoints' names at the ends of their lines, long ones in several, moved apart where they would overlap."""
    from sklearn.isotonic import isotonic_regression  # here: scikit-learn takes a while to import

    ends = {label: [p for p in points if p is not None][-1].value * 100 for label, points in lines.items()}
    labels = sorted(ends, key=lambda label: ends[label])
    texts = [textwrap.fill(label, 28) for label in labels]
    bottom, top = axis.get_ylim()
    heights = 0.07 * (top - bottom) * (1 + 0.8 * np.array([text.count("\n") for text in texts]))
    stacked = heights.cumsum() - heights / 2  # the middles of names that touch, from 0
    # names do not overlap where y - stacked nowhere falls: the least squares nearest to the ends that keeps it so
    shifts = isotonic_regression(
        [ends[label] for label in labels] - stacked, y_min=bottom, y_max=max(bottom, top - heights.sum())
    )
    for label, text, y in zip(labels, texts, shifts + stacked, strict=True):
        axis.annotate(
            text,
            (1.02, y),
            xycoords=("axes fraction", "data"),
            color=look[label].color,
            va="center",
            fontsize=7.5,
            linespacing=1.0,
        )


BETTER, WORSE, UNCLEAR = "#00619a", "#b34700", "#6a6a6a"  # dark enough for text on white; fill tells them apart in grey


def forest(rows: Sequence[Row], *, width: float = WIDTH, xlabel: str = "difference from the baseline") -> Figure:
    """A forest plot: each row's first Number as a mark with its interval, named at its left, in words at its right.

    ``rows`` stand under the headings of their groups; rows that are no percent have a scale of their own below the
    others. A mark is filled where the difference stands after adjustment (``Number.clear``), hollow otherwise.
    ``width`` is in inches, as printed. Rows without a number are left out. Raises UsageError where none has one.
    """
    scales: dict[str, list[tuple[Row, Number]]] = {}
    for row in rows:
        if row.entries and isinstance(row.entries[0], Number):
            scales.setdefault(row.entries[0].unit, []).append((row, row.entries[0]))
    if not scales:
        raise UsageError("a forest plot needs differences, and none of these rows has one")
    with style():
        found = [scales[unit] for unit in sorted(scales)]  # percent, then plain
        stacks = [_forest_lines(each, width) for each in found]
        heights = [_LINE * sum(1 + text.count("\n") for text, _ in lines) + 0.1 for lines in stacks]
        figure = Figure(figsize=(width, sum(heights) + 0.42 * len(found)), layout="constrained")
        axes = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axis, lines in zip(axes, stacks, strict=True):
            points = any(number is not None and number.unit == "percent" for _, number in lines)
            _draw_forest(axis, lines, width)
            axis.set_xlabel(f"{xlabel}, points" if points else f"{xlabel}, as it is")
        return figure


_LINE = 0.16  # inches from one line of a forest plot to the next


def _forest_lines(rows: Sequence[tuple[Row, Number]], width: float) -> list[tuple[str, Number | None]]:
    """The texts at the left, from the top, each with its number; headings of groups have none."""
    room = max(12, int(0.36 * width * 72 / 3.9))  # characters of 7 pt
    lines: list[tuple[str, Number | None]] = []
    before = ""
    for row, number in rows:
        if row.group not in ("", before):
            lines.append((textwrap.fill(row.group, room), None))
        before = row.group
        lines.append((textwrap.fill(row.name, room), number))
    return lines


def _draw_forest(axis: Axes, lines: Sequence[tuple[str, Number | None]], width: float) -> None:
    tall = np.array([1 + text.count("\n") for text, _ in lines], dtype=float)
    places = tall.cumsum() - tall / 2
    axis.axvline(0, color="#555555", linewidth=0.7, zorder=0)
    for y, (_, number) in zip(places, lines, strict=True):
        if number is None:
            continue
        scale = 100 if number.unit == "percent" else 1
        color = UNCLEAR if not number.clear else BETTER if number.better else WORSE
        if number.interval and number.low is not None and number.high is not None:
            axis.hlines(y, scale * number.low, scale * number.high, color=color, linewidth=1.2)
        fill = color if number.clear else "white"
        axis.plot(scale * number.value, y, "o", markersize=4, color=fill, markeredgecolor=color, markeredgewidth=1)
        words = f"{number.main} {number.interval}".strip()
        axis.annotate(
            f"{words}, {number.p_text}" if number.p_text and width >= _WORDY else words,
            (1.02, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=6.5,
            color=color,
        )
    axis.set_ylim(float(tall.sum()), 0)
    axis.set_yticks(places, [text for text, _ in lines])
    for label, (_, number) in zip(axis.get_yticklabels(), lines, strict=True):
        label.set(fontsize=7, fontweight="normal" if number is not None else "bold", linespacing=0.95)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", visible=True)
    axis.margins(x=0.08)
    axis.xaxis.set_major_locator(MaxNLocator(5 if width >= _WORDY else 2))


_WORDY = 4.5  # inches from which on there is room for p beside the interval
