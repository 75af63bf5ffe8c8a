"""Signs that a robust accuracy is not to be trusted: gradients that are masked, or a network used wrongly.

After Carlini et al. 2019 (On Evaluating Adversarial Robustness, section 5) and AutoAttack's own checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coss_eval.attacks.gradient import FGSM, PGD
from coss_eval.attacks.inputs import Problem, held_still
from coss_eval.attacks.result import Verdicts
from coss_eval.attacks.square import Square
from coss_eval.randomness import numbered

ZERO_GRADIENTS = 0.05  # share of gradients
BEATEN = 0.01  # share of images: what an attack finds that PGD missed, beyond luck
LUCK = 2  # images that an attack may find though they are more than that share of a small set
UNBOUNDED = 0.05  # share of images that may stand when every pixel may take any value


@dataclass(frozen=True)
class Flag:
    """One finding: a name for tables, a line for the person, and the share it was raised for."""

    name: str
    message: str
    share: float


@torch.no_grad()
def usage_flags(classifier: nn.Module, images: Tensor, *, batch_size: int = 256) -> list[Flag]:
    """What is wrong with a network before any attack: its mode, its outputs, its pixels. images as for ``pgd``."""
    flags = []
    if any(module.training for module in classifier.modules()):
        flags.append(Flag("train mode", "the network was in training mode; it is attacked in evaluation mode", 1.0))
    batch_norms = [m for m in classifier.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if any(m.running_mean is None for m in batch_norms):
        flags.append(
            Flag("batch statistics", "a BatchNorm has no running statistics: verdicts depend on the batch", 1.0)
        )
    problem = Problem.checked(classifier, images, _no_labels(images), batch_size=batch_size)
    with held_still(classifier):
        logits, again = problem.clean_logits(), problem.clean_logits()
    likely = ((logits >= 0).all(1) & ((logits.sum(1) - 1).abs() < 1e-3)).double().mean().item()
    if likely == 1:
        flags.append(Flag("probabilities", "the outputs look like probabilities; attacks need logits", likely))
    if not torch.allclose(logits, again, rtol=1e-3, atol=1e-3):
        flags.append(Flag("random", "the same pixels give different logits: verdicts are partly luck", 1.0))
    if float(images.max()) < 2 / 255:
        flags.append(Flag("pixel range", "all pixels are below 2/255; were the images divided by 255 twice?", 1.0))
    return flags


def masking_flags(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    ids: Tensor | None,
    result: Verdicts,
    *,
    steps: int = 300,
    seed: int = 0,
    batch_size: int = 256,
) -> list[Flag]:
    """Whether ``result``, by an iterated gradient attack on these images, looks too good.

    What it left standing is attacked again, at the eps where it left nearest to half: by FGSM, in L-infinity by square
    (``steps`` queries, no gradients), and by PGD with no bound to speak of. None of them should find much.
    """
    labels, ids = labels.to(images.device), numbered(ids, images).to(images.device)
    flags = []
    if result.zero_gradients is not None and result.zero_gradients > ZERO_GRADIENTS:
        message = f"{result.zero_gradients:.1%} of the gradients are exactly zero"
        flags.append(Flag("zero gradients", message, result.zero_gradients))

    accuracy = result.robust.double().mean(1)
    level = int((accuracy - result.clean.double().mean() / 2).abs().argmin())
    standing = result.robust[level]
    eps = result.eps[level]
    if standing.any():
        left = images[standing], labels[standing]
        how: dict[str, Any] = {"ids": ids[standing], "seed": seed, "batch_size": batch_size}
        weaker = {"FGSM": FGSM(norm=result.norm)(classifier, *left, eps, **how)}
        if result.norm == "linf":
            weaker["square"] = Square(steps=steps)(classifier, *left, eps, **how)
        for name, attempt in weaker.items():
            found = int((~attempt.robust[0]).sum())
            beaten = found / len(images)
            if found > max(LUCK, BEATEN * len(images)):
                message = f"{name} breaks {beaten:.1%} of the images that {result.attack} leaves at eps {eps:.4g}"
                flags.append(Flag(f"{name} stronger", message, beaten))

    unbounded = 1.0 if result.norm == "linf" else float(images[0].numel()) ** 0.5
    free = PGD(norm=result.norm)(classifier, images, labels, unbounded, ids=ids, seed=seed, batch_size=batch_size)
    stands = free.robust_accuracy[0]
    if stands > UNBOUNDED:
        flags.append(Flag("unbounded", f"{stands:.1%} of the images stand though any pixel may change at will", stands))
    return flags


def _no_labels(images: Tensor) -> Tensor:
    return torch.zeros(len(images), dtype=torch.int64, device=images.device)
