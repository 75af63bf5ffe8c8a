"""Figures of differences: the forest plot of a verdict, and the map of many scores by many models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator

from coss_eval.errors import UsageError
from coss_eval.reports.drawing import BETTER, CLEAR, SMALLEST, UNCLEAR, WIDTH, WORSE, Figure, style
from coss_eval.reports.layout import Number, Row, broken
from coss_eval.statistics import Difference


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
            lines.append(("\n".join(broken(row.group, room)), None))
        before = row.group
        lines.append(("\n".join(broken(row.name, room)), number))
    return lines


def _draw_forest(axis: Axes, lines: Sequence[tuple[str, Number | None]], width: float) -> None:
    tall = np.array([1 + text.count("\n") for text, _ in lines], dtype=float)
    places = tall.cumsum() - tall / 2
    axis.axvline(0, color="#555555", linewidth=0.7, zorder=0)
    bars: list[tuple[float, float, float, str]] = []
    marks: dict[tuple[str, str], list[tuple[float, float]]] = {}  # by fill and edge: one artist for all alike
    notes = []
    for y, (_, number) in zip(places.tolist(), lines, strict=True):
        if number is None:
            continue
        scale = 100 if number.unit == "percent" else 1
        color = {"better": BETTER, "worse": WORSE, "clear": CLEAR, "": UNCLEAR}[number.side]
        if number.interval and number.low is not None and number.high is not None:
            bars.append((y, scale * number.low, scale * number.high, color))
        marks.setdefault((color if number.clear else "white", color), []).append((scale * number.value, y))
        words = f"{number.main} {number.interval}".strip()
        words = f"{words}, {number.p_text}" if number.p_text and width >= _WORDY else words
        notes.append(_note(axis, words, y, color))
    if bars:
        heights, low, high, colors = zip(*bars, strict=True)
        axis.hlines(heights, low, high, colors=list(colors), linewidth=1.2)
    for (fill, edge), places_of in marks.items():
        x, heights = zip(*places_of, strict=True)
        axis.plot(x, heights, "o", markersize=4, color=fill, markeredgecolor=edge, markeredgewidth=1)
    for note in sorted(notes, key=lambda note: note.get_window_extent().width)[:-1]:
        note.set_in_layout(False)  # the widest one needs room, and each that is asked takes time
    axis.set_ylim(float(tall.sum()), 0)
    axis.set_yticks(places, [text for text, _ in lines])
    for label, (_, number) in zip(axis.get_yticklabels(), lines, strict=True):
        label.set(fontsize=7, fontweight="normal" if number is not None else "bold", linespacing=0.95)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", visible=True)
    axis.margins(x=0.08)
    axis.xaxis.set_major_locator(MaxNLocator(5 if width >= _WORDY else 2))


def _note(axis: Axes, words: str, y: float, color: str) -> Annotation:
    """Words at the right of the axis."""
    where = ("axes fraction", "data")
    return axis.annotate(words, (1.02, y), xycoords=where, va="center", fontsize=6.5, color=color)


DARK = 0.5  # luma of a square below which white can be read on it better than black
_WORDY = 4.5  # inches from which on there is room for p beside the interval


def difference_map(
    rows: Sequence[str],
    columns: Sequence[str],
    found: Sequence[Sequence[Difference | None]],
    *,
    width: float | None,
    quantity: str,
) -> Figure:
    """Differences as coloured squares: purple is more, orange less, bold where the interval leaves 0 out, blank a gap.

    Numbers stand in the squares, in points. Of more columns than rows the map stands on its side, so that it grows in
    length; models are always named.
    """
    values = np.array([[math.nan if d is None else 100 * d.difference for d in row] for row in found])
    clear = np.array([[d is not None and (d.low > 0 or d.high < 0) for d in row] for row in found])
    if len(columns) > len(rows) // 2:
        rows, columns, values, clear = columns, rows, values.T, clear.T
    inches = width or min(WIDTH, 1.9 + 0.42 * len(columns))
    longest = max(map(len, rows))
    stub = min(0.4 * inches, 0.058 * (longest if longest < 24 else longest // 2 + 6) + 0.1)
    side = (inches - stub - 0.35) / len(columns)
    names = ["\n".join(broken(row, max(8, int(stub / 0.052)))) for row in rows]
    height = 0.06 + 0.105 * max(1 + name.count("\n") for name in names)
    heads = ["\n".join(broken(column, 24)) for column in columns]
    body = height * len(rows)
    figure = Figure(figsize=(inches, body + 1.7), layout="constrained")
    axis, scale = figure.subplots(2, 1, height_ratios=(body, 0.08))
    most = max(1.0, float(np.nanmax(np.abs(values))))
    image = axis.imshow(values, cmap="PuOr", vmin=-most, vmax=most, aspect="auto")
    axis.set_xticks(range(len(columns)), heads, rotation=90, fontsize=min(7, max(SMALLEST, side * 72 * 0.8)))
    axis.set_yticks(range(len(rows)), names, fontsize=SMALLEST + 0.5)
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    for i, j in np.argwhere(np.isfinite(values)):
        text = f"{values[i, j]:+.0f}".replace("-", "−") if side < 0.33 else f"{values[i, j]:+.1f}".replace("-", "−")
        if len(text) * SMALLEST * 0.6 / 72 > side:
            text = "+" if values[i, j] > 0 else "−"  # no room: what the colour says, for grey print
        weight = "bold" if clear[i, j] else "normal"
        red, green, blue, _ = image.to_rgba(values[i, j])
        ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < DARK else "#222222"
        cell = axis.text(j, i, text, ha="center", va="center", fontsize=SMALLEST, fontweight=weight, color=ink)
        cell.set_in_layout(False)  # inside of the axis: no room is to be found for it
    figure.colorbar(image, cax=scale, orientation="horizontal", label="\n".join(broken(quantity, int(inches * 12))))
    return figure
