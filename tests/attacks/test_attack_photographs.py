"""Parity with foolbox on real photographs: three kinds of network, 512 images, both norms, equal step."""

from __future__ import annotations

from pathlib import Path

import foolbox
import pytest
import torch
from attacked import Digits, Normalised, convnet, train
from torch import Tensor, nn

from coss_eval import attacks
from coss_eval.data.open import load_dataset
from coss_eval.models.classifier import to_float

EPS = {"linf": [1 / 1020, 1 / 255, 4 / 255], "l2": [1 / 32, 1 / 8, 1 / 2]}
PEERS = {
    ("pgd", "linf"): foolbox.attacks.LinfPGD,
    ("pgd", "l2"): foolbox.attacks.L2PGD,
    ("fgsm", "linf"): foolbox.attacks.FGSM,
    ("fgsm", "l2"): foolbox.attacks.FGM,
}


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return torch.relu(maps + self.branch(maps))


def resnet() -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    return Normalised(nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.ReLU(), Residual(24), Residual(24), *head)


def patches() -> nn.Module:
    mix = (nn.Conv2d(48, 48, 5, padding=2, groups=48), nn.GELU(), nn.Conv2d(48, 48, 1), nn.GELU())
    return Normalised(nn.Conv2d(3, 48, 4, stride=4), nn.GELU(), *mix, nn.Flatten(), nn.Linear(48 * 64, 10))


NETWORKS = {"convnet": convnet, "resnet": resnet, "patches": patches}


@pytest.fixture(scope="module")
def photographs(shared_data: Path) -> tuple[Digits, Digits]:
    """5,000 training and 512 test images of cifar10-jpeg."""
    data = load_dataset("cifar10-jpeg", root=shared_data)
    assert data.train is not None
    parts = []
    for split, count in ((data.train, 5000), (data.test, 512)):
        images, labels, ids = zip(*split.limited(count, seed=0).batches(batch_size=1024), strict=True)
        parts.append(Digits(to_float(torch.cat(images)).contiguous(), torch.cat(labels), torch.cat(ids)))
    return parts[0], parts[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NETWORKS))
def test_at_most_half_a_point_more_stands(name: str, photographs: tuple[Digits, Digits]) -> None:
    fit, (images, labels, ids) = photographs
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = train(NETWORKS[name](), fit.images, fit.labels, steps=120).requires_grad_(False)
    victim = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    for (attack, norm), peer in PEERS.items():
        if attack == "pgd":
            method = peer(rel_stepsize=0.25, steps=10, random_start=False)
            ours = attacks.pgd(network, images, labels, EPS[norm], ids, norm, steps=10, random_start=False)
        else:
            method = peer()
            ours = attacks.fgsm(network, images, labels, EPS[norm], norm)
        _, _, success = method(victim, images, labels, epsilons=EPS[norm])
        theirs = (~success).double().mean(1).tolist()
        assert ours.clean.double().mean() > 0.3
        for mine, other in zip(ours.robust_accuracy, theirs, strict=True):
            assert mine <= other + 0.005
            assert mine >= other - 0.03  # the same attack, but for keeping the best so far
