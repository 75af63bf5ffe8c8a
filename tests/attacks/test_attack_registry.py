"""Every registered attack declares what lists, tasks and engine need; and one of a person's own is its equal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from attacked import Digits
from torch import Tensor, nn

from coss_eval import attacks
from coss_eval.attacks.names import attack_named, named_pair
from coss_eval.errors import UsageError
from coss_eval.tasks.attacks.task import Attacks

EPS = [0.01, 0.03, 0.1]
OWN = '''
from dataclasses import dataclass
from coss_eval.attacks import PGD, Stepwise, attack

@attack
@dataclass(frozen=True, kw_only=True)
class Signs(Stepwise):
    """Steps of eps / 4 along the gradient's sign (a test's)."""

    name = "signs"
    about = "steps of eps / 4 along the gradient's sign (a test's)"
    norms = ("linf",)
    random = False
    steps: int = 10

    def advance(self, view, memory):
        return self.ball.project(view.pixels + view.eps / 4 * view.gradient.sign(), view.clean, view.eps)

class NoAttack: ...
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of one's own; what it registers is forgotten afterwards."""
    (tmp_path / "own_attacks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(attacks.ATTACKS)
    yield "own_attacks"
    attacks.ATTACKS.clear()
    attacks.ATTACKS.update(before)
    sys.modules.pop("own_attacks", None)


def test_an_attack_is_an_object_of_its_options() -> None:
    assert attacks.PGD(steps=5) == attacks.PGD(steps=5) != attacks.PGD(steps=6)
    assert attacks.PGD().options == ("steps", "step_size", "restarts", "loss")
    assert attacks.PGD(steps=7).forwards == 21
    assert attacks.Square().forwards == 500


def test_ones_own_is_swept_as_any(module: str, networks: dict[str, nn.Module], digits: Digits) -> None:
    images, labels, _ = digits
    own = attack_named(f"{module}:Signs")
    assert own == attack_named("signs")
    by_hand = attacks.BIM(steps=10, step_size=EPS[-1] / 4)(networks["perceptron"], images, labels, EPS[-1])
    result = own(networks["perceptron"], images, labels, EPS[-1])
    assert (result.attack, result.norm) == ("signs", "linf")
    assert torch.equal(result.adversarial(0), by_hand.adversarial(0))


def test_the_code_of_ones_own_is_in_its_key(module: str, tmp_path: Path) -> None:
    first = attack_named(f"{module}:Signs").code
    sys.modules.pop(module)
    (tmp_path / "own_attacks.py").write_text(OWN.replace("eps / 4", "eps / 3"))
    assert None not in (first, attack_named(f"{module}:Signs").code)
    assert first != attack_named(f"{module}:Signs").code


def test_ones_own_by_its_name_in_the_task(module: str) -> None:
    pairs = tuple(map(named_pair, ("pgd", "apgd:l2", f"{module}:Signs", f"{module}:Signs:linf", "foolbox:X", "pgd:l3")))
    assert pairs == (
        ("pgd", "linf"),
        ("apgd", "l2"),
        (f"{module}:Signs", ""),
        (f"{module}:Signs", "linf"),
        ("foolbox:X", ""),
        ("pgd", "l3"),
    )
    assert Attacks(pairs[2:3], steps=3).attacks == ((f"{module}:Signs", "linf"),)


@dataclass(frozen=True, kw_only=True)
class Fog(attacks.Stepwise):
    name = "pgd"
    about = "no attack"

    def advance(self, view: Any, memory: Any) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attack_named("pgdd"), "did you mean pgd or "),
        (lambda: attack_named("no_such_module:Signs"), "cannot import no_such_module"),
        (lambda: attack_named("own_attacks:Sings"), "did you mean Signs"),
        (lambda: attack_named("own_attacks:NoAttack"), r"derived from coss_eval\.attacks\.Attack"),
        (lambda: attacks.attack(Fog), "the package has an attack pgd already"),
        (lambda: attacks.PGD(norm="l3"), "unknown norm 'l3'"),
        (lambda: attacks.Square(norm="l2"), "unknown norm 'l2'; did you mean linf|known: linf"),
        (lambda: attacks.APGD(steps=0), "steps of 1 or more"),
        (lambda: Attacks((("own_attacks:Signs", "l2"),)), "takes linf"),
        (lambda: Attacks((("own_attacks:Signs", ""),), restarts=2), "none of the attacks takes restarts"),
        (
            lambda: Attacks((("own_attacks:Signs", ""),), backend="reference"),
            "the reference backend has no own_attacks",
        ),
    ],
)
def test_what_is_refused(call: Callable[[], Any], message: str, module: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
