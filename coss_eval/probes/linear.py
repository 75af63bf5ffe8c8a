"""The linear probe: multinomial logistic regression whose strength is chosen on held-out training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coss_eval.errors import UsageError
from coss_eval.probes.logistic import Logistic, Rows
from coss_eval.runtime.device import exact_float32

STRENGTHS = tuple(10 ** (1 - i / 2) for i in range(15))
"""10 to 1e-6, two a decade, the strongest first: the path is warm-started in this order."""

WIDENINGS = 3
"""How often a grid whose best strength lies at its end is widened, each time by two strengths at its own ratio."""

SELECTION_SLACK = 10  # times the tolerance while strengths are only compared


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe: logits = weight @ ((features - mean) / std) + bias, all in float64.

    ``path`` has the accuracy on the held-out images at each strength, the strongest first; it is empty where the
    strength was given. ``asked`` counts the strengths that were asked for; the path is longer where the best one lay at
    their end.
    """

    weight: Tensor  # (K, D), on the standardised features
    bias: Tensor  # (K,)
    mean: Tensor  # (D,)
    std: Tensor  # (D,)
    strength: float
    path: dict[float, float] = field(default_factory=dict)
    asked: int = len(STRENGTHS)

    @property
    def at_the_end(self) -> bool:
        """Whether the chosen strength is the largest or smallest that was tried, so that a better one may lie beyond.

        At the strong end only if the next one is worse: where they are alike, stronger ones hardly differ, either.
        """
        strengths = list(self.path)
        if len(strengths) < 2:
            return False
        strongest, second = (self.path[strength] for strength in strengths[:2])
        return self.strength == strengths[-1] or (self.strength == strengths[0] and strongest > second)

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
        if len(self.path) > self.asked:
            chosen += f", the grid of {self.asked} widened to {min(self.path):.3g} ... {max(self.path):.3g}"
        if self.at_the_end:
            chosen += ", at the END of the grid"
        return f"linear probe, strength {self.strength:.3g}, {chosen}"


@exact_float32()
def fit_probe(
    features: Tensor | Rows,
    labels: Tensor,
    *,
    num_classes: int,
    strengths: Sequence[float] = STRENGTHS,
    select: tuple[Tensor | Rows, Tensor] | None = None,
    device: torch.device | str = "cpu",
    tolerance: float = 1e-6,
) -> LinearProbe:
    """Fit the probe at each strength, keep the one most accurate on ``select``, refit it on all images together.

    ``features`` (N, D) float32 or float64, ``labels`` (N,) in 0 ... K - 1; ``select`` is another such pair, disjoint
    from the first. Of equally accurate strengths the strongest is kept. Where the best lies at an end of ``strengths``,
    they are widened there, up to WIDENINGS times, by two at the ratio of the last two; only a more accurate one is
    taken.

    The objective is mean cross-entropy + strength / 2 * sum(weight ** 2) on standardised features, with a free bias,
    so that a strength means the same for any number of images: scikit-learn's LogisticRegression on standardised
    features has C = 1 / (strength * N); for two classes, where it keeps one weight vector, C = 2 / (strength * N).
    ``tolerance``: what the loss may lie above its minimum, in nats (an estimate). Beside the features given, memory is
    needed for one more copy of them all, on the device; ``Rows`` of larger ones need no copy of their own.
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
    strength, start = strengths[0], None
    rows = Rows.of(features)
    whole = rows if select is None else rows + Rows.of(select[0])
    room = torch.empty(len(whole), whole.shape[1] + 1, dtype=whole.dtype, device=device)
    if select is not None:
        if len(strengths) > 1:
            problem = Logistic(rows, labels, num_classes, device, room[: len(rows)])
            search = _Search(problem, select, tolerance * SELECTION_SLACK, room[len(rows) :])
            path, strength, start = search.run(strengths)
        labels = torch.cat([labels, select[1]])
    problem = Logistic(whole, labels, num_classes, device, room)  # in the place of the other one's rows
    first = None if start is None else problem.from_standardised(*start)
    weight, bias = problem.to_standardised(problem.minimise(strength, first, tolerance=tolerance))
    return LinearProbe(weight, bias, problem.mean, problem.std, strength, path, len(strengths))


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


class _Search:
    """The accuracy on held-out images (features (N, D), labels (N,)) along a path of strengths, and the best fit."""

    def __init__(self, problem: Logistic, select: tuple[Tensor | Rows, Tensor], tolerance: float, room: Tensor) -> None:
        self.problem, self.tolerance = problem, tolerance
        self.rows, self.truth = problem.rotate(select[0], room), select[1].to(problem.device)
        self.accuracy: dict[float, float] = {}
        self.fits: dict[float, Tensor] = {}  # of the two ends and the best
        self.best = 0.0  # the best strength

    def run(self, strengths: Sequence[float]) -> tuple[dict[float, float], float, tuple[Tensor, Tensor]]:
        """Accuracy by strength, the best strength, and its standardised weight and bias."""
        self._try(strengths, None)
        weaker, stronger = strengths[-1] / strengths[-2], strengths[0] / strengths[1]
        for _ in range(WIDENINGS):
            path = self._sorted()
            first, second, last = next(iter(path)), list(path)[1], next(reversed(path))
            if self.best == last:
                self._try([last * weaker, last * weaker**2], self.fits[last])
            elif self.best == first and path[first] > path[second]:
                self._try([first * stronger, first * stronger**2], self.fits[first])
            else:
                break
        return self._sorted(), self.best, self.problem.to_standardised(self.fits[self.best])

    def _try(self, strengths: Sequence[float], start: Tensor | None) -> None:
        """Fit one strength after the other, each from the last; the first of the most accurate is the best."""
        for strength in strengths:
            start = self.problem.minimise(strength, start, tolerance=self.tolerance)
            accuracy = self.problem.hits(start, self.rows, self.truth) / len(self.truth)
            if not self.accuracy or accuracy > self.accuracy[self.best]:
                self.best = strength
            self.accuracy[strength] = accuracy
            self.fits[strength] = start
            ends = (min(self.accuracy), max(self.accuracy), self.best)
            self.fits = {known: fit for known, fit in self.fits.items() if known in ends}

    def _sorted(self) -> dict[float, float]:
        """The strongest first."""
        return dict(sorted(self.accuracy.items(), reverse=True))


def _check(features: Tensor | Rows, labels: Tensor, num_classes: int) -> None:
    if features.dtype not in (torch.float32, torch.float64) or len(features.shape) != 2 or not len(features):
        raise UsageError(
            f"features must be float32 or float64 (N, D) with N > 0, got {features.dtype} {tuple(features.shape)}"
        )
    if labels.shape != features.shape[:1]:
        raise UsageError(f"expected one label for each of {len(features)} features, got shape {tuple(labels.shape)}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UsageError(f"labels must lie in 0 ... {num_classes - 1}, got {int(labels.min())} ... {int(labels.max())}")
