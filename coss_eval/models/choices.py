"""The words with which a person chooses; without torch, so that the command line can name them too."""

from __future__ import annotations

from typing import Literal

Stem = Literal["imagenet", "cifar", "solo-cifar", "lightly-cifar"]
"""A ResNet's: 7x7 and max-pool; 3x3 without max-pool; that padded by 2; that without its ReLU."""

Pooling = Literal["own", "mean"]
"""How tokens become the global representation: the network's own way, or the mean of the patch tokens."""

HeadChoice = Literal["auto", "own", "probe"]
Interpolation = Literal["bilinear", "bicubic"]
