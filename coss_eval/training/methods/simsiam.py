"""SimSiam: predict the projection of the other view, which passes no gradient (Chen and He 2021, arXiv 2011.10566)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from coss_eval.training.method import Comparison, Heads, Method, TargetSource, mlp, precise
from coss_eval.views.augmentation import ViewRecipe


class NegativeCosine(Comparison):
    """-cos(p, z), averaged over online vectors (equation 1)."""

    def forward(self, online: Tensor, target: Tensor, index: Tensor) -> Tensor:
        return -F.cosine_similarity(precise(online), precise(target)[index]).mean()


@dataclass(frozen=True, kw_only=True)
class SimSiam(Method):
    """Three-layer projector whose last BatchNorm has no affine part, bottleneck predictor; no momentum network."""

    name: ClassVar[str] = "simsiam"
    # MoCo v2's, as in the authors' code
    views: ClassVar[ViewRecipe] = ViewRecipe(2 * ({"saturation": 0.4, "crop_min_scale": 0.2, "blur": 0.5},))
    targets: ClassVar[TargetSource] = "stop-gradient"
    directions: ClassVar[Literal["sum", "mean"]] = "mean"
    has_predictor: ClassVar[bool] = True
    constant_predictor: ClassVar[bool] = True

    hidden: int = 2048
    out: int = 2048
    bottleneck: int = 512

    def heads(self, dim: int) -> Heads:
        projector = mlp(dim, self.hidden, self.out, layers=3, last_norm=True, affine=False)
        return Heads(projector, self.predictor())

    def predictor(self) -> nn.Module:
        return mlp(self.out, self.bottleneck, self.out)

    def comparison(self) -> Comparison:
        return NegativeCosine()
