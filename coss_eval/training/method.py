"""What a method is to the trainer: heads, a comparison, and where its targets come from.

A method says nothing of optimisers, data or local representations. Its comparison takes any number of online vectors
with the target that each belongs to, so the same code serves the global term (one online vector an image) and the CO
term (one for every location).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from itertools import pairwise
from math import inf
from typing import ClassVar, Literal

from torch import Tensor, nn

from coss_eval.errors import UsageError
from coss_eval.views.augmentation import ASYMMETRIC, ViewRecipe

TargetSource = Literal["momentum", "stop-gradient", "online", "labels"]


class Comparison(nn.Module, ABC):
    """The loss of ONE direction. It may hold state of its own (DINO's centre), so each term has its own.

    It is called outside autocast, and takes half precision to float32 (``precise``).
    """

    @abstractmethod
    def forward(self, online: Tensor, target: Tensor, index: Tensor) -> Tensor:
        """A scalar from online (N, P) and target (M, P); online row i belongs to target row ``index[i]``."""

    def after_step(self, progress: float) -> None:
        """Called after each optimiser step with the share of training done in [0, 1]."""


def precise(vectors: Tensor) -> Tensor:
    """bfloat16 and float16 as float32; float64 stays."""
    return vectors.float() if vectors.element_size() < 4 else vectors


class Heads(nn.Module):
    """Projector and predictor over vectors (N, D); the target network has the projector alone."""

    def __init__(self, projector: nn.Module, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.projector = projector
        self.predictor = predictor if predictor is not None else nn.Identity()

    def forward(self, vectors: Tensor) -> Tensor:
        out: Tensor = self.predictor(self.projector(vectors))
        return out


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method's heads and comparison; its fields are its hyper-parameters.

    ``targets``: from a momentum copy of the network, from the online network without gradient, or with it, or the
    labels. ``couples_samples``: the loss of an image depends on the others of its batch, so gradients cannot be
    accumulated over smaller batches. ``directions`` says whether the two directions are summed or averaged;
    ``symmetric`` that they are the same number, so that one of them is enough.
    ``kept`` is the network that is handed on, ``constant_predictor`` keeps the predictor's learning rate at its peak.
    ``has_predictor``: ``predictor`` makes one, so small views may have one of their own.
    ``shares`` are the fields that lie between 0 and 1, ``positive`` those above 0.
    ``name`` stands in messages: in the package that of the method's file, elsewhere the class's, where none is given.
    ``views``: the method's own ones, which a configuration may change.
    """

    name: ClassVar[str]
    views: ClassVar[ViewRecipe] = ViewRecipe(ASYMMETRIC)
    targets: ClassVar[TargetSource] = "momentum"
    couples_samples: ClassVar[bool] = False
    directions: ClassVar[Literal["sum", "mean"]] = "sum"
    symmetric: ClassVar[bool] = False
    kept: ClassVar[Literal["online", "target"]] = "online"
    has_predictor: ClassVar[bool] = False
    constant_predictor: ClassVar[bool] = False
    shares: ClassVar[frozenset[str]] = frozenset()
    positive: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls) -> None:
        cls.name = cls.__dict__.get("name", cls.__name__)

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if type(value) is int and value < 1:  # no bool
                raise UsageError(f"{name} of {self.name} must be at least 1, got {value}")
            if type(value) is not float:
                continue
            most = 1.0 if name in self.shares else inf
            if not 0 <= value <= most or value == inf or (value == 0 and name in self.positive):
                bounds = f"from 0 to {most:g}" if name in self.shares else "at least 0"
                bounds = "above 0" if name in self.positive else bounds
                raise UsageError(f"{name} of {self.name} must be {bounds}, got {value:g}")

    @abstractmethod
    def heads(self, dim: int) -> Heads:
        """The online heads over vectors of ``dim``; the target's projector starts as a copy of this one's."""

    def predictor(self) -> nn.Module | None:
        """A fresh predictor of projected vectors (N, P), where the method has one."""
        return None

    @abstractmethod
    def comparison(self) -> Comparison:
        """A fresh comparison, with state of its own."""

    def local_comparison(self) -> Comparison:
        """The same for the CO term, where an image may have any number of online vectors."""
        return self.comparison()

    def before_step(self, heads: Heads, progress: float) -> None:  # noqa: B027 - for DINO's frozen layer
        """Called after the backward pass, before the optimiser, with the share of training done."""


def mlp(dim: int, hidden: int, out: int, *, layers: int = 2, last_norm: bool = False, affine: bool = True) -> nn.Module:
    """Linear, BatchNorm and ReLU, ``layers`` - 1 times, then a linear layer, and a BatchNorm with ``last_norm``.

    Layers that a BatchNorm follows have no bias. ``affine`` is about the last BatchNorm alone.
    """
    widths = [dim, *[hidden] * (layers - 1)]
    parts: list[nn.Module] = []
    for inside, outside in pairwise(widths):
        parts += [nn.Linear(inside, outside, bias=False), nn.BatchNorm1d(outside), nn.ReLU(inplace=True)]
    parts.append(nn.Linear(widths[-1], out, bias=not last_norm))
    if last_norm:
        parts.append(nn.BatchNorm1d(out, affine=affine))
    return nn.Sequential(*parts)
