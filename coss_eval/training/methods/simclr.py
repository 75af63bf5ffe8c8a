"""SimCLR: contrast the two views of an image with all others of the batch (Chen et al. 2020, arXiv 2002.05709)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from coss_eval.runtime.processes import rank
from coss_eval.training.gather import gather
from coss_eval.training.method import Comparison, Heads, Method, TargetSource, mlp, precise
from coss_eval.views.augmentation import ViewRecipe


class NTXent(Comparison):
    """Normalised temperature-scaled cross-entropy (equation 1).

    The negatives of a query are the other images in both views, or with ``own_view`` False in the other view alone.
    """

    def __init__(self, temperature: float, *, own_view: bool = True) -> None:
        super().__init__()
        self.temperature, self.own_view = temperature, own_view

    def forward(self, online: Tensor, target: Tensor, index: Tensor) -> Tensor:
        queries, keys = F.normalize(precise(online)), F.normalize(precise(target))
        candidates = gather(keys)
        logits = queries @ candidates.T / self.temperature
        positive = index + rank() * len(target)
        if self.own_view:
            own = queries @ gather(queries).T / self.temperature
            logits = torch.cat([logits, own.scatter(1, positive[:, None], -torch.inf)], dim=1)
        return F.cross_entropy(logits, positive)


@dataclass(frozen=True, kw_only=True)
class SimCLR(Method):
    """Two-layer projector, no predictor, no momentum network; gradients flow into both views.

    In CO "align" means: the candidates of a location are the globals of the other view, its own image's the positive.
    """

    name: ClassVar[str] = "simclr"
    views: ClassVar[ViewRecipe] = ViewRecipe(
        2 * ({"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "blur": 0.5},)
    )
    targets: ClassVar[TargetSource] = "online"
    couples_samples: ClassVar[bool] = True
    directions: ClassVar[Literal["sum", "mean"]] = "mean"
    positive: ClassVar[frozenset[str]] = frozenset({"temperature"})

    hidden: int = 2048
    out: int = 256
    temperature: float = 0.2

    def heads(self, dim: int) -> Heads:
        return Heads(mlp(dim, self.hidden, self.out))

    def comparison(self) -> Comparison:
        return NTXent(self.temperature)

    def local_comparison(self) -> Comparison:
        return NTXent(self.temperature, own_view=False)
