"""Multinomial logistic regression by L-BFGS on any device, in coordinates that make the problem round."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from coss_eval.errors import CossError

MEMORY = 10  # pairs of steps and gradient changes that L-BFGS keeps
MAX_ITERATIONS = 2_000
SHORTEST_STEP = 2.0**-20
CPU_ROWS = 4_096  # rows at a time: a chunk's features and logits stay in the cache
GPU_LOGITS = 2**26  # logits at a time: 256 MiB in float32


class Logistic:
    """Mean cross-entropy of linear logits over fixed features, plus half a strength times the squared weights.

    ``features`` (N, D) are standardised (constant ones become 0) and rotated onto their principal axes. The rotation
    changes neither penalty nor solution, but there the Hessian is nearly diagonal (the covariance's eigenvalues over
    K), and L-BFGS that starts from this diagonal needs a fraction of the passes over the data. Coefficients
    (K, D + 1), float64, bias last, live in these coordinates; ``to_standardised`` leaves them. Passes over the data
    run in the features' own precision; sums over chunks of rows, and L-BFGS itself, in float64.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.device, self.num_classes = torch.device(device), num_classes
        self.mean, self.std = standardisation(features)
        eigenvalues, self._axes = torch.linalg.eigh(self._covariance(features))
        bias = eigenvalues.new_ones(1)  # a constant feature, orthogonal to the centred ones
        self._curvature = torch.cat([eigenvalues.clamp(min=0), bias]) / num_classes  # (D + 1,)
        self._penalised = torch.cat([torch.ones_like(eigenvalues), 0 * bias])
        self._rows = self.rotate(features)
        self._labels = labels.to(self.device, torch.int64)[:, None]  # (N, 1)
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=MEMORY)

    def rotate(self, features: Tensor) -> Tensor:
        """Features (N, D), on any device, in this problem's coordinates: (N, D + 1), ones last."""
        rotated = torch.ones(len(features), features.shape[1] + 1, dtype=features.dtype, device=self.device)
        axes = self._axes.to(features.dtype)
        for start, chunk in self._standardised(features):
            rotated[start : start + len(chunk), :-1] = chunk @ axes
        return rotated

    def to_standardised(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (K, D) and bias (K,) on the standardised features, float64 on the CPU."""
        return (coefficients[:, :-1] @ self._axes.T).cpu(), coefficients[:, -1].cpu()

    def from_standardised(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The inverse of ``to_standardised``; of another problem's result, a place to start from."""
        return torch.cat([weight.to(self._axes) @ self._axes, bias.to(self._axes)[:, None]], 1)

    def minimise(self, strength: float, start: Tensor | None = None, *, tolerance: float) -> Tensor:
        """The coefficients at one strength, from ``start`` or zero.

        Stops where half the squared Newton decrement, which is L-BFGS's estimate of what is left to gain (in nats),
        falls below ``tolerance``, or where the features' precision allows no lower loss. What one call learns of the
        data's curvature serves the next, at another strength.
        """
        penalty = strength * self._penalised
        point = penalty.new_zeros(self.num_classes, len(penalty)) if start is None else start
        loss, gradient = self._loss(point, penalty)
        for _ in range(MAX_ITERATIONS):
            direction = self._direction(gradient, penalty)
            slope = _dot(direction, gradient).item()
            if -slope / 2 < tolerance:
                return point
            scale = 1.0
            while (moved := self._loss(point + scale * direction, penalty))[0] > loss + 1e-4 * scale * slope:
                scale /= 2
                if scale < SHORTEST_STEP:
                    return point
            step = scale * direction
            change = moved[1] - gradient - penalty * step
            if _dot(step, change) > 0:  # as for any convex function, but for rounding
                self._pairs.append((step, change))
            point, (loss, gradient) = point + step, moved
        warnings.warn(f"the probe of strength {strength:g} stopped before it converged", stacklevel=2)
        return point

    def _loss(self, point: Tensor, penalty: Tensor) -> tuple[float, Tensor]:
        """The objective and its gradient (K, D + 1) in float64, in one pass over the data."""
        weight = point.to(self._rows.dtype)
        loss, gradient = point.new_zeros(()), torch.zeros_like(point)
        for start in range(0, len(self._rows), self._chunk):
            rows, labels = (t[start : start + self._chunk] for t in (self._rows, self._labels))
            log_p = log_softmax(rows @ weight.T, dim=1)  # (n, K)
            loss -= log_p.gather(1, labels).sum(dtype=torch.float64)
            residual = log_p.exp_().scatter_add_(1, labels, log_p.new_full((1, 1), -1).expand_as(labels))
            gradient += residual.T @ rows
        n = len(self._rows)
        return (loss / n + _dot(penalty * point, point) / 2).item(), gradient / n + penalty * point

    def _direction(self, gradient: Tensor, penalty: Tensor) -> Tensor:
        """Minus the inverse Hessian times the gradient, by the two-loop recursion (Nocedal & Wright, algorithm 7.4).

        The pairs hold the change of the data term's gradient; the penalty's follows from the step, so that they serve
        any strength.
        """
        pairs = [(step, change + penalty * step) for step, change in self._pairs]
        inverse = 1 / (self._curvature + penalty)
        direction, weights = -gradient, []
        for step, change in reversed(pairs):
            weights.append(_dot(step, direction) / _dot(step, change))
            direction = direction - weights[-1] * change
        if pairs:
            step, change = pairs[-1]
            inverse = inverse * (_dot(step, change) / _dot(change * inverse, change))
        direction = direction * inverse
        for (step, change), weight in zip(pairs, reversed(weights), strict=True):
            direction = direction + (weight - _dot(change, direction) / _dot(step, change)) * step
        return direction

    def _covariance(self, features: Tensor) -> Tensor:
        """Of the standardised features, float64 (D, D) on the device."""
        total = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=self.device)
        for _, chunk in self._standardised(features):
            total += chunk.T @ chunk
        return total / len(features)

    def _standardised(self, features: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Row number and standardised chunk, on the device; small chunks bound the copies."""
        mean, std = (t.to(self.device, features.dtype) for t in (self.mean, self.std))
        for start in range(0, len(features), CPU_ROWS):
            yield start, (features[start : start + CPU_ROWS].to(self.device) - mean) / std

    @property
    def _chunk(self) -> int:
        return CPU_ROWS if self.device.type == "cpu" else max(CPU_ROWS, GPU_LOGITS // self.num_classes)


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of features (N, D), float64 on the CPU; the deviation of constants is 1.

    A feature counts as constant where its deviation is within the rounding error of its mean.
    """
    mean = features.mean(0, dtype=torch.float64)
    if not mean.isfinite().all():
        bad = int((~mean.isfinite()).sum())
        raise CossError(
            f"{bad} of {len(mean)} features hold NaN or infinite values: check the weights and the normalisation"
        )
    square = torch.zeros_like(mean)
    for start in range(0, len(features), CPU_ROWS):
        square += (features[start : start + CPU_ROWS] - mean).square_().sum(0)
    std = (square / len(features)).sqrt()
    constant = std <= 10 * torch.finfo(features.dtype).eps * mean.abs()
    return mean.cpu(), std.masked_fill(constant, 1).cpu()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()
