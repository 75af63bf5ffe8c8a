"""Pixels in [0, 1] to logits: normalisation, up-sampling and the head inside one module, as attacks require."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coss_eval.data.batches import Geometry
from coss_eval.errors import UsageError
from coss_eval.models.backbone import Backbone, Representations
from coss_eval.models.choices import IMAGENET_MEAN, IMAGENET_STD, Interpolation

MOST_SIDE = 16_384  # px that a network may need


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of its input, and where that knowledge comes from.

    ``img_size`` is the side the network needs: larger or smaller pixels are resized inside the Classifier; None
    means that it takes any size. ``said_by``: who says mean and std, in words ("flag", "checkpoint", "layout", ...);
    None where nobody does, and ImageNet's are assumed. ``asked``: a person said them, so a network that normalises by
    itself is refused.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    img_size: int | None = None
    crop_pct: float = 0.875
    interpolation: Interpolation = "bilinear"
    said_by: str | None = None
    asked: bool = False

    def __post_init__(self) -> None:
        """UsageError for values that no preprocessing has: files say them, too."""
        side, share = self.img_size, self.crop_pct
        if side is not None and not (isinstance(side, int) and 0 < side <= MOST_SIDE):
            raise UsageError(f"the side of images must be a whole number from 1 to {MOST_SIDE:,}, not {side!r}")
        if not (isinstance(share, int | float) and 0 < share <= 1):
            raise UsageError(f"the share of a centre crop must lie in (0, 1], not {share!r}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
                raise UsageError(f"the {name} of pixels must be three numbers, not {values!r}")

    @property
    def source(self) -> str:
        """``said_by`` in words, for people."""
        return self.said_by or "ASSUMED (ImageNet)"

    @property
    def geometry(self) -> Geometry:
        """How image files of varying size are brought to pixels for this network (224 where it takes any size)."""
        return Geometry(self.img_size or 224, self.crop_pct, self.interpolation)

    def protocol(self) -> dict[str, Any]:
        """What numbers depend on, as JSON: the values, whoever says them."""
        values = {key: v for key, v in asdict(self).items() if key not in ("said_by", "asked")}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


class Classifier(nn.Module):
    """float32 pixels (B, 3, H, W) in [0, 1] to logits (B, K).

    ``class_map`` (K,) restricts the head's logits to the dataset's classes, in the dataset's order. ``origin`` says
    where the head comes from ("own head", "linear probe, strength 0.1", ...) and goes into every report; ``fitted``,
    that it was fitted on the dataset's training images.
    """

    mean: Tensor
    std: Tensor
    class_map: Tensor | None

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        preprocessing: Preprocessing,
        *,
        class_map: Tensor | None = None,
        origin: str = "own head",
        fitted: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.preprocessing = backbone, head, preprocessing
        self.origin, self.fitted = origin, fitted
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1))
        self.register_buffer("class_map", class_map)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.logits(self.backbone(self.normalise(pixels)))

    def logits(self, representations: Tensor) -> Tensor:
        """Global representations (B, D') to the logits (B, K) of the dataset's classes."""
        logits: Tensor = self.head(representations)
        return logits if self.class_map is None else logits[:, self.class_map]

    def represent(self, pixels: Tensor) -> Representations:
        """Local (B, L, D) and global (B, D') representations of pixels in [0, 1]."""
        return self.backbone.represent(self.normalise(pixels))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] to what the backbone takes: resized where it needs one size, then standardised."""
        side = self.preprocessing.img_size
        if side is not None and pixels.shape[-2:] != (side, side):
            mode = self.preprocessing.interpolation
            pixels = F.interpolate(pixels, size=(side, side), mode=mode, align_corners=False, antialias=True)
            if mode == "bicubic":  # overshoots; cut a hair outside [0, 1], lest rounding cut the gradient of white
                pixels = pixels.clamp(-1e-4, 1 + 1e-4)
        return (pixels - self.mean) / self.std


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 in [0, 1], channels-last: what every Classifier takes."""
    if images.dtype != torch.uint8:
        raise UsageError(f"expected uint8 images in 0..255, but got {images.dtype}; pixels in [0, 1] need no to_float")
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def training_format(network: nn.Module, device: torch.device) -> torch.memory_format:
    """The memory format to train in: channels-last, but where that is not safe.

    On the CPU, oneDNN (seen with torch 2.15) writes outside its buffers in the channels-last weight gradient of
    convolutions whose number of channels is no multiple of 16.
    """
    narrow = any(isinstance(module, nn.Conv2d) and module.out_channels % 16 for module in network.modules())
    return torch.contiguous_format if device.type == "cpu" and narrow else torch.channels_last
