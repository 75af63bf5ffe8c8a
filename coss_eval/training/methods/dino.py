"""DINO: match the teacher's sharpened distribution over prototypes (Caron et al. 2021, arXiv 2104.14294)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coss_eval.training.gather import mean_over_ranks
from coss_eval.training.method import Comparison, Heads, Method, precise
from coss_eval.views.augmentation import ASYMMETRIC, ViewRecipe


class PrototypeHead(nn.Module):
    """An MLP with GELU to a bottleneck, and weight-normed prototypes of unit length."""

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int, *, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (dim, hidden):
            layers += [nn.Linear(width, hidden), *([nn.BatchNorm1d(hidden)] if batch_norm else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = nn.Linear(bottleneck, prototypes, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        return F.linear(F.normalize(self.mlp(vectors), dim=-1), F.normalize(self.last.weight, dim=-1))


class CentredCrossEntropy(Comparison):
    """-sum softmax((t - centre) / T_t) log softmax(s / T_s), averaged over online vectors.

    The centre is a moving average of the target's outputs over all ranks; it moves after the step, from the outputs
    that the step has seen. All state is in buffers, so that a CUDA graph of the step moves it too.
    """

    centre: Tensor
    temperature: Tensor
    seen: Tensor  # the sum of the means of the outputs that this step has seen, and of how many batches
    batches: Tensor

    def __init__(self, config: DINO) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("centre", torch.zeros(1, config.prototypes))
        self.register_buffer("temperature", torch.tensor(config.temperature_at(0.0)))
        self.register_buffer("seen", torch.zeros(1, config.prototypes), persistent=False)
        self.register_buffer("batches", torch.zeros(()), persistent=False)

    def forward(self, online: Tensor, target: Tensor, index: Tensor) -> Tensor:
        target = precise(target)
        probabilities = F.softmax((target - self.centre) / self.temperature, dim=-1)
        log_student = F.log_softmax(precise(online) / self.config.student_temperature, dim=-1)
        if self.training:
            self.seen += target.detach().mean(0, keepdim=True)
            self.batches += 1
        return -(probabilities[index] * log_student).sum(-1).mean()

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        mean = mean_over_ranks(self.seen / self.batches.clamp(min=1))
        moved = self.centre.lerp(mean, 1 - self.config.centre_momentum)
        self.centre.copy_(torch.where(self.batches > 0, moved, self.centre))
        self.seen.zero_()
        self.batches.zero_()
        self.temperature.fill_(self.config.temperature_at(progress))


@dataclass(frozen=True, kw_only=True)
class DINO(Method):
    """Student and teacher heads alike, no predictor. The last layer stands still for the first share of training.

    ``freeze_share`` and ``warm_up_share`` are shares of all steps: 1 of 100 epochs is 0.01. ``batch_norm`` in the heads
    is the authors' use_bn_in_head: without it a short run can stay at uniform distributions, a loss of log prototypes.
    """

    name: ClassVar[str] = "dino"
    views: ClassVar[ViewRecipe] = ViewRecipe(ASYMMETRIC, small_views=8)
    directions: ClassVar[Literal["sum", "mean"]] = "mean"
    kept: ClassVar[Literal["online", "target"]] = "target"
    shares: ClassVar[frozenset[str]] = frozenset({"warm_up_share", "freeze_share", "centre_momentum"})
    positive: ClassVar[frozenset[str]] = frozenset(
        {"student_temperature", "teacher_temperature", "teacher_temperature_start"}
    )

    hidden: int = 2048
    bottleneck: int = 256
    prototypes: int = 4096
    batch_norm: bool = False
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    teacher_temperature_start: float = 0.04
    warm_up_share: float = 0.05
    freeze_share: float = 0.01
    centre_momentum: float = 0.9

    def temperature_at(self, progress: float) -> float:
        """The teacher's temperature after a share of training: a linear warm-up, then constant."""
        warm = min(1.0, progress / self.warm_up_share) if self.warm_up_share > 0 else 1.0
        return self.teacher_temperature_start + (self.teacher_temperature - self.teacher_temperature_start) * warm

    def heads(self, dim: int) -> Heads:
        return Heads(PrototypeHead(dim, self.hidden, self.bottleneck, self.prototypes, batch_norm=self.batch_norm))

    def comparison(self) -> Comparison:
        return CentredCrossEntropy(self)

    def before_step(self, heads: Heads, progress: float) -> None:
        if progress < self.freeze_share:
            assert isinstance(heads.projector, PrototypeHead)
            heads.projector.last.weight.grad = None
