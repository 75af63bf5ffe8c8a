"""Claims over seeds: the score of a run, the contrast of arms and its interval, what is said before there are seeds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from coss_eval.errors import UsageError
from coss_eval.reports.claims import Claim, claims_table, finding
from coss_eval.statistics import contrast

CLAIM = Claim(
    name="corruptions",
    source="table 3",
    task="corruptions",
    metric="accuracy",
    margin=0.01,
    where={"corruption": ["fog", "snow"], "severity": [1, 2], "eps": 0.1},
)


def measurement(value: float, metric: str = "accuracy", **condition: object) -> dict[str, object]:
    return {"metric": metric, "value": value, "condition": {"eps": 0.1, **condition}}


def test_a_score_is_the_mean_over_the_conditions_that_it_names() -> None:
    records = [
        {
            "task": "corruptions",
            "measurements": [
                measurement(0.5, corruption="fog", severity=1),
                measurement(0.3, corruption="snow", severity=2),
                measurement(0.9, corruption="frost", severity=1),
                measurement(0.9, corruption="fog", severity=3),
                measurement(0.9, "top1", corruption="fog", severity=1),
            ],
        },
        {"task": "probe", "measurements": [measurement(0.9, corruption="fog", severity=1)]},
    ]
    assert CLAIM.score(records) == pytest.approx(0.4)
    assert CLAIM.score(records[1:]) is None


def test_two_arms_give_welchs_test() -> None:
    a, b = [0.31, 0.35, 0.29, 0.40], [0.25, 0.26, 0.27]
    found = finding(CLAIM, {"co-byol": a, "byol": b}).difference
    welch = stats.ttest_ind(a, b, equal_var=False)
    low, high = welch.confidence_interval()
    assert found is not None
    assert (found.difference, found.p) == pytest.approx((np.mean(a) - np.mean(b), welch.pvalue))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_a_contrast_of_four_arms_covers_as_it_should() -> None:
    """95 % of the intervals of (a - b) - (c - d) hold the truth at unequal spreads; binomial noise .35 %."""
    rng = np.random.default_rng(0)
    weights, spreads, hits = (1, -1, -1, 1), (1.0, 2.0, 0.5, 1.0), 0
    for _ in range(4000):
        groups = [(w, rng.normal(0.0, s, 4)) for w, s in zip(weights, spreads, strict=True)]
        found = contrast(groups)
        hits += found.low <= 0 <= found.high
    assert 0.935 <= hits / 4000 <= 0.972


def test_one_seed_says_nothing() -> None:
    found = finding(CLAIM, {"co-byol": [0.3, 0.4], "byol": [0.2]})
    assert found.difference is None
    table = claims_table([found], {"co-byol": 8, "byol": 8})
    assert table.rows[0].entries == ["co-byol − byol", None, "1.0", "2 of 8, 1 of 8"]


def test_weights_that_do_not_sum_to_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="sum to 0"):
        Claim(name="x", source="", task="probe", metric="top1", margin=0.0, contrast={"a": 1.0})
