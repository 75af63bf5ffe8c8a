"""Intervals and tests against published worked examples, closed forms, and their own coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from bootstrap import paired_bootstrap
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coss_eval.errors import UsageError
from coss_eval.statistics import (
    clustered_wilson,
    contrast,
    contrast_error,
    detectable,
    holm,
    mcnemar,
    mean_of_classes,
    paired_difference,
    seeds_needed,
    spread,
    unpaired,
    wilson,
)


def pairs(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Two correctness arrays with the given 2 x 2 table."""
    a = np.repeat([True, True, False, False], [both, only_a, only_b, neither])
    b = np.repeat([True, False, True, False], [both, only_a, only_b, neither])
    return a, b


# Newcombe (1998), Statistics in Medicine 17, 857, table I, method 3
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_gives_the_published_limits(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 10_000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_scipy_s_and_symmetric(n: int, share: float, level: float) -> None:
    k = round(share * n)
    low, high = wilson(k, n, level)
    peer = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert (low, high) == pytest.approx((peer.low, peer.high), abs=1e-12)
    assert 0 <= low <= k / n <= high <= 1
    assert wilson(n - k, n, level) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_of_nothing_knows_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n", "level"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 95)])
def test_wilson_refuses_impossible_counts_and_levels(successes: int, n: int, level: float) -> None:
    with pytest.raises(UsageError):
        wilson(successes, n, level)


@pytest.mark.parametrize("p", [0.02, 0.5, 0.9])
def test_wilson_covers(p: float) -> None:
    n = 300
    k = np.arange(n + 1)
    covered = np.array([low <= p <= high for low, high in (wilson(int(i), n) for i in k)])
    assert 0.925 < float(stats.binom.pmf(k, n, p)[covered].sum()) < 0.985


def test_clustered_wilson_of_one_condition_is_wilson() -> None:
    correct = np.repeat([True, False], [70, 30])
    assert clustered_wilson(correct) == pytest.approx(wilson(70, 100), abs=2e-3)
    copies = np.repeat(correct[:, None], 75, axis=1)  # 75 copies of one verdict say no more than one
    assert clustered_wilson(copies) == pytest.approx(clustered_wilson(correct), abs=1e-12)


def test_clustered_wilson_at_the_ends_counts_images() -> None:
    assert clustered_wilson(np.ones((50, 20))) == wilson(50, 50)
    assert clustered_wilson(np.zeros((50, 20))) == wilson(0, 50)


def test_clustered_wilson_covers_where_the_pooled_interval_does_not() -> None:
    rng = np.random.default_rng(0)
    repeats, images, conditions, truth = 400, 200, 20, 0.6
    hits = pooled = 0
    for _ in range(repeats):
        difficulty = rng.beta(1.2, 0.8, size=(images, 1))  # mean .6: images differ much
        correct = rng.random((images, conditions)) < difficulty
        low, high = clustered_wilson(correct)
        hits += low <= truth <= high
        low, high = wilson(int(correct.sum()), correct.size)
        pooled += low <= truth <= high
    assert 0.92 < hits / repeats < 0.98
    assert pooled / repeats < 0.75


@pytest.mark.parametrize(
    ("only_a", "only_b", "exact", "mid"),
    [
        (1, 9, 22 / 1024, 22 / 1024 - 10 / 1024),  # tail (1 + 10) / 2^10
        (1, 7, 0.0703125, 0.0390625),  # Fagerland, Lydersen & Laake (2013): .070 and .039
        (0, 5, 2 / 32, 1 / 32),
        (4, 4, 1.0, 1.0),
        (0, 0, 1.0, 1.0),
    ],
)
def test_mcnemar_by_hand(only_a: int, only_b: int, exact: float, mid: float) -> None:
    a, b = pairs(20, only_a, only_b, 7)
    assert mcnemar(a, b, method="exact") == pytest.approx(exact)
    assert mcnemar(a, b) == pytest.approx(mid)
    assert mcnemar(b, a) == mcnemar(a, b)


@given(st.integers(0, 200), st.integers(0, 200))
def test_exact_mcnemar_is_the_binomial_test(only_a: int, only_b: int) -> None:
    a, b = pairs(3, only_a, only_b, 3)
    peer = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(a, b, method="exact") == pytest.approx(peer, abs=1e-12)


def test_mid_p_keeps_its_level() -> None:
    """P(p <= .05) under no difference, summed exactly over the discordant pairs."""
    for discordant in (10, 31, 100):
        p_values = [mcnemar(*pairs(0, k, discordant - k, 0)) for k in range(discordant + 1)]
        probability = stats.binom.pmf(np.arange(discordant + 1), discordant, 0.5)
        assert float(probability[np.array(p_values) <= 0.05].sum()) < 0.06


# Newcombe (1998), Statistics in Medicine 17, 2635, method 10; Fagerland, Lydersen & Laake (2014) for the last two
@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # negative association: phi is not corrected
        ((20, 12, 2, 16), 0.0562, 0.3292),
        ((1, 1, 7, 12), -0.507, -0.026),
        ((59, 6, 16, 80), -0.119, -0.005),
    ],
)
def test_newcombe_gives_the_published_limits(table: tuple[int, ...], low: float, high: float) -> None:
    a, b = pairs(*table)
    result = paired_difference(a, b)
    assert result.difference == pytest.approx((table[1] - table[2]) / sum(table))
    assert result.low <= result.difference <= result.high
    assert (result.low, result.high) == pytest.approx((low, high), abs=5.1e-4)
    mirrored = paired_difference(b, a)
    assert (mirrored.low, mirrored.high) == pytest.approx((-result.high, -result.low))


