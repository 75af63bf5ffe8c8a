"""The attack on the representation: no labels, farther with every eps."""

from __future__ import annotations

import pytest
import torch
from attacked import Digits
from torch import nn

from coss_eval.attacks import representation
from coss_eval.attacks.displacement import DISTANCES
from coss_eval.errors import UsageError

EPS = {"linf": [0.0, 0.01, 0.03, 0.06], "l2": [0.0, 0.1, 0.3, 0.6]}


@pytest.fixture
def encoder(networks: dict[str, nn.Module]) -> nn.Module:
    """The convnet without its head: (B, 128)."""
    layers = networks["convnet"].layers
    return nn.Sequential(*layers[:-1]).eval()


@pytest.mark.slow
@pytest.mark.parametrize("distance", list(DISTANCES))
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_farther_than_noise_and_within_the_ball(norm: str, distance: str, encoder: nn.Module, digits: Digits) -> None:
    images, _, ids = digits
    result = representation(encoder, images, EPS[norm], ids, norm, distance=distance)
    assert result.distance.shape == (4, len(images))
    assert not result.distance[0].any()
    assert (result.distance[1:] > result.distance[:-1]).all()
    for level, eps in enumerate(EPS[norm]):
        pixels = result.adversarial(level)
        moved = (pixels - images).flatten(1)
        assert ((moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)) <= eps + 1e-6).all()
        with torch.no_grad():
            reached = DISTANCES[distance](encoder(pixels), encoder(images))
        torch.testing.assert_close(reached, result.distance[level], rtol=0.02, atol=1e-4)
    signs = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).sub(0.5).sign()
    if norm == "linf":
        with torch.no_grad():
            by_noise = DISTANCES[distance](encoder((images + 0.06 * signs).clamp(0, 1)), encoder(images))
        assert (result.distance[-1] > by_noise).all()


@pytest.mark.slow
def test_no_batch_dependence(encoder: nn.Module, digits: Digits) -> None:
    images, _, ids = (part[:40] for part in digits)
    whole = representation(encoder, images, EPS["linf"], ids).distance
    pieces = representation(encoder, images, EPS["linf"], ids, batch_size=7).distance
    torch.testing.assert_close(whole, pieces, rtol=1e-3, atol=1e-5)
    rows = torch.tensor([5, 1, 30])
    alone = representation(encoder, images[rows], EPS["linf"], ids[rows]).distance
    torch.testing.assert_close(whole[:, rows], alone, rtol=1e-3, atol=1e-5)


def test_restarts_only_help(encoder: nn.Module, digits: Digits) -> None:
    images, _, ids = digits
    one = representation(encoder, images, EPS["linf"], ids, steps=5).distance
    three = representation(encoder, images, EPS["linf"], ids, steps=5, restarts=3).distance
    assert (three >= one - 1e-5).all()


def test_errors(encoder: nn.Module, digits: Digits) -> None:
    images, _, ids = digits
    with pytest.raises(UsageError, match="unknown distance 'cosin'; did you mean cosine"):
        representation(encoder, images, 0.1, ids, distance="cosin")
    with pytest.raises(UsageError, match="rising order"):
        representation(encoder, images, [0.2, 0.1], ids)
