"""The paired bootstrap, which closed-form intervals are held against."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    statistic: Callable[[Array], float] = lambda values: float(values.mean()),
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """statistic(a) - statistic(b) with its 95 % percentile interval: (difference, low, high).

    The same resampled images serve both sides (Efron & Tibshirani 1993, ch. 13). ``statistic`` maps an array like ``a``
    with rows resampled to one number.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(left), (resamples, len(left)))
    differences = [statistic(left[rows]) - statistic(right[rows]) for rows in draws]
    low, high = np.quantile(differences, [0.025, 0.975])
    return statistic(left) - statistic(right), float(low), float(high)
