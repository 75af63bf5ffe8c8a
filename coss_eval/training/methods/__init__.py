"""The methods by name. "co-byol" is byol with the CO term beside it; the prefix goes with all but supervised."""

from __future__ import annotations

from typing import Any

from coss_eval.errors import UsageError, unknown_name
from coss_eval.training.fields import build
from coss_eval.training.methods.barlow import BarlowTwins
from coss_eval.training.methods.byol import BYOL
from coss_eval.training.methods.dino import DINO
from coss_eval.training.methods.method import Comparison as Comparison
from coss_eval.training.methods.method import Heads as Heads
from coss_eval.training.methods.method import Method as Method
from coss_eval.training.methods.mocov3 import MoCoV3
from coss_eval.training.methods.simclr import SimCLR
from coss_eval.training.methods.simsiam import SimSiam
from coss_eval.training.methods.supervised import Supervised
from coss_eval.training.methods.vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (BYOL, DINO, MoCoV3, SimCLR, SimSiam, VICReg, BarlowTwins, Supervised)
}

PREFIX = "co-"


def names() -> list[str]:
    """Every name that ``split_name`` takes."""
    return [*METHODS, *(PREFIX + name for name, method in METHODS.items() if method.targets != "labels")]


def split_name(name: str) -> tuple[str, bool]:
    """The base method, and whether the CO term is asked for: "co-byol" is ("byol", True)."""
    if name not in names():
        if name.removeprefix(PREFIX) in METHODS:
            raise UsageError(f"{name}: the CO term compares two views, which {name.removeprefix(PREFIX)} does not")
        raise unknown_name("method", name, names())
    return name.removeprefix(PREFIX), name.startswith(PREFIX)


def make_method(name: str, **overrides: Any) -> Method:
    """The method of that name ("byol" and "co-byol" alike), its hyper-parameters replaced by ``overrides``."""
    base, _ = split_name(name)
    return build(METHODS[base], overrides, f"field of {base}")
