"""Robust accuracy under FGSM and PGD over a rising list of eps: one cell an attack and norm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from coss_eval import attacks
from coss_eval.attacks.inputs import check_eps
from coss_eval.attacks.result import AttackResult
from coss_eval.data.batches import Batch
from coss_eval.errors import UsageError
from coss_eval.models.classifier import to_float
from coss_eval.store import Cell
from coss_eval.tasks.task import Result, Subject, Task

LINF_EPS = tuple(e / 255 for e in (0.25, 0.5, 1, 2, 4, 8))
L2_EPS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
ATTACKS = ("fgsm", "pgd")
CHUNK = 1024  # images handed to an attack at once, from which it keeps its batches full


@dataclass(frozen=True)
class Attacks(Task):
    """Undefended networks break at once at 8/255, so eps starts far below (Aubret et al. 2025 speak of small attacks).

    ``images`` bounds the number of attacked images (a seeded, class-balanced subset; stored and shown with the
    numbers); None attacks all.
    """

    name: ClassVar[str] = "attacks"

    attacks: tuple[tuple[str, str], ...] = (("fgsm", "linf"), ("pgd", "linf"), ("pgd", "l2"))
    eps: dict[str, tuple[float, ...]] = field(default_factory=lambda: {"linf": LINF_EPS, "l2": L2_EPS})
    steps: int = 20
    step_size: float | None = None
    images: int | None = 1000
    backend: str = "native"

    def __post_init__(self) -> None:
        for norm, levels in self.eps.items():
            check_eps(levels, norm)
        for attack, norm in self.attacks:
            if attack not in ATTACKS or norm not in self.eps:
                raise UsageError(f"unknown attack {attack}:{norm}; known: {', '.join(ATTACKS)} with linf or l2")

    def cells(self, subject: Subject, seed: int) -> list[Cell]:
        cells = []
        for attack, norm in self.attacks:
            params: dict[str, Any] = {
                "attack": attack,
                "norm": norm,
                "eps": list(self.eps[norm]),
                "backend": self.backend,
            }
            params |= {"images": self.images, "seed": seed}
            if attack == "pgd":
                params |= {"steps": self.steps, "step_size": self.step_size}
            cells.append(Cell(self.name, params))
        return cells

    def forwards(self, cell: Cell, subject: Subject) -> float:
        images = min(len(subject.data.test), cell.params["images"] or len(subject.data.test))
        steps: int = cell.params.get("steps", 1)
        return 3.0 * images * len(cell.params["eps"]) * steps

    def measure(self, cell: Cell, subject: Subject) -> Result:
        params, split = cell.params, subject.data.test
        notes = []
        if params["images"] is not None and params["images"] < len(split):
            split = split.limited(params["images"], params["seed"])
            notes.append(f"attacks use {len(split)} of {len(subject.data.test)} test images, balanced over classes")
        ids, clean, robust = [], [], []
        for batch in subject.batches(split, batch_size=CHUNK):
            result = _attack(cell, subject, batch)
            ids.append(batch.ids.cpu().numpy())
            clean.append(result.clean.cpu().numpy())
            robust.append(result.robust.cpu().numpy())  # (E, B)
        verdicts = np.vstack([np.concatenate(clean)[None], np.concatenate(robust, axis=1)])  # (1 + E, N)
        condition = {"attack": params["attack"], "norm": params["norm"]}
        levels = [0.0, *params["eps"]]
        found = Result.of_verdicts(
            "robust_accuracy",
            np.concatenate(ids),
            ((condition | {"eps": eps}, row) for eps, row in zip(levels, verdicts, strict=True)),
        )
        found.notes += notes
        return found


def _attack(cell: Cell, subject: Subject, batch: Batch) -> AttackResult:
    params, pixels = cell.params, to_float(batch.images)
    shared: dict[str, Any] = {
        "norm": params["norm"],
        "backend": params["backend"],
        "batch_size": subject.settings.batch_size,
    }
    if params["attack"] == "fgsm":
        return attacks.fgsm(subject.classifier, pixels, batch.labels, params["eps"], **shared)
    options = {"steps": params["steps"], "step_size": params["step_size"], "seed": params["seed"]}
    return attacks.pgd(subject.classifier, pixels, batch.labels, params["eps"], batch.ids, **options, **shared)
