"""Intervals, paired tests and spread over seeds, each with its source.

Which one to use:

* one proportion (top-1 of n images): ``wilson``;
* a mean over conditions that share images (corruptions x severities): ``clustered_wilson``;
* two checkpoints on the same images: ``paired_difference`` (its p is ``mcnemar`` for one condition), and its p for
  every two of many: ``all_pairs``;
* two numbers of which only the intervals are known: ``unpaired``;
* several seeds of one method: ``spread``, or ``contrast`` of one group for new images as well;
* METHODS against each other by their seeds: ``contrast``. McNemar compares two checkpoints only;
* what such a comparison could have seen, and the seeds that it would need: ``detectable``, ``seeds_needed``;
* a median that may be censored (the smallest eps that breaks an image): ``median_interval``;
* a mean of any numbers, one an image: ``mean_interval``;
* many p-values in one table: ``holm``.

Correctness arrays are boolean or [0, 1] floats, (N,) for one condition or (N, C) for C conditions of the same N images.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coss_eval.errors import UsageError

T = TypeVar("T", bound=np.generic)
SEEDS_FOR_P = 4  # with 3 seeds against 3 no permutation of them has p < .1; 4 against 4 can reach .029
POWER = 0.8
MOST_SEEDS = 200  # more than anybody trains
_TINY = 1e-12  # rounding, where all images have one difference


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


def mean_of_classes(right: ArrayLike, count: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The interval of the mean of the classes' accuracies, from ``right`` of ``count`` images in each (K,).

    The variance is that of a stratified mean, each class's by its own rate with half an image added on either side,
    turned into an effective sample size for Wilson's formula, as in ``clustered_wilson``.
    """
    k, n = np.asarray(right, dtype=np.float64), np.asarray(count, dtype=np.float64)
    k, n = k[n > 0], n[n > 0]
    p, smooth = float((k / n).mean()), (k + 0.5) / (n + 1)
    variance = float((smooth * (1 - smooth) / n).sum()) / len(n) ** 2
    centre = float(smooth.mean())
    effective = min(centre * (1 - centre) / variance, float(n.sum()))
    return wilson(p * effective, effective, level)


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
    McNemar's mid-p, or the exact p where all images that differ go one way. (N, C): the images are the unit; Student's
    t on the per-image mean differences, which is the cluster-robust interval of a balanced design, within what the
    images' signs can tell (``_by_signs``).
    """
    a, b = _pair(np.asarray(correct_a, dtype=np.float64), np.asarray(correct_b, dtype=np.float64))
    if a.ndim == 1 and _is_binary(a) and _is_binary(b):
        low, high = _newcombe(a > 0.5, b > 0.5, level)
        one_way = bool(np.all(a >= b) or np.all(a <= b))
        p = max(mcnemar(a > 0.5, b > 0.5, method="exact" if one_way else "mid-p"), sys.float_info.min)
        return Difference(float(a.mean() - b.mean()), low, high, p, len(a))
    per_image = _two_dimensional(a).mean(axis=1) - _two_dimensional(b).mean(axis=1)
    in_range = min(a.min(), b.min()) >= 0 and max(a.max(), b.max()) <= 1
    return _by_signs(mean_interval(per_image, level), per_image, level, largest=1.0 if in_range else 0.0)


def all_pairs(values: ArrayLike) -> NDArray[np.float64]:
    """p of every two columns of ``values`` (N images, M), (M, M), as ``paired_difference`` has them pair by pair.

    NaN on the diagonal. Takes time as M^2 N, and memory as M N.
    """
    x = _two_dimensional(values)
    binary = ((x == 0) | (x == 1)).all(axis=0)
    p = np.full((x.shape[1], x.shape[1]), math.nan)
    for i in range(x.shape[1] - 1):
        changes = x[:, i, None] - x[:, i + 1 :]
        above, below = (changes > _TINY).sum(axis=0), (changes < -_TINY).sum(axis=0)
        verdicts = binary[i] & binary[i + 1 :]
        p[i, i + 1 :] = np.where(verdicts, _mcnemar_p(above, below), _signed_student_p(changes, above + below))
    return np.where(np.isnan(p), p.T, p)


def _mcnemar_p(only_a: NDArray[np.int_], only_b: NDArray[np.int_]) -> NDArray[np.float64]:
    """McNemar's mid-p of discordant counts (M,), the exact p where all go one way; never 0."""
    from scipy.special import bdtr

    fewer, discordant = np.minimum(only_a, only_b), only_a + only_b
    tail = bdtr(fewer, discordant, 0.5)
    below = np.where(fewer > 0, bdtr(np.maximum(fewer - 1, 0), discordant, 0.5), tail)
    return np.asarray(np.clip(tail + below, sys.float_info.min, 1.0))


