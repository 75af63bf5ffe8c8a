"""Online probes on held-out training images, and the signs of collapse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from coss_eval.data.split import Split
from coss_eval.models.model import Model
from coss_eval.probes.features import extract_known
from coss_eval.probes.forward import scores
from coss_eval.probes.knn import predict
from coss_eval.probes.linear import fit_probe
from coss_eval.redundancy.spectrum import effective_rank
from coss_eval.runtime.device import Compute

BANK, QUERIES = 5_000, 2_000  # images at most: a fraction of a second beside an epoch
NEIGHBOURS = 20
STRENGTH = 1e-2  # of the linear probe; one, since this is a curve to look at and no result
LEAST_STD, LEAST_RANK = 0.05, 2.0


@dataclass(frozen=True)
class Health:
    """Accuracies are fractions on held-out training images; None where none are held out.

    ``feature_std``: of unit vectors, times sqrt(D): 1 where they point everywhere alike, 0 where all are the same.
    """

    feature_std: float
    effective_rank: float
    knn: float | None = None
    linear: float | None = None

    @property
    def alarm(self) -> str | None:
        """What is wrong, or None."""
        if self.feature_std < LEAST_STD:
            return f"the representation collapses: its standard deviation is {self.feature_std:.3f} (healthy: near 1)"
        if self.effective_rank < LEAST_RANK:
            return f"the representation collapses: its effective rank is {self.effective_rank:.1f}"
        return None


class Monitor:
    """Looks at a network through fixed samples: a bank from the training part, queries from the held-out part."""

    def __init__(self, fit: Split, select: Split | None, device: torch.device, batch_size: int) -> None:
        self.bank = fit.limited(BANK)
        self.queries = None if select is None else select.limited(QUERIES)
        self.device, self.compute = device, Compute(device, batch_size, cache=False)

    def look(self, model: Model) -> Health:
        """Features of the model as it stands; its mode and gradients are left as they were."""
        bank = extract_known(model, self.bank, self.compute)
        features = bank.values["global"]
        std, rank = spread(features)
        if self.queries is None:
            return Health(std, rank)
        queries = extract_known(model, self.queries, self.compute)
        found, truth, classes = queries.values["global"], queries.labels, len(self.bank.classes)
        k = min(NEIGHBOURS, len(features))
        votes = predict(features, bank.labels, found, num_classes=classes, k=k, device=self.device)
        probe = fit_probe(features, bank.labels, num_classes=classes, strengths=[STRENGTH], device=self.device)
        return Health(std, rank, scores(votes, truth)["top1"], scores(probe.module()(found), truth)["top1"])


def spread(features: Tensor) -> tuple[float, float]:
    """Standard deviation of the unit vectors (times sqrt(D)) and effective rank of features (N, D)."""
    unit = normalize(features.double())
    std = float(unit.std(0).mean() * unit.shape[1] ** 0.5)
    return std, effective_rank(unit.T @ unit / len(unit), len(unit))