@pytest.mark.parametrize("table", [(0.5, 0.1, 0.05, 0.35), (0.9, 0.04, 0.01, 0.05)])
def test_paired_difference_covers(table: tuple[float, ...]) -> None:
    rng = np.random.default_rng(1)
    truth = table[1] - table[2]
    hits = 0
    for _ in range(400):
        result = paired_difference(*pairs(*rng.multinomial(200, table)))
        hits += result.low <= truth <= result.high
    assert 0.925 < hits / 400 < 0.985


def test_paired_difference_over_conditions_is_student_on_images() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random((80, 5)) < 0.7, rng.random((80, 5)) < 0.6
    result = paired_difference(a, b)
    peer = stats.ttest_rel(a.mean(axis=1), b.mean(axis=1))
    interval = peer.confidence_interval()
    assert (result.low, result.high, result.p) == pytest.approx((interval.low, interval.high, peer.pvalue))
    assert result.n == 80


def test_one_difference_in_every_image_is_no_chance() -> None:
    a = np.full((50, 3), 0.1) + 0.2  # 0.30000000000000004: rounding must not pass for evidence
    assert paired_difference(a, np.full((50, 3), 0.3)).p == 1.0
    assert paired_difference(a, np.full((50, 3), 0.2)).p == 2.0**-49  # the sign test of 50 images, never 0


def test_the_bootstrap_agrees_with_the_closed_form() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random((500, 4)) < 0.7, rng.random((500, 4)) < 0.65
    closed = paired_difference(a, b)
    assert paired_bootstrap(a, b, seed=7) == pytest.approx((closed.difference, closed.low, closed.high), abs=4e-3)


