"""The attacks by name: checked inputs in, an AttackResult out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from coss_eval.attacks.gradient import AdaptiveStep, FixedStep, Rule
from coss_eval.attacks.inputs import Problem, check_count, check_eps, check_norm, check_step_size, held_still
from coss_eval.attacks.losses import Misclassification, parse_losses, verdict
from coss_eval.attacks.result import AttackResult
from coss_eval.attacks.square import Square
from coss_eval.attacks.sweep import Findings, Schedule, Sweep
from coss_eval.errors import UsageError, unknown_name

Eps = float | Sequence[float]


def fgsm(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: Eps,
    norm: str = "linf",
    *,
    loss: str = "ce",
    targeted: Tensor | None = None,
    batch_size: int = 256,
    backend: str = "native",
) -> AttackResult:
    """The fast gradient sign method (Goodfellow et al. 2015), in L2 the fast gradient method: one step of length eps.

    Arguments as for ``pgd``; nothing in it is random. Each eps is a method of its own, so that an image may withstand a
    larger one than the one that broke it: the verdicts at an eps do not depend on the others in the list.
    """
    ball = check_norm(norm)
    problem = Problem.checked(classifier, images, labels, targeted=targeted, batch_size=batch_size)
    if _is_reference(backend, loss):
        from coss_eval.attacks import reference

        return reference.fgsm(problem, check_eps(eps, norm), norm=norm)
    rule = FixedStep(ball, 1, random_start=False, rel_step=1)
    return _attack("fgsm", rule, norm, problem, eps, loss=loss, swept=False)


def bim(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: Eps,
    norm: str = "linf",
    *,
    steps: int = 10,
    step_size: float | None = None,
    loss: str = "ce",
    targeted: Tensor | None = None,
    batch_size: int = 256,
) -> AttackResult:
    """The basic iterative method (Kurakin et al. 2017): PGD from the clean image. Arguments as for ``pgd``."""
    check_count("steps", steps)
    check_step_size(step_size)
    problem = Problem.checked(classifier, images, labels, targeted=targeted, batch_size=batch_size)
    rule = FixedStep(check_norm(norm), steps, step_size, random_start=False)
    return _attack("bim", rule, norm, problem, eps, loss=loss)


def pgd(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: Eps,
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
    """Projected gradient descent (Madry et al. 2018) over one eps or a rising list.

    classifier: pixels in [0, 1] to logits (B, K), normalisation inside; it is put in evaluation mode for the call.
    images float32 (B, 3, H, W) in [0, 1]; labels, ids int64 (B,). eps, step_size: in pixels of [0, 1]; step_size None
    is rel_step * eps, by default 2.5 eps / steps. loss: "ce", "dlr" or "ce+dlr" (the minimum over both). targeted:
    int64 (B,), the classes to reach instead of any wrong one; robust then means not reached. batch_size: how many
    images are attacked at a time.

    The random start of an image comes from (seed, id, norm, eps, restart), so its verdict does not depend on the
    images beside it. An image broken at one eps counts as broken at all larger ones. backend "reference" is foolbox.
    Raises UsageError for inputs out of range and for a network that gives pixels no gradient.
    """
    ball = check_norm(norm)
    check_count("steps", steps)
    check_count("restarts", restarts)
    check_step_size(step_size)
    check_step_size(rel_step, "rel_step", "as a share of eps")
    problem = Problem.checked(classifier, images, labels, ids=ids, targeted=targeted, batch_size=batch_size)
    if _is_reference(backend, loss):
        from coss_eval.attacks import reference

        return reference.pgd(
            problem,
            check_eps(eps, norm),
            norm=norm,
            steps=steps,
            step_size=step_size,
            rel_step=rel_step,
            random_start=random_start,
            restarts=restarts,
            seed=seed,
        )
    rule = FixedStep(ball, steps, step_size, random_start, rel_step)
    return _attack("pgd", rule, norm, problem, eps, restarts=restarts, loss=loss, seed=seed)


def apgd(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: Eps,
    ids: Tensor,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: str = "ce",
    seed: int = 0,
    targeted: Tensor | None = None,
    *,
    batch_size: int = 256,
) -> AttackResult:
    """Auto-PGD (Croce and Hein 2020): no step size to choose. Arguments as for ``pgd``."""
    check_count("steps", steps)
    check_count("restarts", restarts)
    problem = Problem.checked(classifier, images, labels, ids=ids, targeted=targeted, batch_size=batch_size)
    rule = AdaptiveStep(check_norm(norm), steps)
    return _attack("apgd", rule, norm, problem, eps, restarts=restarts, loss=loss, seed=seed)


def square(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: Eps,
    ids: Tensor,
    steps: int = 500,
    restarts: int = 1,
    seed: int = 0,
    targeted: Tensor | None = None,
    *,
    batch_size: int = 256,
) -> AttackResult:
    """Square attack (Andriushchenko et al. 2020) in L-infinity: random search without gradients.

    ``steps`` are queries of the network; the other arguments as for ``pgd``.
    """
    check_count("steps", steps)
    check_count("restarts", restarts)
    problem = Problem.checked(classifier, images, labels, ids=ids, targeted=targeted, batch_size=batch_size)
    return _attack("square", Square(steps), "linf", problem, eps, restarts=restarts, seed=seed)


def _attack(
    name: str,
    rule: Rule,
    norm: str,
    problem: Problem,
    eps: Eps,
    *,
    restarts: int = 1,
    loss: str = "ce",
    seed: int = 0,
    swept: bool = True,
) -> AttackResult:
    """Classify the clean images, attack what is right over eps (``swept``: until it breaks), and tell."""
    levels = check_eps(eps, norm)
    labels, targeted = problem.labels.to(problem.device), problem.targeted
    targets = None if targeted is None else targeted.to(problem.device)
    with held_still(problem.classifier):
        logits = problem.clean_logits()
        losses = parse_losses(loss, logits.shape[1], targeted=targeted is not None)
        margin, broken = verdict(logits, problem.labels, targeted)

        def sweep(rows: Tensor, eps: tuple[float, ...]) -> Findings:
            goal = Misclassification(problem.classifier, labels, targets, losses)
            schedule = Schedule(eps, restarts, len(losses), seed, norm, problem.batch_size)
            return Sweep(problem.classifier, problem.images, problem.ids, goal, rule, schedule).run(rows, margin)

        rows = (~broken).nonzero().flatten()
        if not swept:
            return _each_alone(name, norm, levels, ~broken, lambda eps: sweep(rows, (eps,)), problem.classifier)
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
        name, norm, levels, ~broken, robust, found.margin, found.zero_gradients, adversarial_images=adversarial
    )


def _each_alone(
    name: str,
    norm: str,
    levels: tuple[float, ...],
    clean: Tensor,
    attack: Callable[[float], Findings],
    classifier: nn.Module,
) -> AttackResult:
    """The verdicts of ``attack`` at each eps for itself; its images are made anew when they are asked for."""
    robust, margins, shares = [], [], []
    for eps in levels:
        found = attack(eps)
        robust.append(found.withstood > 0)
        margins.append(found.margin)
        shares += [] if found.zero_gradients is None else [found.zero_gradients]

    def adversarial(level: int) -> Tensor:
        with held_still(classifier):
            return attack(levels[level]).best

    zero = sum(shares) / len(shares) if shares else None
    verdicts = torch.stack(robust), torch.cat(margins), zero
    return AttackResult(name, norm, levels, clean, *verdicts, swept=False, adversarial_images=adversarial)


def _is_reference(backend: str, loss: str) -> bool:
    if backend not in ("native", "reference"):
        raise unknown_name("attack backend", backend, ["native", "reference"])
    if backend == "reference" and loss != "ce":
        raise UsageError(f"expected loss 'ce' with the reference backend (foolbox has no other), got {loss!r}")
    return backend == "reference"
