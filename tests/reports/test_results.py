"""Estimates: values, intervals and differences against the same numbers computed by hand from the verdicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bootstrap import paired_bootstrap
from scipy import integrate, stats
from synthetic_runs import Writer

from coss_eval.checkpoints.load import load_model, make_model, save_model
from coss_eval.cli.app import app
from coss_eval.cli.flags import ModelFlags
from coss_eval.corruptions.names import BENCHMARK
from coss_eval.errors import UsageError
from coss_eval.reports.by_task import task_report
from coss_eval.reports.document import build, resolve_baseline
from coss_eval.reports.estimates import (
    Estimate,
    Shares,
    area,
    could_have_seen,
    difference,
    difference_within,
    from_shares,
    mean,
    pooled,
    ratio,
)
from coss_eval.reports.groups import given
from coss_eval.reports.headline import columns
from coss_eval.reports.layout import Number, Table
from coss_eval.reports.results import Results
from coss_eval.statistics import clustered_wilson, contrast, paired_difference, spread, wilson
from coss_eval.store import Cell, Measurement, Store, own_column
from coss_eval.tasks.redundancy.report import BY_CLASS, against_untrained, by_class, with_accuracy


def estimates(verdicts: np.ndarray, ids: np.ndarray | None = None, data: str = "d") -> list[Estimate]:
    """One estimate a column of (N, C)."""
    index = pd.Index(np.arange(len(verdicts)) if ids is None else ids)
    return [Estimate(float(c.mean()), None, None, len(c), Shares(index, c), data) for c in verdicts.astype(float).T]


@pytest.fixture
def two() -> tuple[np.ndarray, np.ndarray]:
    """Verdicts of two checkpoints on 300 images under 4 conditions, alike in which images are hard."""
    rng = np.random.default_rng(0)
    hard = rng.normal(size=(300, 1))
    return tuple(rng.normal(size=(300, 4)) + hard < level for level in (0.8, 0.4))  # type: ignore[return-value]


def test_a_mean_is_over_images_and_conditions(two: tuple[np.ndarray, np.ndarray]) -> None:
    found = mean(estimates(two[0]))
    assert found is not None
    assert found.value == pytest.approx(two[0].mean())
    assert (found.low, found.high) == pytest.approx(clustered_wilson(two[0]))
    assert found.shares is not None
    assert found.shares.values == pytest.approx(two[0].mean(axis=1))


def test_a_gap_is_never_averaged_over(two: tuple[np.ndarray, np.ndarray]) -> None:
    parts = estimates(two[0])
    assert mean([*parts, None]) is None
    assert mean([]) is None
    assert area([0, 0.5, 1], [parts[0], None, parts[1]]) is None
    assert ratio(parts[0], None) is None
    assert difference(parts[0], None) is None


def test_without_samples_there_is_a_value_and_no_interval(two: tuple[np.ndarray, np.ndarray]) -> None:
    parts = estimates(two[0])
    bare = Estimate(parts[1].value, 0.1, 0.9, parts[1].n)
    for found in (mean([parts[0], bare]), area([0, 1], [parts[0], bare]), ratio(parts[0], bare)):
        assert found is not None
        assert found.low is None
    assert np.isnan(difference(parts[0], bare).p)  # type: ignore[union-attr]


def test_an_area_is_the_trapezium_of_the_values(two: tuple[np.ndarray, np.ndarray]) -> None:
    parts = estimates(two[0])[:3]
    found = area([0.0, 0.5, 0.9], parts)
    assert found is not None
    assert found.value == pytest.approx(integrate.trapezoid([p.value for p in parts], [0, 0.5, 0.9]) / 0.9)
    assert found.low is not None
    assert found.low < found.value < found.high  # type: ignore[operator]


def test_an_area_of_accuracies_stays_within_its_bounds() -> None:
    right = np.ones((40, 3))
    right[0] = 0
    found = area([0.0, 0.5, 1.0], estimates(right))
    assert found is not None
    assert 0 <= found.low < found.value < found.high <= 1  # type: ignore[operator]


@pytest.mark.parametrize("paired", [False, True])
def test_a_ratio_s_interval_is_the_bootstrap_s(two: tuple[np.ndarray, np.ndarray], *, paired: bool) -> None:
    a, b = ((verdicts[:, 1:].mean(axis=1), verdicts[:, 0]) for verdicts in two)
    left, right = (ratio(mean(estimates(v[:, 1:])), estimates(v[:, :1])[0]) for v in two)
    tables = [np.column_stack(pair).astype(float) for pair in (a, b)]

    def measure(table: np.ndarray) -> float:
        return float(table[:, 0].mean() / table[:, 1].mean())

    if paired:
        found = difference(left, right)
        assert found is not None
        expected = paired_bootstrap(tables[0], tables[1], measure)
        assert (found.difference, found.low, found.high) == pytest.approx(expected, abs=0.01)
    else:
        assert left is not None
        draws = np.random.default_rng(0).integers(0, 300, (2000, 300))
        low, high = np.quantile([measure(tables[0][rows]) for rows in draws], [0.025, 0.975])
        assert (left.low, left.high) == pytest.approx((low, high), abs=0.01)


def test_differences_are_paired_by_id(two: tuple[np.ndarray, np.ndarray]) -> None:
    order = np.random.default_rng(1).permutation(300)[:250]  # another order, and some images missing
    a, b = estimates(two[0])[0], estimates(two[1][order], ids=order)[0]
    found = difference(a, b)
    assert found is not None
    assert found.n == 250
    assert found == paired_difference(two[0][np.sort(order), 0], two[1][np.sort(order), 0])


def test_other_images_are_not_paired(two: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = estimates(two[0])[0], estimates(two[1], data="other")[0]
    found = difference(a, b)
    assert found is not None
    assert found.difference == pytest.approx(a.value - b.value)
    assert np.isnan(found.p)


def test_shares_give_back_their_value() -> None:
    values = np.random.default_rng(2).normal(0.4, 0.1, 50)
    found = from_shares(float(values.mean()), Shares(pd.RangeIndex(50), values), None)
    assert (found.low + found.high) / 2 == pytest.approx(found.value)  # type: ignore[operator]


def test_a_column_is_used_only_for_the_metric_it_is_of(store: Store, writer: Callable) -> None:
    r18 = writer("r18")
    correct = r18.verdicts(0)
    condition, top1 = {"labels": "0.01"}, float(correct.mean())
    measurements = [
        Measurement("top1", top1, len(correct), top1 - 0.1, top1 + 0.1, condition),
        Measurement("mean_per_class", top1, len(correct), condition=condition),  # equal where classes are balanced
        Measurement("top5", 0.123, len(correct), 0.1, 0.2, condition),
    ]
    r18.put(Cell("probe", condition), measurements, {"id": r18.ids, "labels=0.01": correct})
    results = Results(store)
    found = {m.metric: results.estimate("r18", "probe", m.metric, **condition) for m in measurements}
    assert {metric: e is not None and e.shares is not None for metric, e in found.items()} == {
        "top1": True,
        "mean_per_class": False,
        "top5": False,
    }


def test_top_5_and_the_mean_per_class_have_their_intervals(store: Store, writer: Callable) -> None:
    """Of cells that were stored without: a share of the images, and the top-1 where classes are of one size."""
    for name, skill in (("a", 0.2), ("b", 1.4)):
        run = writer(name, skill)
        right = run.verdicts(0)
        value, n = float(right.mean()), len(right)
        bare = [Measurement("top5", 0.9, n), Measurement("mean_per_class", value if name == "a" else value - 0.1, n)]
        run.put(Cell("probe", {}), [Measurement("top1", value, n, 0.1, 0.9), *bare], {"id": run.ids, "top1": right})
    results = Results(store)
    rows = {score.name: score for score in task_report("probe").scores(results)[0].scores}
    assert (rows["linear probe top-5"].of("a").low, rows["linear probe top-5"].of("a").high) == wilson(0.9 * n, n)
    mean_per_class = rows["linear probe, mean per class"]
    assert mean_per_class.of("a").shares is not None
    assert mean_per_class.of("b").low is None  # of classes of unlike sizes
    shown = entry(table(build(results), "probe_differences"), "linear probe top-5", "b")
    assert isinstance(shown, Number)
    assert shown.interval
    assert shown.p_text == ""  # not paired


def test_damaged_files_are_reported_not_raised(full: Store) -> None:
    cells = sorted((full.path / "cells").glob("*.json"))
    cells[0].write_text("{")
    results = Results(full)
    assert len(results.records) == len(cells) - 1
    assert any(cells[0].name in warning for warning in results.warnings)


def table(document: object, name: str) -> Table:
    return next(t for t in document.tables if t.name == name)  # type: ignore[attr-defined]


def entry(table: Table, row: str, column: str) -> object:
    return next(r for r in table.rows if r.name == row).entries[list(table.columns).index(column)]


def methods(
    store: Store, seeds: int, skills: dict[str, float], *, recorded: bool = True, everything: bool = False
) -> None:
    """Runs of methods, with what their own checkpoints say of them."""
    names = {(method, seed): f"{method}-{seed}" for method in skills for seed in range(seeds)}
    said = [{"name": name, "group": method, "seed": seed} for (method, seed), name in names.items()]
    store.record_run({"models": said if recorded else [{"name": name} for name in names.values()]})
    for number, ((method, seed), name) in enumerate(names.items()):
        run = Writer(store, name, skills[method] + 0.1 * seed, seed=number)
        run.probe()
        if everything:
            run.corruptions(BENCHMARK)
            run.internal()
            run.attacks()


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("groups") / "run")
    methods(store, 3, {"byol": 0.2, "co-byol": 1.5}, everything=True)
    return store


@pytest.mark.slow
def test_runs_of_one_method_are_one_row_about_seeds_and_images(three_seeds: Store) -> None:
    results = Results(three_seeds)
    assert results.labels == ["byol (3 seeds)", "co-byol (3 seeds)"]
    document = build(results)
    assert "2 methods (6 checkpoints)" in document.subtitle
    assert "fewer than 4 seeds give an interval and no p" in document.subtitle
    own = {
        label: np.array([results.estimate(one, "probe", "top1").shares.values for one in results.members(label)])  # type: ignore[union-attr]
        for label in results.labels
    }
    byol, co_byol = (own[label] for label in results.labels)
    found = entry(table(document, "probe_differences"), "linear probe top-1", "co-byol (3 seeds)")
    expected = contrast([(1, co_byol), (-1, byol)])
    assert isinstance(found, Number)
    assert (found.value, found.low, found.high) == pytest.approx(expected[:3])
    assert found.p_text == ""
    shown = entry(table(document, "probe"), "linear probe top-1", "co-byol (3 seeds)")
    assert isinstance(shown, Number)
    assert (shown.low, shown.high) == pytest.approx(contrast([(1, co_byol)])[1:3])
    each = table(document, "headline_checkpoints")
    assert [row.name for row in each.rows] == [
        f"{method}-{seed}" for method in ("byol", "co-byol") for seed in range(3)
    ]


@pytest.mark.slow
def test_scores_of_methods_are_the_means_of_their_runs_scores(three_seeds: Store) -> None:
    results = Results(three_seeds)
    for task in ("corruptions", "internal", "attacks"):
        for spec in task_report(task).scores(results):
            for score in spec.scores:
                for label in results.labels:
                    runs = [score.of(one) for one in results.members(label)]
                    found = score.of(label)
                    assert (found is None) == (None in runs), score.name
                    if found is not None:
                        assert found.value == pytest.approx(np.mean([run.value for run in runs if run is not None]))


def test_four_seeds_have_a_p(store: Store) -> None:
    methods(store, 4, {"byol": 0.2, "co-byol": 1.5})
    shown = table(build(Results(store)), "probe_differences")
    assert "p between checkpoints" not in shown.corner
    assert all(isinstance(e, Number) and e.p_text for row in shown.rows for e in row.entries)


def test_one_seed_says_that_it_compares_checkpoints(full: Store) -> None:
    document = build(Results(full))
    assert "compare these checkpoints, not the methods that made them" in document.subtitle
    assert "p between checkpoints" in table(document, "probe_differences").corner


def test_labels_group_what_says_nothing_of_itself(store: Store) -> None:
    methods(store, 2, {"byol": 0.2, "co-byol": 1.5}, recorded=False)
    assert len(Results(store).labels) == 4
    patterns = given(["CO-BYOL (ours)=runs/co-*/model.safetensors", "BYOL=byol-*"])
    results = Results(store, patterns)
    assert results.labels == ["BYOL (2 seeds)", "CO-BYOL (ours) (2 seeds)"]
    assert resolve_baseline(results, "CO-BYOL (ours)") == "CO-BYOL (ours) (2 seeds)"
    for wrong, said in (
        ({"x": ["nothing-*"]}, "matches no model; there are byol-0"),
        ({"x": ["byol-*"], "y": ["byol-1"]}, "byol-1 is in x and in y"),
    ):
        with pytest.raises(UsageError, match=said):
            _ = Results(store, wrong).labels
    methods(store, 3, {"byol": 0.2})
    some = Results(store, {"byol": ["byol-[01]"]})
    assert some.members("byol (2 seeds)") == ("byol-0", "byol-1")  # and not byol-2, which says that it is of byol, too
    alone = Results(store, {"BYOL": ["byol-0"]})
    assert "byol (2 seeds)" in alone.labels
    assert [line[:45] for line in alone.groups.warnings] == ["byol-0 is not grouped: no other run of BYOL w"]
    for text in ("no sign", "=x", "x="):
        with pytest.raises(UsageError, match="expected --label"):
            given([text])


def test_protocols_are_not_mixed_in_a_group(store: Store) -> None:
    for number, backend in enumerate(("native", "reference")):
        Writer(store, f"byol-{number}", 0.4, seed=number).corruptions(BENCHMARK, backend=backend)
    with pytest.raises(UsageError, match="--label BYOL: corruptions: backend differs"):
        _ = Results(store, {"BYOL": ["byol-*"]}).labels
    store.record_run({"models": [{"name": f"byol-{n}", "group": "byol", "seed": n} for n in range(2)]})
    results = Results(store)
    assert results.labels == ["byol-0", "byol-1"]
    assert any("are not grouped: corruptions: backend differs" in line for line in build(results).warnings)


def test_runs_trained_in_different_ways_are_left_apart(store: Store) -> None:
    for number in range(2):
        Writer(store, f"byol-{number}", 0.4, seed=number).corruptions(BENCHMARK)
    said = [{"name": f"byol-{n}", "group": "byol", "seed": n, "recipe": f"{n}"} for n in range(2)]
    store.record_run({"models": said})
    results = Results(store)
    assert results.labels == ["byol-0", "byol-1"]
    assert any("are not grouped: they were trained in different ways" in line for line in build(results).warnings)


def test_a_missing_run_is_a_gap_of_its_method(store: Store) -> None:
    methods(store, 2, {"byol": 0.2, "co-byol": 1.5})
    writer = Writer(store, "byol-0", 0.2, seed=0)
    writer.redundancy()
    assert Results(store).estimate("byol (2 seeds)", "redundancy", "within", site="prepool", weights="trained") is None


def test_a_method_is_paired_with_itself_run_by_run() -> None:
    """Two scores of the same runs: what the seeds have in common is no doubt about their difference."""
    rng = np.random.default_rng(0)
    runs = []
    for seed in range(3):
        apart = rng.normal(0.1, 0.01, 40)
        one = seed + rng.normal(0, 0.01, 40)
        ids = pd.RangeIndex(40)
        runs.append([from_shares(float(x.mean()), Shares(ids, x), "d") for x in (one + apart, one)])
    a, b = (pooled(side) for side in zip(*runs, strict=True))
    found, own = difference_within(a, b), [x.shares.values - y.shares.values for x, y in runs]
    assert found is not None
    expected = contrast([(1, np.stack(own))])
    assert tuple(found[:3]) == pytest.approx(tuple(expected[:3]))
    assert found.high - found.low < 0.1
    assert np.isnan(found.p)
    apart = difference(a, b)
    assert apart is not None
    assert apart.high - apart.low > 1
    assert could_have_seen(runs[0][0], runs[0][0]) is None  # one and the same


def test_redundancy_of_methods_stands_beside_that_of_old_results(store: Store) -> None:
    """Pairs are of images: results that hold intervals alone have none, and each run of a method its classes."""
    for number, name in enumerate(("byol-0", "byol-1", "old")):
        writer = Writer(store, name, 0.4, seed=number)
        for state, value in (("trained", 0.3), ("untrained", 0.6)):
            condition = {"site": "prepool", "weights": state}
            own = value + np.random.default_rng([number, state == "trained"]).normal(0, 0.1, 60)
            found = Measurement(BY_CLASS, float(own.mean()), 60, own.mean() - 0.03, own.mean() + 0.03, condition)
            samples = {"id": writer.ids, "label": np.arange(60) % 3, own_column(BY_CLASS, condition): own}
            writer.put(Cell("redundancy", condition), [found], None if name == "old" else samples)
    results = Results(store, {"byol": ["byol-*"]})
    apart = against_untrained(results)
    assert apart is not None
    assert list(apart.columns) == ["byol (2 seeds)"]
    assert "of its runs' own differences" in apart.caption
    classes = by_class(results)
    assert classes is not None
    assert list(classes.columns) == ["byol-0", "byol-0, untrained", "byol-1", "byol-1, untrained"]


def test_an_images_redundancy_stands_beside_its_accuracy(store: Store) -> None:
    """Spearman's coefficient over images, by hand; the images of the two cells stand in different orders."""
    writer = Writer(store, "net", 0.4)
    writer.corruptions(BENCHMARK)
    own = np.random.default_rng(0).normal(0.3, 0.1, 60)
    condition = {"site": "prepool", "weights": "trained"}
    measurement = Measurement(BY_CLASS, float(own.mean()), 60, 0.2, 0.4, condition)
    order = np.random.default_rng(1).permutation(60)
    samples = {"id": np.asarray(writer.ids)[order], own_column(BY_CLASS, condition): own[order]}
    writer.put(Cell("redundancy", condition), [measurement], samples)
    results = Results(store)
    found = with_accuracy(results)
    assert found is not None
    row = next(row for row in found.rows if row.name == "corrupted")
    share = next(c for c in columns(results) if c.name == "corrupted").of("net").shares  # type: ignore[union-attr]
    ranks = [stats.rankdata(values) for values in (own, share.series().loc[list(writer.ids)])]  # type: ignore[union-attr]
    r = float(np.corrcoef(*ranks)[0, 1])
    (number,) = row.entries
    assert isinstance(number, Number)
    assert number.value == pytest.approx(r)
    half = 1.96 * np.sqrt((1 + r**2 / 2) / 57)
    assert (number.low, number.high) == pytest.approx((np.tanh(np.arctanh(r) - half), np.tanh(np.arctanh(r) + half)))


