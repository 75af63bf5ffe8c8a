"""Intervals, paired tests and spread over seeds, each with its source.

Which one to use:

* one proportion (top-1 of n images): ``wilson``;
* a mean over conditions that share images (corruptions x severities): ``clustered_wilson``;
* two checkpoints on the same images: ``paired_difference`` (its p is ``mcnemar`` for one condition);
* several seeds of one method: ``spread``;
* METHODS against each other by their seeds: ``contrast``. McNemar compares two checkpoints only;
* a median that may be censored (the smallest eps that breaks an image): ``median_interval``;
* many p-values in one table: ``holm``.

Correctness arrays are boolean or [0, 1] floats, (N,) for one condition or (N, C) for C conditions of the same N images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coss_eval.errors import UsageError

T = TypeVar("T", bound=np.generic)


class Jackknifed(NamedTuple):
    """A number and its 95 % interval over images: leave-one-block-out jackknife, Student's t."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """a - b with its interval; ``p`` is two-sided, against no difference; ``n`` counts images."""

    difference: float
    low: float
    high: float
    p: float
    n: int


class Spread(NamedTuple):
    """Mean over seeds, their standard deviation (n - 1), and Student's interval of the mean; NaN where n = 1."""

    mean: float
    sd: float
    low: float
    high: float
    n: int


def wilson(successes: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's (1927) score interval of a proportion; (0, 1) where nothing was seen.

    Brown, Cai & DasGupta (2001) recommend it at any n. ``n`` may be fractional: an effective sample size.

    >>> low, high = wilson(9, 10)
    >>> f"{low:.3f} {high:.3f}"
    '0.596 0.982'
    """
    if not 0 <= successes <= n:
        raise UsageError(f"wilson expects 0 <= successes <= n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    z2 = _z(level) ** 2
    p = successes / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) + z2 / (4 * n)) / n) / (1 + z2 / n)
    # the score interval ends exactly at 0 and 1; rounding must not push it off
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def clustered_wilson(correct: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of the mean of ``correct`` (N, C), whose C columns are conditions of the same N images.

    The same image under 75 corruptions is not 75 images. The variance of the mean is taken between images (the
    cluster-robust variance of a balanced design) and turned into an effective sample size, n_eff = p(1-p)/var, for
    Wilson's formula: Korn & Graubard (1998) with Wilson's in place of the exact interval, as Franco et al. (2019)
    recommend for clustered surveys. n_eff lies between 1 and N C, and is N where every entry is the same.
    """
    values = _two_dimensional(correct)
    images, conditions = values.shape
    p = float(values.mean())
    variance = float(values.mean(axis=1).var(ddof=1)) / images if images > 1 else math.inf
    if p in (0.0, 1.0):
        effective = float(images)
    elif variance == 0.0:
        effective = float(images * conditions)
    else:
        effective = min(max(p * (1 - p) / variance, 1.0), images * conditions)
    return wilson(p * effective, effective, level)


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike, *, method: Literal["mid-p", "exact"] = "mid-p") -> float:
    """Two-sided p of McNemar's test that two checkpoints are right equally often on the same images (N,).

    Exact: twice the binomial tail of the discordant pairs at 1/2, at most 1. Mid-p takes half of the observed
    outcome's probability off each tail; Fagerland, Lydersen & Laake (2013) show that it keeps the nominal level where
    the exact test is needlessly conservative.

    >>> round(mcnemar([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0]), 4)  # one is right alone four times, the other never
    0.0625
    """
    from scipy.special import bdtr  # here: SciPy costs a tenth of a second at import

    a, b = _pair(np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool))
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    discordant, fewer = only_a + only_b, min(only_a, only_b)
    if discordant == 0:
        return 1.0
    tail = float(bdtr(fewer, discordant, 0.5))
    if method == "exact":
        return min(1.0, 2 * tail)
    below = float(bdtr(fewer - 1, discordant, 0.5)) if fewer > 0 else 0.0
    return min(1.0, tail + below)  # 2 tail - P(fewer)


def paired_difference(correct_a: ArrayLike, correct_b: ArrayLike, level: float = 0.95) -> Difference:
    """Accuracy of a minus that of b on the same images, with interval and p.

    (N,): Newcombe's (1998, method 10) square-and-add interval, which Fagerland, Lydersen & Laake (2014) recommend, and
    McNemar's mid-p. (N, C): the images are the unit; Student's t on the per-image mean differences, which is the
    cluster-robust interval of a balanced design.
    """
    a, b = _pair(np.asarray(correct_a, dtype=np.float64), np.asarray(correct_b, dtype=np.float64))
    if a.ndim == 1 and _is_binary(a) and _is_binary(b):
        low, high = _newcombe(a > 0.5, b > 0.5, level)
        return Difference(float(a.mean() - b.mean()), low, high, mcnemar(a > 0.5, b > 0.5), len(a))
    per_image = _two_dimensional(a).mean(axis=1) - _two_dimensional(b).mean(axis=1)
    error = float(per_image.std(ddof=1)) / math.sqrt(len(per_image)) if len(per_image) > 1 else math.nan
    return _student(float(per_image.mean()), error, df=len(per_image) - 1, n=len(per_image), level=level)


