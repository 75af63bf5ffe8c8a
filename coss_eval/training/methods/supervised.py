"""Supervised reference: cross-entropy with smoothed labels (Szegedy et al. 2016, arXiv 1512.00567)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from coss_eval.training.method import Comparison, Heads, Method, TargetSource, precise
from coss_eval.views.augmentation import ViewRecipe


class LabelCrossEntropy(Comparison):
    """Cross-entropy of logits (N, K) with the labels int64 (M,)."""

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, online: Tensor, target: Tensor, index: Tensor) -> Tensor:
        return F.cross_entropy(precise(online), target[index], label_smoothing=self.smoothing)


@dataclass(frozen=True, kw_only=True)
class Supervised(Method):
    """One linear head, which is the classifier; every view is compared with its label, so one view is enough."""

    name: ClassVar[str] = "supervised"
    views: ClassVar[ViewRecipe] = ViewRecipe(({"jitter": 0.0, "greyscale": 0.0},))
    targets: ClassVar[TargetSource] = "labels"
    directions: ClassVar[Literal["sum", "mean"]] = "mean"
    shares: ClassVar[frozenset[str]] = frozenset({"smoothing"})

    classes: int = 1000  # set from the data
    smoothing: float = 0.1

    def heads(self, dim: int) -> Heads:
        return Heads(nn.Linear(dim, self.classes))

    def comparison(self) -> Comparison:
        return LabelCrossEntropy(self.smoothing)
