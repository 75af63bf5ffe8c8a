"""Attacks that follow the gradient: FGSM, BIM and PGD with a step of fixed length, and APGD with one that adapts."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from coss_eval.attacks.attack import Memory, Stepwise, View, attack
from coss_eval.runtime.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from coss_eval.attacks.inputs import Problem
    from coss_eval.attacks.result import AttackResult
else:
    torch = lazy("torch")


@dataclass(frozen=True, kw_only=True)
class FixedStep(Stepwise):
    """Projected steepest ascent: x <- P(x + length * direction)."""

    @abstractmethod
    def length(self, eps: Tensor) -> Tensor:
        """How far a step goes, (B, 1, 1, 1)."""

    def advance(self, view: View, memory: Memory) -> Tensor:
        moved = torch.addcmul(view.pixels, self.ball.direction(view.gradient), self.length(view.eps))
        return self.ball.project(moved, view.clean, view.eps)


@attack
@dataclass(frozen=True, kw_only=True)
class FGSM(FixedStep):
    """The fast gradient sign method (Goodfellow et al. 2015), in L2 the fast gradient method: one step of length eps.

    Each eps is a method of its own, so that an image may withstand a larger one than the one that broke it: the
    verdicts at an eps do not depend on the others in the list.
    """

    name = "fgsm"
    about = "one step (Goodfellow et al. 2015); every attack but square also with l2, the Euclidean ball"
    random = False
    iterated = False
    in_foolbox = True

    loss: str = "ce"

    @property
    def single_step(self) -> bool:
        return True

    def length(self, eps: Tensor) -> Tensor:
        return eps

    def by_foolbox(self, problem: Problem, eps: tuple[float, ...], seed: int) -> AttackResult:
        from coss_eval.attacks import reference

        return reference.fgsm(self, problem, eps)


@attack
@dataclass(frozen=True, kw_only=True)
class BIM(FixedStep):
    """The basic iterative method (Kurakin et al. 2017): PGD from the clean image."""

    name = "bim"
    about = "FGSM in small steps (Kurakin et al. 2017)"
    random = False

    steps: int = 10
    step_size: float | None = None
    loss: str = "ce"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_step_size(self.step_size)

    def length(self, eps: Tensor) -> Tensor:
        return eps * (2.5 / self.steps) if self.step_size is None else torch.full_like(eps, self.step_size)


@attack
@dataclass(frozen=True, kw_only=True)
class PGD(FixedStep):
    """Projected gradient descent (Madry et al. 2018).

    step_size: in pixels of [0, 1]; None is rel_step * eps, by default 2.5 eps / steps: enough to cross the ball and
    settle. loss: "ce", "dlr" or "ce+dlr" (the minimum over both).
    """

    name = "pgd"
    about = "projected gradient descent from a random start (Madry et al. 2018)"
    in_foolbox = True

    steps: int = 20
    step_size: float | None = None
    restarts: int = 1
    loss: str = "ce"
    random_start: bool = True
    rel_step: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_step_size(self.step_size)
        _check_step_size(self.rel_step, "rel_step", "as a share of eps")

    def start(self, clean: Tensor, eps: Tensor, keys: Tensor) -> Tensor:
        return self.ball.start(clean, eps, keys) if self.random_start else clean.clone()

    @property
    def relative(self) -> float:
        """A step as a share of eps, where no step_size is given."""
        return 2.5 / self.steps if self.rel_step is None else self.rel_step

    def length(self, eps: Tensor) -> Tensor:
        return eps * self.relative if self.step_size is None else torch.full_like(eps, self.step_size)

    def by_foolbox(self, problem: Problem, eps: tuple[float, ...], seed: int) -> AttackResult:
        from coss_eval.attacks import reference

        return reference.pgd(self, problem, eps, seed)


@attack
@dataclass(frozen=True, kw_only=True)
class APGD(Stepwise):
    """Auto-PGD (Croce and Hein 2020, algorithm 1): momentum, and a step of 2 eps that is halved where it fails.

    At checkpoints an image whose loss rose in under three quarters of the steps since the last one, or whose best
    loss has stood still, halves its step and goes on from its best point. The checkpoints are AutoAttack's.
    """

    name = "apgd"
    about = "PGD that adapts its step (Croce and Hein 2020); --loss ce, dlr or ce+dlr"

    steps: int = 100
    restarts: int = 1
    loss: str = "ce"

    def start(self, clean: Tensor, eps: Tensor, keys: Tensor) -> Tensor:
        return self.ball.start(clean, eps, keys)

    def memory(self, pixels: Tensor, eps: Tensor) -> Memory:
        count = len(pixels)
        return {
            "previous": pixels.clone(),
            "best": pixels.clone(),
            "best_gradient": torch.zeros_like(pixels),
            "best_loss": pixels.new_full((count,), -torch.inf),
            "last_loss": pixels.new_full((count,), torch.inf),  # so that the first step counts as no rise
            "rises": pixels.new_zeros(count),
            "length": 2 * eps,
            "halved": torch.ones(count, dtype=torch.bool, device=pixels.device),
            "checked_loss": pixels.new_full((count,), -torch.inf),
        }

    def advance(self, view: View, memory: Memory) -> Tensor:
        self._observe(view, memory)
        back = self._check(view, memory)
        here = torch.where(_wide(back), memory["best"], view.pixels)
        gradient = torch.where(_wide(back), memory["best_gradient"], view.gradient)
        towards = self.ball.project(here + memory["length"] * self.ball.direction(gradient), view.clean, view.eps)
        inertia = _wide(torch.where(view.step == 0, 1.0, 0.75))
        moved = here + inertia * (towards - here) + (1 - inertia) * (here - memory["previous"])
        memory["previous"] = here
        return self.ball.project(moved, view.clean, view.eps)

    @staticmethod
    def _observe(view: View, memory: Memory) -> None:
        """Count rises of the loss and keep the best point."""
        memory["rises"] += view.loss > memory["last_loss"]
        memory["last_loss"] = view.loss
        better = view.loss > memory["best_loss"]
        memory["best_loss"] = torch.where(better, view.loss, memory["best_loss"])
        memory["best"] = torch.where(_wide(better), view.pixels, memory["best"])
        memory["best_gradient"] = torch.where(_wide(better), view.gradient, memory["best_gradient"])

    def _check(self, view: View, memory: Memory) -> Tensor:
        """At a checkpoint, halve the step where it fails; bool (B,) says which images return to their best point."""
        since = torch.tensor(steps_since_check(self.steps), device=view.step.device)[view.step]
        check = since > 0
        stuck = ~memory["halved"] & (memory["checked_loss"] >= memory["best_loss"])
        halve = check & ((memory["rises"] <= 0.75 * since) | stuck)
        memory["length"] = torch.where(_wide(halve), memory["length"] / 2, memory["length"])
        memory["halved"] = torch.where(check, halve, memory["halved"])
        memory["checked_loss"] = torch.where(check, memory["best_loss"], memory["checked_loss"])
        memory["rises"] = torch.where(check, 0.0, memory["rises"])
        return halve


@lru_cache
def steps_since_check(steps: int) -> tuple[int, ...]:
    """For each step, 0, or at a checkpoint the number of steps since the last one; AutoAttack's schedule."""
    table = [0] * (steps + 1)
    length, at = max(int(0.22 * steps), 1), 0
    while (at := at + length) <= steps:
        table[at] = length
        length = max(length - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return tuple(table)


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _check_step_size(value: float | None, *named: str) -> None:
    from coss_eval.attacks.inputs import check_step_size

    check_step_size(value, *named)
