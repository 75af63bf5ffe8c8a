"""Adversarial attacks on any classifier from pixels in [0, 1] to logits.

Importing the package imports no torch, so that the attacks can be listed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from coss_eval.attacks.attack import ATTACKS as ATTACKS
from coss_eval.attacks.attack import Attack as Attack
from coss_eval.attacks.attack import Stepwise as Stepwise
from coss_eval.attacks.attack import attack as attack
from coss_eval.attacks.gradient import APGD as APGD
from coss_eval.attacks.gradient import BIM as BIM
from coss_eval.attacks.gradient import FGSM as FGSM
from coss_eval.attacks.gradient import PGD as PGD
from coss_eval.attacks.names import attack_named as attack_named
from coss_eval.attacks.of_foolbox import Foolbox as Foolbox
from coss_eval.attacks.square import Square as Square

if TYPE_CHECKING:
    from coss_eval.attacks.api import fgsm as fgsm
    from coss_eval.attacks.api import pgd as pgd
    from coss_eval.attacks.checks import Flag as Flag
    from coss_eval.attacks.checks import masking_flags as masking_flags
    from coss_eval.attacks.checks import usage_flags as usage_flags
    from coss_eval.attacks.displacement import RepresentationResult as RepresentationResult
    from coss_eval.attacks.displacement import representation as representation
    from coss_eval.attacks.result import AttackResult as AttackResult
    from coss_eval.attacks.result import Verdicts as Verdicts

_HOME = {
    "fgsm": "api",
    "pgd": "api",
    "Flag": "checks",
    "masking_flags": "checks",
    "usage_flags": "checks",
    "RepresentationResult": "displacement",
    "representation": "displacement",
    "AttackResult": "result",
    "Verdicts": "result",
}

__all__ = [
    "APGD",
    "ATTACKS",
    "BIM",
    "FGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "Flag",
    "Foolbox",
    "RepresentationResult",
    "Square",
    "Stepwise",
    "Verdicts",
    "attack",
    "attack_named",
    "fgsm",
    "masking_flags",
    "pgd",
    "representation",
    "usage_flags",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'coss_eval.attacks' has no attribute {name!r}")
    return getattr(import_module(f"coss_eval.attacks.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
