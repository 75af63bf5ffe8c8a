"""The linear probe: multinomial logistic regression whose strength is chosen on held-out training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coss_eval.errors import UsageError
from coss_eval.probes.forward import exact_float32
from coss_eval.probes.logistic import Logistic

STRENGTHS = tuple(10 ** (1 - i / 2) for i in range(15))
"""10 to 1e-6, two a decade, the strongest first: the path is warm-started in this order."""

SELECTION_SLACK = 10  # times the tolerance while strengths are only compared


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe: logits = weight @ ((features - mean) / std) + bias, all in float64.

    ``path`` has the accuracy on the held-out images at each strength, the strongest first; it is empty where the
    strength was given.
    """

    weight: Tensor  # (K, D), on the standardised features
    bias: Tensor  # (K,)
    mean: Tensor  # (D,)
    std: Tensor  # (D,)
    strength: float
    path: dict[float, float] = field(default_factory=dict)

    def module(self) -> nn.Linear:
        """The probe as a layer on the raw features (B, D), float32, the standardisation folded in."""
        weight = self.weight / self.std
        linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")  # draws no initial weights
        linear.weight = nn.Parameter(weight.float(), requires_grad=False)
        linear.bias = nn.Parameter((self.bias - weight @ self.mean).float(), requires_grad=False)
        return linear

    def describe(self) -> str:
        """ "linear probe, strength 0.01, the best of 15 on held-out training images": for reports."""
        chosen = f"the best of {len(self.path)} on held-out training images" if self.path else "fixed"
        return f"linear probe, strength {self.strength:.3g}, {chosen}"


@exact_float32()
def fit_probe(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    strengths: Sequence[float] = STRENGTHS,
    select: tuple[Tensor, Tensor] | None = None,
    device: torch.device | str = "cpu",
    tolerance: float = 1e-6,
) -> LinearProbe:
    """Fit the probe at each strength, keep the one most accurate on ``select``, refit it on all images together.

    ``features`` (N, D) float32 or float64, ``labels`` (N,) in 0 ... K - 1; ``select`` is another such pair, disjoint
    from the first. Of equally accurate strengths the strongest is kept.

    The objective is mean cross-entropy + strength / 2 * sum(weight ** 2) on standardised features, with a free bias,
    so that a strength means the same for any number of images: scikit-learn's LogisticRegression on standardised
    features has C = 1 / (strength * N); for two classes, where it keeps one weight vector, C = 2 / (strength * N).
    ``tolerance``: what the loss may lie above its minimum, in nats (an estimate).
    """
    for part in ((features, labels), *([] if select is None else [select])):
        _check(*part, num_classes)
    strengths = sorted(set(strengths), reverse=True)
    if not strengths or strengths[-1] <= 0:
        raise UsageError(f"strengths must be above 0, at least one, got {strengths}")
    if len(strengths) > 1 and select is None:
        raise UsageError(
            f"{len(strengths)} strengths need held-out images to choose from: pass select, or one strength"
        )
    path: dict[float, float] = {}
    start: tuple[Tensor, Tensor] | None = None
    if select is not None:
        if len(strengths) > 1:
            path, start = _path(features, labels, num_classes, strengths, select, device, tolerance * SELECTION_SLACK)
        features, labels = torch.cat([features, select[0]]), torch.cat([labels, select[1]])
    strength = max(path, key=path.__getitem__) if path else strengths[0]
    problem = Logistic(features, labels, num_classes, device)
    first = None if start is None else problem.from_standardised(*start)
    weight, bias = problem.to_standardised(problem.minimise(strength, first, tolerance=tolerance))
    return LinearProbe(weight, bias, problem.mean, problem.std, strength, path)


@exact_float32()
def refit_probe(
    probe: LinearProbe,
    features: Tensor,
    labels: Tensor,
    strength: float,
    *,
    device: torch.device | str = "cpu",
    tolerance: float = 1e-6,
) -> LinearProbe:
    """The probe at another strength, on the same images; ``probe`` is where the fit starts. Arguments as above."""
    problem = Logistic(features, labels, len(probe.bias), device)
    start = problem.from_standardised(probe.weight, probe.bias)
    weight, bias = problem.to_standardised(problem.minimise(strength, start, tolerance=tolerance))
    return LinearProbe(weight, bias, problem.mean, problem.std, strength)


def _path(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    strengths: Sequence[float],
    select: tuple[Tensor, Tensor],
    device: torch.device | str,
    tolerance: float,
) -> tuple[dict[float, float], tuple[Tensor, Tensor]]:
    """Accuracy on ``select`` by strength, and the standardised weight and bias of the best."""
    problem = Logistic(features, labels, num_classes, device)
    rows, truth = problem.rotate(select[0]), select[1].to(device)
    path: dict[float, float] = {}
    coefficients = best = None
    for strength in strengths:
        coefficients = problem.minimise(strength, coefficients, tolerance=tolerance)
        hits = (rows @ coefficients.to(rows.dtype).T).argmax(1) == truth
        accuracy = int(hits.sum()) / len(hits)
        if best is None or accuracy > max(path.values()):
            best = coefficients
        path[strength] = accuracy
    assert best is not None
    return path, problem.to_standardised(best)


def _check(features: Tensor, labels: Tensor, num_classes: int) -> None:
    if features.dtype not in (torch.float32, torch.float64) or features.dim() != 2 or not len(features):
        raise UsageError(
            f"features must be float32 or float64 (N, D) with N > 0, got {features.dtype} {tuple(features.shape)}"
        )
    if labels.shape != features.shape[:1]:
        raise UsageError(f"expected one label for each of {len(features)} features, got shape {tuple(labels.shape)}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UsageError(f"labels must lie in 0 ... {num_classes - 1}, got {int(labels.min())} ... {int(labels.max())}")
