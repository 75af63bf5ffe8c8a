"""What figures share: one look a method, the style, lines with their bands, and the files they become.

Every figure is a Figure object drawn under coss.mplstyle on Agg: pyplot and the caller's settings stay untouched. It is
as wide as it is printed, so that a point of its text is a point on paper.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib import figure as mpl_figure
from matplotlib import rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox, BboxBase
from numpy.typing import NDArray

from coss_eval.reports.estimates import Estimate
from coss_eval.reports.files import write_file
from coss_eval.reports.layout import broken
from coss_eval.reports.results import Results

LineStyle = Literal["-", "--", ":"] | tuple[float, tuple[float, ...]]

# Okabe & Ito (2008), told apart by colour-blind readers; yellow is left out (too light on white)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dvph"
DASHES: tuple[LineStyle, ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (1, 1.3)),
    (0, (6, 1.4, 1, 1.4)),
    (0, (2.2, 1.2)),
    (0, (9, 1.6)),
    (0, (4, 1.2, 1, 1.2, 1, 1.2)),
)
GREY, PALE = "#8a8a8a", "#c4c4c4"
# Dark enough for text on white; fill tells them apart in grey. CLEAR: no better and no worse
BETTER, WORSE, CLEAR, UNCLEAR = "#00619a", "#b34700", "#1d2126", "#6a6a6a"
WIDTH = 7.0  # inches: the text width of a two-column page
MANY = 12  # models that lines can tell apart; of more, the others are pale
SMALLEST = 6.0  # pt
KINDS = ("png", "pdf", "svg")
PACKED = 3  # zlib's level: the usual 6 takes half as long again for 6 % off a PNG
PERSON = b"coss34"  # of the names' hash: byol, co-byol, dino, co-dino, simclr, co-simclr, supervised all differ by it


class Look(NamedTuple):
    """How one method is drawn in every figure; what is not ``named`` is one of too many."""

    color: str
    marker: str
    dashes: LineStyle
    named: bool = True


@dataclass(frozen=True)
class Canvas:
    """What a figure is drawn for: its ``width`` in inches (None: its own), the labels shown (empty: all), the baseline.

    The baseline is a label; None is the first.
    """

    width: float | None = None
    labels: tuple[str, ...] = ()
    baseline: str | None = None

    def inches(self, natural: float = WIDTH) -> float:
        """The figure's width."""
        return natural if self.width is None else self.width

    def shown(self, labels: Iterable[str]) -> list[str]:
        """Those of ``labels`` that are asked for, the baseline first."""
        found = [label for label in labels if not self.labels or label in (*self.labels, self.baseline)]
        return sorted(found, key=lambda label: label != self.baseline)  # stable


WHOLE = Canvas()


Drawn = TypeVar("Drawn", bound=mpl_figure.Figure)


class Figure(mpl_figure.Figure):
    """A figure that shows itself in a notebook; matplotlib's own does so only after pyplot has drawn one there.

    Its canvas is Agg's, which keeps its renderer: without, every text that is measured makes one as large as the page.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        found = io.BytesIO()
        self.savefig(found, format="png", bbox_inches="tight")
        return found.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """coss.mplstyle alone for a while, whatever the caller's settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_own_style())
        yield


@cache
def _own_style() -> mpl.RcParams:
    return rc_params_from_file(Path(__file__).with_name("coss.mplstyle"), use_default_template=False)


