"""Internal corruption as a task: every kind at every site where it means something, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_subjects import subject

from coss_eval import evaluation, reports
from coss_eval.errors import UsageError
from coss_eval.internal import KINDS
from coss_eval.store import Store
from coss_eval.tasks.internal.task import Internal


def test_every_kind_measures_accuracy_area_and_signal_to_noise() -> None:
    task = Internal(("stage2", "global"), ("all",), (0.2, 0.6), seeds=2)
    cells = task.cells(subject(), seed=0)
    places = [(cell.params["site"], cell.params["kind"]) for cell in cells]
    assert {kind for site, kind in places if site == "stage2"} == set(KINDS)
    assert {kind for site, kind in places if site == "global"} == {"channel", "noise", "ablation"}
    for cell in cells:
        result = task.measure(cell, subject())
        found = {
            metric: [m for m in result.measurements if m.metric == metric] for metric in ("accuracy", "auc", "snr_db")
        }
        assert len(found["accuracy"]) == 2 * 3  # seeds and levels, the clean one among them
        assert len(found["auc"]) == 2
        assert len(found["snr_db"]) == 4
        by_seed = [m.value for m in found["snr_db"] if m.condition["seed"] == 0]
        assert by_seed[0] > by_seed[1]


def test_options_are_in_the_key_and_defaults_are_not() -> None:
    def keys(**options: Any) -> set[str]:
        return {Store("unused").key({}, cell) for cell in Internal(sites=("prepool",), **options).cells(subject(), 0)}

    assert keys() == keys(rescale=False, match_locations=None)
    for options in ({"rescale": True}, {"match_locations": 9}, {"levels": (0.5,)}, {"seeds": 6}):
        assert keys(**options).isdisjoint(keys())


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
