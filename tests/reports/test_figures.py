"""Figures at the width they are printed: sizes, looks, names that do not overprint, and what can be asked for."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from coss_eval.errors import UsageError
from coss_eval.reports.drawing import forest
from coss_eval.reports.layout import Number, Row

COLUMN = 3.3  # inches: a column of a two-column page


def texts(figure: Figure) -> list[Text]:
    """What is written in a figure, once it is drawn."""
    figure.draw_without_rendering()
    hidden = [axis for axis in figure.axes if not axis.get_visible()]
    inside = {id(text) for axis in hidden for text in axis.findobj(Text)}
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and id(text) not in inside]


def check(figure: Figure, width: float) -> None:
    """Printed as wide as asked for, with no text below 6 pt, beyond the edge or upon another."""
    assert figure.get_figwidth() == pytest.approx(width)
    found = texts(figure)
    assert min(text.get_fontsize() for text in found) >= 6
    boxes = [(text.get_text(), text.get_window_extent()) for text in found]
    edge = figure.bbox.padded(1.0)
    for name, box in boxes:
        assert (edge.x0 <= box.x0, edge.y0 <= box.y0, box.x1 <= edge.x1, box.y1 <= edge.y1) == (True,) * 4, name
    crossing = [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.padded(-0.5).overlaps(other)]
    assert crossing == []


@pytest.mark.parametrize("width", [COLUMN, 7.0])
def test_a_forest_plot_says_what_stands(width: float) -> None:
    long = "an untrained rf_resnet18_k4-4-1-0_mlp2x512 with a long name (seed 0)"
    rows = [
        Row("co-byol", [Number(0.032, 0.010, 0.054, p=0.012, signed=True)], "corrupted"),
        Row(long, [Number(-0.2, -0.25, -0.15, p=0.0001, signed=True)], "corrupted"),
        Row("dino", [Number(0.01, -0.02, 0.04, p=0.4, signed=True)], "kept"),
        Row("simclr", [Number(0.01, signed=True)], "kept"),
        Row("not measured", [None], "kept"),
        Row("co-byol", [Number(-0.04, -0.05, -0.03, "plain", p=0.01, signed=True)], "redundancy"),
    ]
    figure = forest(rows, width=width)
    check(figure, width)
    marks = [line for axis in figure.axes for line in axis.lines if line.get_marker() == "o"]
    assert [line.get_color() != "white" for line in marks] == [True, True, False, False, True]
    assert [float(line.get_xdata()[0]) for line in marks] == pytest.approx([3.2, -20, 1, 1, -0.04])  # type: ignore[arg-type,index]
    assert "+3.2 [+1.0, +5.4]" in " ".join(text.get_text() for text in texts(figure))


def test_a_forest_plot_of_nothing_is_one_line() -> None:
    with pytest.raises(UsageError, match="none of these rows has one"):
        forest([Row("a", [None])])