def looks(names: Iterable[str], untrained: Collection[str] = ()) -> dict[str, Look]:
    """One look a name: colour, marker and line style by the name itself, whatever stands beside it and in what order.

    Where several of ``names`` would share a colour, the one whose hash is smaller keeps it and the next takes the next
    that is free: so give all names that a folder has, also where few are shown. Untrained networks are grey and dashed,
    so that they read as the reference they are.
    """
    order = list(dict.fromkeys(names))
    found: dict[str, Look] = {}
    taken: set[tuple[bool, int]] = set()
    for name in sorted(order, key=_hashed):
        grey, first = name in untrained, _hashed(name)
        slots = (len(COLORS) * turn + (first + step) % len(COLORS) for turn in count() for step in range(len(COLORS)))
        slot = next(slot for slot in slots if (grey, slot) not in taken)
        taken.add((grey, slot))
        turn, place = divmod(slot, len(COLORS))
        marker = MARKERS[(place + turn) % len(MARKERS)]
        dashes = DASHES[(place + 2 * turn + turn // len(MARKERS)) % len(DASHES)]
        found[name] = Look(GREY, marker, (0, (3, 1.5))) if grey else Look(COLORS[place], marker, dashes)
    return {name: found[name] for name in order}


def _hashed(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=4, person=PERSON).digest(), "big")


def methods_of(labels: Sequence[str], methods: Mapping[str, str]) -> dict[str, str]:
    """What a label's look belongs to: its method, also where one seed of it is there alone; itself where two share it.

    ``methods``: those that are known, by label.
    """
    named = {label: methods.get(label) or re.sub(r"[-_ ,]*\(?seeds?[=_ -]?\d+\)?$", "", label) for label in labels}
    several = Counter(named.values())
    return {label: name if name and several[name] == 1 else label for label, name in named.items()}


def looks_in(results: Results, task: str, canvas: Canvas = WHOLE) -> dict[str, Look]:
    """The looks of those that a task was measured for, the same as in every other figure, the baseline first.

    Beyond MANY of them the others are pale and without a name of their own.
    """
    return looks_of(results, results.measured(task), canvas)


def looks_of(results: Results, labels: Sequence[str], canvas: Canvas = WHOLE) -> dict[str, Look]:
    """``looks_in`` of some labels."""
    name = methods_of(results.labels, results.groups.methods)
    look = looks(name.values(), {name[label] for label in results.untrained if label in name})
    shown = canvas.shown(labels)
    return {label: look[name[label]] if i < MANY else Look(PALE, "", "-", False) for i, label in enumerate(shown)}


def save(figure: mpl_figure.Figure, stem: Path, kinds: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """The figure as stem.png, stem.pdf ..., without dates, so that the same figure is the same file; the paths."""
    paths = []
    options: dict[str, dict[str, Any]] = {
        "pdf": {"metadata": {"CreationDate": None}},
        "svg": {"metadata": {"Date": None}},
        "png": {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": PACKED}},
    }
    for kind in kinds:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, **options[kind])
        paths.append(write_file(stem.with_name(f"{stem.name}.{kind}"), buffer.getvalue()))
    return paths


def panels(
    number: int, *, width: float, height: float, least: float = 1.2, most: int = 5, alike: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of ``number`` panels, as many beside one another as have ``least`` inches, at ``most``.

    ``height`` is a panel's, in inches; ``alike`` panels have one scale, which the first of a row shows.
    """
    columns = max(1, min(most, number, int((width - 0.3) / least)))
    rows = -(-number // columns)
    figure = Figure(figsize=(width, rows * height + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=alike, squeeze=False).flat)
    for axis in axes[number:]:
        axis.set_visible(False)
    for place, axis in enumerate(axes[:number]):
        axis.tick_params(labelbottom=True, labelleft=not alike or place % columns == 0)
    return figure, axes[:number]


def settle(figure: Drawn) -> Drawn:
    """The figure laid out, titles broken and tick labels thinned out where they would reach into one another.

    The layout stays as it is then: it takes longer than all else that is drawn, and a figure that has an engine for it
    is drawn twice for each file.
    """
    _lay_out(figure)
    changed = [change(axis) for axis in figure.axes if axis.get_visible() for change in (_title, _label, _thin_out)]
    if any(changed):
        _lay_out(figure)
    figure.set_layout_engine(None)
    return figure


def _lay_out(figure: mpl_figure.Figure) -> None:
    engine = figure.get_layout_engine()
    if engine is None:
        figure.draw_without_rendering()
    else:
        engine.execute(figure)


def _title(axis: Axes) -> bool:
    """Break the title where it is longer than the axis; whether it was."""
    title = axis.get_title(loc="left")
    if not title or "\n" in title:
        return False
    drawn = next(text for text in axis.get_children() if isinstance(text, Text) and text.get_text() == title)
    wide, room = drawn.get_window_extent().width, axis.get_window_extent().width
    if wide <= room:
        return False
    axis.set_title("\n".join(broken(title, max(6, int(len(title) * room / wide)))), loc="left")
    return True


def _label(axis: Axes) -> bool:
    """Break the label at the side where it is longer than the axis is high; whether it was."""
    label = axis.get_ylabel()
    long, room = axis.yaxis.label.get_window_extent().height, axis.get_window_extent().height
    if not label or long <= room or "\n" in label:
        return False
    axis.set_ylabel("\n".join(broken(label, max(8, int(len(label) * room / long)))))
    return True


def _thin_out(axis: Axes) -> bool:
    """Leave every second label along the bottom, or every third ..., until none touches its neighbour; whether so."""
    low, high = sorted(axis.get_xlim())
    ticks = [
        (x, label) for x, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=False) if low <= x <= high
    ]
    named = [(float(x), label.get_text(), label.get_window_extent()) for x, label in ticks if label.get_text()]
    step = next(step for step in count(1) if _apart([box for _, _, box in named[::step]]))
    if step == 1:
        return False
    axis.set_xticks([x for x, _, _ in named[::step]], [text for _, text, _ in named[::step]])
    axis.minorticks_off()
    return True


def _apart(boxes: Sequence[BboxBase]) -> bool:
    return all(b.x0 - a.x1 > 2 for a, b in pairwise(boxes))


def line(axis: Axes, x: Sequence[float], points: Sequence[Estimate | None], look: Look, *, scale: float = 100) -> None:
    """Values over ``x`` with a band of their intervals; a gap breaks the line. ``scale`` 100 is for percent."""
    lines(axis, x, {"": points}, {"": look}, scale=scale)


def lines(
    axis: Axes,
    x: Sequence[float],
    points: Mapping[str, Sequence[Estimate | None]],
    look: Mapping[str, Look],
    *,
    scale: float = 100,
) -> None:
    """A ``line`` a label over one ``x``; those too many to be told apart are drawn as one collection, as all bands are.

    fill_between and plot take three times as long, for units and cycles that none of these has.
    """
    scaled = {label: _scaled(points[label], scale) for label in points}
    named, pale = ([label for label in points if look[label].named is which] for which in (True, False))
    bands = [(band, look[label].color) for label in named for band in _bands(x, *scaled[label][1:])]
    if bands:
        areas, colors = map(list, zip(*bands, strict=True))  # matplotlib 3.8: a tuple of two is a colour and its alpha
        axis.add_collection(PolyCollection(areas, facecolors=colors, alpha=0.16, linewidths=0))
    for label in named:
        one = look[label]
        stroke(axis, x, scaled[label][0], color=one.color, marker=one.marker, linestyle=one.dashes)
    if pale:
        one, paths = look[pale[0]], [np.column_stack([x, scaled[label][0]]) for label in pale]
        axis.add_collection(LineCollection(paths, colors=one.color, linestyles=one.dashes, linewidths=0.6, zorder=1))
    axis.autoscale_view()


def stroke(axis: Axes, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """A line of plain numbers; ``axis.autoscale_view()`` fits the axis when all are there."""
    axis.add_line(Line2D(x, y, **style))


def _bands(x: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Iterator[NDArray[np.float64]]:
    """The areas between two curves, (2 M, 2) for M neighbours without a gap."""
    edges = np.column_stack([x, low, high]).astype(float)
    there = np.isfinite(edges).all(axis=1)
    for part in np.split(edges, np.flatnonzero(np.diff(there)) + 1):
        if np.isfinite(part).all():
            yield np.concatenate([part[:, :2], part[::-1, ::2]])


def marks(axis: Axes, x: Sequence[float], points: Sequence[Estimate | None], look: Look, *, scale: float = 100) -> None:
    """Values that no line joins, as their places have no order, with bars for their intervals."""
    y, low, high = _scaled(points, scale)
    axis.vlines(x, low, high, color=look.color, linewidth=1, alpha=0.6)
    axis.plot(x, y, color=look.color, marker=look.marker or "_", linestyle="")


def _scaled(points: Sequence[Estimate | None], scale: float) -> tuple[list[float], list[float], list[float]]:
    """Values and the bounds of their intervals, NaN where there is none."""
    bounds = [(p.value, p.low, p.high) if p is not None else (None, None, None) for p in points]
    value, low, high = ([math.nan if b is None else scale * b for b in column] for column in zip(*bounds, strict=True))
    return value, low, high


def percent(axes: Iterable[Axes], chance: float | None = None) -> None:
    """All panels on one scale from 0 to a little above the highest value, with a line where guessing stands."""
    shown = [axis for axis in axes if axis.get_visible()]
    top = max(axis.dataLim.y1 for axis in shown if axis.has_data())
    for axis in shown:
        axis.set_ylim(0, min(102.0, top * 1.06))
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.margins(x=0.04)
        if chance is not None:
            axis.axhline(100 * chance, color="#555555", linewidth=0.7, linestyle=(0, (1, 2)), zorder=0, gid="chance")


def chance_in(results: Results, look: Collection[str]) -> float | None:
    """The accuracy of guessing on the images of all that is drawn; None where it is not known or not one."""
    found = {results.chance(label) for label in look}
    return found.pop() if len(found) == 1 else None


def label_edges(figure: Figure, x: str, y: str) -> None:
    """One label for all panels' axes, broken where the figure is narrow."""
    room = int(figure.get_figwidth() * 72 / 4.6)
    figure.supxlabel("\n".join(broken(x, room)), fontsize="medium")
    figure.supylabel(y, fontsize="medium")


def legend(figure: Figure, look: Mapping[str, Look]) -> None:
    """One legend above all panels, in as many columns as fit; those too many to be named are counted."""
    named = {label: one for label, one in look.items() if one.named}
    room = int((figure.get_figwidth() - 0.55) / 0.058)
    names = ["\n".join(broken(label, room)) for label in named]
    shown = list(named.values())
    if len(named) < len(look):
        others = f"the other {len(look) - len(named)} of {len(look)}, too many to tell apart: choose with --models"
        longest = max((len(line) for name in names for line in name.split("\n")), default=0)
        names.append("\n".join(broken(others, min(room, max(24, longest)))))  # all columns are as wide as the widest
        shown.append(next(one for one in look.values() if not one.named))
    handles = [Line2D([], [], color=one.color, marker=one.marker, linestyle=one.dashes) for one in shown]
    widths = [0.6 + 0.066 * max(map(len, name.split("\n"))) for name in names]  # inches
    fits = len(names) if sum(widths) < figure.get_figwidth() else int(figure.get_figwidth() / max(widths))
    columns = max(1, fits)
    rows = -(-len(names) // columns)
    deep = rows + sum(sorted((name.count("\n") for name in names), reverse=True)[:rows])
    figure.set_figheight(figure.get_figheight() + 0.17 * deep)  # panels keep their size
    figure.legend(handles, names, loc="outside upper left", ncols=columns, columnspacing=1.4, borderaxespad=0)


def rising(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest numbers in least squares that nowhere fall, by pooling neighbours that do (Ayer et al. 1955)."""
    blocks: list[tuple[float, int]] = []  # mean and length
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (one, m), (other, n) = blocks[-2:]
            blocks[-2:] = [((one * m + other * n) / (m + n), m + n)]
    return np.repeat([mean for mean, _ in blocks], [length for _, length in blocks])


def label_ends(axis: Axes, lines: Mapping[str, Sequence[Estimate | None]], look: Mapping[str, Look]) -> None:
    """The names at the ends of their lines, long ones in several lines, moved apart where they would overlap.

    A legend takes their place where they are too many for the axis, or the figure is narrow.
    """
    figure = axis.get_figure()
    assert isinstance(figure, Figure)
    ends = {label: [p for p in points if p is not None][-1].value * 100 for label, points in lines.items()}
    labels = sorted(ends, key=lambda label: ends[label])
    texts = ["\n".join(broken(label, 28)) for label in labels]
    bottom, top = axis.get_ylim()
    room = (figure.get_figheight() - 0.6) * 72  # points
    heights = 8.9 / room * (top - bottom) * (1 + np.array([text.count("\n") for text in texts]))
    few = heights.sum() < 0.95 * (top - bottom) and all(one.named for one in look.values())
    if figure.get_figwidth() < _ENDS or not few:
        legend(figure, {label: one for label, one in look.items() if label in lines})
        return
    stacked = heights.cumsum() - heights / 2  # the middles of names that touch, from 0
    # names do not overlap where y - stacked nowhere falls: the least squares nearest to the ends that keeps it so
    shifts = rising([ends[label] for label in labels] - stacked).clip(bottom, max(bottom, top - heights.sum()))
    for label, text, y in zip(labels, texts, shifts + stacked, strict=True):
        axis.annotate(
            text,
            (1.02, y),
            xycoords=("axes fraction", "data"),
            color=look[label].color,
            va="center",
            fontsize=7,
            linespacing=1.0,
        )


_ENDS = 4.0  # inches from which on names stand at the ends of lines


def name_points(axis: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside their points where there is room, with a line to those that had to go further off.

    What finds no place is left out and counted in a corner. To be called when all else is drawn.
    """
    figure = axis.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    frame = axis.get_window_extent()
    marks = [axis.transData.transform((x, y)) for x, y, _ in points]
    taken: list[BboxBase] = [Bbox([mark - 4, mark + 4]) for mark in marks]
    taken += [bar.get_window_extent() for bar in axis.lines]  # of a bar along an axis, its box is all of it
    note = axis.annotate("99 names left out", (0.99, 0.01), xycoords="axes fraction", ha="right", fontsize=SMALLEST)
    note.set_in_layout(False)
    taken.append(note.get_window_extent())
    left_out = 0
    for x, y, name in points:
        text = axis.annotate(
            name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=SMALLEST, color="#444444", va="center"
        )
        text.set_in_layout(False)
        place = _free_place(text, taken, frame)
        if place is None:
            text.remove()
            left_out += 1
            continue
        taken.append(text.get_window_extent())
        if place > _NEAR:
            axis.annotate(
                "", (x, y), xytext=text.xyann, textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.4},
            )  # fmt: skip
    note.set_text(f"{left_out} names left out" if left_out else "")


_NEAR = 12  # points from a mark within which a name needs no line to it


def _free_place(text: Annotation, taken: Sequence[BboxBase], frame: BboxBase) -> float | None:
    """Move a name to the nearest place that is free and in the frame; how far in points, None where there is none."""
    for distance in (5, 9, 14, 20, 28, 38, 50):
        for angle in (0, 180, 45, 135, 315, 225, 90, 270):
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            text.set_horizontalalignment("left" if across > 0.1 else "right" if across < -0.1 else "center")
            text.xyann = (distance * across, distance * up)
            box = text.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.padded(1).overlaps(other) for other in taken):
                return distance
    return None
