"""Robust accuracy under attacks of the pixels over a rising list of eps: one cell an attack and norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from coss_eval.attacks import ATTACKS, Attack, Foolbox, attack_named
from coss_eval.attacks.inputs import check_count, check_eps, check_step_size
from coss_eval.attacks.losses import parse_losses
from coss_eval.attacks.names import named_pair
from coss_eval.data.split import Split
from coss_eval.errors import UsageError
from coss_eval.store import Cell
from coss_eval.tasks.attacks.calls import CHUNK, attack_of, run
from coss_eval.tasks.attacks.checks import QUERIES, masking_lines, strength_sensitivity
from coss_eval.tasks.task import Result, Subject, Task

LINF_EPS = tuple(e / 255 for e in (0.25, 0.5, 1, 2, 4, 8))
L2_EPS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
CHECKED = 200
DEFAULTS = {"restarts": 1, "loss": "ce", "second_loss": None, "checked_images": CHECKED}
"""What cells were before these parameters were added: left out of their keys."""
SWEPT, EACH_ALONE = 1, 2
"""Algorithm versions. Of attacks that iterate, whose balls are nested, an image broken at one eps counts as broken at
all larger ones; attacks of one step are run at each eps for itself (until version 2 they were swept, too)."""


@dataclass(frozen=True)
class Attacks(Task):
    """Undefended networks break at once at 8/255, so eps starts far below (Aubret et al. 2025 speak of small attacks).

    ``attacks`` pairs a name (of ``coss_eval.attacks.ATTACKS``; "package.module:Class"; foolbox:NAME with backend
    "reference") with a norm, "" for its usual one; a foolbox attack has a norm of its own. ``eps`` is by norm.
    ``steps`` None is each attack's own number; options go to the attacks that take them. ``images`` bounds the number
    of attacked images (a seeded, class-balanced subset; stored and shown with the numbers); None attacks all.

    ``loss`` "auto" climbs cross-entropy through a network's own head. Through a linear probe, whose regularisation
    sets the margins, the verdict is the minimum over cross-entropy and DLR, and PGD at the middle eps is repeated with
    probes one step weaker and stronger. ``checked_images`` (a fifth of the attacked ones, no more than this; 0 for
    none) are used for the gradient-masking flags that go into every cell's notes, half of them for the strengths.
    Measured, all of this takes 0.4 of the plain attack's own time through a probe, and 0.06 of it through an own head.
    """

    name: ClassVar[str] = "attacks"

    attacks: tuple[tuple[str, str], ...] = (("fgsm", "linf"), ("pgd", "linf"), ("pgd", "l2"))
    eps: dict[str, tuple[float, ...]] = field(default_factory=lambda: {"linf": LINF_EPS, "l2": L2_EPS})
    steps: int | None = None
    step_size: float | None = None
    images: int | None = 1000
    backend: str = "native"
    restarts: int = 1
    loss: str = "auto"
    checked_images: int = CHECKED

    def __post_init__(self) -> None:
        for norm, levels in self.eps.items():
            check_eps(levels, norm)
        for name in ("steps", "restarts", "images"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_step_size(self.step_size)
        if self.loss != "auto":
            parse_losses(self.loss, 1000, targeted=False)
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
        params, attack = cell.params, attack_of(cell.params)
        images = min(len(subject.data.test), params["images"] or len(subject.data.test))
        attempts = len(params["eps"]) * params.get("restarts", 1) + (params.get("second_loss") is not None)
        checks = checked_count(params, images) * QUERIES * attack.iterated
        return float(attack.forwards * images * attempts + checks)

    def measure(self, cell: Cell, subject: Subject) -> Result:
        params, notes = cell.params, []
        split = attacked_split(subject, params)
        if len(split) < len(subject.data.test):
            notes.append(f"attacks use {len(split)} of {len(subject.data.test)} test images, balanced over classes")
        size = subject.settings.batch_size
        ids, verdicts = run(params, subject.classifier, subject.batches(split, batch_size=CHUNK), size)
        condition = {"attack": params["attack"], "norm": params["norm"]}
        rows = np.vstack([verdicts.clean.cpu().numpy()[None], verdicts.robust.cpu().numpy()])  # (1 + E, N)
        levels = [0.0, *params["eps"]]
        conditions = [condition | {"eps": eps} for eps in levels]
        result = Result.of_verdicts("robust_accuracy", ids.cpu().numpy(), zip(conditions, rows, strict=True))
        if count := checked_count(params, len(split)):
            few = split.limited(count, params["seed"])
            result.notes += masking_lines(params, subject, few, ids, verdicts)
            if params["attack"] == "pgd" and params["second_loss"] is not None:
                result.measurements += strength_sensitivity(params, subject, few)
        result.notes = notes + result.notes
        return result


def named_attacks(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pairs from "pgd:l2", "pgd" (linf) and "foolbox:NAME" (its own norm); the default ones where none is named."""
    return tuple(map(named_pair, names)) or Attacks.attacks


def attacked_split(subject: Subject, params: dict[str, Any]) -> Split:
    """The test images that a cell attacks."""
    split = subject.data.test
    return split if params["images"] is None else split.limited(params["images"], params["seed"])


def checked_count(params: dict[str, Any], images: int) -> int:
    """How many of ``images`` attacked ones the checks use: a fifth, so that they never cost more than the attack."""
    most: int = params["checked_images"]
    return min(most, -(-images // 5))
