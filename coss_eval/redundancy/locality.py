"""Redundancy by distance on the grid: do far-apart locations, whose receptive fields are disjoint, still agree?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coss_eval.redundancy.moments import CentredSums, Sums
from coss_eval.redundancy.similarity import jackknife
from coss_eval.statistics import Jackknifed


def by_distance(moments: CentredSums) -> dict[int, Jackknifed]:
    """Mean cosine of two locations of one image at each Chebyshev distance on the grid, from 1."""
    if moments.grid is None:
        return {}
    far = max(moments.grid) - 1
    return {d: jackknife(_mean_cosine(moments.grid, d, d), moments) for d in range(1, far + 1)}


def by_overlap(moments: CentredSums, field: tuple[int, int] | None) -> dict[str, Jackknifed]:
    """Mean cosine of pairs whose receptive fields overlap and of pairs whose fields are disjoint.

    ``field`` is the theoretical receptive field of a location and the distance between neighbours, (size, jump) in
    pixels: fields are disjoint from the grid distance d with d * jump >= size.
    """
    if moments.grid is None or field is None:
        return {}
    size, jump = field
    apart, far = -(-size // jump), max(moments.grid) - 1
    ranges = {"within_overlapping": (1, min(apart - 1, far)), "within_disjoint": (apart, far)}
    return {
        name: jackknife(_mean_cosine(moments.grid, *ends), moments)
        for name, ends in ranges.items()
        if ends[0] <= ends[1]
    }


def _mean_cosine(grid: tuple[int, int], nearest: int, farthest: int) -> Callable[[Sums, int], Tensor]:
    """The statistic: mean cosine over pairs at Chebyshev distances from ``nearest`` to ``farthest``."""
    height, width = grid

    def statistic(sums: Sums, locations: int) -> Tensor:
        cosines = torch.fft.irfft2(sums.power, s=(2 * height, 2 * width))  # (K, 2H, 2W): sums by displacement
        rows, columns = _lags(height, sums.power.device), _lags(width, sums.power.device)
        distance = torch.maximum(rows[:, None], columns[None, :])
        pairs = (height - rows).clamp(min=0)[:, None] * (width - columns).clamp(min=0)[None, :]
        chosen = (distance >= nearest) & (distance <= farthest) & (pairs > 0)
        mean: Tensor = cosines[:, chosen].sum(-1) / (sums.images * pairs[chosen].sum())
        return mean

    return statistic


def _lags(size: int, device: torch.device) -> Tensor:
    """|displacement| along an axis of 2 x size bins in the order of the Fourier transform: 0 1 ... size ... 1."""
    bins = torch.arange(2 * size, device=device)
    return torch.minimum(bins, 2 * size - bins)
