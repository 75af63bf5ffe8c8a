"""MoCo v3: contrast with the momentum network's keys of the batch (Chen, Xie and He 2021, arXiv 2104.02057)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from coss_eval.runtime.processes import rank
from coss_eval.training.gather import gather
from coss_eval.training.method import Comparison, Heads, Method, mlp, precise
from coss_eval.views.augmentation import ASYMMETRIC, ViewRecipe


class InfoNCE(Comparison):
    """Cross-entropy of each query over the keys of all images of all ranks, times 2 T (algorithm 1)."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, online: Tensor, target: Tensor, index: Tensor) -> Tensor:
        queries = F.normalize(precise(online))
        keys = gather(F.normalize(precise(target)))  # (world * M, P)
        logits = queries @ keys.T / self.temperature  # (N, world * M)
        return F.cross_entropy(logits, index + rank() * len(target)) * (2 * self.temperature)


@dataclass(frozen=True, kw_only=True)
class MoCoV3(Method):
    """A projector that ends in a BatchNorm without affine part, a predictor, in-batch negatives, no queue.

    The defaults are the authors' heads for ResNets; theirs for ViTs have a projector of 3 ``layers`` and a BatchNorm
    at the predictor's end too (``predictor_norm``).
    In CO every location is a query and the globals of the other view are the keys: aligned with its own image's
    global, contrasted with the other images' globals.
    """

    name: ClassVar[str] = "mocov3"
    views: ClassVar[ViewRecipe] = ViewRecipe(tuple({**values, "crop_min_scale": 0.2} for values in ASYMMETRIC))
    couples_samples: ClassVar[bool] = True
    has_predictor: ClassVar[bool] = True
    positive: ClassVar[frozenset[str]] = frozenset({"temperature"})

    hidden: int = 4096
    out: int = 256
    layers: int = 2
    predictor_norm: bool = False
    temperature: float = 0.2

    def heads(self, dim: int) -> Heads:
        projector = mlp(dim, self.hidden, self.out, layers=self.layers, last_norm=True, affine=False)
        return Heads(projector, self.predictor())

    def predictor(self) -> nn.Module:
        return mlp(self.out, self.hidden, self.out, last_norm=self.predictor_norm, affine=False)

    def comparison(self) -> Comparison:
        return InfoNCE(self.temperature)