def _signed_student_p(changes: NDArray[np.float64], differing: NDArray[np.int_]) -> NDArray[np.float64]:
    """Student's p of per-image differences (N, M), no smaller than that of the sign test (see ``_by_signs``)."""
    from scipy.special import stdtr

    n = len(changes)
    if n < 2:
        return np.full(changes.shape[1], math.nan)
    mean, error = changes.mean(axis=0), changes.std(axis=0, ddof=1) / math.sqrt(n)
    spread = error > _TINY
    student = 2 * stdtr(n - 1, -np.abs(mean) / np.where(spread, error, 1.0))
    p = np.where(spread, student, np.abs(mean) < _TINY)
    exact = 2.0 ** (1 - np.minimum(differing, 1000.0))
    return np.asarray(np.clip(np.maximum(p, exact), sys.float_info.min, 1.0))


def mean_interval(values: ArrayLike, level: float = 0.95) -> Difference:
    """The mean of one number an image (N,), with Student's interval and its p against a mean of 0."""
    x = np.asarray(values, dtype=np.float64)
    error = float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return _student(float(x.mean()), error, df=len(x) - 1, n=len(x), level=level)


def _by_signs(found: Difference, per_image: NDArray[np.float64], level: float, *, largest: float) -> Difference:
    """Student's answer on per-image differences (N,), no surer than the sign test that has all images go one way.

    p is at least 2^(1 - k) where k images differ: exact, and never 0. Where the k all go one way, or none differs, the
    spread says nothing: the interval then holds Wilson's of the share of images that differ times their mean difference
    (``largest`` where none does), and 0 unless that exact p is below 1 - ``level``.
    """
    above, below = int(np.sum(per_image > _TINY)), int(np.sum(per_image < -_TINY))
    exact = max(2.0 ** (1 - above - below), sys.float_info.min) if above + below < 1000 else sys.float_info.min
    exact = min(1.0, exact)
    p = max(found.p, exact)
    if (above and below) or math.isnan(found.low):
        return found._replace(p=p)
    differing = above + below
    size = abs(found.difference) * len(per_image) / differing if differing else largest
    ends = [size * share for share in wilson(differing, len(per_image), level)]
    low, high = ends if above else (-ends[1], -ends[0]) if below else (-ends[1], ends[1])
    zero = [0.0] if exact > 1 - level else []
    return found._replace(low=min(low, found.low, *zero), high=max(high, found.high, *zero), p=p)