def spread(values: ArrayLike, level: float = 0.95) -> Spread:
    """Mean, standard deviation and Student's interval of the mean over training seeds; never mixed with image noise."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise UsageError(f"spread expects one number a seed, got an array of shape {x.shape}")
    if len(x) == 1:
        return Spread(float(x[0]), math.nan, math.nan, math.nan, 1)
    sd = float(x.std(ddof=1))
    interval = _student(float(x.mean()), sd / math.sqrt(len(x)), df=len(x) - 1, n=len(x), level=level)
    return Spread(interval.difference, sd, interval.low, interval.high, len(x))


def contrast(groups: Sequence[tuple[float, ArrayLike]], level: float = 0.95) -> Difference:
    """sum of weight * mean over independent groups of runs, each (weight, one number a seed), two seeds or more.

    Spreads may differ: the variance is the sum of weight^2 s^2 / n with Satterthwaite's (1946) degrees of freedom,
    which is Welch's test for two groups. ``n`` of the result is the number of runs. p is two-sided.
    """
    parts = [(w, np.asarray(values, dtype=np.float64)) for w, values in groups]
    if any(x.ndim != 1 or len(x) < 2 for _, x in parts):
        raise UsageError("a contrast needs two seeds or more in every group")
    variances = np.array([w**2 * x.var(ddof=1) / len(x) for w, x in parts])
    total = float(variances.sum())
    freedom = np.array([len(x) - 1 for _, x in parts])
    df = total**2 / float((variances**2 / freedom).sum()) if total > 0 else float(freedom.sum())
    estimate = float(sum(w * x.mean() for w, x in parts))
    return _student(estimate, math.sqrt(total), df=df, n=sum(len(x) for _, x in parts), level=level)


def median_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float, float]:
    """The median (the lower one of two) and its interval by ranks, whatever the distribution; NaN where n = 0.

    Campbell and Gardner (1988), BMJ 296, 1454. Infinite values are censored ones: larger than all others.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64).ravel())
    n = len(ordered)
    if n == 0:
        return math.nan, math.nan, math.nan
    half = _z(level) * math.sqrt(n) / 2
    low, high = max(round(n / 2 - half), 1), min(round(1 + n / 2 + half), n)  # ranks, from 1
    return float(ordered[(n - 1) // 2]), float(ordered[low - 1]), float(ordered[high - 1])


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's (1979) adjusted p-values: family-wise error over one table, without assuming independence. NaN stays."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full_like(p, math.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known])]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return adjusted


def _newcombe(a: NDArray[np.bool_], b: NDArray[np.bool_], level: float) -> tuple[float, float]:
    """Newcombe (1998), Statistics in Medicine 17, 2635: method 10, phi corrected for continuity towards 0."""
    n = len(a)
    both, only_a, only_b = int(np.sum(a & b)), int(np.sum(a & ~b)), int(np.sum(b & ~a))
    neither = n - both - only_a - only_b
    p_a, p_b = (both + only_a) / n, (both + only_b) / n
    (low_a, high_a), (low_b, high_b) = wilson(both + only_a, n, level), wilson(both + only_b, n, level)
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    association = float(both * neither - only_a * only_b)
    if association > 0:
        association = max(0.0, association - n / 2)
    phi = 0.0 if margins == 0 else association / math.sqrt(margins)
    down = (p_a - low_a) ** 2 - 2 * phi * (p_a - low_a) * (high_b - p_b) + (high_b - p_b) ** 2
    up = (high_a - p_a) ** 2 - 2 * phi * (high_a - p_a) * (p_b - low_b) + (p_b - low_b) ** 2
    return p_a - p_b - math.sqrt(max(0.0, down)), p_a - p_b + math.sqrt(max(0.0, up))


def _student(estimate: float, error: float, *, df: float, n: int, level: float) -> Difference:
    from scipy.special import stdtr, stdtrit

    if math.isnan(error) or df < 1:
        return Difference(estimate, math.nan, math.nan, math.nan, n)
    half = float(stdtrit(df, (1 + level) / 2)) * error
    tiny = 1e-12  # rounding, where all images have one difference
    p = float(2 * stdtr(df, -abs(estimate) / error)) if error > tiny else float(abs(estimate) < tiny)
    return Difference(estimate, estimate - half, estimate + half, p, n)


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise UsageError(f"a confidence level lies between 0 and 1, got {level}")
    return NormalDist().inv_cdf((1 + level) / 2)


def _is_binary(values: NDArray[np.float64]) -> bool:
    return bool(np.all((values == 0) | (values == 1)))


def _two_dimensional(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or array.size == 0:
        raise UsageError(f"expected correctness of shape (images,) or (images, conditions), got {array.shape}")
    return array


def _pair(a: NDArray[T], b: NDArray[T]) -> tuple[NDArray[T], NDArray[T]]:
    if a.shape != b.shape or a.size == 0:
        raise UsageError(f"paired statistics need the same images on both sides, got shapes {a.shape} and {b.shape}")
    return a, b


def above_chance(accuracy: float, chance: float, n: int) -> bool:
    """Whether an accuracy on ``n`` images lies more than three of its standard errors above chance.

    Shares of (accuracy - chance) mean nothing otherwise: the denominator might as well be zero.
    """
    return accuracy - chance > 3 * math.sqrt(accuracy * (1 - accuracy) / n)