def test_only_shares_of_images_end_at_0_and_1(store: Store) -> None:
    for number, nll in enumerate((0.5, 0.9, 0.7)):
        writer = Writer(store, f"byol-{number}", 0.4, seed=number)
        condition = {"corruption": "clean", "severity": 0}
        further = [Measurement("nll", nll, 60, nll - 0.1, nll + 0.1, condition)]
        writer.write(Cell("corruptions", {"corruption": "clean"}), [("accuracy", condition, np.ones(60))], further)
        top5 = [Measurement("top5", 0.96 + number / 100, 60, 0.9, 1.0, {})]
        writer.write(Cell("probe", {"seed": 0}), [("top1", {}, writer.verdicts(0))], top5)
    results = Results(store, {"byol": ["byol-*"]})
    nll = results.estimate("byol (3 seeds)", "corruptions", "nll", **condition)
    assert nll is not None
    expected = spread([0.5, 0.9, 0.7])
    assert (nll.low, nll.high) == pytest.approx((expected.low, expected.high))
    assert expected.high > 1
    right = results.estimate("byol (3 seeds)", "corruptions", "accuracy", **condition)
    assert right is not None
    assert right.high == 1
    shown = entry(table(build(results), "probe"), "linear probe top-5", "byol (3 seeds)")
    assert isinstance(shown, Number)
    assert shown.high == pytest.approx(min(1.0, spread([0.96, 0.97, 0.98]).high))


