"""Barlow Twins: cross-correlation of the two views to the identity (Zbontar et al. 2021, arXiv 2103.03230)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from coss_eval.training.gather import gather
from coss_eval.training.method import Comparison, Heads, Method, TargetSource, mlp, precise
from coss_eval.views.augmentation import ASYMMETRIC, ViewRecipe


class CrossCorrelation(Comparison):
    """Equation 1: on-diagonal terms to 1, off-diagonal ones, weighted by ``redundancy``, to 0.

    In CO "align" means: the correlation is taken over all locations of the batch, each paired with its image's global
    of the other view.
    """

    def __init__(self, redundancy: float, scale: float) -> None:
        super().__init__()
        self.redundancy, self.scale = redundancy, scale

    def forward(self, online: Tensor, target: Tensor, index: Tensor) -> Tensor:
        a, b = gather(precise(online)), gather(precise(target)[index])
        correlation = _standardised(a).T @ _standardised(b) / len(a)  # (P, P)
        diagonal = correlation.diagonal()
        off_diagonal = correlation.square().sum() - diagonal.square().sum()
        return self.scale * ((diagonal - 1).square().sum() + self.redundancy * off_diagonal)


def _standardised(batch: Tensor) -> Tensor:
    """Each dimension to mean 0 and variance 1 over the batch, as BatchNorm without affine part does."""
    return (batch - batch.mean(0)) / (batch.var(0, correction=0) + 1e-5).sqrt()


@dataclass(frozen=True, kw_only=True)
class BarlowTwins(Method):
    """Three-layer projector, no predictor, no momentum network."""

    name: ClassVar[str] = "barlow"
    views: ClassVar[ViewRecipe] = ViewRecipe(ASYMMETRIC)
    targets: ClassVar[TargetSource] = "online"
    couples_samples: ClassVar[bool] = True
    directions: ClassVar[Literal["sum", "mean"]] = "mean"
    symmetric: ClassVar[bool] = True

    hidden: int = 2048
    out: int = 2048
    redundancy: float = 0.0051
    scale: float = 0.1

    def heads(self, dim: int) -> Heads:
        return Heads(mlp(dim, self.hidden, self.out, layers=3))

    def comparison(self) -> Comparison:
        return CrossCorrelation(self.redundancy, self.scale)
