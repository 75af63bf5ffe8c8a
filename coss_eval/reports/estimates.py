"""Numbers with their intervals: a value and, where samples exist, each image's share of it; what is made of them.

Every score here is linear in the images or has been made so (a ratio by its first-order terms), so that means over
conditions, areas, ratios and paired differences all follow from the shares: the image is the unit throughout. Several
runs of one method are an estimate of its own, made from each run's: there seeds and images are the units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from coss_eval.statistics import (
    SEEDS_FOR_P,
    Difference,
    above_chance,
    clustered_wilson,
    contrast,
    contrast_error,
    detectable,
    mean_interval,
    paired_difference,
    unpaired,
)


@dataclass(frozen=True, eq=False)
class Shares:
    """One number an image, ``values`` (N,), which are booleans for verdicts; ``ids`` names the images."""

    ids: pd.Index
    values: NDArray[Any]

    def series(self) -> pd.Series:
        """The numbers by the images' ids: pandas takes longer for each of these than most of what is made of them."""
        return pd.Series(self.values.astype(np.float64), index=self.ids)

    @property
    def are_verdicts(self) -> bool:
        """Whether every image is wholly right or wrong."""
        return self.values.dtype == bool or bool(np.isin(self.values, (0.0, 1.0)).all())


@dataclass(frozen=True)
class Estimate:
    """One number of one checkpoint. ``shares`` has it image by image (their mean is ``value``), where that is known.

    Of a method it is the mean over its ``runs``, each an estimate of its own; they are empty for one checkpoint.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    shares: Shares | None = None
    data: str | None = None  # fingerprint of the images: only shares of the same images are paired
    runs: tuple[Estimate, ...] = ()


def pooled(runs: Sequence[Estimate | None]) -> Estimate | None:
    """The mean over a method's runs, about new seeds and new images (new seeds alone where no images are known).

    None, a gap, if a run has none.
    """
    known = [run for run in runs if run is not None]
    if len(known) < len(runs) or not known:
        return None
    values = by_run([known])[0]
    about = contrast([(1.0, values)])
    low, high = (None, None) if np.isnan(about.low) else (about.low, about.high)
    n, data = min(run.n for run in known), known[0].data
    found = Estimate(float(values.mean()), low, high, n, data=data, runs=tuple(known))
    verdicts = all(run.shares is not None and _within(run.shares.values) for run in known)
    return as_share(found) if verdicts else found  # a log-likelihood of .9 in all runs may be 1.2 in the next


def _within(values: NDArray[Any]) -> bool:
    return bool(values.min() >= 0 and values.max() <= 1)


def as_share(estimate: Estimate) -> Estimate:
    """The estimate of what lies in [0, 1], its bounds there."""
    if estimate.low is None or estimate.high is None:
        return estimate
    return replace(estimate, low=max(0.0, estimate.low), high=min(1.0, estimate.high))


def by_run(groups: Sequence[Sequence[Estimate]]) -> list[NDArray[np.float64]]:
    """The values of each group's runs, (S, N) over the images that all have; (S,) where those are not known."""
    everything = [run for runs in groups for run in runs]
    columns = aligned(everything) if len({run.data for run in everything}) == 1 else None
    if columns is None:
        return [np.array([run.value for run in runs]) for runs in groups]
    ends = np.cumsum([len(runs) for runs in groups])[:-1]
    return [part.T for part in np.split(columns[1], ends, axis=1)]


def mean(parts: Sequence[Estimate | None], weights: Sequence[float] | None = None) -> Estimate | None:
    """The (weighted) mean over conditions of one checkpoint; None, a gap, if any is missing.

    Interval: image-clustered Wilson for means of verdicts, Student's on the images' shares otherwise; none without
    samples, since conditions that share images are not independent. Weights sum to 1.
    """
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    if len(known) == 1:
        return known[0]
    if known[0].runs:
        return pooled([mean(parts, weights) for parts in zip(*(part.runs for part in known), strict=True)])
    w = np.full(len(known), 1 / len(known)) if weights is None else np.asarray(weights, dtype=float)
    value = float(np.dot(w, [part.value for part in known]))
    n, data = min(part.n for part in known), known[0].data
    columns = aligned(known)
    if columns is None:
        return Estimate(value, None, None, n, data=data)
    ids, table = columns
    shares = Shares(ids, table @ w)
    if all(part.shares is not None and part.shares.are_verdicts for part in known) and bool((w >= 0).all()):
        low, high = clustered_wilson(table if weights is None else (table @ w).clip(0, 1))
        return Estimate(value, low, high, len(ids), shares, data)
    return from_shares(value, shares, data)


def area(levels: Sequence[float], parts: Sequence[Estimate | None]) -> Estimate | None:
    """Trapezoidal area under the estimates over ``levels`` (rising), divided by their range."""
    x = np.asarray(levels, dtype=float)
    if len(x) < 2:
        return None
    steps = np.diff(x) / (x[-1] - x[0])
    return mean(parts, np.concatenate([[0.0], steps / 2]) + np.concatenate([steps / 2, [0.0]]))


def ratio(top: Estimate | None, bottom: Estimate | None) -> Estimate | None:
    """top / bottom of one checkpoint. Its shares are the first-order terms (delta method) about the ratio."""
    if top is None or bottom is None or bottom.value <= 0:
        return None
    if top.runs:
        return pooled([ratio(*pair) for pair in zip(top.runs, bottom.runs, strict=True)])
    value = top.value / bottom.value
    columns = aligned([top, bottom])
    if columns is None:
        return Estimate(value, None, None, min(top.n, bottom.n), data=top.data)
    ids, table = columns
    shares = value + (table[:, 0] - value * table[:, 1]) / bottom.value
    return from_shares(value, Shares(ids, shares), top.data)


