"""The ball an attack lives in, L-infinity or L2: where to start, which way is up, and how to come back inside.

Tensors are float32 (B, 3, H, W) in [0, 1]; eps is (B, 1, 1, 1), so images of one batch may have different balls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from coss_eval.randomness import normal, uniform

NormName = Literal["linf", "l2"]

_PIXELS = (1, 2, 3)
_TINY = 1e-30  # below any gradient or perturbation that matters; keeps 0 / 0 away


class Norm(ABC):
    name: NormName

    @abstractmethod
    def start(self, clean: Tensor, eps: Tensor, keys: Tensor) -> Tensor:
        """A point drawn uniformly from the ball around ``clean``, clipped to the pixels' range; keys (B,) seed it."""

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """The steepest ascent in this norm, of length 1; zero where the gradient is zero."""

    @abstractmethod
    def project(self, pixels: Tensor, clean: Tensor, eps: Tensor) -> Tensor:
        """The nearest point in the ball (exact for each constraint in turn), then in [0, 1]."""


class Linf(Norm):
    name = "linf"

    def start(self, clean: Tensor, eps: Tensor, keys: Tensor) -> Tensor:
        noise = uniform(keys, "start", shape=tuple(clean.shape[1:]))
        return (clean + (2 * noise - 1) * eps).clamp_(0, 1)

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def project(self, pixels: Tensor, clean: Tensor, eps: Tensor) -> Tensor:
        return torch.clamp(pixels, clean - eps, clean + eps).clamp_(0, 1)


class L2(Norm):
    name = "l2"

    def start(self, clean: Tensor, eps: Tensor, keys: Tensor) -> Tensor:
        pixels = clean[0].numel()
        noise = normal(
            keys, "start", shape=(pixels + 2,)
        )  # a point of the sphere without two coordinates is uniform in the ball
        noise = noise[:, :pixels] / noise.square().sum(1, keepdim=True).sqrt()  # (Voelker et al. 2017)
        return (clean + noise.view(clean.shape) * eps).clamp_(0, 1)

    def direction(self, gradient: Tensor) -> Tensor:
        largest = gradient.abs().amax(_PIXELS, keepdim=True)
        gradient = gradient / largest.clamp_min(_TINY)  # first, so that the squares of a tiny gradient do not underflow
        return gradient / _length(gradient).clamp_min(_TINY)

    def project(self, pixels: Tensor, clean: Tensor, eps: Tensor) -> Tensor:
        perturbation = pixels - clean
        shrink = (eps / _length(perturbation).clamp_min(_TINY)).clamp_max(1)
        return (clean + perturbation * shrink).clamp_(0, 1)


NORMS: dict[str, Norm] = {"linf": Linf(), "l2": L2()}


def _length(perturbation: Tensor) -> Tensor:
    """The L2 norm of each image, (B, 1, 1, 1)."""
    length: Tensor = torch.linalg.vector_norm(perturbation, dim=_PIXELS, keepdim=True)
    return length
