"""Recordings of the same images several times, set against networks: how much could a perfect model reach?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coss_eval.errors import CossError, UsageError
from coss_eval.similarity.arrays import Array, jackknifed
from coss_eval.similarity.cka import cka
from coss_eval.similarity.geometry import procrustes
from coss_eval.similarity.many import without_each

Measure = Callable[[Array, Array], float]


class NoiseCeiling(NamedTuple):
    """What recordings' own noise leaves to reach.

    ``split_half``: the measure between the means of two halves of the repeats, mean over random halves.
    ``reliability``: what it would be between two recordings of ALL repeats, by Spearman and Brown.
    ``ceiling``: its square root, the measure between the mean of all repeats and a model without noise and fault.
    """

    split_half: float
    reliability: float
    ceiling: float


class AgainstRecordings(NamedTuple):
    """A representation against recordings: the measure, its 95 % interval over images, and its share of the ceiling."""

    value: float
    low: float
    high: float
    ceiling: float
    share: float


@dataclass(frozen=True, eq=False)
class Recordings:
    """Recordings of images, a row an image, that are set beside networks by the images' ids.

    ``values`` are (images, units), (images, locations, units) or, with ``repeats``, (images, repeats, units), whose
    noise is then told. ``ids`` (images,) say whose rows they are: a dataset's sample ids (``data.test.ids``) or its
    keys (``data.test.keys``). Raises UsageError for what does not fit, CossError for values that are not finite.
    """

    name: str
    values: Array
    ids: Sequence[int] | Sequence[str] | NDArray[np.int64] | NDArray[np.str_]
    repeats: bool = False

    def __post_init__(self) -> None:
        values, ids = torch.as_tensor(self.values), np.asarray(self.ids)
        what = f"the recordings {self.name}"
        if not self.name.strip():
            raise UsageError("recordings need a name, which tables call them")
        if values.ndim not in (2, 3) or 0 in values.shape or values.is_complex():
            shapes = "(images, units), (images, locations, units) or (images, repeats, units)"
            raise UsageError(f"{what}: expected numbers of the shape {shapes}, got {tuple(values.shape)}")
        if self.repeats and (values.ndim != 3 or values.shape[1] < 2):
            raise UsageError(f"{what}: with repeats they are (images, 2 or more, units), got {tuple(values.shape)}")
        if ids.shape != (len(values),) or ids.dtype.kind not in "iuU":
            raise UsageError(
                f"{what}: give an id (int) or a key (str) for each of the {len(values)} images, got {ids.dtype} of "
                f"the shape {ids.shape}"
            )
        if len(np.unique(ids)) < len(ids):
            raise UsageError(f"{what} have an image twice; put what was recorded of one image into repeats")
        if not bool(values.isfinite().all()):
            raise CossError(f"{what} hold NaN or infinity; leave such units or images out")


def noise_ceiling(recordings: Array, *, measure: Measure = cka, splits: int = 20, seed: int = 0) -> NoiseCeiling:
    """The split-half noise ceiling of recordings (images, repeats, units).

    The repeats are cut into two random halves ``splits`` times; an odd one is left out each time. With r between the
    halves and k times as many repeats in all as in one half, Spearman and Brown have k r / (1 + (k - 1) r). That is
    exact where noise falls as 1 / repeats; with noise far above the signal it falls faster in products of units, and
    the ceiling is on the low side. ``measure`` is one that is a correlation, as ``cka`` and ``rsa`` are. Raises
    UsageError for other shapes, a single repeat and ``procrustes``; CossError where the halves do not agree at all.

    >>> signal, noise = torch.randn(60, 1, 8), torch.randn(60, 10, 8)
    >>> found = noise_ceiling(signal + 0.5 * noise)
    >>> found.split_half < found.reliability < found.ceiling < 1
    True
    """
    values = _repeats(recordings)
    if measure is procrustes:
        raise UsageError("procrustes is no correlation: it has no ceiling by Spearman and Brown; take cka or rsa")
    if splits < 1:
        raise UsageError(f"expected 1 random split of the repeats or more, got {splits}")
    repeats, half = values.shape[1], values.shape[1] // 2
    draws = np.random.default_rng(seed)
    found = []
    for _ in range(splits):
        order = draws.permutation(repeats)
        found.append(measure(values[:, order[:half]].mean(1), values[:, order[half : 2 * half]].mean(1)))
    r, k = float(np.mean(found)), repeats / half
    if r <= 0:
        raise CossError(f"the halves of the recordings do not agree ({r:.3f}): there is too much noise to compare with")
    reliability = k * r / (1 + (k - 1) * r)
    return NoiseCeiling(r, reliability, math.sqrt(reliability))


def against_recordings(
    x: Array, recordings: Array, *, measure: Measure = cka, splits: int = 20, seed: int = 0
) -> AgainstRecordings:
    """``measure`` of a representation (images, units) and recordings (images, repeats, units) of the same images.

    The recordings are averaged over their repeats; ``x`` may have locations, (images, locations, units), which are
    averaged over, too. The interval leaves out every twentieth image after the other and is NaN below 40 images; it
    does not hold the ceiling's own uncertainty. A share near 1 says that noise hides any difference that is left.

    >>> signal = torch.randn(60, 8)
    >>> found = against_recordings(signal, signal[:, None] + 0.5 * torch.randn(60, 10, 8))
    >>> 0.9 < found.share < 1.1
    True
    """
    given, mean = torch.as_tensor(x), _repeats(recordings).mean(1)

    def of(images: Tensor) -> Tensor:
        return torch.full((2, 2), measure(given[images], mean[images]), dtype=torch.float64)

    ceiling = noise_ceiling(recordings, measure=measure, splits=splits, seed=seed).ceiling
    whole = torch.full((2, 2), measure(given, mean), dtype=torch.float64)  # says so where the images are not the same
    parts: Iterator[Tensor] = map(of, without_each(len(mean)))
    value, low, high = (float(part[0, 1]) for part in jackknifed(whole, parts))
    return AgainstRecordings(value, low, high, ceiling, value / ceiling)


def _repeats(recordings: Array) -> Tensor:
    """Recordings, float64 (images, repeats, units)."""
    values = torch.as_tensor(recordings).detach().double()
    if values.ndim != 3 or values.shape[1] < 2:
        raise UsageError(
            f"recordings are (images, repeats, units) with 2 repeats or more, got the shape {tuple(values.shape)}"
        )
    return values