def kept(damaged: Estimate | None, clean: Estimate | None, chance: float | None) -> Estimate | None:
    """(damaged - chance) / (clean - chance) of one checkpoint: the share of its accuracy above chance that remains.

    None where the clean accuracy is within three standard errors of chance, or chance is not known.
    """
    if damaged is not None and clean is not None and damaged.runs:
        return pooled([kept(*pair, chance) for pair in zip(damaged.runs, clean.runs, strict=True)])
    if damaged is None or clean is None or chance is None or not above_chance(clean.value, chance, clean.n):
        return None
    return ratio(shifted(damaged, -chance), shifted(clean, -chance))


def shifted(estimate: Estimate, constant: float, slope: float = 1.0) -> Estimate:
    """slope * estimate + constant, its bounds and shares with it."""
    bounds = [None if bound is None else slope * bound + constant for bound in (estimate.low, estimate.high)]
    low, high = bounds if slope > 0 else bounds[::-1]
    own = estimate.shares
    shares = None if own is None else Shares(own.ids, slope * own.values + constant)
    runs = tuple(shifted(run, constant, slope) for run in estimate.runs)
    return Estimate(slope * estimate.value + constant, low, high, estimate.n, shares, estimate.data, runs)


def from_shares(value: float, shares: Shares, data: str | None) -> Estimate:
    """An estimate whose interval is Student's on its images' shares."""
    interval = mean_interval(shares.values)
    shift = value - interval.difference
    return Estimate(value, interval.low + shift, interval.high + shift, len(shares.ids), shares, data)


def difference(a: Estimate | None, b: Estimate | None) -> Difference | None:
    """a - b over the images that both saw; interval and p are NaN where they cannot be compared.

    Two checkpoints are paired over images; where only their intervals are known, these make a wider one, without p. Two
    methods are compared over seeds and images (``contrast``), without p where one has fewer seeds than ``SEEDS_FOR_P``;
    a method and a single checkpoint cannot be.
    """
    if a is None or b is None:
        return None
    if a.runs or b.runs:
        return _between_methods(a, b)
    columns = aligned([a, b]) if a.data == b.data else None
    if columns is None:
        one, other = _bounds(a), _bounds(b)
        if a.data != b.data or one is None or other is None:
            return _unknown(a, b)
        return Difference(*unpaired(one, other), float("nan"), min(a.n, b.n))
    _, table = columns
    return paired_difference(table[:, 0], table[:, 1])


def _between_methods(a: Estimate, b: Estimate) -> Difference:
    if min(len(a.runs), len(b.runs)) < 2 or a.data != b.data:
        return _unknown(a, b)
    values = by_run([a.runs, b.runs])
    found = contrast([(1.0, values[0]), (-1.0, values[1])])
    few = min(len(a.runs), len(b.runs)) < SEEDS_FOR_P
    n = values[0].shape[1] if values[0].ndim == 2 else min(a.n, b.n)
    return found._replace(n=n, p=float("nan") if few else found.p)


def difference_within(a: Estimate | None, b: Estimate | None) -> Difference | None:
    """a - b of one label: of a method it is that of its runs' own differences, each of one network with itself."""
    if a is None or b is None or not a.runs:
        return difference(a, b)
    own = [mean(pair, (1.0, -1.0)) for pair in zip(a.runs, b.runs, strict=True)]
    values = by_run([[one for one in own if one is not None]])[0]
    found = contrast([(1.0, values)])
    n = values.shape[1] if values.ndim == 2 else min(a.n, b.n)
    return found._replace(n=n, p=float("nan") if len(own) < SEEDS_FOR_P else found.p)


def could_have_seen(a: Estimate | None, b: Estimate | None) -> float | None:
    """The difference that these images, or these seeds and images, would show 8 times in 10; None where not known.

    Nor is it where nothing differs: two that agree on every image have seen nothing.
    """
    if a is None or b is None:
        return None
    if a.runs or b.runs:
        if min(len(a.runs), len(b.runs)) < 2 or a.data != b.data:
            return None
        values = by_run([a.runs, b.runs])
        return detectable(*contrast_error([(1.0, values[0]), (-1.0, values[1])])[1:]) or None
    columns = aligned([a, b]) if a.data == b.data else None
    if columns is None or len(columns[0]) < 2:
        return None
    apart = columns[1][:, 0] - columns[1][:, 1]
    return detectable(float(apart.std(ddof=1)) / np.sqrt(len(apart)), len(apart) - 1.0) or None


def _unknown(a: Estimate, b: Estimate) -> Difference:
    return Difference(a.value - b.value, float("nan"), float("nan"), float("nan"), min(a.n, b.n))


def _bounds(estimate: Estimate) -> tuple[float, float, float] | None:
    if estimate.low is None or estimate.high is None:
        return None
    return estimate.value, estimate.low, estimate.high


def aligned(parts: Sequence[Estimate]) -> tuple[pd.Index, NDArray[np.float64]] | None:
    """Ids (N,) and shares (N, C) of the images that all parts have; None where one has no shares."""
    known = [part.shares for part in parts if part.shares is not None]
    if len(known) < len(parts):
        return None
    ids = known[0].ids
    for one in known[1:]:
        if one.ids is not ids and not one.ids.equals(ids):
            ids = ids.intersection(one.ids)
    if len(ids) == 0:
        return None
    columns = [one.values if one.ids is ids else one.values[one.ids.get_indexer(ids)] for one in known]
    return ids, np.array(columns).T.astype(np.float64, order="C")
