"""What a person chooses from, and the usual normalisation; without torch, so that the command line knows them too."""

from __future__ import annotations

from typing import Literal

Stem = Literal["imagenet", "cifar", "solo-cifar", "lightly-cifar"]
"""A ResNet's: 7x7 and max-pool; 3x3 without max-pool; that padded by 2; that without its ReLU."""

Pooling = Literal["own", "mean"]
"""How tokens become the global representation: the network's own way, or the mean of the patch tokens."""

HeadChoice = Literal["auto", "own", "probe"]
Interpolation = Literal["bilinear", "bicubic"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
