"""How pixels move: FGSM, BIM and PGD with a step of fixed length, and APGD with one that adapts.

A rule says where an attempt starts and, from what the network said of the present pixels, where it goes next. It
never runs the network; the one loop that does is in sweep.py. Images of a batch may be at different steps and eps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from coss_eval.attacks.norms import Norm

Memory = dict[str, Tensor]  # what a rule remembers of each image, one row an image


class View(NamedTuple):
    """A batch under attack, and what the network said of it. B images, each at its own step."""

    clean: Tensor  # float32 (B, 3, H, W)
    pixels: Tensor  # float32 (B, 3, H, W)
    eps: Tensor  # float32 (B, 1, 1, 1)
    keys: Tensor  # int64 (B,), the attempt's random numbers
    step: Tensor  # int64 (B,), from 0
    loss: Tensor  # float32 (B,)
    margin: Tensor  # float32 (B,)
    gradient: Tensor  # float32 (B, 3, H, W), of the loss with respect to pixels


class Rule(Protocol):
    """The hooks of an attack."""

    @property
    def uses_gradient(self) -> bool: ...

    @property
    def steps(self) -> int: ...

    def start(self, clean: Tensor, eps: Tensor, keys: Tensor) -> Tensor:
        """The first pixels of an attempt."""

    def memory(self, pixels: Tensor, eps: Tensor) -> Memory:
        """What to remember of images that start at ``pixels``."""

    def advance(self, view: View, memory: Memory) -> Tensor:
        """The next pixels, inside the ball and in [0, 1]; updates ``memory`` in place."""


@dataclass(frozen=True)
class FixedStep:
    """Projected steepest ascent (Madry et al. 2018): x <- P(x + step * direction).

    FGSM is one step of length eps from the clean image, BIM several, PGD several from a random start. ``step_size``
    is in pixels; None takes ``rel_step`` * eps, by default 2.5 / steps: enough to cross the ball and settle.
    """

    uses_gradient: ClassVar[bool] = True

    norm: Norm
    steps: int
    step_size: float | None = None
    random_start: bool = True
    rel_step: float | None = None

    def start(self, clean: Tensor, eps: Tensor, keys: Tensor) -> Tensor:
        return self.norm.start(clean, eps, keys) if self.random_start else clean.clone()

    def memory(self, pixels: Tensor, eps: Tensor) -> Memory:
        return {}

    def advance(self, view: View, memory: Memory) -> Tensor:
        relative = 2.5 / self.steps if self.rel_step is None else self.rel_step
        length = view.eps * relative if self.step_size is None else torch.full_like(view.eps, self.step_size)
        moved = torch.addcmul(view.pixels, self.norm.direction(view.gradient), length)
        return self.norm.project(moved, view.clean, view.eps)


@dataclass(frozen=True)
class AdaptiveStep:
    """Auto-PGD (Croce and Hein 2020, algorithm 1): momentum, and a step of 2 eps that is halved where it fails.

    At checkpoints an image whose loss rose in under three quarters of the steps since the last one, or whose best
    loss has stood still, halves its step and goes on from its best point. The checkpoints are AutoAttack's.
    """

    uses_gradient: ClassVar[bool] = True

    norm: Norm
    steps: int
    random_start: bool = True

    def start(self, clean: Tensor, eps: Tensor, keys: Tensor) -> Tensor:
        return self.norm.start(clean, eps, keys) if self.random_start else clean.clone()

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
        towards = self.norm.project(here + memory["length"] * self.norm.direction(gradient), view.clean, view.eps)
        inertia = _wide(torch.where(view.step == 0, 1.0, 0.75))
        moved = here + inertia * (towards - here) + (1 - inertia) * (here - memory["previous"])
        memory["previous"] = here
        return self.norm.project(moved, view.clean, view.eps)

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
