"""What an attack climbs: a loss of the logits, and a verdict.

A loss is written for ascent. ``margin`` says how far an image is from broken, whatever the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from coss_eval.errors import UsageError, unknown_name

_TINY = 1e-12


class Reading(NamedTuple):
    """What the network says of a batch of pixels."""

    loss: Tensor  # float32 (B,), to be raised; carries the graph
    margin: Tensor  # float32 (B,), to be lowered
    broken: Tensor  # bool (B,), the attack has reached its goal


class Objective(Protocol):
    """An attack's goal, for the images numbered ``rows`` (B,) and the loss that each image's attempt climbs."""

    def __call__(self, pixels: Tensor, rows: Tensor, attempt: Tensor) -> Reading: ...


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """log sum_{j != y} exp z_j - z_y, (B,): the cross-entropy without its saturation.

    With m this value, cross-entropy is softplus(m): it grows with m and its gradient points the same way, but for a
    confident network it underflows to zero, and an attack that climbs it stops. Steps of fixed length see no
    difference elsewhere.
    """
    own = labels[:, None]
    return logits.scatter(1, own, -torch.inf).logsumexp(1) - logits.gather(1, own).squeeze(1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, (B,): (max_{j != y} z_j - z_y) / (z_(1) - z_(3)) (Croce and Hein 2020, eq. 6)."""
    ranked = logits.sort(1, descending=True).values
    return -margins(logits, labels) / (ranked[:, 0] - ranked[:, 2] + _TINY)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), (B,) (Croce and Hein 2020, eq. 7)."""
    ranked = logits.sort(1, descending=True).values
    gap = logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])
    return gap.squeeze(1) / (ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2 + _TINY)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y - max_{j != y} z_j, (B,): below zero where the image is misclassified."""
    own = labels[:, None]
    return logits.gather(1, own).squeeze(1) - logits.scatter(1, own, -torch.inf).amax(1)


@dataclass(frozen=True)
class Misclassification:
    """Any class but the true one; with ``targets``, exactly that class.

    ``losses`` are climbed in turn by an image's attempts: the result is the minimum over all of them. labels and
    targets int64 (N,) on the network's device.
    """

    classifier: nn.Module
    labels: Tensor
    targets: Tensor | None = None
    losses: tuple[str, ...] = ("ce",)

    def __call__(self, pixels: Tensor, rows: Tensor, attempt: Tensor) -> Reading:
        logits: Tensor = self.classifier(pixels).float()
        labels = self.labels[rows]
        targets = None if self.targets is None else self.targets[rows]
        values = torch.stack([self._loss(name, logits, labels, targets) for name in self.losses])  # (losses, B)
        loss = values.gather(0, (attempt % len(self.losses))[None]).squeeze(0)
        return Reading(loss, *verdict(logits.detach(), labels, targets))

    @staticmethod
    def _loss(name: str, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        if name == "ce":
            return cross_entropy(logits, labels) if targets is None else -cross_entropy(logits, targets)
        return dlr(logits, labels) if targets is None else targeted_dlr(logits, labels, targets)


def verdict(logits: Tensor, labels: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Margin float32 (B,) and broken bool (B,) of logits (B, K)."""
    if targets is None:
        return margins(logits, labels), logits.argmax(1) != labels
    return -margins(logits, targets), logits.argmax(1) == targets


def parse_losses(loss: str, classes: int, *, targeted: bool) -> tuple[str, ...]:
    """ "ce", "dlr" or "ce+dlr" (the minimum over both) as a tuple; DLR needs logits to rank."""
    names = tuple(loss.split("+"))
    for name in names:
        if name not in ("ce", "dlr"):
            raise unknown_name("loss", name, ["ce", "dlr", "ce+dlr"])
    needed = 4 if targeted else 3
    if "dlr" in names and classes < needed:
        raise UsageError(f"loss 'dlr' needs at least {needed} classes, the classifier has {classes}; use loss 'ce'")
    return names