def test_spread_is_student_s() -> None:
    values = [0.61, 0.64, 0.60, 0.66]
    result = spread(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (result.mean, result.sd, result.low, result.high) == pytest.approx(
        (np.mean(values), np.std(values, ddof=1), low, high)
    )
    assert math.isnan(spread([0.5]).sd)
    with pytest.raises(UsageError):
        spread([])


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([math.nan, 0.04, 0.9])[1:] == pytest.approx([0.08, 0.9])
    assert holm([0.8, 0.9]) == pytest.approx([1.0, 1.0])


def test_different_images_are_refused() -> None:
    with pytest.raises(UsageError, match="same images"):
        paired_difference(np.ones(3), np.ones(4))


@pytest.mark.parametrize("conditions", [None, 1, 4])
@pytest.mark.parametrize("images", [5, 10, 3000])
def test_images_that_all_go_one_way_get_an_exact_p_and_an_interval(images: int, conditions: int | None) -> None:
    shape = (images,) if conditions is None else (images, conditions)
    found = paired_difference(np.ones(shape), np.zeros(shape))
    assert found.p == pytest.approx(2.0 ** (1 - images), rel=1e-9) if images < 1000 else 0 < found.p < 1e-300
    assert found.low < found.difference == found.high == 1.0
    assert conditions is None or (found.low <= 0) == (found.p > 0.05)
    turned = paired_difference(np.zeros(shape), np.ones(shape))
    assert (turned.low, turned.high, turned.p) == pytest.approx((-found.high, -found.low, found.p))


def test_few_images_that_differ_are_tested_by_their_signs() -> None:
    a = np.zeros((1000, 4))
    b = a.copy()
    a[:5, 0] = 1
    found = paired_difference(a, b)
    assert found.p == 2**-4
    assert found.low <= 0 < found.high
    same = paired_difference(b, b)
    assert same.p == 1.0
    assert same.low == -same.high < 0  # that no image of a thousand differs does not show that none ever does


def nested(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Difference, standard error and degrees of freedom of a - b, (seeds, images) each, written out cell by cell."""
    images = a.shape[1]
    terms: list[tuple[float, float]] = []
    for x in (a, b):
        by_seed = [sum(row) / images for row in x]
        centre = sum(by_seed) / len(x)
        terms.append((sum((m - centre) ** 2 for m in by_seed) / (len(x) - 1) / len(x), len(x) - 1))
    differences = [sum(a[:, j]) / len(a) - sum(b[:, j]) / len(b) for j in range(images)]
    centre = sum(differences) / images
    image_terms = [(sum((d - centre) ** 2 for d in differences) / (images - 1) / images, images - 1)]
    for x in (a, b):
        residual = 0.0
        for s in range(len(x)):
            for j in range(images):
                expected = sum(x[s]) / images + sum(x[:, j]) / len(x) - x.mean()
                residual += (x[s, j] - expected) ** 2
        df = (len(x) - 1) * (images - 1)
        image_terms.append((-residual / df / len(x) / images, df))
    if sum(value for value, _ in image_terms) > 0:
        terms += image_terms
    total = sum(value for value, _ in terms)
    return centre, math.sqrt(total), total**2 / sum(value**2 / df for value, df in terms)


@pytest.mark.parametrize("interaction", [0.02, 3.0])  # the second leaves nothing to the images
def test_a_contrast_of_seeds_and_images_is_the_one_written_out(interaction: float) -> None:
    rng = np.random.default_rng(4)
    hard = rng.normal(size=(2, 20))
    a, b = (
        rng.normal(size=(n, 1)) * spread + hard[i] + interaction * rng.normal(size=(n, 20))
        for i, (n, spread) in enumerate([(3, 0.2), (5, 1.0)])
    )
    estimate, error, df = nested(a, b)
    assert contrast_error([(1, a), (-1, b)]) == pytest.approx((estimate, error, df))
    found = contrast([(1, a), (-1, b)])
    half = stats.t.ppf(0.975, df) * error
    assert (found.low, found.high) == pytest.approx((estimate - half, estimate + half))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(estimate) / error, df))


def test_one_image_s_worth_of_seeds_is_welch() -> None:
    a, b = np.array([0.31, 0.35, 0.29, 0.40]), np.array([0.25, 0.26, 0.27])
    same = contrast([(1, np.repeat(a[:, None], 9, axis=1)), (-1, np.repeat(b[:, None], 9, axis=1))])
    assert tuple(same) == pytest.approx(tuple(contrast([(1, a), (-1, b)])))


def test_runs_that_do_not_differ_claim_nothing() -> None:
    bare = contrast([(1, [0.5, 0.5]), (-1, [0.2, 0.2])])
    assert math.isnan(bare.low)
    assert math.isnan(bare.p)
    images = contrast([(1, np.ones((3, 10))), (-1, np.zeros((3, 10)))])
    assert (images.p, images.high) == (2**-9, 1.0)
    assert images.low < 1.0


def test_seeds_that_agree_by_chance_keep_an_interval_of_some_width() -> None:
    """Verdicts of coins: what is subtracted from the images' variance leaves little or nothing, in two seeds often."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        groups = [(w, (rng.random((2, 60)) < 0.5).astype(float)) for w in (1, -1)]
        found, (_, error, df) = contrast(groups), contrast_error(groups)
        assert found.high - found.low > 0.02
        assert df >= 1
        assert detectable(error, df) < 2
        held += found.low <= 0 <= found.high
    assert held >= 0.95 * 300 - 11  # three binomial standard errors
    alike = np.tile([[1.0, 0.0], [0.0, 1.0]], 15)  # both right on half, never on the same images
    own = contrast([(1, alike), (-1, np.roll(alike, 1, axis=1))])
    assert own.low <= 0 <= own.high


def test_more_seeds_see_a_smaller_difference() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.5, 0.02, (3, 1)) + np.zeros(50), rng.normal(0.5, 0.02, (3, 1)) + np.zeros(50)
    groups = [(1.0, a), (-1.0, b)]
    _, error, df = contrast_error(groups)
    assert seeds_needed(groups, detectable(error, df)) == 3
    more = seeds_needed(groups, 0.02)
    assert more is not None
    assert more > 3
    assert seeds_needed(groups, 1e-4) is None
    assert detectable(1.0) == pytest.approx(1.959964 + 0.841621, abs=1e-5)


def test_a_contrast_refuses_other_images() -> None:
    for groups in ([(1, np.ones((2, 5))), (-1, np.ones((2, 6)))], [(1, np.ones((2, 5))), (-1, [1.0, 2.0])]):
        with pytest.raises(UsageError, match="same images"):
            contrast(groups)


def test_numbers_known_by_their_intervals_alone_are_compared_as_unpaired() -> None:
    """Without correlation Newcombe's method 10 is his method for two samples (1998, Statistics in Medicine 17, 873)."""
    value, low, high = unpaired((56 / 70, *wilson(56, 70)), (48 / 80, *wilson(48, 80)))
    assert (value, low, high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)  # his table II, (a), method 10


def test_a_mean_of_classes_has_an_interval_that_covers() -> None:
    rng = np.random.default_rng(6)
    rates, count, hits = np.array([0.9, 0.5, 0.2, 0.7]), np.array([300, 20, 40, 10]), 0
    for _ in range(2000):
        low, high = mean_of_classes(rng.binomial(count, rates), count)
        hits += low <= rates.mean() <= high
    assert 0.93 < hits / 2000 < 0.98
    balanced = mean_of_classes([40, 30, 20, 0], [50, 50, 50, 0])
    assert balanced == pytest.approx(wilson(90, 150), abs=0.012)  # a little narrower: the classes are fixed
    assert wilson(90, 150)[0] <= balanced[0] < balanced[1] <= wilson(90, 150)[1]
