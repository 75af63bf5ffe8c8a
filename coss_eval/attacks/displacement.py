"""Attack the representation itself: push it as far as a small perturbation can. No labels, no head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coss_eval.attacks.gradient import PGD
from coss_eval.attacks.inputs import (
    check_count,
    check_eps,
    check_images,
    check_rows,
    device_of,
    held_still,
)
from coss_eval.attacks.losses import Reading
from coss_eval.attacks.result import place_of
from coss_eval.attacks.sweep import Findings, RisingEps, Schedule
from coss_eval.errors import unknown_name
from coss_eval.randomness import numbered


def relative_distance(moved: Tensor, clean: Tensor) -> Tensor:
    """||moved - clean|| / ||clean||, (B,)."""
    length: Tensor = torch.linalg.vector_norm(clean, dim=1).clamp_min(1e-12)
    way: Tensor = torch.linalg.vector_norm(moved - clean, dim=1)
    return way / length


def cosine_distance(moved: Tensor, clean: Tensor) -> Tensor:
    """1 - cos(moved, clean), (B,)."""
    return 1 - torch.cosine_similarity(moved, clean, dim=1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"relative": relative_distance, "cosine": cosine_distance}


@dataclass(frozen=True)
class RepresentationResult:
    """How far the representation of B images could be moved at E rising eps; tensors on the images' device."""

    norm: str
    eps: tuple[float, ...]
    distance: Tensor  # float32 (E, B), never falling with eps
    zero_gradients: float | None
    adversarial_images: Callable[[int], Tensor] = field(repr=False, kw_only=True)

    def adversarial(self, e: int) -> Tensor:
        """float32 (B, 3, H, W): the pixels that moved it farthest at ``eps[e]``; below the last eps computed anew."""
        return self.adversarial_images(range(len(self.eps))[e])

    def images(self, eps: float) -> Tensor:
        """``adversarial`` at this eps, one of those attacked (nearly: 0.0314 is 8/255)."""
        return self.adversarial(place_of(eps, self.eps))


@dataclass(frozen=True)
class _Displacement:
    """The goal: away from the clean representation. No image is ever done."""

    encoder: nn.Module
    anchors: Tensor  # float32 (N, D')
    distance: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, pixels: Tensor, rows: Tensor, attempt: Tensor) -> Reading:
        distance = self.distance(self.encoder(pixels).float(), self.anchors[rows])
        return Reading(distance, -distance.detach(), torch.zeros_like(rows, dtype=torch.bool))


def representation(
    encoder: nn.Module,
    images: Tensor,
    eps: float | Sequence[float],
    ids: Tensor | None = None,
    norm: str = "linf",
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    seed: int = 0,
    *,
    distance: str = "relative",
    batch_size: int = 256,
) -> RepresentationResult:
    """PGD that maximises the distance of the global representation from the clean one.

    encoder: pixels (B, 3, H, W) in [0, 1] to the global representation (B, D'); distance: "relative" (L2, as a share
    of the clean one's length) or "cosine". The start is always random: at the clean image the gradient is zero.
    The other arguments, and the errors, are those of ``pgd``.
    """
    attack, levels = PGD(norm=norm, steps=steps, step_size=step_size, restarts=restarts), check_eps(eps, norm)
    check_images(images)
    numbers = numbered(ids, images)
    check_rows("ids", numbers, images)
    check_count("batch_size", batch_size)
    if distance not in DISTANCES:
        raise unknown_name("distance", distance, DISTANCES)

    rows = torch.arange(len(images), device=images.device)

    def sweep(goal: _Displacement, eps: tuple[float, ...]) -> Findings:
        schedule = Schedule(eps, restarts, 1, seed, norm, batch_size)
        return RisingEps(encoder, images, numbers, goal, attack, schedule).run(rows, images.new_zeros(len(images)))

    with held_still(encoder):
        goal = _Displacement(encoder, _represent(encoder, images, batch_size), DISTANCES[distance])
        found = sweep(goal, levels)

    def adversarial(level: int) -> Tensor:
        if level == len(levels) - 1:
            return found.best.clone()
        with held_still(encoder):
            return sweep(goal, levels[: level + 1]).best

    return RepresentationResult(norm, levels, -found.margin, found.zero_gradients, adversarial_images=adversarial)


@torch.no_grad()
def _represent(encoder: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """float32 (N, D') on the encoder's device."""
    device = device_of(encoder, images)
    starts = range(0, len(images), batch_size)
    return torch.cat([encoder(images[start : start + batch_size].to(device)).float() for start in starts])
