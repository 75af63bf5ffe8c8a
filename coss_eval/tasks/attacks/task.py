"""Robust accuracy under attacks of the pixels over a rising list of eps: one cell an attack and norm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from coss_eval.attacks import ATTACKS, Attack, Foolbox, attack_named
from coss_eval.attacks.inputs import check_count, check_eps, check_step_size
from coss_eval.attacks.losses import parse_losses
from coss_eval.errors import UsageError
from coss_eval.store import Cell
from coss_eval.tasks.attacks import CHECKED, AttacksOptions, representation
from coss_eval.tasks.attacks.calls import CHUNK, attack_of, run
from coss_eval.tasks.attacks.checks import QUERIES, masking_lines, strength_sensitivity
from coss_eval.tasks.attacks.images import attacked_split, bounded_note, checked_count
from coss_eval.tasks.task import Result, SplitName, Subject, Task

DEFAULTS = {"restarts": 1, "loss": "ce", "second_loss": None, "checked_images": CHECKED}
"""What cells were before these parameters were added: left out of their keys."""
SWEPT, EACH_ALONE = 1, 2
"""Algorithm versions. Of attacks that iterate, whose balls are nested, an image broken at one eps counts as broken at
all larger ones; attacks of one step are run at each eps for itself (until version 2 they were swept, too)."""


@dataclass(frozen=True)
class Attacks(AttacksOptions, Task):
    """See AttacksOptions. One cell per attack and norm; of ``target`` "representation", one per norm.

    Measured, flags and strengths take 0.4 of the plain attack's own time through a probe, and 0.06 of it through an own
    head.
    """

    name: ClassVar[str] = "attacks"

    @property
    def uses_head(self) -> bool:
        return self.target == "label"

    def __post_init__(self) -> None:
        for norm, levels in self.eps.items():
            if max(check_eps(levels, norm)) == 0:
                raise UsageError("eps 0 is the clean accuracy, which is measured beside every attack; give one above 0")
        above = {norm: tuple(e for e in levels if e > 0) for norm, levels in self.eps.items()}
        object.__setattr__(self, "eps", above if any(0 in levels for levels in self.eps.values()) else self.eps)
        for name in ("steps", "restarts", "images"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_step_size(self.step_size)
        if self.loss != "auto":
            parse_losses(self.loss, 1000, targeted=False)
        if self.target == "representation":
            representation.check(self)
        object.__setattr__(self, "attacks", tuple(self._checked(*pair) for pair in self.attacks))
        for option, default in (("steps", None), ("step_size", None), ("restarts", 1), ("loss", "auto")):
            taken = any(option in attack_named(name).options for name, _ in self.attacks)
            if getattr(self, option) != default and not taken:
                takers = ", ".join(name for name in ATTACKS if option in attack_named(name).options)
                raise UsageError(f"none of the attacks takes {option}; these do: {takers}")

    def _checked(self, attack: str, norm: str) -> tuple[str, str]:
        """The pair, a foolbox attack's norm filled in; a UsageError for what there is not."""
        named = attack_named(attack)
        if isinstance(named, Foolbox) and self.backend != "reference":
            raise UsageError(f"attack {attack} is the reference backend's; add --backend reference")
        if self.backend == "reference" and not named.in_foolbox:
            known = ", ".join(name for name, kind in ATTACKS.items() if kind.in_foolbox)
            raise UsageError(f"the reference backend has no {attack}; it has {known} and any foolbox:NAME")
        if not norm or isinstance(named, Foolbox):
            norm = named.norm
        if norm not in named.norms:
            raise UsageError(f"unknown attack {attack}:{norm}; {attack} takes {' or '.join(named.norms)}")
        if norm not in self.eps:
            raise UsageError(f"attack {attack} counts eps in {norm}: give its list of eps, there is none by default")
        return attack, norm

    def cells(self, subject: Subject, seed: int) -> list[Cell]:
        if self.target == "representation":
            return representation.cells(self, subject, seed)
        through_probe = subject.head_protocol()["head"] == "probe"
        cells = []
        for name, norm in self.attacks:
            attack = self._made(name, norm)
            params: dict[str, Any] = {"attack": name, "norm": norm, "eps": list(self.eps[norm])}
            params |= {"backend": self.backend, "images": self.images, "seed": seed}
            params |= self._options(attack, through_probe and len(subject.data.classes) > 2)
            params["checked_images"] = self.checked_images
            params |= {} if attack.code is None else {"code": attack.code}
            version = EACH_ALONE if attack.single_step else SWEPT
            cells.append(Cell(self.name, params, version, defaults=DEFAULTS))
        return cells

    def _made(self, name: str, norm: str) -> Attack:
        """The attack with those of the task's options that it takes and that were given."""
        attack = attack_named(name)
        given = {option: getattr(self, option) for option in attack.options}
        if self.loss == "auto":
            given.pop("loss", None)
        return replace(attack, norm=norm, **{option: value for option, value in given.items() if value is not None})

    def _options(self, attack: Attack, ensemble: bool) -> dict[str, Any]:
        """The parameters that an attack takes; ``ensemble``: both losses, where none was asked for."""
        options: dict[str, Any] = {option: getattr(attack, option) for option in attack.options}
        if "loss" in options:
            both = ensemble and self.loss == "auto" and self.backend == "native"
            options["second_loss"] = "dlr" if both else None
        return options

    def forwards(self, cell: Cell, subject: Subject) -> float:
        """No image broken before the last step: more than it will be."""
        if self.target == "representation":
            return representation.forwards(cell, subject)
        params, attack = cell.params, attack_of(cell.params)
        images = min(len(subject.data.test), params["images"] or len(subject.data.test))
        attempts = len(params["eps"]) * params.get("restarts", 1) + (params.get("second_loss") is not None)
        checks = checked_count(params, images) * QUERIES * attack.iterated
        return float(attack.forwards * images * attempts + checks)

    def reads(self, subject: Subject) -> list[SplitName]:
        return ["train"] if self.target == "representation" else super().reads(subject)

    def measure(self, cell: Cell, subject: Subject) -> Result:
        if self.target == "representation":
            return representation.measure(cell, subject)
        params, split = cell.params, attacked_split(subject, cell.params)
        size = subject.compute.batch_size
        ids, verdicts = run(params, subject.classifier, subject.batches(split, batch_size=CHUNK), size)
        condition = {"attack": params["attack"], "norm": params["norm"]}
        rows = np.vstack([verdicts.clean.cpu().numpy()[None], verdicts.robust.cpu().numpy()])  # (1 + E, N)
        levels = [0.0, *params["eps"]]
        conditions = [condition | {"eps": eps} for eps in levels]
        result = Result.of_verdicts("robust_accuracy", ids.cpu().numpy(), zip(conditions, rows, strict=True))
        result.notes += bounded_note(split, subject)
        if count := checked_count(params, len(split)):
            few = split.limited(count, params["seed"])
            result.notes += masking_lines(params, subject, few, ids, verdicts)
            if params["attack"] == "pgd" and params["second_loss"] is not None:
                result.measurements += strength_sensitivity(params, subject, few)
        return result
