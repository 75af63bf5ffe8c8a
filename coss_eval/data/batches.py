"""What every part of the toolkit reads: uint8 batches of one geometry, in a fixed order, with sample ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    images: Tensor  # uint8 (B, 3, H, W)
    labels: Tensor  # int64 (B,)
    ids: Tensor  # int64 (B,), hashes of the samples' keys


@dataclass(frozen=True)
class Geometry:
    """How an image file becomes pixels: shorter side to size / crop_pct, then a centre crop of size x size.

    Sets of one fixed size (CIFAR, Tiny-ImageNet, digits) stay native and ignore it; a network that needs a
    larger input up-samples inside its Classifier, so that corruptions and eps act on the stored pixels.
    """

    size: int = 224
    crop_pct: float = 0.875
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
