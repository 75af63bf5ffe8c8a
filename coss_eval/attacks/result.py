"""What an attack found: a verdict for every image at every eps, and the adversarial images on demand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttackResult:
    """Verdicts of one attack on B images at E rising eps; tensors lie on the images' device.

    An image broken at one eps is broken at every larger one, so each column of ``robust`` is monotone. ``margin`` is
    the lowest logit margin (true class minus best other; for a targeted attack best other minus target) that was
    seen up to each eps: how near a standing image came. A backend that does not see it gives None.
    """

    attack: str
    norm: str
    eps: tuple[float, ...]
    clean: Tensor  # bool (B,), classified rightly without an attack (targeted: not as the target)
    robust: Tensor  # bool (E, B)
    margin: Tensor | None = None  # float32 (E, B)
    zero_gradients: float | None = None  # share of gradients that were exactly zero: a sign of masking
    adversarial_images: Callable[[int], Tensor] = field(repr=False, kw_only=True)

    def adversarial(self, e: int) -> Tensor:
        """float32 (B, 3, H, W) for ``eps[e]``: the image that broke the network, else the strongest attempt.

        Images wrong without an attack come back clean. Attempts on images that stand at ``eps[e]`` but are attacked
        further at larger eps are computed anew, from the same seeds.
        """
        return self.adversarial_images(range(len(self.eps))[e])

    @property
    def robust_accuracy(self) -> list[float]:
        """The share of images that stand, for each eps."""
        return [float(share) for share in self.robust.double().mean(1)]

    @property
    def smallest_eps(self) -> Tensor:
        """float64 (B,): the smallest eps that broke each image; 0 if it was wrong before, infinity if it stands."""
        steps = torch.tensor([*self.eps, math.inf], dtype=torch.float64)
        first = self.robust.sum(0).cpu()  # monotone: the number of eps it withstood is the index that broke it
        return torch.where(self.clean.cpu(), steps[first], 0.0)

    @property
    def median_eps(self) -> float:
        """The median smallest eps over images that are right without an attack (the lower one of two)."""
        broken = self.smallest_eps[self.clean.cpu()]
        return float(broken.median()) if len(broken) else math.nan
