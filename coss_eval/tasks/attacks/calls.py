"""From a cell's parameters to an attack on batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from coss_eval.attacks import Attack, Verdicts, attack_named
from coss_eval.data.batches import Batch
from coss_eval.models.classifier import to_float

CHUNK = 1024  # images handed to an attack at once, from which it keeps its batches full


def attack_of(params: dict[str, Any]) -> Attack:
    """The attack with the options of a cell."""
    attack = attack_named(params["attack"])
    return replace(attack, norm=params["norm"], **{option: params[option] for option in attack.options})


def run(
    params: dict[str, Any], classifier: nn.Module, batches: Iterable[Batch], batch_size: int
) -> tuple[Tensor, Verdicts]:
    """The ids (N,) of the images and the verdicts on them, of an attack with a cell's parameters.

    With ``second_loss``, the minimum over both losses: see ``Verdicts.minimum``.
    """
    attack, second = attack_of(params), params.get("second_loss")
    other = None if second is None else attack_of(params | {"loss": second})
    how: dict[str, Any] = {"seed": params["seed"], "batch_size": batch_size, "backend": params["backend"]}

    def attacked(attack: Attack, batch: Batch, eps: list[float]) -> Verdicts:
        return attack(classifier, to_float(batch.images), batch.labels, eps, ids=batch.ids, **how)

    def attacked_again(other: Attack, batch: Batch, found: Verdicts) -> Verdicts:
        return found.minimum(
            lambda eps, rows: attacked(other, Batch(*(tensor[rows] for tensor in batch)), [eps]).robust[0]
        )

    ids, parts = [], []
    for batch in batches:
        found = attacked(attack, batch, params["eps"])
        ids.append(batch.ids)
        parts.append(found if other is None else attacked_again(other, batch, found))
    return torch.cat(ids or [torch.empty(0, dtype=torch.int64)]), Verdicts.joined(parts)
