"""The tidy frame, its labels, and tables beside a task's own: what was stored is what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from synthetic_runs import IMAGES

from coss_eval.errors import UsageError
from coss_eval.evaluation import Run
from coss_eval.reports import provenance
from coss_eval.reports.folders import Folders
from coss_eval.reports.layout import Table
from coss_eval.reports.results import Results
from coss_eval.reports.tables import tidy
from coss_eval.statistics import median_interval
from coss_eval.store import Cell, Measurement, Store, column_name
from coss_eval.tasks.attacks.report import by_strength, median_eps


def test_tidy_has_one_row_a_measurement_in_the_runs_order(full: Store) -> None:
    frame = tidy(full)
    assert len(frame) == sum(len(record["measurements"]) for record in full.records())
    assert list(dict.fromkeys(frame["checkpoint"])) == ["b", "a_1"]  # as the run gave them, not by name
    assert list(dict.fromkeys(frame["task"])) == ["probe", "corruptions", "attacks", "internal", "redundancy"]
    fog = frame[(frame["corruption"] == "fog") & (frame["severity"] == 3) & (frame["model"] == "b")]
    assert fog[["task", "metric", "n", "data", "head"]].to_numpy().tolist() == [
        ["corruptions", "accuracy", 60, "tiny", "linear probe, strength 0.1"]
    ]
    assert frame["limit"].isna().all()


def test_an_empty_store_is_an_empty_frame(store: Store) -> None:
    assert tidy(store).empty
    assert "checkpoint" in tidy(store)


def test_a_limit_beside_the_whole_split_is_always_in_the_name(store: Store, writer: Callable) -> None:
    writer("r18").probe()
    writer("r18", limit=100).probe()
    assert sorted(set(tidy(store)["checkpoint"])) == ["r18 [limit=100]", "r18 [limit=null]"]


def test_two_protocols_of_one_measurement_get_two_rows(store: Store, writer: Callable) -> None:
    r18 = writer("r18")
    r18.probe()
    for backend in ("native", "reference"):
        r18.corruptions(["fog"], backend=backend)
    results = Results(store)
    assert results.labels == ["r18 [backend=native]", "r18 [backend=reference]"]
    # both stand for the same weights, whose probe has one protocol
    top1 = [results.estimate(label, "probe", "top1") for label in results.labels]
    assert top1[0] is not None
    assert top1[0].value == top1[1].value  # type: ignore[union-attr]


def test_other_weights_under_the_same_name_are_told_apart(store: Store, writer: Callable) -> None:
    one, other = writer("r18"), writer("r18")
    other.protocol["model"] = {"sha256": "12345678" * 8, "arch": "resnet18"}
    one.probe()
    other.probe()
    labels = set(tidy(store)["checkpoint"])
    assert len(labels) == 2
    assert "r18 [sha256=12345678]" in labels


def test_weights_that_moved_stay_one_row_under_their_newest_name(store: Store, writer: Callable) -> None:
    before, after = writer("model"), writer("runs/byol")
    before.protocol["model"] = after.protocol["model"] = {"sha256": "12345678" * 8, "arch": "resnet18"}
    before.probe()
    for name in ("model", "runs/byol"):
        store.record_run({"models": [{"name": name, **after.protocol["model"]}]})
    after.redundancy()
    assert set(tidy(store)["checkpoint"]) == {"runs/byol"}
    assert Results(store).labels == ["runs/byol"]


def test_cells_of_different_conditions_share_a_name(store: Store, writer: Callable) -> None:
    r18 = writer("r18")
    for seed in range(3):
        rows = [("accuracy", {"labels": "1 %", "seed": seed}, r18.verdicts(0, seed))]
        r18.write(Cell("probe", {"labels": 0.01, "seed": seed}), rows)
    assert set(tidy(store)["checkpoint"]) == {"r18"}


def test_what_a_newer_version_of_a_task_measured_takes_the_place_of_the_old(store: Store, writer: Callable) -> None:
    """The new version names a parameter that was fixed before. Other strengths and other rows are other questions."""
    r18 = writer("r18")
    right = [("accuracy", {"kind": "noise"}, r18.verdicts(0))]
    old = r18.write(Cell("internal", {"kind": "noise", "levels": [1, 2]}), right)
    other = r18.write(
        Cell("internal", {"kind": "noise", "levels": [3]}), [("accuracy", {"kind": "x"}, r18.verdicts(1))]
    )
    apart = r18.write(Cell("internal", {}), [("accuracy", {"kind": "none"}, r18.verdicts(3))])
    assert set(tidy(store)["key"]) == {old, other, apart}
    more = {"kind": "noise", "levels": [1, 2], "order": 0}
    new = r18.write(Cell("internal", more, algorithm_version=2), [("accuracy", {"kind": "noise"}, r18.verdicts(2))])
    store.record_run({"models": [], "cells": [{"key": old, "model": "r18", "task": "internal"}]})
    results = Results(store)
    assert results.superseded == {old}
    renamed = Results(Folders.of([store.path]).renamed({"r18": "ours"}))
    for each in (results, renamed):
        assert {record["key"] for record in each.records} == {other, apart, new}
        assert not any("missing" in line for line in provenance.warnings(each))


def test_a_probe_of_all_labels_stays_beside_newer_ones_of_few(store: Store, writer: Callable) -> None:
    r18 = writer("r18")
    of_all = r18.write(Cell("probe", {"method": "linear"}), [("top1", {}, r18.verdicts(0))])
    params = {"method": "linear", "labels": 0.01, "draws": 1}
    few = Cell("probe", params, algorithm_version=2)
    r18.write(few, [("top1", {"labels": "0.01", "draw": 0}, r18.verdicts(1))])
    results = Results(store)
    assert not results.superseded
    assert of_all in set(results.frame["key"])
    assert results.estimate("r18", "probe", "top1") is not None


EPS = (0.0, 1 / 255, 2 / 255, 4 / 255)


def written(path: Path, stands: Any) -> Results:
    """A store with one PGD cell; ``stands`` bool (4, N) by eps."""
    conditions = [{"attack": "pgd", "norm": "linf", "eps": eps} for eps in EPS]
    measurements = [
        Measurement("robust_accuracy", float(row.mean()), len(row), 0.0, 1.0, condition)
        for condition, row in zip(conditions, stands, strict=True)
    ]
    samples = {column_name("robust_accuracy", c): row for c, row in zip(conditions, stands, strict=True)}
    for metric, strength in (("chosen", 0.7), ("chosen x 3.2", 0.6)):
        condition = {"attack": "pgd", "norm": "linf", "strength": metric, "eps": EPS[1]}
        measurements.append(Measurement("robust_accuracy_by_strength", strength, 20, 0.5, 0.8, condition))
    store, cell = Store(path), Cell("attacks", {"attack": "pgd"})
    protocol = {"model": {"sha256": "0"}, "data": {"fingerprint": "f", "limit": None, "name": "d"}}
    record = {"protocol": protocol, "cell": cell, "model": "net", "measurements": measurements, "notes": []}
    store.write(store.key(protocol, cell), record, {"id": np.arange(stands.shape[1]), **samples})
    return Results(store)


@pytest.mark.parametrize(
    ("broken_at", "expected"),
    [
        ([2] * 90 + [1] * 10, "2/255 [2/255, 2/255]"),
        ([1] * 30 + [9] * 70, "> 4/255"),
        ([1] * 50 + [2] * 50, "1/255 [1/255, 2/255]"),
    ],
)
def test_the_median_smallest_eps_and_its_censoring(broken_at: list[int], expected: str, tmp_path: Path) -> None:
    found = np.array([[eps * 255 < at - 0.5 for at in broken_at] for eps in EPS])
    found = np.concatenate([found, np.zeros((4, 20), bool)], 1)  # images wrong without an attack do not count
    table = median_eps(written(tmp_path, found))
    assert isinstance(table, Table)
    assert table.name == "attacks_median_eps"
    assert [row.name for row in table.rows] == ["PGD, Linf"]
    assert table.rows[0].entries == [expected]


def test_the_probes_strength_has_a_row_each(tmp_path: Path) -> None:
    table = by_strength(written(tmp_path, np.ones((4, 10), bool)))
    assert isinstance(table, Table)
    assert table.name == "attacks_strength"
    assert [row.name for row in table.rows] == ["strength chosen, eps 1/255", "strength chosen x 3.2, eps 1/255"]
    assert [str(row.entries[0]) for row in table.rows] == ["70.0 [50.0, 80.0]", "60.0 [50.0, 80.0]"]
    assert by_strength(Results(Store(tmp_path / "empty"))) is None


def test_a_median_by_ranks_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    intervals = [median_interval(rng.exponential(size=101)) for _ in range(400)]
    assert all(low <= median <= high for median, low, high in intervals)
    assert np.mean([low <= np.log(2) <= high for _, low, high in intervals]) == pytest.approx(0.95, abs=0.03)
    assert median_interval([1.0, np.inf, np.inf]) == (np.inf, 1.0, np.inf)
    assert np.isnan(median_interval([])).all()


def test_a_narrow_terminal_shows_values_and_models(full: Store) -> None:
    table = Run(full.path).table()
    with pd.option_context("display.max_columns", 0, "display.width", 80):
        first = str(table).splitlines()[0]
    assert {"value", "model"} <= set(first.split())
    assert sorted(table.columns) == sorted(tidy(full).columns)


def test_a_wide_table_has_each_value_once_and_untrained_networks_by_themselves(full: Store) -> None:
    """A column a model, in order; the trained and the untrained redundancy side by side, never averaged."""
    run = Run(full.path)
    wide, long = run.table(wide=True), run.table()
    assert [*wide.columns] == ["b", "b, untrained", "a_1", "a_1, untrained"]
    assert wide.notna().sum().sum() == len(long)
    row = wide.loc["redundancy", "normalised", "site=prepool"]
    assert [*row] == pytest.approx([0.3, 0.6, 0.3, 0.6])
    frost = wide.loc["corruptions", "accuracy", "corruption=frost,severity=1"]
    assert pd.isna(frost["a_1"])  # a gap
    assert not pd.isna(frost["b"])
    assert wide.index.get_level_values("task").unique().tolist() == long["task"].unique().tolist()


def test_per_image_has_what_the_means_are_of(full: Store) -> None:
    run = Run(full.path)
    verdicts, wide = run.per_image(), run.table(wide=True)
    assert len(verdicts) == IMAGES
    for model, task, condition in verdicts.columns:
        metric = {"corruptions": "accuracy", "attacks": "robust_accuracy", "internal": "accuracy"}.get(task, condition)
        assert verdicts[model, task, condition].mean() == pytest.approx(wide.loc[(task, metric, condition), model])
    assert set(run.per_image("attacks").columns.get_level_values("task")) == {"attacks"}


def test_a_run_is_shown_in_a_line_and_in_a_notebook_with_its_headline(full: Store, tmp_path: Path) -> None:
    run = Run(full.path, failures=("<b> of x: no",))
    assert repr(run) == f"Run({full.path}: 2 models, 5 tasks, {len(full.records())} cells; 1 not done)"
    html = run._repr_html_()
    assert "&lt;b&gt; of x: no" in html
    assert "<th>corrupted %</th>" in html
    assert repr(Run(tmp_path / "none")) == f"Run({tmp_path / 'none'}: no finished cells)"
    assert "no finished cells" in Run(tmp_path / "none")._repr_html_()
    with pytest.raises(UsageError, match="no finished cells"):
        Run(tmp_path / "none").per_image()
