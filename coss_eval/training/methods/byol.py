"""BYOL: predict the target network's projection of the other view (Grill et al. 2020, arXiv 2006.07733)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from coss_eval.training.method import Comparison, Heads, Method, mlp, precise
from coss_eval.views.augmentation import ASYMMETRIC, ViewRecipe


class NormalisedDistance(Comparison):
    """|| p/||p|| - z/||z|| ||^2 = 2 - 2 cos(p, z), averaged over online vectors (equation 2)."""

    def forward(self, online: Tensor, target: Tensor, index: Tensor) -> Tensor:
        return 2 - 2 * F.cosine_similarity(precise(online), precise(target)[index]).mean()


@dataclass(frozen=True, kw_only=True)
class BYOL(Method):
    """The two symmetric terms are SUMMED, as in the paper; averaging them halves the learning rate in effect.

    ``predictor_hidden``: the predictor's hidden width where it is not the projector's.
    """

    name: ClassVar[str] = "byol"
    views: ClassVar[ViewRecipe] = ViewRecipe(ASYMMETRIC)
    has_predictor: ClassVar[bool] = True

    hidden: int = 4096
    predictor_hidden: int | None = None
    out: int = 256

    def heads(self, dim: int) -> Heads:
        predictor = self.predictor()  # drawn first
        return Heads(mlp(dim, self.hidden, self.out), predictor)

    def predictor(self) -> nn.Module:
        return mlp(self.out, self.predictor_hidden or self.hidden, self.out)

    def comparison(self) -> Comparison:
        return NormalisedDistance()
