"""A task that the package does not know: its cells have a table with intervals and a figure all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from matplotlib.figure import Figure

from coss_eval import reports
from coss_eval.reports.by_task import task_report
from coss_eval.reports.document import build
from coss_eval.reports.drawing import style
from coss_eval.reports.layout import Number, Table
from coss_eval.reports.results import Results
from coss_eval.store import Cell, Measurement, Store

TASK = "rotations"
ANGLES = (0.0, 15.0, 45.0)


@pytest.fixture
def rotated(store: Store, writer: Callable) -> Store:
    """Two checkpoints' accuracy over angles and seeds, and one number that has no samples."""
    for name, skill in (("a", 0.3), ("b", 1.2)):
        m = writer(name, skill)
        verdicts = [
            ("upright", {"angle": angle, "seed": seed}, m.verdicts(angle / 20, seed))
            for angle in ANGLES
            for seed in (0, 1)
        ]
        drift = [Measurement("drift", 0.25, 60, 0.2, 0.3, {"axis": axis}) for axis in ("x", "y")]
        m.write(Cell(TASK, {"angles": list(ANGLES)}), verdicts, further=drift)
    return store


def table_of(results: Results) -> Table:
    return next(t for t in build(results).tables if t.name == TASK)


def drawn(results: Results) -> Figure:
    ((maker, _),) = task_report(TASK).figures.values()
    with style():
        figure = maker(results)
    assert figure is not None
    return figure


def test_it_has_a_row_a_metric_and_condition_with_intervals(rotated: Store) -> None:
    shown = table_of(Results(rotated))
    assert [row.name for row in shown.rows] == [
        *("upright, angle 0", "upright, angle 15", "upright, angle 45"),
        *("drift, axis x", "drift, axis y"),
    ]
    entries = [entry for row in shown.rows for entry in row.entries]
    assert all(isinstance(entry, Number) and entry.interval for entry in entries)
    # shares of images, as their samples tell whatever the metric is called, are percent
    assert [row.entries[0].unit for row in shown.rows] == 3 * ["percent"] + 2 * ["plain"]  # type: ignore[union-attr]


def test_checkpoints_are_compared_in_it(rotated: Store) -> None:
    differences = next(t for t in build(Results(rotated)).tables if t.name == f"{TASK}_differences")
    names = [row.name for row in differences.rows]
    assert names[:3] == ["upright, angle 0", "upright, angle 15", "upright, angle 45"]
    assert names[3:] == ["drift, axis x", "drift, axis y"]  # which are no shares of images, but have intervals
    assert all(row.entries[0].p is not None for row in differences.rows)  # type: ignore[union-attr]


def test_its_figure_has_lines_over_numbers_and_marks_over_names(rotated: Store) -> None:
    results = Results(rotated)
    upright, drift = (axis for axis in drawn(results).axes if axis.get_visible())
    expected = [
        100 * float(results.frame.query("angle == @angle & checkpoint == 'a'")["value"].mean()) for angle in ANGLES
    ]
    assert list(upright.lines[0].get_xdata()) == list(ANGLES)
    assert list(upright.lines[0].get_ydata()) == pytest.approx(expected)
    assert (upright.get_xlabel(), upright.get_ylabel()) == ("angle", "%")
    assert len(upright.collections) == 2  # a band a checkpoint
    assert [text.get_text() for text in drift.get_xticklabels()] == ["axis x", "axis y"]
    assert drift.lines[0].get_linestyle() == "None"
    assert drift.get_ylabel() == "value"


def test_the_whole_report_is_written(rotated: Store) -> None:
    names = {str(path.relative_to(rotated.path)) for path in reports.write(rotated.path)}
    assert {f"tables/{TASK}.csv", f"figures/{TASK}.png"} <= names
    page = (rotated.path / "report.md").read_text()
    assert "## Rotations" in page
    assert f"](figures/{TASK}.png)" in page


def test_a_name_that_begins_like_a_task_s_is_its_own(store: Store, writer: Callable) -> None:
    name, m = "corruptions_of_mine", writer("m")
    m.corruptions(["fog"])
    m.write(Cell(name, {}), [("top1", {"noise": noise}, m.verdicts(noise)) for noise in (0.1, 0.2)])
    corruptions, mine = build(Results(store), None, [name]).sections[1:3]
    assert corruptions.figures == {}
    assert list(mine.figures) == [name]
    assert mine.tables[0].rows[0].name == "top1, noise 0.1"  # no probe's
