"""How an attack is run: checked inputs in, an AttackResult out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from coss_eval.attacks.attack import Stepwise
from coss_eval.attacks.inputs import Problem, check_eps, held_still
from coss_eval.attacks.losses import Misclassification, parse_losses, verdict
from coss_eval.attacks.result import AttackResult
from coss_eval.attacks.sweep import Findings, RisingEps, Schedule
from coss_eval.errors import UsageError, unknown_name


def run(attack: Stepwise, problem: Problem, eps: float | Sequence[float], seed: int, backend: str) -> AttackResult:
    """An attack by the native engine, or the same one by foolbox."""
    if backend not in ("native", "reference"):
        raise unknown_name("attack backend", backend, ["native", "reference"])
    if backend == "native":
        return _swept(attack, problem, eps, seed)
    if attack.loss != "ce":
        raise UsageError(f"expected loss 'ce' with the reference backend (foolbox has no other), got {attack.loss!r}")
    return attack.by_foolbox(problem, check_eps(eps, attack.norm), seed)


def _swept(attack: Stepwise, problem: Problem, eps: float | Sequence[float], seed: int) -> AttackResult:
    """Classify the clean images, attack what is right over eps (until it breaks, where that counts), and tell."""
    levels = check_eps(eps, attack.norm)
    labels, targeted = problem.labels.to(problem.device), problem.targeted
    targets = None if targeted is None else targeted.to(problem.device)
    with held_still(problem.classifier):
        logits = problem.clean_logits()
        losses = parse_losses(attack.loss, logits.shape[1], targeted=targeted is not None)
        margin, broken = verdict(logits, problem.labels, targeted)

        def sweep(rows: Tensor, eps: tuple[float, ...]) -> Findings:
            goal = Misclassification(problem.classifier, labels, targets, losses)
            schedule = Schedule(eps, attack.restarts, len(losses), seed, attack.norm, problem.batch_size)
            return RisingEps(problem.classifier, problem.images, problem.ids, goal, attack, schedule).run(rows, margin)

        rows = (~broken).nonzero().flatten()
        if attack.single_step:
            return _each_alone(attack, levels, ~broken, lambda eps: sweep(rows, (eps,)), problem.classifier)
        found = sweep(rows, levels)
    robust = found.withstood > torch.arange(len(levels), device=broken.device)[:, None]  # (E, B)

    def adversarial(level: int) -> Tensor:
        later = robust[level] & (level < len(levels) - 1)  # these were attacked further
        if not later.any():
            return found.best.clone()
        with held_still(problem.classifier):
            anew = sweep(later.nonzero().flatten(), levels[: level + 1])
        return torch.where(later.view(-1, 1, 1, 1), anew.best, found.best)

    return AttackResult(
        attack.name,
        attack.norm,
        levels,
        ~broken,
        robust,
        found.margin,
        found.zero_gradients,
        adversarial_images=adversarial,
    )


def _each_alone(
    attack: Stepwise,
    levels: tuple[float, ...],
    clean: Tensor,
    sweep: Callable[[float], Findings],
    classifier: nn.Module,
) -> AttackResult:
    """The verdicts of one step at each eps for itself; its images are made anew when they are asked for."""
    robust, margins, shares = [], [], []
    for eps in levels:
        found = sweep(eps)
        robust.append(found.withstood > 0)
        margins.append(found.margin)
        shares += [] if found.zero_gradients is None else [found.zero_gradients]

    def adversarial(level: int) -> Tensor:
        with held_still(classifier):
            return sweep(levels[level]).best

    zero = sum(shares) / len(shares) if shares else None
    verdicts = torch.stack(robust), torch.cat(margins), zero
    return AttackResult(attack.name, attack.norm, levels, clean, *verdicts, swept=False, adversarial_images=adversarial)
