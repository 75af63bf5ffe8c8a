"""The two attacks that everyone knows, as functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from coss_eval.attacks.gradient import FGSM, PGD
from coss_eval.attacks.result import AttackResult


def fgsm(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float | Sequence[float],
    norm: str = "linf",
    *,
    loss: str = "ce",
    targeted: Tensor | None = None,
    batch_size: int = 256,
    backend: str = "native",
) -> AttackResult:
    """``FGSM(norm=norm, loss=loss)`` on these images: see FGSM, and Attack for the arguments."""
    attack = FGSM(norm=norm, loss=loss)
    return attack(classifier, images, labels, eps, targeted=targeted, batch_size=batch_size, backend=backend)


def pgd(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float | Sequence[float],
    ids: Tensor,
    norm: str = "linf",
    steps: int = 20,
    step_size: float | None = None,
    random_start: bool = True,
    restarts: int = 1,
    loss: str = "ce",
    seed: int = 0,
    targeted: Tensor | None = None,
    *,
    rel_step: float | None = None,
    batch_size: int = 256,
    backend: str = "native",
) -> AttackResult:
    """``PGD(norm=norm, steps=steps, ...)`` on these images: see PGD for its options, and Attack for the arguments.

    classifier: pixels in [0, 1] to logits (B, K). images float32 (B, 3, H, W) in [0, 1]; labels, ids int64 (B,). eps,
    step_size: in pixels of [0, 1]; step_size None is rel_step * eps, by default 2.5 eps / steps.
    """
    attack = PGD(
        norm=norm,
        steps=steps,
        step_size=step_size,
        restarts=restarts,
        loss=loss,
        random_start=random_start,
        rel_step=rel_step,
    )
    how: dict[str, Any] = {"targeted": targeted, "batch_size": batch_size, "backend": backend}
    return attack(classifier, images, labels, eps, ids=ids, seed=seed, **how)
