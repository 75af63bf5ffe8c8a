"""What an attack found: a verdict for every image at every eps, and the adversarial images on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from coss_eval.errors import UsageError


def place_of(eps: float, attacked: Sequence[float]) -> int:
    """Where an eps is among those attacked, within a hundredth of it; UsageError where it is none of them."""
    place = min(range(len(attacked)), key=lambda e: abs(attacked[e] - eps))
    if not math.isclose(attacked[place], eps, rel_tol=0.01):
        raise UsageError(f"eps {eps:g} was not attacked: choose one of {', '.join(f'{one:g}' for one in attacked)}")
    return place


@dataclass(frozen=True)
class Verdicts:
    """Which of B images withstood one attack at E rising eps; tensors lie on the images' device.

    ``swept``: an image broken at one eps counts as broken at every larger one (the balls are nested), so each column
    of ``robust`` is monotone, and the verdict at an eps is the minimum over the list up to it. Attacks of one step are
    not swept: each eps has a verdict of its own.
    """

    attack: str
    norm: str
    eps: tuple[float, ...]
    clean: Tensor  # bool (B,), classified rightly without an attack (targeted: not as the target)
    robust: Tensor  # bool (E, B)
    margin: Tensor | None = None  # float32 (E, B)
    zero_gradients: float | None = None  # share of gradients that were exactly zero: a sign of masking
    swept: bool = True

    @classmethod
    def joined(cls, parts: Sequence[Verdicts]) -> Verdicts:
        """The verdicts of one attack on several batches, (E, B1 + B2 + ...); margins and images are let go."""
        if not parts:
            raise UsageError("no images to attack: the split is empty")
        first = parts[0]
        shares = [(part.zero_gradients, len(part.clean)) for part in parts if part.zero_gradients is not None]
        zero = sum(share * n for share, n in shares) / sum(n for _, n in shares) if shares else None
        clean, robust = torch.cat([p.clean for p in parts]), torch.cat([p.robust for p in parts], 1)
        return Verdicts(first.attack, first.norm, first.eps, clean, robust, zero_gradients=zero, swept=first.swept)

    def among(self, rows: Tensor) -> Verdicts:
        """The verdicts on the images numbered ``rows`` (n,)."""
        clean, robust = self.clean[rows], self.robust[:, rows]
        return Verdicts(
            self.attack, self.norm, self.eps, clean, robust, zero_gradients=self.zero_gradients, swept=self.swept
        )

    def minimum(self, attack_again: Callable[[float, Tensor], Tensor]) -> Verdicts:
        """The minimum of this attack and another one, image by image.

        ``attack_again(eps, rows)`` attacks the images numbered ``rows`` (n,) and returns bool (n,): which of them
        stand. In a sweep each image is tried at the largest eps that it withstood, and at the next smaller one while it
        breaks: what stands in a ball stands in the balls inside it. So the second attack costs about one attempt an
        image, not one for every eps. Where each eps is for itself, all that stand at it are tried.
        """
        robust = self.robust.clone()
        for level in reversed(range(len(self.eps))):
            undecided = robust[level].clone()
            if self.swept and level + 1 < len(self.eps):
                undecided &= ~robust[level + 1]
            rows = undecided.nonzero().flatten()
            if len(rows):
                robust[level, rows] = attack_again(self.eps[level], rows)
        return replace(self.among(torch.arange(len(self.clean), device=self.clean.device)), robust=robust)

    @property
    def robust_accuracy(self) -> list[float]:
        """The share of images that stand, for each eps."""
        return [float(share) for share in self.robust.double().mean(1)]

    @property
    def smallest_eps(self) -> Tensor:
        """float64 (B,): the smallest eps that broke each image; 0 if it was wrong before, infinity if it stands."""
        steps = torch.tensor([*self.eps, math.inf], dtype=torch.float64)
        first = self.robust.long().cumprod(0).sum(0).cpu()  # how many eps it withstood before the one that broke it
        return torch.where(self.clean.cpu(), steps[first], 0.0)

    @property
    def median_eps(self) -> float:
        """The median smallest eps over images that are right without an attack (the lower one of two)."""
        broken = self.smallest_eps[self.clean.cpu()]
        return float(broken.median()) if len(broken) else math.nan


@dataclass(frozen=True)
class AttackResult(Verdicts):
    """Verdicts, and the adversarial images.

    ``margin`` is the lowest logit margin (true class minus best other; for a targeted attack best other minus target)
    that was seen up to each eps (not swept: at it): how near a standing image came. None from a backend that does not
    see it.
    """

    adversarial_images: Callable[[int], Tensor] = field(repr=False, kw_only=True)

    def adversarial(self, e: int) -> Tensor:
        """float32 (B, 3, H, W) for ``eps[e]``: the image that broke the network, else the strongest attempt.

        Images wrong without an attack come back clean. Attempts on images that stand at ``eps[e]`` but are attacked
        further at larger eps are computed anew, from the same seeds.
        """
        return self.adversarial_images(range(len(self.eps))[e])

    def images(self, eps: float) -> Tensor:
        """``adversarial`` at this eps, one of those attacked (nearly: 0.0314 is 8/255)."""
        return self.adversarial(place_of(eps, self.eps))
