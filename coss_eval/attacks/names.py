"""The attacks by name; torch-free until one is made."""

from __future__ import annotations

from coss_eval.attacks import gradient, square  # noqa: F401 (they register theirs)
from coss_eval.attacks.attack import ATTACKS, NORMS, Attack
from coss_eval.attacks.of_foolbox import PREFIX, Foolbox
from coss_eval.errors import UsageError, unknown_name
from coss_eval.runtime.imports import imported


def attack_named(name: str) -> Attack:
    """A registered attack, "foolbox:NAME" or "package.module:Class", with its own options; UsageError for others."""
    if name.startswith(PREFIX):
        return Foolbox(attack=name.removeprefix(PREFIX))
    if ":" in name:
        own = imported(name, "attack", "class")
        if not (isinstance(own, type) and issubclass(own, Attack)):
            raise UsageError(f"attack {name!r} must be a class derived from coss_eval.attacks.Attack, not {own!r}")
        return own(norm=own.norms[0])
    if name not in ATTACKS:
        raise unknown_name("attack", name, [*ATTACKS, PREFIX + "LinfDeepFoolAttack"])
    return ATTACKS[name](norm=ATTACKS[name].norms[0])


def named_pair(text: str) -> tuple[str, str]:
    """An attack and its norm from "pgd:l2", "pgd" (in linf) and "package.module:Class:l2"; "" for the attack's own."""
    attack, _, norm = text.rpartition(":")
    if attack and norm in NORMS:
        return attack, norm
    if text.partition(":")[0] in ATTACKS:  # "pgd:l3" is no module's
        return text.partition(":")[0], text.partition(":")[2] or "linf"
    return text, "" if ":" in text else "linf"


def list_lines() -> dict[str, str]:
    """Every attack with its usual norm, and what it is."""
    own = {f"{name}:{kind.norms[0]}": kind.about for name, kind in ATTACKS.items()}
    return own | {Foolbox.name: Foolbox.about, "package.module:Class": "an attack of your own, :NORM added or not"}
