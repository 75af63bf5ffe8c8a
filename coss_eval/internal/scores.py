"""Numbers that compare across networks: accuracy above chance, area under the curve, signal-to-noise ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from coss_eval.statistics import above_chance


def relative_accuracy(accuracy: float, clean: float, chance: float, n: int) -> float:
    """(accuracy - chance) / (clean - chance), "kept" in tables: 1 undamaged, 0 at chance.

    NaN for a network no better than chance on ``n`` images: see ``statistics.above_chance``.
    """
    return (accuracy - chance) / (clean - chance) if above_chance(clean, chance, n) else math.nan


def area_under_curve(levels: Sequence[float], values: Sequence[float]) -> float:
    """Mean of the curve from level 0, where it is 1, to the largest level: trapezoids over the level, not its log.

    ``levels`` rise and ``values`` are relative accuracies; a leading level of 0 is taken as it is.
    """
    if levels and levels[0] > 0:
        levels, values = (0.0, *levels), (1.0, *values)
    return float(
        torch.trapezoid(torch.tensor(values, dtype=torch.float64), torch.tensor(levels, dtype=torch.float64))
        / levels[-1]
    )


class SignalToNoise:
    """Variance of the clean global representation over the mean squared change by damage, both summed over D'."""

    def __init__(self) -> None:
        self._n = 0
        self._sum = self._square = self._noise = torch.zeros((), dtype=torch.float64)

    def add(self, clean: Tensor, damaged: Tensor) -> None:
        """A batch of global representations (B, D') without and with damage."""
        g = clean.double()
        self._n += len(g)
        self._sum = self._sum.to(g) + g.sum(0)
        self._square = self._square.to(g) + g.square().sum()
        self._noise = self._noise.to(g) + (damaged.double() - g).square().sum()

    def decibel(self) -> float:
        """10 log10 of the ratio; infinite where nothing changed."""
        signal = float(self._square - self._sum.square().sum() / self._n)
        noise = float(self._noise)
        return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
