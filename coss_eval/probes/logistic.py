"""Multinomial logistic regression by L-BFGS on any device, in coordinates that make the problem round."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from coss_eval.errors import CossError, UsageError

MEMORY = 10  # pairs of steps and gradient changes that L-BFGS keeps
MAX_ITERATIONS = 2_000
SHORTEST_STEP = 2.0**-20
CPU_ROWS = 4_096  # rows at a time: a chunk's features and logits stay in the cache
GPU_LOGITS = 2**26  # logits at a time: 256 MiB in float32


class Rows:
    """Rows (N, D) of matrices, one below the other: of each all rows, or those at the places int64 (n,) given with it.

    A chunk is copied at a time, never all of them: features of millions of images may lie in a mapped file.
    """

    def __init__(self, *parts: tuple[Tensor, Tensor | None]) -> None:
        self._parts = parts
        self._lengths = [len(matrix if places is None else places) for matrix, places in parts]
        self.dtype = parts[0][0].dtype
        self.shape: tuple[int, ...] = (sum(self._lengths), *parts[0][0].shape[1:])
        if any((matrix.dtype, matrix.shape[1:]) != (self.dtype, self.shape[1:]) for matrix, _ in parts):
            kinds = ", ".join(f"{matrix.dtype} {tuple(matrix.shape)}" for matrix, _ in parts)
            raise UsageError(f"expected features of one type and length to fit and to select on, got {kinds}")

    @classmethod
    def of(cls, given: Tensor | Rows) -> Rows:
        return given if isinstance(given, Rows) else cls((given, None))

    def __len__(self) -> int:
        return self.shape[0]

    def __add__(self, other: Rows) -> Rows:
        return Rows(*self._parts, *other._parts)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Row number and rows (n, D), CPU_ROWS at a time."""
        for start in range(0, len(self), CPU_ROWS):
            yield start, self._between(start, min(start + CPU_ROWS, len(self)))

    def _between(self, start: int, stop: int) -> Tensor:
        found, first = list[Tensor](), 0
        for (matrix, places), length in zip(self._parts, self._lengths, strict=True):
            here = slice(max(start - first, 0), max(stop - first, 0))
            if here.start < length and here.stop > here.start:
                found.append(matrix[here] if places is None else matrix[places[here]])
            first += length
        return found[0] if len(found) == 1 else torch.cat(found)


class Logistic:
    """Mean cross-entropy of linear logits over fixed features, plus half a strength times the squared weights.

    ``features`` (N, D) are standardised (constant ones become 0) and rotated onto their principal axes. The rotation
    changes neither penalty nor solution, but there the Hessian is nearly diagonal (the covariance's eigenvalues over
    K), and L-BFGS that starts from this diagonal needs a fraction of the passes over the data. Coefficients
    (K, D + 1), float64, bias last, live in these coordinates; ``to_standardised`` leaves them. Passes over the data
    run in the features' own precision; sums over chunks of rows, and L-BFGS itself, in float64. The rotated features
    are the one copy that is made, in ``room`` (N, D + 1) on the device where that is given.
    """

    def __init__(
        self,
        features: Tensor | Rows,
        labels: Tensor,
        num_classes: int,
        device: torch.device | str = "cpu",
        room: Tensor | None = None,
    ) -> None:
        features = Rows.of(features)
        self.device, self.num_classes = torch.device(device), num_classes
        self.mean, self.std = standardisation(features)
        eigenvalues, self._axes = torch.linalg.eigh(self._covariance(features))
        bias = eigenvalues.new_ones(1)  # a constant feature, orthogonal to the centred ones
        self._curvature = torch.cat([eigenvalues.clamp(min=0), bias]) / num_classes  # (D + 1,)
        self._penalised = torch.cat([torch.ones_like(eigenvalues), 0 * bias])
        self._rows = self.rotate(features, room)
        self._labels = labels.to(self.device, torch.int64)[:, None]  # (N, 1)
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=MEMORY)

    def rotate(self, features: Tensor | Rows, room: Tensor | None = None) -> Tensor:
        """Features (N, D), on any device, in this problem's coordinates: (N, D + 1), ones last; in ``room``, if any."""
        features = Rows.of(features)
        shape = len(features), features.shape[1] + 1
        rotated = torch.empty(shape, dtype=features.dtype, device=self.device) if room is None else room
        axes = self._axes.to(features.dtype)
        rotated[:, -1] = 1
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

    def hits(self, point: Tensor, rows: Tensor, labels: Tensor) -> int:
        """How many rotated rows (N, D + 1) the coefficients give their labels (N,)."""
        weight = point.to(rows.dtype)
        parts = zip(torch.split(rows, self._chunk), torch.split(labels, self._chunk), strict=True)
        return sum(int(((part @ weight.T).argmax(1) == truth).sum()) for part, truth in parts)

    def _covariance(self, features: Rows) -> Tensor:
        """Of the standardised features, float64 (D, D) on the device."""
        total = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=self.device)
        for _, chunk in self._standardised(features):
            total += chunk.T @ chunk
        return total / len(features)

    def _standardised(self, features: Rows) -> Iterator[tuple[int, Tensor]]:
        """Row number and standardised chunk, on the device; small chunks bound the copies."""
        mean, std = (t.to(self.device, features.dtype) for t in (self.mean, self.std))
        for start, chunk in features.chunks():
            yield start, (chunk.to(self.device) - mean) / std

    @property
    def _chunk(self) -> int:
        return CPU_ROWS if self.device.type == "cpu" else max(CPU_ROWS, GPU_LOGITS // self.num_classes)


def standardisation(features: Tensor | Rows) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of features (N, D), float64 on the CPU; the deviation of constants is 1.

    A feature counts as constant where its deviation is within the rounding error of its mean.
    """
    features = Rows.of(features)
    sums = (chunk.sum(0, dtype=torch.float64) for _, chunk in features.chunks())
    mean = reduce(torch.add, sums) / len(features)
    if not mean.isfinite().all():
        bad = int((~mean.isfinite()).sum())
        raise CossError(
            f"{bad} of {len(mean)} features hold NaN or infinite values: check the weights and the normalisation"
        )
    square = torch.zeros_like(mean)
    for _, chunk in features.chunks():
        square += (chunk - mean).square_().sum(0)
    std = (square / len(features)).sqrt()
    constant = std <= 10 * torch.finfo(features.dtype).eps * mean.abs()
    return mean.cpu(), std.masked_fill(constant, 1).cpu()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()
