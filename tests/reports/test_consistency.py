"""Error consistency: kappa against scikit-learn's, its interval, and which checkpoints and conditions meet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score
from synthetic_runs import IMAGES, Writer

from coss_eval.errors import CossError, UsageError
from coss_eval.reports.consistency import ALL, consistency, kappa, text
from coss_eval.reports.estimates import Estimate, Shares
from coss_eval.store import Store


def estimate(verdicts: NDArray[np.bool_], data: str = "f00d") -> Estimate:
    return Estimate(
        float(verdicts.mean()),
        0.0,
        1.0,
        len(verdicts),
        Shares(pd.RangeIndex(len(verdicts)), verdicts.astype(float)),
        data,
    )


def drawn(seed: int, n: int = 200) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two networks right on 70 and 80 % of the images, which share what is difficult."""
    draw = np.random.default_rng(seed)
    difficult = draw.random(n)
    return tuple(0.6 * difficult + 0.4 * draw.random(n) < level for level in (0.61, 0.68))  # type: ignore[return-value]


def test_kappa_is_scikit_learns() -> None:
    a, b = drawn(0)
    found = kappa(estimate(a), estimate(b))
    assert found is not None
    assert found.value == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)
    assert found.shares is not None
    assert found.shares.values.mean() == pytest.approx(found.value, abs=1e-12)


def test_its_interval_covers() -> None:
    a, b = drawn(1, 200_000)
    truth = cohen_kappa_score(a, b)
    found = [kappa(*map(estimate, drawn(seed))) for seed in range(2, 302)]
    covered = sum(one.low <= truth <= one.high for one in found if one is not None)  # type: ignore[operator]
    assert 270 <= covered <= 297  # of 300: a binomial of .95 is outside with probability .0009


def test_identities() -> None:
    a, b = drawn(0)
    assert kappa(estimate(a), estimate(a)).value == pytest.approx(1)  # type: ignore[union-attr]
    assert kappa(estimate(a), estimate(b)).value == pytest.approx(kappa(estimate(b), estimate(a)).value)  # type: ignore[union-attr]
    assert kappa(estimate(a), estimate(~a)).value < 0  # type: ignore[union-attr]
    independent = np.random.default_rng(5).random(200) < 0.7
    around = kappa(estimate(a), estimate(independent))
    assert around is not None
    assert around.low < 0 < around.high  # type: ignore[operator]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (estimate(np.ones(9, bool)), estimate(np.ones(9, bool))),
        (estimate(drawn(0)[0]), estimate(drawn(0)[1], "other images")),
        (estimate(drawn(0)[0]), None),
        (estimate(drawn(0)[0]), Estimate(0.5, 0.4, 0.6, 200, Shares(pd.RangeIndex(200), np.full(200, 0.5)), "f00d")),
    ],
    ids=["always right", "other images", "missing", "no verdicts"],
)
def test_what_has_no_kappa(one: Estimate, other: Estimate | None) -> None:
    assert kappa(one, other) is None


def test_every_two_checkpoints_meet_under_every_condition(tmp_path: Path) -> None:
    store = Store(tmp_path / "one")
    weak, strong = Writer(store, "weak", 0.2).everything(), Writer(store, "stronger", 1.2).everything()
    Writer(Store(tmp_path / "two"), "weak", 0.7).everything()
    frame = consistency(tmp_path / "one", tmp_path / "two")
    pairs = [("stronger", "weak, one"), ("stronger", "weak, two"), ("weak, one", "weak, two")]
    assert list(dict.fromkeys(zip(frame["a"], frame["b"], strict=True))) == pairs
    top1 = frame[(frame["metric"] == "top1") & (frame["condition"] != ALL)].iloc[0]
    assert top1["kappa"] == pytest.approx(cohen_kappa_score(weak.verdicts(0), strong.verdicts(0)))
    assert top1["agreement"] == pytest.approx((weak.verdicts(0) == strong.verdicts(0)).mean())
    assert top1["n"] == IMAGES
    corrupted = frame[(frame["task"] == "corruptions") & (frame["a"] == "stronger") & (frame["b"] == "weak, one")]
    every, whole = corrupted[corrupted["condition"] != ALL], corrupted[corrupted["condition"] == ALL]
    damaged = every[~every["condition"].str.contains("clean")]
    assert len(damaged) == len(every) - 1 > 10
    assert whole["kappa"].item() == pytest.approx(damaged["kappa"].mean())
    assert whole["high"].item() - whole["low"].item() < (damaged["high"] - damaged["low"]).mean()
    shown = text(frame)
    assert "stronger and weak, one" in shown
    assert "corruptions" in shown.splitlines()[0]


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give results folders"):
        consistency()
    with pytest.raises(CossError, match="no finished cells"):
        consistency(tmp_path / "none")
    alone = Writer(Store(tmp_path / "alone"), "weak", 0.2).everything()
    with pytest.raises(UsageError, match="no two checkpoints"):
        consistency(alone.store.path)