def test_names_of_other_weights_are_no_seeds_of_a_method(store: Store) -> None:
    """Two files of one name in two runs: each network is what was said of its own weights."""
    for number in range(3):
        writer = Writer(store, f"byol-{number}", 0.4, seed=number)
        sha = f"{number}" * 64
        writer.protocol["model"]["sha256"] = sha
        writer.name = "model" if number else "byol-0"
        writer.probe()
        said = {"name": writer.name, "sha256": sha, "arch": "resnet18"}
        store.record_run({"models": [said | ({"group": "byol", "seed": number} if number < 2 else {})]})
    assert Results(store).labels == ["byol (2 seeds)", "model [sha256=22222222]"]


def test_a_seed_that_was_evaluated_otherwise_is_left_out_aloud(store: Store) -> None:
    """One seed has cells of another parameter beside those that all have; older versions of the same do not count."""
    methods(store, 3, {"byol": 0.2})
    for number in range(3):
        writer = Writer(store, f"byol-{number}", 0.2, seed=number)
        condition = {"site": "prepool", "weights": "trained"}
        within = [Measurement("within", 0.5, 60, 0.4, 0.6, condition)]
        for more in ({"images": 5}, {"images": 6}) if number == 2 else ({"images": 5},):
            writer.put(Cell("redundancy", condition | more, 3), within)
        writer.put(Cell("redundancy", condition, 2), within)
    results = Results(store)
    assert results.labels[0] == "byol (2 seeds)"
    assert len(results.labels) == 3
    document = build(results)
    assert sum("no other run of byol was evaluated like that" in line for line in document.warnings) == 2


