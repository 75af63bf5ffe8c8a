"""Small real networks, trained on scikit-learn's digits once a session, and the images they are attacked with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Digits(NamedTuple):
    images: Tensor  # float32 (N, 3, 16, 16) in [0, 1]
    labels: Tensor
    ids: Tensor


class Normalised(nn.Module):
    """A network with its normalisation inside, as attacks require."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers((pixels - 0.3) / 0.4)


def convnet() -> nn.Module:
    return Normalised(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(128, 10),
    )


def perceptron() -> nn.Module:
    return Normalised(nn.Flatten(), nn.Linear(768, 64), nn.GELU(), nn.Linear(64, 10))


def linear() -> nn.Module:
    return Normalised(nn.Flatten(), nn.Linear(768, 10))


BUILDERS: dict[str, Callable[[], nn.Module]] = {"convnet": convnet, "perceptron": perceptron, "linear": linear}


def train(network: nn.Module, images: Tensor, labels: Tensor, *, steps: int = 150) -> nn.Module:
    """A few seconds of Adam; batches by a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    network.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (128,), generator=generator)
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return network.eval()
