"""Any attack of foolbox (Rauber et al. 2017) as one of ours; torch-free until one is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coss_eval.attacks.attack import NORMS, Attack

if TYPE_CHECKING:
    from torch import Tensor, nn

    from coss_eval.attacks.result import AttackResult

PREFIX = "foolbox:"


@dataclass(frozen=True, kw_only=True)
class Foolbox(Attack):
    """Any attack of foolbox (Rauber et al. 2017), such as "LinfDeepFoolAttack", over rising eps in a norm of its own.

    ``steps`` None is its own number; ``extra`` goes to its constructor, too. Its random numbers depend on batch size
    and order. Raises UsageError for an unknown name or options that it does not take.
    """

    name = PREFIX + "NAME"
    about = "any attack of foolbox, such as LinfDeepFoolAttack; with --backend reference"
    norms = NORMS
    in_foolbox = True

    attack: str
    steps: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from coss_eval.attacks import reference

        object.__setattr__(self, "norm", reference.norm_of(self.attack, self._options))

    @property
    def _options(self) -> dict[str, Any]:
        return {**self.extra, **({} if self.steps is None else {"steps": self.steps})}

    @property
    def single_step(self) -> bool:
        from coss_eval.attacks import reference

        return reference.is_single_step(self.attack, self._options)

    @property
    def forwards(self) -> int:
        return 3 * (self.steps or 50)

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
        backend: str = "reference",
    ) -> AttackResult:
        from coss_eval.attacks import reference
        from coss_eval.attacks.inputs import Problem

        problem = Problem.checked(classifier, images, labels, targeted=targeted, batch_size=batch_size)
        return reference.named(self.attack, self._options, problem, eps, seed)
