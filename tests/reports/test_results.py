"""Estimates: values, intervals and differences against the same numbers computed by hand from the verdicts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from bootstrap import paired_bootstrap

from coss_eval.reports.results import Estimate, Results, area, difference, from_shares, mean, ratio
from coss_eval.statistics import clustered_wilson, paired_difference
from coss_eval.store import Cell, Measurement, Store


def estimates(verdicts: np.ndarray, ids: np.ndarray | None = None, data: str = "d") -> list[Estimate]:
    """One estimate a column of (N, C)."""
    index = np.arange(len(verdicts)) if ids is None else ids
    columns = [pd.Series(column.astype(float), index=index) for column in verdicts.T]
    return [Estimate(float(c.mean()), None, None, len(c), c, data) for c in columns]


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
    assert found.shares.to_numpy() == pytest.approx(two[0].mean(axis=1))


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
    assert found.value == pytest.approx(np.trapezoid([p.value for p in parts], [0, 0.5, 0.9]) / 0.9)
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
    shares = pd.Series(np.random.default_rng(2).normal(0.4, 0.1, 50))
    found = from_shares(float(shares.mean()), shares, None)
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


def test_damaged_files_are_reported_not_raised(full: Store) -> None:
    cells = sorted((full.path / "cells").glob("*.json"))
    cells[0].write_text("{")
    results = Results(full)
    assert len(results.records) == len(cells) - 1
    assert any(cells[0].name in warning for warning in results.warnings)
