"""Small heads for every method, and smooth random images."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from coss_eval.data.open import Dataset, load_dataset
from coss_eval.models.rf_resnet import RFResNet

SMALL: dict[str, dict[str, int]] = {
    name: {"hidden": 32, "out": 20} for name in ("byol", "mocov3", "simclr", "vicreg", "barlow")
} | {
    "simsiam": {"hidden": 32, "out": 20, "bottleneck": 10},
    "dino": {"hidden": 32, "bottleneck": 16, "prototypes": 20},
    "supervised": {"classes": 5},
}


def photographs(n: int, seed: int = 0, size: int = 32) -> Tensor:
    """Smooth random images (n, 3, size, size): neighbouring pixels agree."""
    coarse = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


TINY: dict[str, object] = {
    "width": 8,
    "holdout": 0.0,
    "batch_size": 32,
    "warm_up_epochs": 1.0,
    "lr": 0.1,
    "precision": "fp32",
    "probe_every": 0,
    "log_every": 1,
}


OWN: dict[str, object] = {"stem": "imagenet", "width": 64}  # what a network made by a factory leaves unchanged
DROPPING = {**OWN, "arch": "training_parts:dropping_network"}
TWO_CONVOLUTIONS = {**OWN, "arch": "training_parts:two_convolutions"}
HUNGRY = {**OWN, "arch": "training_parts:hungry_network"}
COLLAPSED = {**OWN, "arch": "training_parts:collapsed_network"}


def two_convolutions() -> nn.Module:
    """A 3x3 convolution of stride 2, a 1x1 with a ReLU (so that it is no head), and the mean over places."""
    layers = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 12, 1, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def dropping_network() -> nn.Module:
    """A ResNet whose second stage drops channels at random, and too narrow for channels-last on the CPU."""
    made = RFResNet(18, width=8, stem="cifar")
    made.layer2.append(nn.Dropout2d(0.2))
    return made


class _Hungry(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps + torch.empty(2**50).sum() if self.training and len(maps) > 8 else maps


def hungry_network() -> nn.Module:
    """A ResNet that asks for 4 PB to train on more than 8 images at a time."""
    made = RFResNet(18, width=8, stem="cifar")
    made.layer2.append(_Hungry())
    return made


def collapsed_network() -> nn.Module:
    """A ResNet that says the same of every image."""
    made = RFResNet(18, width=16, stem="cifar")
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
            nn.init.ones_(module.bias)
    return made


def digits(n: int = 96) -> Dataset:
    """A few of scikit-learn's digits, 32 px."""
    data = load_dataset("digits")
    assert data.train is not None
    return replace(data, train=data.train.limited(n), test=data.test.limited(50))
