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
    """``FGSM(norm=norm, loss=loss)`` on these images: see FGSM, and Attack for the arguments.

    >>> import torch
    >>> classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).eval()
    >>> _ = classifier[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))  # bright or dark?
    >>> _ = classifier[1].bias.data.copy_(torch.tensor([-6.0, 6.0]))
    >>> images, labels = torch.full((1, 3, 2, 2), 0.6), torch.tensor([0])
    >>> fgsm(classifier, images, labels, [0.05, 0.2]).robust.tolist()
    [[True], [False]]
    """
    attack = FGSM(norm=norm, loss=loss)
    return attack(classifier, images, labels, eps, targeted=targeted, batch_size=batch_size, backend=backend)


def pgd(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float | Sequence[float],
    ids: Tensor | None = None,
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

    classifier: pixels in [0, 1] to logits (B, K). images float32 (B, 3, H, W) in [0, 1]; labels, ids int64 (B,); ids
    None are 0, 1, ... eps, step_size: in pixels of [0, 1]; step_size None is rel_step * eps, by default
    2.5 eps / steps.

    >>> import torch
    >>> classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).eval()
    >>> _ = classifier[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))  # bright or dark?
    >>> _ = classifier[1].bias.data.copy_(torch.tensor([-6.0, 6.0]))
    >>> images, labels = torch.full((2, 3, 2, 2), 0.6), torch.tensor([0, 0])
    >>> result = pgd(classifier, images, labels, [0.05, 0.2], ids=torch.tensor([7, 8]), steps=5)
    >>> result.robust.tolist()
    [[True, True], [False, False]]
    >>> float((result.images(0.2) - images).abs().max()) <= 0.2 + 1e-6
    True
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
