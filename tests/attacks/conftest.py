"""Small real networks, trained on scikit-learn's digits once a session, and the images they are attacked with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
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


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def all_digits() -> Digits:
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div(16)[:, None].expand(-1, 3, -1, -1)
    images = F.interpolate(images, size=16, mode="bilinear", align_corners=False).clamp(0, 1)
    labels = torch.from_numpy(bunch.target).long()
    ids = (torch.arange(len(labels)) + 1) * 7_919_393_051  # spread out, as hashed ids are
    return Digits(images.contiguous(), labels, ids)


@pytest.fixture(scope="session")
def digits(all_digits: Digits) -> Digits:
    """120 images that no network was trained on."""
    return Digits(*(part[-120:] for part in all_digits))


@pytest.fixture(scope="session")
def networks(all_digits: Digits, one_thread: None) -> dict[str, nn.Module]:
    trained = {}
    for name, build in BUILDERS.items():
        with torch.random.fork_rng():
            torch.manual_seed(1)
            trained[name] = train(build(), all_digits.images[:-120], all_digits.labels[:-120])
    return trained


@pytest.fixture(params=list(BUILDERS))
def network(request: pytest.FixtureRequest, networks: dict[str, nn.Module]) -> nn.Module:
    return networks[request.param]
