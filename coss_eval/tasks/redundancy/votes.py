"""What a linear probe of the global representation makes of its parts: each location, a few of them, some dimensions.

It needs a global representation that is made of the mean of the locations, by whatever layers follow it: those then
make one of each location, or of a few, as they do of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from coss_eval.data.batches import Batch
from coss_eval.errors import CossError, UsageError
from coss_eval.models.backbone import Backbone
from coss_eval.models.classifier import Classifier, to_float
from coss_eval.probes.features import Features
from coss_eval.probes.linear import fit_probe
from coss_eval.randomness import uniform

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the dimensions
SUBSETS = 3  # of the dimensions, at each share


@dataclass(frozen=True)
class Votes:
    """Of each image, in the order in which they came."""

    ids: Tensor  # int64 (N,)
    labels: Tensor  # int64 (N,)
    accuracy: Tensor  # (N,): the share of locations whose class is the image's
    agreement: Tensor  # (N,): the share of pairs of locations that name one class
    divergence: Tensor  # (N,): Jensen-Shannon divergence of the locations' probabilities, in nats
    kept: dict[int, Tensor]  # bool (N,) by k: whether the class is right with k random locations pooled


def read_locations(classifier: Classifier, batches: Iterable[Batch], seed: int) -> Votes:
    """The classifier at every location of every image, and with k = 1, 2, 4, ..., L of them pooled."""
    ids, labels, columns = list[Tensor](), list[Tensor](), list[dict[str, Tensor]]()
    for batch in batches:
        with torch.inference_mode():
            local, global_ = classifier.represent(to_float(batch.images))
            alone = _pooled(classifier.backbone, local)
            if alone is None or not torch.allclose(alone, global_, rtol=1e-3, atol=1e-4):
                raise CossError(
                    "the global representation is not made of the mean of the locations, so that its probe cannot read "
                    "one; leave out --probe for this network"
                )
            columns.append(_read(classifier, local, batch.labels, batch.ids, seed))
        ids.append(batch.ids.cpu())
        labels.append(batch.labels.cpu())
    joined = {name: torch.cat([column[name] for column in columns]).cpu() for name in columns[0]}
    kept = {int(name): joined.pop(name) for name in list(joined) if name.isdigit()}
    return Votes(torch.cat(ids), torch.cat(labels), **joined, kept=kept)


def _read(classifier: Classifier, local: Tensor, labels: Tensor, ids: Tensor, seed: int) -> dict[str, Tensor]:
    """One batch's columns; local (B, L, D)."""
    images, locations, _ = local.shape
    if locations < 2:
        raise UsageError("the network has one location at these images: there is no other for it to agree with")
    logits = _logits(classifier, local.flatten(0, 1)[:, None]).double().reshape(images, locations, -1)  # (B, L, K)
    votes = logits.argmax(2)
    counts = torch.zeros(images, logits.shape[2], dtype=torch.float64, device=votes.device)
    counts.scatter_add_(1, votes, torch.ones_like(votes, dtype=torch.float64))
    p = logits.softmax(2)
    order = uniform(ids, seed, "kept locations", shape=(locations,)).argsort(1)
    found = {
        "accuracy": (votes == labels[:, None]).double().mean(1),
        "agreement": (counts.square().sum(1) - locations) / (locations * (locations - 1)),
        "divergence": _entropy(p.mean(1)) - _entropy(p).mean(1),
    }
    shuffled = local.gather(1, order[:, :, None].expand_as(local))
    for k in kept_counts(locations):
        found[str(k)] = _logits(classifier, shuffled[:, :k]).argmax(1) == labels
    return found


def _logits(classifier: Classifier, local: Tensor) -> Tensor:
    """(B, K) of images that have these locations (B, k, D) alone."""
    pooled = _pooled(classifier.backbone, local)
    assert pooled is not None  # read_locations has asked
    return classifier.logits(pooled)


def _pooled(backbone: Backbone, local: Tensor) -> Tensor | None:
    """The global representation of locations (B, k, D); None where it needs what is no location."""
    if backbone.prefix_tokens:
        return None
    layouts = {"nchw": local.transpose(1, 2)[..., None], "nhwc": local[:, :, None], "nlc": local}
    pooled: Tensor = backbone.global_(backbone.pool(layouts[backbone.prepool_layout]))
    return pooled


def kept_counts(locations: int) -> list[int]:
    """1, 2, 4, ..., and all of them."""
    return [*(2**i for i in range((locations - 1).bit_length())), locations]


def enough(accuracies: dict[int, float], share: float = 0.9) -> int:
    """The fewest locations that keep ``share`` of the accuracy with all of them."""
    return next(k for k in sorted(accuracies) if accuracies[k] >= share * accuracies[max(accuracies)])


def diffused(
    train: Features, test: Features, classes: int, strength: float, seed: int, device: torch.device
) -> Iterator[tuple[float, Tensor]]:
    """(share, bool (N, SUBSETS)): the verdicts of probes on random subsets of the dimensions (arXiv 2306.00183)."""
    x, y = train.values["global"], test.values["global"]
    for share in SHARES:
        count = max(1, round(share * x.shape[1]))
        verdicts = []
        for subset in range(SUBSETS):
            draws = uniform(torch.arange(x.shape[1]), seed, "dimensions", subset, shape=(1,))[:, 0]
            chosen = draws.argsort()[:count]  # those of a smaller share are among those of a larger one
            probe = fit_probe(x[:, chosen], train.labels, num_classes=classes, strengths=[strength], device=device)
            verdicts.append(probe.module()(y[:, chosen]).argmax(1) == test.labels)
        yield share, torch.stack(verdicts, 1)


def _entropy(p: Tensor) -> Tensor:
    """In nats, over the last axis."""
    entropy: Tensor = torch.special.entr(p).sum(-1)
    return entropy