def unpaired(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    """a - b and its interval from (value, low, high) of each, as if of other images: wider than paired ones would be.

    MOVER (Zou & Donner 2008, Statistics in Medicine 27, 1693): Newcombe's square and add without the correlation.
    """
    (x, low_x, high_x), (y, low_y, high_y) = a, b
    down, up = math.hypot(x - low_x, high_y - y), math.hypot(high_x - x, y - low_y)
    return x - y, x - y - down, x - y + up


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
    """sum of weight * mean over independent groups of runs, each (weight, its runs' values), two seeds or more.

    Values (S,), one number a seed: about new seeds on the same images; Welch's test for two groups. Values (S, N), one
    a seed and image, the same N images in all groups: about new seeds and new images (see ``contrast_error``). ``n`` of
    the result is the number of runs. p is two-sided; NaN, as the interval, where no run differs from another.
    """
    parts = _groups(groups)
    estimate, error, df = _error_of(parts)
    found = _student(estimate, error, df=df, n=sum(len(part.values) for part in parts), level=level)
    if error > _TINY:
        return found
    if parts[0].values.ndim == 1:
        return found._replace(low=math.nan, high=math.nan, p=math.nan)
    in_range = all(part.values.min() >= 0 and part.values.max() <= 1 for part in parts)
    return _by_signs(found, _per_image(parts), level, largest=float(in_range))


def contrast_error(groups: Sequence[tuple[float, ArrayLike]]) -> tuple[float, float, float]:
    """Estimate, standard error and degrees of freedom of a ``contrast``.

    Readers (here: seeds) nested in methods, every image read by all (Obuchowski & Rockette 1995; Hillis 2007):
    SE^2 = sum w^2 s^2 / S + max(0, V - sum w^2 R / S) / N, with s^2 the variance of a group's seeds, V that of the
    images' contrasts of seed means, and R the seed-by-image residual, which s^2 has in it already. Satterthwaite's
    (1946) degrees of freedom from those of each mean square, S - 1, N - 1 and (S - 1)(N - 1), and no fewer than the
    least S - 1: what is subtracted may leave next to none, and no t. Where all seeds of a group are right equally often
    by chance and nothing at all is left, V / N is the variance.
    """
    return _error_of(_groups(groups))


def _error_of(parts: Sequence[_Group]) -> tuple[float, float, float]:
    estimate = sum(part.weight * part.mean for part in parts)
    seeds = [len(part.values) for part in parts]
    terms = [(part.spread / n, n - 1.0) for part, n in zip(parts, seeds, strict=True)]
    images = _image_terms(parts)
    if sum(value for value, _ in images) > 0:
        terms += images
    elif sum(value for value, _ in terms) <= _TINY**2:
        terms += images[:1]
    total = sum(value for value, _ in terms)
    doubt = sum(value**2 / df for value, df in terms)
    if doubt == 0:
        return estimate, math.sqrt(total), sum(seeds) - float(len(seeds))
    return estimate, math.sqrt(total), max(total**2 / doubt, min(seeds) - 1.0)


def p_against(estimate: float, error: float, df: float, value: float) -> float:
    """Two-sided p of Student's test that what was estimated is ``value``; NaN where the error is not known or 0."""
    return _student(estimate - value, error if error > _TINY else math.nan, df=df, n=0, level=0.95).p


def detectable(error: float, df: float = math.inf, level: float = 0.95) -> float:
    """The difference that a two-sided test at 1 - ``level`` with this standard error sees 8 times in 10."""
    return (_t(df, (1 + level) / 2) + _t(df, POWER)) * error


def seeds_needed(groups: Sequence[tuple[float, ArrayLike]], difference: float, level: float = 0.95) -> int | None:
    """The seeds a group with which ``contrast`` would see ``difference`` 8 times in 10, if spreads stay as they are.

    None where ``MOST_SEEDS`` do not suffice, as where there are too few images.
    """
    parts = _groups(groups)
    spreads = [part.spread for part in parts]
    images = max(0.0, sum(value for value, _ in _image_terms(parts)))
    many = float(parts[0].values.shape[-1] - 1) if images > 0 else 1.0
    for seeds in range(2, MOST_SEEDS + 1):
        terms = [(s / seeds, seeds - 1.0) for s in spreads] + [(images, many)]
        total, doubt = sum(value for value, _ in terms), sum(value**2 / df for value, df in terms)
        if detectable(math.sqrt(total), total**2 / doubt if doubt > 0 else math.inf, level) <= abs(difference):
            return seeds
    return None


@dataclass(frozen=True)
class _Group:
    """A group of a contrast, with the means of its ``values``, (S,) or (S, N), each taken once."""

    weight: float
    values: NDArray[np.float64]

    @cached_property
    def mean(self) -> float:
        return float(self.values.mean())

    @cached_property
    def by_seed(self) -> NDArray[np.float64]:
        return self.values if self.values.ndim == 1 else self.values.mean(axis=1)

    @cached_property
    def by_image(self) -> NDArray[np.float64]:
        return np.asarray(self.values.mean(axis=0))

    @cached_property
    def spread(self) -> float:
        """The variance of the seeds in the contrast's units."""
        return self.weight**2 * float(self.by_seed.var(ddof=1))


def _groups(groups: Sequence[tuple[float, ArrayLike]]) -> list[_Group]:
    """Weights and values, all of them (S,) or all (S, N) of as many images."""
    parts = [_Group(w, np.asarray(values, dtype=np.float64)) for w, values in groups]
    shapes = [part.values.shape for part in parts]
    if not parts or any(len(shape) not in (1, 2) or shape[0] < 2 or 0 in shape for shape in shapes):
        raise UsageError("a contrast needs two seeds or more in every group")
    if len({shape[1:] for shape in shapes}) > 1:
        raise UsageError("a contrast needs one number a seed in all groups, or the same images in all")
    return parts


def _per_image(parts: Sequence[_Group]) -> NDArray[np.float64]:
    return np.asarray(np.sum([part.weight * part.by_image for part in parts], axis=0))


def _image_terms(parts: Sequence[_Group]) -> list[tuple[float, float]]:
    """What the images add to the variance: that of their contrasts, less the seed-by-image residuals; each with df."""
    images = parts[0].values.shape[-1]
    if parts[0].values.ndim == 1 or images < 2:
        return []
    terms = [(float(_per_image(parts).var(ddof=1)) / images, images - 1.0)]
    for part in parts:
        residual = part.values - part.by_image - part.by_seed[:, None] + part.mean
        seeds = len(part.values)
        df = (seeds - 1.0) * (images - 1)
        terms.append((-(part.weight**2) * float(np.square(residual).sum()) / df / seeds / images, df))
    return terms


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
    from scipy.special import stdtr

    if math.isnan(error) or df < 1:
        return Difference(estimate, math.nan, math.nan, math.nan, n)
    half = _t(df, (1 + level) / 2) * error
    p = float(2 * stdtr(df, -abs(estimate) / error)) if error > _TINY else float(abs(estimate) < _TINY)
    return Difference(estimate, estimate - half, estimate + half, p, n)


def _t(df: float, share: float) -> float:
    """Student's quantile; the normal one where ``df`` is infinite."""
    from scipy.special import stdtrit

    return NormalDist().inv_cdf(share) if math.isinf(df) else float(stdtrit(df, share))


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
