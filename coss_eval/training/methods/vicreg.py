"""VICReg: invariance, variance and covariance (Bardes, Ponce and LeCun 2022, arXiv 2105.04906)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from coss_eval.training.gather import gather
from coss_eval.training.method import Comparison, Heads, Method, TargetSource, mlp, precise
from coss_eval.views.augmentation import ViewRecipe


class VarianceInvarianceCovariance(Comparison):
    """Equation 6 for one pair of batches. It is symmetric for one vector an image.

    In CO "align" means: the invariance term draws every location to its image's global of the other view, and the
    variance and covariance terms are taken over all locations of the batch (and over the globals).
    """

    def __init__(self, invariance: float, variance: float, covariance: float) -> None:
        super().__init__()
        self.weights = invariance, variance, covariance

    def forward(self, online: Tensor, target: Tensor, index: Tensor) -> Tensor:
        invariance, variance, covariance = self.weights
        online, target = precise(online), precise(target)
        loss = invariance * F.mse_loss(online, target[index])
        for batch in (gather(online), gather(target)):
            deviation = (batch.var(0) + 1e-4).sqrt()
            loss = loss + variance * F.relu(1 - deviation).mean() / 2 + covariance * off_diagonal_covariance(batch)
        return loss


def off_diagonal_covariance(batch: Tensor) -> Tensor:
    """Sum of squared off-diagonal covariances of (N, P), over P."""
    centred = batch - batch.mean(0)
    covariance = centred.T @ centred / (len(batch) - 1)  # (P, P)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / batch.shape[1]


@dataclass(frozen=True, kw_only=True)
class VICReg(Method):
    """Three-layer expander, no predictor, no momentum network."""

    name: ClassVar[str] = "vicreg"
    views: ClassVar[ViewRecipe] = ViewRecipe(2 * ({"blur": 0.5, "solarise": 0.1},), cifar_min_scale=0.2)
    targets: ClassVar[TargetSource] = "online"
    couples_samples: ClassVar[bool] = True
    directions: ClassVar[Literal["sum", "mean"]] = "mean"
    symmetric: ClassVar[bool] = True

    hidden: int = 2048
    out: int = 2048
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0

    def heads(self, dim: int) -> Heads:
        return Heads(mlp(dim, self.hidden, self.out, layers=3))

    def comparison(self) -> Comparison:
        return VarianceInvarianceCovariance(self.invariance, self.variance, self.covariance)
