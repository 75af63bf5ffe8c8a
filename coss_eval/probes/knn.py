"""Weighted nearest neighbours by cosine similarity, as in DINO (Caron et al. 2021; Wu et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from coss_eval.errors import UsageError
from coss_eval.runtime.device import exact_float32

SIMILARITIES = 2**26  # at a time: 256 MiB in float32


@exact_float32()
def predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Votes (M, K) of the ``k`` nearest training features, each weighted by exp(cosine / temperature).

    Features are (N, D) and (M, D), on any device; the votes come back on the CPU and each row sums to 1. An infinite
    temperature counts every neighbour alike. Beside the features, memory is bounded whatever N and M are.
    """
    if not 1 <= k <= len(train_features):
        raise UsageError(f"k must lie in 1 ... {len(train_features)} (the number of training images), got {k}")
    if not temperature > 0:
        raise UsageError(f"the temperature must be above 0, got {temperature}")
    bank = normalize(train_features.to(device, torch.float32)).T  # (D, N)
    labels = train_labels.to(device)
    votes = torch.empty(len(test_features), num_classes)
    rows = max(1, SIMILARITIES // len(train_features))
    for start in range(0, len(test_features), rows):
        queries = normalize(test_features[start : start + rows].to(device, torch.float32))
        similarity, nearest = (queries @ bank).topk(k, dim=1)  # (m, k), the most similar first
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # of the most similar: 1, so nothing overflows
        weight /= weight.sum(1, keepdim=True)
        found = weight.new_zeros(len(queries), num_classes).scatter_add_(1, labels[nearest], weight)
        votes[start : start + rows] = found.cpu()
    return votes
