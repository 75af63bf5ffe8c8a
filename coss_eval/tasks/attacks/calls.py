"""From a cell's parameters to calls of the attacks room: which attacks there are, and what each takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coss_eval import attacks
from coss_eval.attacks import Verdicts
from coss_eval.data.batches import Batch
from coss_eval.models.classifier import to_float

CHUNK = 1024  # images handed to an attack at once, from which it keeps its batches full
FOOLBOX = "foolbox:"
NORMS = ("linf", "l2")


@dataclass(frozen=True)
class Kind:
    """What an attack takes beside eps; ``steps`` is its usual number of them, ``cost`` what one costs in forwards."""

    options: tuple[str, ...]
    steps: int = 1
    cost: int = 3
    norms: tuple[str, ...] = NORMS
    reference: bool = False  # whether foolbox has it, too
    iterated: bool = True  # whether it follows gradients step by step, so that masked ones mislead it
    random: bool = True  # whether it draws numbers, from the seed and the images' ids


KINDS = {
    "fgsm": Kind(("loss",), reference=True, iterated=False, random=False),
    "bim": Kind(("steps", "step_size", "loss"), 10, random=False),
    "pgd": Kind(("steps", "step_size", "restarts", "loss"), 20, reference=True),
    "apgd": Kind(("steps", "restarts", "loss"), 100),
    "square": Kind(("steps", "restarts"), 500, cost=1, norms=("linf",), iterated=False),
}
OF_FOOLBOX = Kind(("steps",), 50, norms=("linf", "l2", "l1", "l0"), reference=True)


def kind_of(attack: str) -> Kind | None:
    """The attack of that name; None where there is none. Any "foolbox:NAME" may be one: foolbox knows."""
    return OF_FOOLBOX if attack.startswith(FOOLBOX) else KINDS.get(attack)


def is_single_step(attack: str) -> bool:
    """Whether an attack takes one step of its eps and so has verdicts of its own at each."""
    if attack.startswith(FOOLBOX):
        from coss_eval.attacks import reference

        return reference.is_single_step(attack)
    return KINDS[attack].steps == 1


def run(
    params: dict[str, Any], classifier: nn.Module, batches: Iterable[Batch], batch_size: int
) -> tuple[Tensor, Verdicts]:
    """The ids (N,) of the images and the verdicts on them, of an attack with a cell's parameters.

    With ``second_loss``, the minimum over both losses: see ``Verdicts.minimum``.
    """
    ids, parts = [], []
    for batch in batches:
        found: Verdicts = attack(params, classifier, batch, batch_size)
        if params.get("second_loss") is not None:
            found = _with_second_loss(found, params, classifier, batch, batch_size)
        ids.append(batch.ids)
        parts.append(found)
    return torch.cat(ids or [torch.empty(0, dtype=torch.int64)]), Verdicts.joined(parts)


def attack(params: dict[str, Any], classifier: nn.Module, batch: Batch, batch_size: int) -> attacks.AttackResult:
    """One batch under one attack."""
    name = params["attack"]
    options: dict[str, Any] = {
        "classifier": classifier,
        "images": to_float(batch.images),
        "labels": batch.labels,
        "eps": params["eps"],
        "batch_size": batch_size,
    }
    if name.startswith(FOOLBOX):
        options |= {"steps": params["steps"]} if params["steps"] is not None else {}
        return attacks.foolbox_attack(name, seed=params["seed"], **options)
    kind = KINDS[name]
    options |= {option: params[option] for option in kind.options}
    options |= {"norm": params["norm"]} if len(kind.norms) > 1 else {}
    options |= {"backend": params["backend"]} if kind.reference else {}
    options |= {"ids": batch.ids, "seed": params["seed"]} if kind.random else {}
    method: Callable[..., attacks.AttackResult] = getattr(attacks, name)
    return method(**options)


def _with_second_loss(
    found: Verdicts, params: dict[str, Any], classifier: nn.Module, batch: Batch, batch_size: int
) -> Verdicts:
    def again(eps: float, rows: Tensor) -> Tensor:
        some = Batch(*(tensor[rows] for tensor in batch))
        changed = params | {"eps": [eps], "loss": params["second_loss"]}
        return attack(changed, classifier, some, batch_size).robust[0]

    return found.minimum(again)
