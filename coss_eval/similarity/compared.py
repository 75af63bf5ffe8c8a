"""Similarities of all pairs of representations with intervals that never pair an image with itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor


class Compared(NamedTuple):
    """Every pair of R representations: the similarity and its 95 % interval over images, float64 (R, R)."""

    value: Tensor
    low: Tensor
    high: Tensor


def jackknifed(value: Tensor, left_out: Iterable[Tensor]) -> Compared:
    """``value`` (R, R) of all images with the interval that the values without one block after the other give.

    Leave-one-block-out jackknife with Student's t. A bootstrap would draw images twice, and their pairs, which every
    representation puts at distance 0, would raise each similarity. NaN bounds, but on the diagonal, for a single block.
    """
    shift = square = torch.zeros_like(value)
    blocks = 0
    for one in left_out:
        apart = one - value
        shift, square, blocks = shift + apart, square + apart.square(), blocks + 1
    if blocks < 2:
        unknown = torch.full_like(value, torch.nan).fill_diagonal_(0)
        return Compared(value, value + unknown, value + unknown)
    variance = (blocks - 1) / blocks * (square - shift.square() / blocks).clamp(min=0)
    half_width = float(stats.t.ppf(0.975, blocks - 1)) * variance.sqrt()
    half_width.fill_diagonal_(0)
    return Compared(value, value - half_width, value + half_width)
