"""Random numbers belong to (stream, id, position): uniform, independent, and blind to batch and order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from coss_eval import randomness

IDS = torch.randint(-(2**63), 2**63 - 1, (64,), generator=torch.Generator().manual_seed(0))
Draw = Callable[..., torch.Tensor]
DRAWS: dict[str, Draw] = {"uniform": randomness.uniform, "normal": randomness.normal}
GAMMA, M64 = 0x9E3779B97F4A7C15, (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The published generator's output function, in Python integers."""
    z = state & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def test_finaliser_is_splitmix64() -> None:
    # the first outputs of the reference implementation (Vigna, splitmix64.c) from state 0
    first = [splitmix64(k * GAMMA) for k in (1, 2, 3)]
    assert first == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    state = torch.arange(1, 1001) * (GAMMA - (1 << 64))
    ours = [value & M64 for value in randomness._mix(state).tolist()]
    assert ours == [splitmix64(k * GAMMA) for k in range(1, 1001)]


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_batch_size_and_order_change_nothing(draw: Draw, size: int) -> None:
    whole = draw(IDS, 0, "mask", shape=(3, 5))
    parts = torch.cat([draw(ids, 0, "mask", shape=(3, 5)) for ids in IDS.split(size)])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(whole, parts)
    assert torch.equal(whole[order], draw(IDS[order], 0, "mask", shape=(3, 5)))
    assert whole.shape == (64, 3, 5)
    assert whole.dtype == torch.float32


@pytest.mark.parametrize("ids", [torch.arange(300), torch.zeros(300, dtype=torch.int64) + torch.arange(300) * 2**40])
def test_distributions_for_structured_ids(ids: torch.Tensor) -> None:
    u = randomness.uniform(ids, 3, "u", shape=(1000,)).double().numpy()
    z = randomness.normal(ids, 3, "z", shape=(1000,)).double().numpy()
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-4
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-4
    for values in (u, z):  # neighbours along either axis are uncorrelated: 3e5 draws, 5 sigma
        for a, b in ((values[1:], values[:-1]), (values[:, 1:], values[:, :-1])):
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01


def test_streams_are_independent() -> None:
    base = randomness.uniform(IDS, 0, "a", shape=(1000,))
    for other in ((1, "a"), (0, "b"), (0,), (0, "a", 0)):
        values = randomness.uniform(IDS, *other, shape=(1000,))
        assert abs(np.corrcoef(base.ravel(), values.ravel())[0, 1]) < 0.02


def test_values_are_pinned() -> None:
    """A changed generator would silently change every stored measurement."""
    u = randomness.uniform(torch.tensor([0, 1, -5]), 0, "golden", shape=(2,))
    z = randomness.normal(torch.tensor([0, 1, -5]), 0, "golden", shape=(2,))
    assert torch.allclose(u, torch.tensor([[0.6029, 0.6184], [0.8822, 0.1454], [0.4384, 0.0788]]), atol=1e-4)
    assert torch.allclose(z, torch.tensor([[-0.7261, 0.0111], [0.2234, -1.9402], [-0.8080, 0.2266]]), atol=1e-4)
