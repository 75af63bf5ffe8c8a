"""Fixtures of the attacks' tests; what they are made of is in attacked.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from attacked import BUILDERS, Digits, train
from sklearn.datasets import load_digits
from torch import nn


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
