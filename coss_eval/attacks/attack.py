"""What an attack is: one object that says what it takes and costs, and how pixels move; torch-free.

An attack of one's own is a frozen dataclass, whose fields are its options. Most derive from Stepwise, whose loop gives
restarts, losses, rising eps and full batches; ``@attack`` registers it under its name, and without that it goes by
"package.module:Class".

    @attack
    @dataclass(frozen=True, kw_only=True)
    class Signs(Stepwise):
        \"\"\"Steps of eps / 4 along the gradient's sign (source).\"\"\"

        name = "signs"
        about = "steps of eps / 4 along the gradient's sign (source)"
        norms = ("linf",)
        random = False
        steps: int = 10

        def advance(self, view, memory):
            moved = view.pixels + view.eps / 4 * view.gradient.sign()
            return self.ball.project(moved, view.clean, view.eps)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

from coss_eval.errors import UsageError, unknown_name
from coss_eval.runtime.code_identity import UNKNOWN, code_identity, is_foreign

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from coss_eval.attacks.inputs import Problem
    from coss_eval.attacks.norms import Norm
    from coss_eval.attacks.result import AttackResult

NORMS = ("linf", "l2", "l1", "l0")
"""All that eps is ever counted in; the last two by attacks of foolbox's."""
OPTIONS = ("steps", "step_size", "restarts", "loss")
"""The names that options have in every attack that takes them."""


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack with its options, called on images. Every class declares:

    ``name``; ``about``, its line in lists, with its source; ``norms`` it takes, the usual one first; ``random``:
    whether it draws numbers, from the seed and the images' ids; ``iterated``: whether it follows gradients step by
    step, so that masked ones mislead it; ``single_step``: whether it takes one step of its eps, and so has verdicts of
    its own at each; ``in_foolbox``: whether the reference backend has it.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    random: ClassVar[bool] = True
    iterated: ClassVar[bool] = True
    in_foolbox: ClassVar[bool] = False

    norm: str = "linf"

    def __post_init__(self) -> None:
        if self.norm not in self.norms:
            raise unknown_name("norm", self.norm, self.norms)

    @abstractmethod
    def __call__(
        self,
        classifier: nn.Module,
        images: Tensor,
        labels: Tensor,
        eps: float | Sequence[float],
        *,
        ids: Tensor | None = None,
        seed: int = 0,
        targeted: Tensor | None = None,
        batch_size: int = 256,
        backend: str = "native",
    ) -> AttackResult:
        """Attack images over one eps or a rising list.

        classifier: pixels in [0, 1] to logits (B, K), normalisation inside; it is put in evaluation mode for the call.
        images float32 (B, 3, H, W) in [0, 1]; labels, ids int64 (B,); eps in pixels of [0, 1]. targeted: int64 (B,),
        the classes to reach instead of any wrong one; robust then means not reached. batch_size: how many images are
        attacked at a time. backend "reference" is foolbox.

        What is random for an image comes from (seed, id, norm, eps, restart), so its verdict does not depend on the
        images beside it. ids None are 0, 1, ...: over several calls give them, else the draws of each are the same. An
        image broken at one eps counts as broken at all larger ones, but for attacks of one step.
        Raises UsageError for inputs out of range and for a network that gives pixels no gradient.
        """

    @property
    @abstractmethod
    def forwards(self) -> int:
        """What one attempt on one image costs, in forward passes (a backward pass counts as two)."""

    @property
    def single_step(self) -> bool:
        return False

    @property
    def options(self) -> tuple[str, ...]:
        """Those of OPTIONS that it takes."""
        return tuple(field.name for field in fields(self) if field.name in OPTIONS)

    @property
    def code(self) -> str | None:
        """The identity of code that is not the package's, a part of every key; None for the package's own attacks."""
        found = code_identity([type(self)])
        if found == UNKNOWN:
            raise UsageError(
                f"the source code of the attack {type(self).__name__} cannot be read, so its numbers could not be told "
                "from those of another version: give the class a version (version = 1), raised when its numbers change"
            )
        return found


AttackType = TypeVar("AttackType", bound=type[Attack])

ATTACKS: dict[str, type[Attack]] = {}
"""Every registered attack by name."""


def attack(kind: AttackType) -> AttackType:
    """Register an attack under its name. Raises UsageError for a name that the package has."""
    there = ATTACKS.get(kind.name)
    if ":" in kind.name or (there is not None and is_foreign(kind.__module__) and not is_foreign(there.__module__)):
        raise UsageError(f"the package has an attack {kind.name} already, or it has a colon: give yours another name")
    ATTACKS[kind.name] = kind
    return kind


Memory = dict[str, "Tensor"]  # what an attack remembers of each image, one row an image


class View(NamedTuple):
    """A batch under attack, and what the network said of it. B images, each at its own step."""

    clean: Tensor  # float32 (B, 3, H, W)
    pixels: Tensor  # float32 (B, 3, H, W)
    eps: Tensor  # float32 (B, 1, 1, 1)
    keys: Tensor  # int64 (B,), the attempt's random numbers
    step: Tensor  # int64 (B,), from 0
    loss: Tensor  # float32 (B,)
    margin: Tensor  # float32 (B,)
    gradient: Tensor  # float32 (B, 3, H, W), of the loss with respect to pixels; empty without gradients


@dataclass(frozen=True, kw_only=True)
class Stepwise(Attack):
    """An attack that the one loop of sweep.py runs: it says where an attempt starts and where it goes next.

    It never runs the network. Images of a batch may be at different steps and eps. ``cost``: what a step costs in
    forward passes. An option that it does not take has the value here.
    """

    cost: ClassVar[int] = 3
    uses_gradient: ClassVar[bool] = True

    steps = 1
    restarts = 1
    loss = "ce"

    def __post_init__(self) -> None:
        from coss_eval.attacks.inputs import check_count

        super().__post_init__()
        check_count("steps", self.steps)
        check_count("restarts", self.restarts)

    def __call__(
        self,
        classifier: nn.Module,
        images: Tensor,
        labels: Tensor,
        eps: float | Sequence[float],
        *,
        ids: Tensor | None = None,
        seed: int = 0,
        targeted: Tensor | None = None,
        batch_size: int = 256,
        backend: str = "native",
    ) -> AttackResult:
        from coss_eval.attacks.engine import run
        from coss_eval.attacks.inputs import Problem

        problem = Problem.checked(classifier, images, labels, ids=ids, targeted=targeted, batch_size=batch_size)
        return run(self, problem, eps, seed, backend)

    @property
    def forwards(self) -> int:
        return self.cost * self.steps

    @property
    def ball(self) -> Norm:
        """Where the attack lives."""
        from coss_eval.attacks.norms import NORMS

        return NORMS[self.norm]

    def by_foolbox(self, problem: Problem, eps: tuple[float, ...], seed: int) -> AttackResult:
        """The same attack of foolbox's, where it has it."""
        raise UsageError(f"the reference backend has no {self.name}")

    def start(self, clean: Tensor, eps: Tensor, keys: Tensor) -> Tensor:
        """The first pixels of an attempt."""
        return clean.clone()

    def memory(self, pixels: Tensor, eps: Tensor) -> Memory:
        """What to remember of images that start at ``pixels``."""
        return {}

    @abstractmethod
    def advance(self, view: View, memory: Memory) -> Tensor:
        """The next pixels, inside the ball and in [0, 1]; updates ``memory`` in place."""
