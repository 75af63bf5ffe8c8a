"""What a report says: headline, tables with n and limit, gaps, warnings, provenance."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest
from synthetic_runs import Writer

from coss_eval.corruptions.names import BENCHMARK, SEVERITIES
from coss_eval.corruptions.score import mce, relative_mce
from coss_eval.errors import UsageError
from coss_eval.reports import headline, verdict
from coss_eval.reports.by_task import task_report
from coss_eval.reports.document import build, difference_table, resolve_baseline
from coss_eval.reports.estimates import Estimate, Shares, difference, pooled
from coss_eval.reports.latex import MARKS, latex
from coss_eval.reports.layout import Number, Table, markdown, to_csv
from coss_eval.reports.provenance import protocol_line
from coss_eval.reports.results import Results
from coss_eval.reports.scores import Column, TaskScores
from coss_eval.statistics import holm
from coss_eval.store import Cell, Measurement, Store
from coss_eval.tasks.corruptions.report import mean_corruption_error


def table(document: object, name: str) -> Table:
    return next(t for t in document.tables if t.name == name)  # type: ignore[attr-defined]


def entry(table: Table, row: str, column: str) -> object:
    found = next(r for r in table.rows if r.name == row)
    return found.entries[list(table.columns).index(column)]


def test_the_headline_has_a_row_a_checkpoint_and_a_column_a_kind(full: Store) -> None:
    shown = table(build(Results(full)), "headline")
    assert [row.name for row in shown.rows] == ["b", "a_1"]
    assert shown.corner == "n = 60"
    assert list(shown.columns) == [
        "head",
        "clean top-1 %",
        "kNN %",
        "corrupted %",
        "kept %",
        "PGD 0.5/255 %",
        "PGD 2/255 %",
        "kept, channels masked %",
        "kept, locations masked %",
        "redundancy",
        "redundancy, untrained",
    ]
    assert entry(shown, "a_1", "head") == "linear probe"  # its strength is in the provenance
    assert entry(shown, "a_1", "corrupted %") is None  # frost is missing: no mean over the other 14
    assert shown.gaps == 2
    assert "2 of 22 not measured" in shown.footnote


def test_the_headline_of_probes_alone_speaks_of_probes_alone(store: Store, writer: Callable) -> None:
    writer("r18").probe()
    writer("vit").probe()
    shown = table(build(Results(store)), "headline")
    assert list(shown.columns) == ["linear probe %", "kNN %"]
    assert shown.footnote == "linear probe: logistic regression on the images as they are."


def test_there_is_no_headline_without_scores(store: Store, writer: Callable) -> None:
    m = writer("m")
    condition = {"attack": "representation:knn", "norm": "linf", "eps": 0.01}
    m.put(Cell("attacks", {"attack": "representation"}), [Measurement("moved", 0.4, 60, 0.3, 0.5, condition)])
    document = build(Results(store))
    assert [section.title for section in document.sections] == ["Attacks", "Provenance"]
    assert all(shown.columns for shown in document.tables)


def test_a_caption_explains_the_columns_that_are_there(full: Store) -> None:
    columns = headline.columns(Results(full))
    masked = next(column for column in columns if column.name == "kept, channels masked")
    assert [part.split(":")[0] for part in headline.caption([masked]).split(" · ")] == ["kept", "masked"]


def test_the_headline_s_means_are_those_of_the_measurements(full: Store) -> None:
    results = Results(full)
    rows = results.rows("corruptions")
    rows = rows[(rows["checkpoint"] == "b") & rows["corruption"].isin(BENCHMARK)]
    found = next(column for column in headline.columns(results) if column.name == "corrupted").of("b")
    assert found is not None
    assert found.value == pytest.approx(rows["value"].mean())
    assert found.low is not None
    pooled = 60 * 75
    assert found.high - found.low > 2 / np.sqrt(pooled)  # type: ignore[operator]  # wider than 4,500 images would be


@pytest.mark.slow
def test_every_task_has_its_table_and_differences(full: Store) -> None:
    document = build(Results(full))
    names = [t.name for t in document.tables]
    for task in ("probe", "corruptions", "attacks", "internal"):
        assert {task, f"{task}_differences"} <= set(names)
    redundancy = table(document, "redundancy_differences")  # no samples to pair: from the intervals, without p
    assert {row.name for row in redundancy.rows} == {"within", "normalised"}  # not the untrained network's, a reference
    assert all(isinstance(e, Number) and e.interval and not e.p_text for row in redundancy.rows for e in row.entries)
    corruptions = table(document, "corruptions")
    assert list(corruptions.columns) == ["b (baseline)", "a_1"]
    assert entry(corruptions, "frost", "a_1") is None
    means = table(document, "corruptions_means")
    assert entry(means, "weather", "a_1") is None
    assert isinstance(entry(means, "noise", "a_1"), Number)
    internal = table(document, "internal")
    assert [row.name for row in internal.rows][:3] == ["stage2", "stage10", "prepool"]  # in the network's order


@pytest.mark.slow
def test_differences_are_against_the_baseline(full: Store) -> None:
    results = Results(full)
    forward = table(build(results, "b"), "probe_differences")
    backward = table(build(results, "a_1"), "probe_differences")
    one, other = forward.rows[0].entries[0], backward.rows[0].entries[0]
    assert isinstance(one, Number)
    assert isinstance(other, Number)
    assert one.value == -other.value
    assert one.p == other.p
    assert one.low == pytest.approx(-other.high)  # type: ignore[operator]
    assert list(table(build(results, "a_1"), "probe").columns) == ["a_1 (baseline)", "b"]


@pytest.mark.slow
def test_p_is_adjusted_over_the_column(full: Store) -> None:
    results = Results(full)
    shown = table(build(results), "attacks_differences")
    raw = [row.entries[0].p for row in shown.rows]  # type: ignore[union-attr]
    assert all(p is not None and 0 <= p <= 1 for p in raw)
    assert "Holm" in " ".join(build(results).sections[-1].paragraphs)


@pytest.mark.slow
def test_an_error_turns_its_accuracy_s_difference_about(full: Store, writer: Callable) -> None:
    writer("c", -1.0).corruptions()
    document = build(Results(full))
    accuracy = entry(table(document, "corruptions_differences"), "clean", "c")
    error = entry(table(document, "corruptions_error_differences"), "clean error", "c")
    assert isinstance(accuracy, Number)
    assert isinstance(error, Number)
    assert error.value == pytest.approx(-accuracy.value)
    assert error.value > 0
    assert error.clear
    assert error.side == "worse"
    assert accuracy.side == "worse"


def test_redundancy_is_explained_as_far_as_it_is_shown(full: Store) -> None:
    shown = table(build(Results(full)), "redundancy")
    assert [(row.group.split(",")[0], row.name) for row in shown.rows][::2] == [
        ("the mean of each grid position taken off", "normalised"),
        ("one mean taken off for all positions", "within"),
        ("one mean taken off for all positions", "normalised"),
        ("directions and information", "effective rank total"),
    ]
    terms = [part.split(": ")[0].rsplit(". ", 1)[-1] for part in shown.caption.split(" · ")]
    assert terms[1:] == ["normalised", "effective rank"]
    assert "two images. within: " in shown.caption


def test_an_unknown_baseline_is_answered_with_the_names(full: Store) -> None:
    with pytest.raises(UsageError, match="unknown baseline 'a1'; did you mean a_1"):
        resolve_baseline(Results(full), "a1")


def test_a_limit_is_in_every_table_s_head(store: Store, writer: Callable) -> None:
    for name in ("one", "two"):
        writer(name, 0.4, limit=60).everything()
    document = build(Results(store))
    for shown in document.tables:
        if shown.name not in ("models", "data", "runs"):
            assert "n = 60, limit" in shown.corner, shown.name
    assert document.warnings[0].startswith("LIMITED")


def test_checkpoints_that_were_measured_in_other_ways_are_told(store: Store, writer: Callable[..., Writer]) -> None:
    """One table has both, with a difference and its p; what labels tell is not told again."""
    writer("a").corruptions(["fog"])
    assert build(Results(store)).warnings == []
    writer("b").corruptions(["fog"], backend="reference")
    said = "not measured alike, and may differ by that alone: corruptions: backend differs: native and reference."
    assert any(line.endswith(said) for line in build(Results(store)).warnings)
    assert not any(said in line for line in build(Results(store, models=["b"])).warnings)
    writer("a").corruptions(["fog"], backend="reference")  # which is "a [backend=reference]"
    assert not any(said in line for line in build(Results(store)).warnings)


def test_the_protocol_names_backend_and_table(full: Store) -> None:
    results = Results(full)
    assert protocol_line(results, "corruptions") == "Protocol: native backend, severities as for tiny-imagenet."
    assert protocol_line(results, "attacks") == "Protocol: 20 steps, 60 images attacked."
    attacks = next(s for s in build(results).sections if s.title == "Attacks")
    assert attacks.folded[1:] == ["Attacks use 60 of 90 test images, balanced over classes."]


def test_provenance_names_weights_data_and_runs(full: Store) -> None:
    document = build(Results(full))
    models = table(document, "models")
    assert entry(models, "b", "layout") == "dino"
    assert len(str(entry(models, "b", "weights (sha256)"))) == 16
    assert entry(table(document, "data"), "tiny", "fingerprint") == "f00d"
    assert entry(table(document, "runs"), "2025-01-01T00:00:00+0000", "device") == "cpu, 4 threads"


def test_warnings_say_what_a_reader_must_know(full: Store, writer: Callable) -> None:
    full.record_run({"device": "cuda:0", "warnings": ["b: the pixels look like BGR"], "cells": [
        {"key": "0" * 20, "model": "b", "task": "crops"}, {"key": full.records()[0]["key"], "model": "b", "task": "x"},
    ]})  # fmt: skip
    warnings = " | ".join(build(Results(full)).warnings)
    assert "b: the pixels look like BGR" in warnings
    assert "several device types (cpu, cuda)" in warnings
    assert "1 planned cells are missing: b: crops (1)" in warnings


def test_digits_are_called_a_demonstration(store: Store, writer: Callable) -> None:
    writer("m", data="digits", side=32).probe()
    assert "support no ranking" in build(Results(store)).warnings[0]


@pytest.mark.parametrize(
    ("data", "side", "defined"), [("imagenet", 224, True), ("imagenet", 64, False), ("tiny", 224, False)]
)
def test_mce_stands_only_where_it_is_defined(
    data: str, side: int, *, defined: bool, store: Store, writer: Callable
) -> None:
    m = writer("m", data=data, side=side)
    m.corruptions(BENCHMARK, table="imagenet")
    results = Results(store)
    found = mean_corruption_error(results, "m")
    relative = mean_corruption_error(results, "m", relative=True)
    assert (found is not None) == (relative is not None) == defined
    assert ("corruptions_mce" in [t.name for t in build(results).tables]) == defined
    if found is not None:
        rows = results.rows("corruptions")
        errors = {
            (name, severity): 1
            - float(rows[(rows["corruption"] == name) & (rows["severity"] == severity)]["value"].iloc[0])
            for name in BENCHMARK
            for severity in SEVERITIES
        }
        where = {"dataset": "imagenet", "side": 224, "table": "imagenet"}
        assert found.value == pytest.approx(mce(errors, **where))
        assert found.low < found.value < found.high  # type: ignore[operator]
        clean = float(rows[rows["corruption"] == "clean"]["value"].iloc[0])
        assert relative.value == pytest.approx(relative_mce(errors, 1 - clean, **where))
        assert relative.low < relative.value < relative.high  # type: ignore[operator]


def test_a_task_of_tomorrow_gets_a_plain_table(store: Store, writer: Callable) -> None:
    m = writer("m")
    rows = [("accuracy", {"area": area, "seed": seed}, m.verdicts(0, seed)) for area in (0.2, 0.5) for seed in (0, 1)]
    m.write(Cell("angles", {"areas": [0.2, 0.5]}), rows)
    shown = table(build(Results(store)), "angles")
    assert [row.name for row in shown.rows] == ["accuracy, area 0.2", "accuracy, area 0.5"]


def test_what_is_no_accuracy_gets_a_row_of_its_own(store: Store, writer: Callable) -> None:
    m = writer("m")
    m.attacks()
    m.put(Cell("attacks", {"summary": 1}), [Measurement("median_smallest_eps", 0.01, 60, condition={"attack": "pgd"})])
    rows = writer("m").verdicts(0)
    m.write(Cell("probe", {"labels": 0.01}), [("top1", {"labels": "0.01"}, rows)])
    document = build(Results(store))
    assert table(document, "attacks").rows[-1].name == "median smallest eps, attack pgd"
    assert table(document, "probe").rows[0].name == "linear probe top-1, 1 % of the labels"


def test_notes_that_differ_in_numbers_are_one_column(store: Store, writer: Callable) -> None:
    """What all have is said once; the rest is a table, by what it says, and never a paragraph a checkpoint."""
    for name, own, few in (("b", "3", "30"), ("a", "1e-05", "10")):
        m = writer(name)
        m.write(Cell("probe", {}), [("top1", {}, m.verdicts(0))], notes=["k=20", f"strength {own}, of 15"])
        notes = [f"10 % of the labels: strength {few}, of 15", *(["slow"] if name == "b" else [])]
        m.write(Cell("probe", {"labels": 0.1}), [("top1", {"labels": "0.1"}, m.verdicts(1))], notes=notes)
    shared, own_notes = Results(store).notes("probe")
    assert shared == ["k=20"]
    assert own_notes == {
        "10 % of the labels: strength …, of 15": {"a": "10", "b": "30"},
        "strength …, of 15": {"a": "1e-05", "b": "3"},
        "slow": {"b": "yes"},
    }
    section = build(Results(store)).sections[1]
    assert section.folded == ["k=20."]
    shown = section.folded_tables[0]
    assert (shown.name, list(shown.columns)) == ("probe_notes", list(own_notes))
    assert entry(shown, "a", "strength …, of 15") == "1e-05"


def test_where_the_logits_came_from_is_a_field_and_was_a_note(store: Store, writer: Callable) -> None:
    m = writer("m")
    m.corruptions(["fog"])  # as older versions wrote: a note
    record = {"protocol": m.protocol, "model": "m", "measurements": [Measurement("fine", 0.5, 60)]}
    for head, task in (("own head", "using"), (None, "headless")):
        cell = Cell(task, {})
        store.write(store.key(m.protocol, cell), {**record, "cell": cell, "head": head, "notes": ["head: up"]})
    results = Results(store)
    assert results.heads("m") == ["linear probe, strength 0.1", "own head"]
    assert results.notes("corruptions") == ([], {})
    assert results.notes("headless") == results.notes("using") == (["head: up"], {})


def test_a_checkpoint_without_a_task_is_named_below_it(store: Store, writer: Callable) -> None:
    writer("m").everything()
    writer("other").probe()
    shown = table(build(Results(store)), "attacks")
    assert "Not measured here: other." in shown.footnote
    assert list(shown.columns) == ["m (baseline)"] or list(shown.columns) == ["m"]


def test_one_comparison_has_one_p_whatever_is_shown(full: Store, writer: Callable) -> None:
    """Its family is all pairs on all rows of its table: a baseline, a gap of it and the format change nothing."""
    writer("c", 1.0).everything()
    results = Results(full)
    scores = next(s for s in task_report("corruptions").scores(results) if s.name == "corruptions")
    labels = results.labels
    raw = [difference(s.of(a), s.of(b)) for s in scores.scores for a, b in combinations(labels, 2)]
    family = list(holm([float("nan") if d is None else d.p for d in raw]))
    row = scores.scores[0]
    expected = family[0]  # clean, b and a_1
    for base, other in (("b", "a_1"), ("a_1", "b")):
        shown = difference_table(results, scores, base)
        assert shown is not None
        number = entry(shown, row.name, other)
        assert isinstance(number, Number)
        assert number.p == pytest.approx(expected)
        assert number.p_text in markdown(shown)
        assert f"{expected:.4g}" in to_csv(shown)
        mark = next((mark for least, mark in MARKS if expected < least), "")
        first = next(line for line in latex(shown).splitlines() if line.startswith(f"{row.name} & "))
        assert re.findall(r"\^\{(\**)\}", first.split(" & ")[1 + list(shown.columns).index(other)]) == [mark] * bool(
            mark
        )
        assert "8 times in 10" in shown.caption


def verdict_of(results: Results) -> list[str]:
    return verdict.sentences(results, headline.columns(results))


def probes(store: Store, skills: dict[str, float], seeds: int = 0, images: int = 1500) -> Results:
    """A store with the probes of methods of known skill, some seeds each, or of single checkpoints."""
    names = [f"{name}_{seed}" if seeds else name for name in skills for seed in range(max(1, seeds))]
    for place, name in enumerate(names):
        method = name.rpartition("_")[0] if seeds else name
        one = Writer(store, name, skills[method], seed=100 * place, images=images)
        one.write(Cell("probe", {"seed": 0}), [("top1", {}, one.verdicts(0, place))])
    patterns = {name: [f"{name}_*"] for name in skills} if seeds else None
    return Results(store, patterns)


def test_the_verdict_names_the_best_and_by_how_much(store: Store) -> None:
    results = probes(store, {"weak": 0.0, "strong": 1.0, "middle": 0.5}, seeds=4)
    first, second, third = verdict_of(results)
    shown = difference_table(results, TaskScores("headline", "", "", [*headline.columns(results)]), "middle (4 seeds)")
    assert shown is not None
    number = entry(shown, "linear probe", "strong (4 seeds)")
    assert isinstance(number, Number)
    lead = f"{number.main} {number.interval} points over the next, middle (4 seeds) ({number.p_text})."
    assert first == f"strong (4 seeds) is best on linear probe: {lead}"
    assert number.clear
    assert second == "Nothing is tied. Nothing is missing."
    assert third.startswith("How sure: 4 seeds a method (n = 1500); intervals are about new seeds and new images")


def test_the_verdict_calls_a_tie_a_tie(store: Store) -> None:
    first, second, third = verdict_of(probes(store, {"a": 0.5, "b": 0.5}))
    assert first.startswith("There is no clear best: on the one score of the headline")
    most = re.fullmatch(
        r"Not told apart: on linear probe (\w) and (\w) \(at most (.*) points behind (\w)\)\..*", second
    )
    assert most is not None
    assert most[1] == most[4] != most[2]
    assert 0 < float(most[3]) < 8
    assert "one seed each (n = 1500), so checkpoints are compared, not the methods" in third


def test_the_verdict_ranks_no_gap_no_reference_and_no_single_seed(store: Store, writer: Callable) -> None:
    store.record_run({"models": [{"name": "new", "layout": "untrained"}]})
    for name, skill in (("new", 9.0), ("good", 3.0), ("poor", -1.0)):
        one = writer(name, skill)
        one.probe()
        one.corruptions([*BENCHMARK] if name != "poor" else [*BENCHMARK][1:])
    first, second, third = verdict_of(Results(store))
    assert "good is best on clean top-1" in first
    assert "new" not in first + second
    assert "Not measured, so not ranked: poor on corrupted." in second
    assert third.endswith("; new is the reference and not ranked.")
    methods = probes(Store(store.path.parent / "methods"), {"a": 0.0, "b": 2.0}, seeds=3, images=200)
    Writer(methods.store, "alone", 5.0, images=200).probe()
    first, _, third = verdict_of(Results(methods.store, {"a": ["a_*"], "b": ["b_*"]}))
    assert first.startswith("b (3 seeds) is best on linear probe")
    assert "(an interval and no p: fewer than 4 seeds)" in first
    assert "fewer than 4 seeds have no p; alone, of one seed, is not ranked with them" in third


@pytest.mark.parametrize("others", [{"good": 1.5, "level": 0.5, "poor": -0.5}, {"poor": -0.5}])
def test_the_verdict_tells_where_an_untrained_network_is_not_below(store: Store, others: dict[str, float]) -> None:
    store.record_run({"models": [{"name": "new", "layout": "untrained"}]})
    for name, skill in ({"new": 0.5} | others).items():
        one = Writer(store, name, skill, images=1500)
        one.write(Cell("probe", {}), [("top1", {}, one.verdicts(0))])
    first, second, third = verdict_of(Results(store))
    ahead = "An untrained network is ahead of poor on linear probe"
    if len(others) > 1:
        assert first.startswith("good is best on linear probe")
        assert second == f"{ahead} and not told apart from level on linear probe. Nothing is tied. Nothing is missing."
        assert third.endswith("; new is the reference and not ranked.")
    else:
        assert first.startswith("There is no other trained network to compare poor with: linear probe")
        assert second == f"{ahead}. Nothing is missing."


def test_names_with_commas_in_a_list_stand_in_quotes() -> None:
    assert verdict.listed(["kept", "kept, channels masked"]) == 'kept and "kept, channels masked"'
    assert verdict.listed(["kept, channels masked"]) == "kept, channels masked"
    assert verdict.listed(["byol on kept, clean", "b"], "; ") == "byol on kept, clean and b"


def test_one_model_has_a_verdict_without_comparisons(store: Store, writer: Callable) -> None:
    writer("net").probe()
    number = entry(table(build(Results(store)), "headline"), "net", "linear probe %")
    first, second, third = verdict_of(Results(store))
    assert first.startswith(f"There is nothing to compare net with: linear probe {number} %, kNN")
    assert second == "Nothing is missing."
    assert third == "How sure: intervals are about new images (n = 60); one seed says nothing of other seeds."


def test_the_verdict_is_given_for_each_set_of_images(store: Store, writer: Callable) -> None:
    for data, skills in (("old", (2.0, -2.0)), ("new", (-2.0, 2.0))):
        for name, skill in zip("ab", skills, strict=True):
            one = writer(name, skill, data=data)
            one.protocol["data"]["fingerprint"] = data
            one.write(Cell("probe", {}), [("top1", {}, one.verdicts(0))])
    first, *_ = verdict_of(Results(store))
    assert "a [data=old, fingerprint=old] is best on linear probe on old" in first
    assert "b [data=new, fingerprint=new] is best on linear probe on new" in first


@pytest.mark.slow
def test_without_an_effect_a_best_is_declared_in_one_draw_of_twenty_at_most() -> None:
    """200 draws of 4 methods with 4 seeds each on 3 scores: 16 are the 95 % bound of 5 % of them."""
    rng, labels = np.random.default_rng(5), ["a", "b", "c", "d"]
    declared = 0
    for _ in range(200):
        hard, spread = rng.normal(0, 1, (3, 120)), rng.normal(0, 0.2, (3, 4, 4))

        def of(label: str, score: int, hard: Any = hard, spread: Any = spread) -> Estimate | None:
            luck = rng.normal(0, 1, (4, 120))
            right = luck + hard[score] < 0.4 + spread[score, labels.index(label), :, None]
            runs = [Estimate(x.mean(), 0.0, 1.0, 120, Shares(pd.RangeIndex(120), x), "d") for x in right]
            return pooled(runs)

        scores = [Column(f"s{i}", lambda label, i=i, of=of: of(label, i)) for i in range(3)]  # type: ignore[misc]
        declared += any(not standing.ties for standing in verdict.standings(scores, labels))
    assert declared <= 16


def test_a_mean_per_class_that_is_the_top1_is_said_once(store: Store, writer: Callable) -> None:
    for name in ("a", "b"):
        m = writer(name)
        right = m.verdicts(0)
        more = [Measurement("mean_per_class", float(right.mean()), 60)]
        m.write(Cell("probe", {}), [("top1", {}, right)], more)
    shown = table(build(Results(store)), "probe")
    assert [row.name for row in shown.rows] == ["linear probe top-1"]
    assert "a mean per class that is not shown is the top-1" in shown.caption
    c = writer("c")
    c.write(Cell("probe", {}), [("top1", {}, c.verdicts(0))], [Measurement("mean_per_class", 0.25, 60)])
    assert len(table(build(Results(store)), "probe").rows) == 2
