"""SimCLR: contrast the two views of an image with all others of the batch (Chen et al. 2020, arXiv 2002.05709)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from coss_eval.training.gather import gather, rank
from coss_eval.training.methods.method import Comparison, Heads, Method, Targets, mlp, precise


class NTXent(Comparison):
    """Normalised temperature-scaled cross-entropy (equation 1).

    The negatives of a query are the other images in both views. With several online vectors an image (locations, in
    CO) the ones of the own view come from the globals alone, so they are left out: the candidates of a location are
    the other view's globals, its own image's the positive.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, online: Tensor, target: Tensor, index: Tensor) -> Tensor:
        queries, keys = F.normalize(precise(online)), F.normalize(precise(target))
        candidates = gather(keys)
        logits = queries @ candidates.T / self.temperature
        positive = index + rank() * len(target)
        if len(online) == len(target):  # one query an image: the own view's other images are negatives too
            own = queries @ gather(queries).T / self.temperature
            own[torch.arange(len(own)), positive] = -torch.inf
            logits = torch.cat([logits, own], dim=1)
        return F.cross_entropy(logits, positive)


@dataclass(frozen=True, kw_only=True)
class SimCLR(Method):
    """Two-layer projector, no predictor, no momentum network; gradients flow into both views."""

    name: ClassVar[str] = "simclr"
    targets: ClassVar[Targets] = "online"
    couples_samples: ClassVar[bool] = True
    directions: ClassVar[Literal["sum", "mean"]] = "mean"

    hidden: int = 2048
    out: int = 256
    temperature: float = 0.2

    def heads(self, dim: int) -> Heads:
        return Heads(mlp(dim, self.hidden, self.out))

    def comparison(self) -> Comparison:
        return NTXent(self.temperature)
