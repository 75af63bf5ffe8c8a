"""Internal corruption as a task: every kind at every site where it means something, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_subjects import subject

from coss_eval import evaluation, reports
from coss_eval.errors import UsageError
from coss_eval.internal import KINDS
from coss_eval.reports.layout import Number
from coss_eval.reports.results import Results
from coss_eval.store import Store
from coss_eval.tasks.internal.report import CONTROLS, GRIDS, controls, kept_area
from coss_eval.tasks.internal.task import Internal


def test_every_kind_measures_accuracy_area_and_signal_to_noise() -> None:
    task = Internal(("stage2", "global"), ("all",), (0.2, 0.6), seeds=2)
    cells = task.cells(subject(), seed=0)
    places = [(cell.params["site"], cell.params["kind"]) for cell in cells]
    of_weights = {name for name, kind in KINDS.items() if kind.weights}
    assert {kind for site, kind in places if site == "stage2"} == set(KINDS) - of_weights
    assert {kind for site, kind in places if site == "global"} == {"channel", "noise", "ablation", "quantised"}
    assert {kind for site, kind in places if site == "network"} == of_weights
    for cell in cells:
        result = task.measure(cell, subject())
        found = {
            metric: [m for m in result.measurements if m.metric == metric] for metric in ("accuracy", "auc", "snr_db")
        }
        seeds = 1 if KINDS[cell.params["kind"]].grid else 2  # nothing is drawn for a grid
        assert len(found["accuracy"]) == seeds * 3  # seeds and levels, the clean one among them
        assert len(found["auc"]) == seeds
        assert len(found["snr_db"]) == seeds * 2
        by_seed = [m.value for m in found["snr_db"] if m.condition["seed"] == 0]
        assert by_seed[0] > by_seed[1]


def test_options_are_in_the_key_and_defaults_are_not() -> None:
    def keys(**options: Any) -> set[str]:
        return {Store("unused").key({}, cell) for cell in Internal(sites=("prepool",), **options).cells(subject(), 0)}

    assert keys() == keys(rescale=False, match_locations=None, surrogate=None)
    for options in ({"surrogate": 0.9}, {"rescale": True}, {"match_locations": 9}, {"levels": (0.5,)}, {"seeds": 6}):
        assert keys(**options).isdisjoint(keys())


def test_masking_and_noise_run_beside_their_controls() -> None:
    """By default, with no flag; noise is left out, with a line, where no training images say how large it is."""
    cells = Internal().cells(subject(), 0)
    kinds = {cell.params["kind"] for cell in cells if cell.params["site"] == "prepool"}
    assert kinds == {"location", "channel", "noise", "noise-shared"}
    assert all(KINDS[kind].shared in {*kinds, ""} for kind in kinds)
    alone = replace(subject(), data=replace(subject().data, train=None))
    assert {cell.params["kind"] for cell in Internal().cells(alone, 0)} == {"location", "channel"}
    assert Internal().left_out(alone) == ["digits has no training split to calibrate noise and noise-shared on"]
    with pytest.raises(UsageError, match="no training split to calibrate noise on"):
        Internal(kinds=("noise",)).cells(alone, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("chanel",)}, "channel"),
        ({"levels": (0.5, 1.0)}, "channel takes a level in"),
        ({"levels": (-0.1,)}, "-0.1"),
        ({"levels": (0.5, 0.2)}, "rising"),
        ({"seeds": 0}, "at least 1 seed"),
        ({"sites": ("stage9",)}, "stage1, stage2, prepool, global"),
        ({"sites": ("global",), "kinds": ("location",)}, "no locations"),
        ({"sites": ("stage1",), "match_locations": 4}, "prepool"),
        ({"sites": ("stage1",), "surrogate": 0.5}, "prepool"),
        ({"surrogate": 1.0}, "between 0 and 1"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Internal(**options).cells(subject(), 0)
    assert "\n" not in str(caught.value)


def test_the_report_shows_damage_at_sites_where_not_all_kinds_mean_something(tmp_path: Path) -> None:
    task = Internal(("stage2", "global"), ("location", "noise"), (0.2, 0.6), seeds=2)
    store = evaluation.evaluate(subject().model, subject().data, [task], out=tmp_path, cache=False).path
    reports.write(store)
    report = (tmp_path / "report.md").read_text()
    for expected in ("noise at level 0.6: signal-to-noise ratio, dB", "location at level 0.6: kept, %"):
        assert expected in report
    assert "internal_by_level.png" in report


def test_the_surrogate_of_a_more_redundant_network_is_measured_beside_the_real_one(tmp_path: Path) -> None:
    """Clean it is the same network, masked locations move it less, and its rows say what it is."""
    for surrogate in (None, 0.95):
        task = Internal(("prepool",), ("location",), (0.5, 0.9), seeds=1, surrogate=surrogate)
        run = evaluation.evaluate(subject().model, subject().data, [task], out=tmp_path, cache=False, quiet=True)
        assert run.failures == ()
    results = Results(Store(tmp_path))
    mixed, real = sorted(results.checkpoints)
    assert (mixed, real) == ("small [surrogate=0.95]", "small [surrogate=null]")
    where = {"site": "prepool", "kind": "location", "seed": 0}
    values = {
        (label, metric, level): found.value
        for label in results.checkpoints
        for metric in ("accuracy", "snr_db")
        for level in (0.0, 0.5, 0.9)
        if (found := results.estimate(label, "internal", metric, **where, level=level)) is not None
    }
    assert values[real, "accuracy", 0.0] == values[mixed, "accuracy", 0.0]
    assert values[mixed, "snr_db", 0.5] > values[real, "snr_db", 0.5] + 3
    (note,) = [note for record in results.records for note in record["notes"] if "surrogate" in note]
    assert "so that redundancy is 0.95" in note


@pytest.mark.slow
def test_the_report_shows_each_kind_beside_its_control(tmp_path: Path) -> None:
    task = Internal(("prepool",), ("location", "channel", "noise", "noise-shared", "weight-quantised"), None, seeds=1)
    own = replace(subject().model, head_choice="own")
    run = evaluation.evaluate(own, subject().data, [task], out=tmp_path, cache=False, quiet=True)
    assert run.failures == ()
    assert {name: kind.shared for name, kind in KINDS.items() if kind.shared} == CONTROLS
    assert {name for name, kind in KINDS.items() if kind.grid} == set(GRIDS)
    results = Results(Store(tmp_path))
    table = controls(results)
    assert table is not None
    assert [row.name for row in table.rows] == ["noise, prepool", "locations / channels masked, prepool"]
    for row, pair in zip(table.rows, (("noise", "noise-shared"), ("location", "channel")), strict=True):
        apart, alike = (
            kept_area(results, results.conditions("internal", "accuracy", kind=kind))("small") for kind in pair
        )
        assert apart is not None
        assert alike is not None
        shown = [entry for entry in row.entries if isinstance(entry, Number)]
        assert [entry.value for entry in shown[:2]] == [apart.value, alike.value]
        assert apart.shares is not None
        assert alike.shares is not None
        paired = apart.shares.series() - alike.shares.series()
        half = 1.96 * paired.std() / len(paired) ** 0.5
        assert shown[2].value == pytest.approx(apart.value - alike.value)
        assert shown[2].low == pytest.approx(shown[2].value - half, abs=0.03 * half + 1e-9)  # Student's, of 60 images
    reports.write(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "explains damage inside the network at most" in page
    assert "weight-quantised at 5 bits: kept, %" in page


def test_matched_controls_need_the_same_levels(tmp_path: Path) -> None:
    for kind, levels in (("noise", (0.5, 1.0)), ("noise-shared", (0.5, 2.0))):
        task = Internal(("prepool",), (kind,), levels, seeds=1)
        evaluation.evaluate(subject().model, subject().data, [task], out=tmp_path, cache=False, quiet=True)
    assert controls(Results(Store(tmp_path))) is None
