"""Redundancy by distance on the grid: do far-apart locations, whose receptive fields are disjoint, still agree?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coss_eval.redundancy.moments import CentredSums, Sums, distances
from coss_eval.redundancy.similarity import jackknife
from coss_eval.statistics import Jackknifed

SizeAndJump = tuple[int, int]  # (size, jump) in pixels


def by_distance(moments: CentredSums) -> dict[int, Jackknifed]:
    """Mean cosine of two locations of one image at each Chebyshev distance on the grid, from 1."""
    if moments.grid is None:
        return {}
    return {d: jackknife(_mean_cosine(moments.grid, d, d), moments) for d in range(1, max(moments.grid))}


def by_overlap(moments: CentredSums, field: SizeAndJump | None) -> dict[str, Jackknifed]:
    """Mean cosine of pairs whose receptive fields overlap and of pairs whose fields are disjoint.

    ``field`` is the theoretical receptive field of a location and the distance between neighbours, (size, jump) in
    pixels: fields are disjoint from the grid distance d with d * jump >= size.
    """
    if moments.grid is None:
        return {}
    ranges = _ranges(moments.grid, field)
    return {name: jackknife(_mean_cosine(moments.grid, *ends), moments) for name, ends in ranges.items()}


def by_overlap_each(moments: CentredSums, field: SizeAndJump | None) -> dict[str, Tensor]:
    """``by_overlap`` of every image alone, (N,)."""
    if moments.grid is None:
        return {}
    pairs, cosines = _pairs(moments.grid), moments.each["by_distance"]
    return {
        name: cosines[:, nearest : farthest + 1].sum(1) / sum(pairs[nearest : farthest + 1])
        for name, (nearest, farthest) in _ranges(moments.grid, field).items()
    }


def _ranges(grid: tuple[int, int], field: SizeAndJump | None) -> dict[str, tuple[int, int]]:
    """The nearest and the farthest distance of each kind of pair that there is."""
    if field is None:
        return {}
    size, jump = field
    apart, far = -(-size // jump), max(grid) - 1
    ranges = {"within_overlapping": (1, min(apart - 1, far)), "within_disjoint": (apart, far)}
    return {name: ends for name, ends in ranges.items() if ends[0] <= ends[1]}


def _pairs(grid: tuple[int, int]) -> list[int]:
    """How many ordered pairs of locations lie at each distance from 0."""
    return torch.bincount(distances(grid, torch.device("cpu")).flatten()).tolist()


def _mean_cosine(grid: tuple[int, int], nearest: int, farthest: int) -> Callable[[Sums, int], Tensor]:
    """The statistic: mean cosine over pairs at Chebyshev distances from ``nearest`` to ``farthest``."""
    count = sum(_pairs(grid)[nearest : farthest + 1])

    def statistic(sums: Sums, locations: int) -> Tensor:
        mean: Tensor = sums.by_distance[:, nearest : farthest + 1].sum(-1) / (sums.images * count)
        return mean

    return statistic
