"""Robust accuracy, and how far the representation moves, under adversarial attacks."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction as Ratio
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from coss_eval.attacks.names import named_pair
from coss_eval.tasks.entry import TaskEntry
from coss_eval.tasks.flags import BackendFlag, Fraction, numbers

LINF_EPS = tuple(e / 255 for e in (0.25, 0.5, 1, 2, 4, 8))
L2_EPS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
CHECKED = 200

Pairs = tuple[tuple[str, str], ...]
EpsByNorm = dict[str, tuple[float, ...]]


def default_eps() -> EpsByNorm:
    return {"linf": LINF_EPS, "l2": L2_EPS}


def pairs(names: tuple[str, ...]) -> Pairs:
    """Attacks with their norms from "pgd:l2", "pgd" (linf) and "foolbox:NAME" (its own norm)."""
    return tuple(map(named_pair, names))


def _pairs(_type: Any, tokens: Any) -> Pairs:
    return pairs(tuple(token.value for token in tokens))


def _eps(_type: Any, tokens: Any) -> EpsByNorm:
    """--eps-l2 gives the list of l2; --eps that of linf, and of the norms that only foolbox's attacks have."""
    given: dict[bool, list[str]] = {}
    for token in tokens:
        given.setdefault("l2" in token.keyword, []).append(token.value)
    found = default_eps()
    if False in given:
        found |= dict.fromkeys(("linf", "l1", "l0"), numbers(given[False]))
    return found | ({"l2": numbers(given[True])} if True in given else {})


def _shown_pairs(value: Pairs) -> str:
    return " ".join(f"{attack}:{norm}" for attack, norm in value)


def _shown_eps(value: EpsByNorm) -> str:
    linf, l2 = (" ".join(f"{255 * e:g}/255" for e in value["linf"]), " ".join(str(Ratio(e)) for e in value["l2"]))
    return f"{linf}; {l2}"


_LIST = Parameter(consume_multiple=1, n_tokens=-1)


@dataclass(frozen=True)
class AttacksOptions:
    """Robust accuracy under adversarial attacks over a rising list of eps, with gradient-masking flags.

    FGSM (Goodfellow et al. 2015), PGD (Madry et al. 2018), APGD and Square (Croce and Hein 2020; Andriushchenko et al.
    2020) and any of foolbox's. Undefended networks break at once at 8/255, so eps starts far below. An image that an
    iterated attack broke at one eps counts as broken at all larger ones.
    """

    attacks: Annotated[Pairs, _LIST, Parameter(name="--attack", converter=_pairs, show_default=_shown_pairs)] = (
        ("fgsm", "linf"),
        ("pgd", "linf"),
        ("pgd", "l2"),
    )
    """NAME:NORM of coss-eval list attacks (linf, l2; square linf), package.module:Class for one of your own, with
    :NORM or in its usual norm, or with --backend reference foolbox:NAME, any of foolbox, in its own norm."""
    eps: Annotated[
        EpsByNorm,
        _LIST,
        Parameter(name=("--eps", "--eps-l2"), converter=_eps, accepts_keys=False, show_default=_shown_eps),
    ] = field(default_factory=default_eps)
    """Rising list in pixels of [0, 1]; 8/255 is understood. --eps is for linf (and foolbox's l1 and l0), --eps-l2 for
    attacks in the Euclidean norm."""
    steps: int | None = None
    "Of each attack that takes them [default: pgd 20, bim 10, apgd 100, square 500 queries]."
    step_size: Fraction = None
    "Of pgd and bim [default: 2.5 eps / steps]."
    images: int | None = 1000
    "Number of test images to attack (seeded, balanced over classes); it is stored and shown with the numbers."
    backend: BackendFlag = "native"
    restarts: int = 1
    "Of pgd, apgd and square; an image counts as right if it stands in all."
    loss: Literal["auto", "ce", "dlr", "ce+dlr"] = "auto"
    """auto is ce with a network's own head. Through a linear probe, whose regularisation sets the margins, it is the
    minimum over ce and dlr, and PGD at the middle eps is repeated with probes one step weaker and stronger."""
    checked_images: int = CHECKED
    """Most images to use for the gradient-masking flags (a fifth of the attacked ones, no more than this; 0 for no
    flags), half of them for the probe's strengths."""
    target: Literal["label", "representation"] = "label"
    """representation moves the global representation as far as it can from the clean one, without labels or a head
    (PGD; linf and l2), and reads a linear probe and kNN from it."""


ENTRY = TaskEntry(
    name="attacks",
    about="robust accuracy under FGSM and PGD over rising eps",
    source="Goodfellow et al. 2015; Madry et al. 2018; Croce and Hein 2020",
    options=AttacksOptions,
    home="coss_eval.tasks.attacks.task:Attacks",
    order=30,
    quick={"images": 100, "steps": 10},
    small={"eps": {"linf": (1 / 255,), "l2": (0.1,)}, "steps": 2, "checked_images": 0},
)