@pytest.mark.slow
def test_files_know_their_method_and_flags_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        for method in ("byol", "co"):
            made = make_model("resnet18", stem="cifar", width=8, seed=2 * seed + (method == "co"))
            said = replace(made, group=method, seed=seed) if method == "byol" else made
            save_model(said, tmp_path / f"{method}-{seed}" / "model.safetensors")
    loaded = load_model(tmp_path / "byol-1" / "model.safetensors")
    assert loaded.training() == {"group": "byol", "seed": 1}
    assert loaded.untrained().group is None
    flags = [*(f"--ckpt={tmp_path}/byol-{seed}/model.safetensors" for seed in range(2)), "--out", str(tmp_path / "out")]
    flags += ["--label", f"CO (ours)={tmp_path}/co-*/model.safetensors", "--limit", "20", "--quiet", "--no-cache"]
    assert app(["crops", *flags], result_action="return_value") == 0
    assert Results(Store(tmp_path / "out")).labels == ["byol (2 seeds)", "CO (ours) (2 seeds)"]
    again = ["report", str(tmp_path / "out"), "--label", "ours=co-*", "--label", "theirs=runs/byol-*/model.safetensors"]
    assert app(again, result_action="return_value") == 0
    assert "| ours (2 seeds) |" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(UsageError, match="matches no file"):
        ModelFlags(label=("x=nowhere/*.pt",)).load()
