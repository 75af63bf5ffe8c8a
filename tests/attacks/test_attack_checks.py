"""Flags: raised where a number would mislead, silent where it would not."""

from __future__ import annotations

import pytest
import torch
from attacked import Digits
from torch import Tensor, nn

from coss_eval import attacks
from coss_eval.attacks import masking_flags, usage_flags

EPS = {"linf": [0.01, 0.03, 0.06, 0.12], "l2": [0.1, 0.3, 0.6, 1.2]}


class Quantised(nn.Module):
    """Rounds the pixels: almost the same function, of zero gradient everywhere."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network((pixels * 64).round() / 64)


class Noisy(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.generator = network, torch.Generator().manual_seed(0)

    def forward(self, pixels: Tensor) -> Tensor:
        logits = self.network(pixels)
        return logits + 0.1 * torch.randn(logits.shape, generator=self.generator)


def names(flags: list[attacks.Flag]) -> set[str]:
    assert all("\n" not in flag.message and 0 < flag.share <= 1 for flag in flags)
    return {flag.name for flag in flags}


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_honest_network_raises_no_flag(norm: str, network: nn.Module, digits: Digits) -> None:
    images, labels, ids = digits
    result = attacks.pgd(network, images, labels, EPS[norm], ids, norm)
    assert names(usage_flags(network, images)) == set()
    assert names(masking_flags(network, images, labels, ids, result, steps=60)) == set()


@pytest.mark.slow
def test_masked_gradients_are_seen(networks: dict[str, nn.Module], digits: Digits) -> None:
    images, labels, ids = digits
    network = Quantised(networks["convnet"])
    result = attacks.pgd(network, images, labels, EPS["linf"], ids)
    assert result.zero_gradients == 1
    found = names(masking_flags(network, images, labels, ids, result, steps=60))
    assert {"zero gradients", "square stronger", "unbounded"} <= found


def test_an_attack_too_weak_is_seen(networks: dict[str, nn.Module], digits: Digits) -> None:
    images, labels, ids = digits
    network = networks["convnet"]
    weak = attacks.pgd(network, images, labels, EPS["linf"], ids, steps=1, step_size=1e-4)
    assert {"FGSM stronger", "square stronger"} <= names(masking_flags(network, images, labels, ids, weak, steps=60))


def test_usage(networks: dict[str, nn.Module], digits: Digits) -> None:
    images, network = digits.images, networks["convnet"]
    assert names(usage_flags(nn.Sequential(network, nn.Softmax(1)).eval(), images)) == {"probabilities"}
    assert names(usage_flags(Noisy(network).eval(), images)) == {"random"}
    assert "pixel range" in names(usage_flags(network, images / 255))
    stateless = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), network).eval()
    assert "batch statistics" in names(usage_flags(stateless, images))
    network.train()
    try:
        assert names(usage_flags(network, images)) == {"train mode"}
        assert network.training
    finally:
        network.eval()
