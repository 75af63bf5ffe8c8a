"""The tidy frame and the labels that keep different protocols in different rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from synthetic_runs import IMAGES

from coss_eval.errors import UsageError
from coss_eval.evaluation import Run
from coss_eval.reports.results import Results
from coss_eval.reports.tables import tidy
from coss_eval.store import Cell, Store


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
