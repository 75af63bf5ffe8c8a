"""Scores on known numbers."""

from __future__ import annotations

import math

import pytest
import torch

from coss_eval.internal.scores import SignalToNoise, area_under_curve, relative_accuracy


def test_relative_accuracy_is_one_when_clean_and_zero_at_chance() -> None:
    assert relative_accuracy(0.8, 0.8, 0.1, 1000) == 1
    assert relative_accuracy(0.1, 0.8, 0.1, 1000) == 0
    assert relative_accuracy(0.45, 0.8, 0.1, 1000) == pytest.approx(0.5)
    assert math.isnan(relative_accuracy(0.1, 0.1, 0.1, 1000))


@pytest.mark.parametrize(
    ("levels", "values", "area"),
    [
        ((0.5, 1.0), (1.0, 1.0), 1.0),
        ((0.5, 1.0), (0.5, 0.0), 0.5),
        ((1.0, 4.0), (0.0, 0.0), 0.125),  # falls from 1 at level 0 to 0 at level 1, of 4
        ((0.0, 1.0), (0.5, 0.5), 0.5),
    ],
)
def test_area_is_the_mean_height_from_level_zero(levels: tuple[float], values: tuple[float], area: float) -> None:
    assert area_under_curve(levels, values) == pytest.approx(area)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_signal_to_noise_of_known_noise(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = 3 * torch.randn(1000, 16, generator=generator) + 100
    damaged = clean + 0.3 * torch.randn(1000, 16, generator=generator)
    ratio = SignalToNoise()
    for a, b in zip(clean.split(size), damaged.split(size), strict=True):
        ratio.add(a, b)
    assert ratio.decibel() == pytest.approx(20, abs=0.3)  # amplitudes 10 : 1
    same = SignalToNoise()
    same.add(clean, clean)
    assert math.isinf(same.decibel())
