"""Arrays of the same images, checked and as float64; what comparing every two of them gives, with intervals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from coss_eval.errors import CossError, UsageError

Array = Tensor | NDArray[np.floating]


def pair(x: Array, y: Array, fewest: int) -> tuple[Tensor, Tensor]:
    """Both as float64 (N, D) and (N, D') with the mean over images taken off, as ``rows`` has it.

    Raises UsageError where they are no rows of the same ``fewest`` images or more, CossError where one is not finite or
    the same for all images.
    """
    counts = tuple(len(array) for array in (x, y))
    if counts[0] != counts[1]:
        raise UsageError(f"x has {counts[0]} images and y {counts[1]}: give both for the same images, in one order")
    if counts[0] < fewest:
        raise UsageError(f"a similarity of two representations needs {fewest} images or more, got {counts[0]}")
    return rows(x, "x"), rows(y, "y")


def rows(array: Array, name: str) -> Tensor:
    """One representation, float64 (N, D), with the mean over images taken off."""
    values = uncentred(array, name)
    centred = values - values.mean(0)
    if bool(centred.square().sum() <= 1e-24 * values.square().sum()):
        raise CossError(f"{name} is the same for all images: there is nothing to compare")
    return centred


def uncentred(array: Array, name: str) -> Tensor:
    """One representation, float64 (N, D), as it is; (N, L, D) averaged over its locations, or repeats."""
    values = torch.as_tensor(array).detach()
    if values.ndim not in (2, 3) or 0 in values.shape[1:]:
        raise UsageError(
            f"{name} must be (images, units), or (images, locations or repeats, units), which are averaged over, got "
            f"an array of shape {tuple(values.shape)}"
        )
    values = values.double()
    if not bool(values.isfinite().all()):
        raise CossError(f"{name} holds NaN or infinity")
    return values.mean(1) if values.ndim == 3 else values


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
