"""Adversarial attacks on any classifier from pixels in [0, 1] to logits.

``foolbox_attack`` is resolved on first use, so that the native attacks do not import foolbox.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coss_eval.attacks.api import apgd, bim, fgsm, pgd, square
from coss_eval.attacks.checks import Flag, masking_flags, usage_flags
from coss_eval.attacks.representation import RepresentationResult, representation
from coss_eval.attacks.result import AttackResult, Verdicts

if TYPE_CHECKING:
    from coss_eval.attacks.reference import foolbox_attack

__all__ = [
    "AttackResult",
    "Flag",
    "RepresentationResult",
    "Verdicts",
    "apgd",
    "bim",
    "fgsm",
    "foolbox_attack",
    "masking_flags",
    "pgd",
    "representation",
    "square",
    "usage_flags",
]


def __getattr__(name: str) -> Any:
    if name != "foolbox_attack":
        raise AttributeError(f"module 'coss_eval.attacks' has no attribute {name!r}")
    from coss_eval.attacks.reference import foolbox_attack

    return foolbox_attack
