"""Attacks as a task: every attack and norm through every head, keys that do not move, flags, the probe's share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_subjects import subject

from coss_eval.attacks import Verdicts
from coss_eval.errors import UsageError
from coss_eval.store import Cell, Store, column_name
from coss_eval.tasks.attacks import L2_EPS, LINF_EPS, pairs
from coss_eval.tasks.attacks.task import Attacks
from coss_eval.tasks.task import Result

EPS = {"linf": (0.1 / 255, 2 / 255), "l2": (0.01, 0.5)}
PAIRS = [
    *((name, norm) for name in ("fgsm", "bim", "pgd", "apgd") for norm in ("linf", "l2")),
    ("square", "linf"),
    ("foolbox:LinfDeepFoolAttack", "linf"),
    ("foolbox:L2FastGradientAttack", "l2"),
]


def measured(head: str, attack: str, norm: str, **options: Any) -> Result:
    options = {"eps": EPS, "images": 30, "checked_images": 0} | options
    if attack.startswith("foolbox:"):
        options["backend"] = "reference"
    (cell,) = (task := Attacks(((attack, norm),), **options)).cells(subject(head), seed=0)
    return task.measure(cell, subject(head))


def verdicts(result: Result, attack: str, norm: str) -> Any:
    """bool (1 + E, N), by rising eps."""
    names = ({"attack": attack, "norm": norm, "eps": eps} for eps in (0.0, *EPS[norm]))
    return np.stack([result.samples[column_name("robust_accuracy", name)] for name in names])


@pytest.mark.parametrize(("attack", "norm"), PAIRS)
def test_every_attack_measures_a_monotone_curve(attack: str, norm: str) -> None:
    steps = {"square": 100, "apgd": 20}.get(attack)
    stands = verdicts(result := measured("own", attack, norm, steps=steps), attack, norm)
    assert stands.shape == (3, 30)
    assert (stands[1:] <= stands[0]).all()
    if attack != "fgsm":  # which has a verdict of its own at each eps
        assert (stands[1:] <= stands[:-1]).all()
    assert stands[0].mean() > 0.4
    assert stands[-1].mean() < stands[0].mean() - 0.2
    assert all(m.low <= m.value <= m.high for m in result.measurements)
    assert any("30 of 60" in note for note in result.notes)


def test_keys_of_default_cells_are_those_of_the_first_version_but_for_fgsm_which_is_no_longer_swept() -> None:
    store, (fgsm, pgd, _) = Store("unused"), Attacks().cells(subject("own"), seed=3)
    first = {"norm": "linf", "eps": list(LINF_EPS), "backend": "native", "images": 1000, "seed": 3}
    assert store.key({}, fgsm) == store.key({}, Cell("attacks", {"attack": "fgsm", **first}, 2))
    steps = {"steps": 20, "step_size": None}
    assert store.key({}, pgd) == store.key({}, Cell("attacks", {"attack": "pgd", **first, **steps}))


@pytest.mark.parametrize(
    "option", [{"steps": 21}, {"step_size": 0.01}, {"restarts": 2}, {"loss": "dlr"}, {"loss": "ce+dlr"}, {"images": 7}]
)
def test_every_option_is_in_the_key(option: dict[str, Any]) -> None:
    keys = {Store("unused").key({}, Attacks(**given).cells(subject("own"), 0)[1]) for given in ({}, option)}
    assert len(keys) == 2


def test_through_a_probe_the_verdict_is_the_minimum_over_both_losses() -> None:
    options = {"steps": 3, "images": 60}
    parts = {
        loss: verdicts(measured("probe", "pgd", "linf", loss=loss, **options), "pgd", "linf") for loss in ("ce", "dlr")
    }
    both = verdicts(measured("probe", "pgd", "linf", **options), "pgd", "linf")
    assert (both <= parts["ce"]).all()
    assert (both[1:] <= both[:-1]).all()
    # dlr is tried at the largest eps that an image withstood, so at each eps no more than its own sweep breaks
    assert (both >= parts["ce"] & parts["dlr"]).all()
    assert (both[-1] == (parts["ce"] & parts["dlr"])[-1]).mean() > 0.95
    own, probe = (Attacks().cells(subject(head), 0)[1].params for head in ("own", "probe"))
    assert (own["second_loss"], probe["second_loss"]) == (None, "dlr")


@pytest.mark.slow
def test_the_strength_of_the_probe_is_varied() -> None:
    result = measured("probe", "pgd", "linf", steps=3, checked_images=10)
    rows = [m for m in result.measurements if m.metric == "robust_accuracy_by_strength"]
    assert [m.condition["strength"] for m in rows[::2]] == ["chosen / 3.2", "chosen", "chosen x 3.2"]
    assert {m.condition["eps"] for m in rows} == {0.0, EPS["linf"][0]}
    assert {m.n for m in rows} == {3}
    assert all(attacked.value <= clean.value for clean, attacked in zip(rows[::2], rows[1::2], strict=True))


def test_flags_are_raised_where_gradients_are_masked_and_only_there() -> None:
    options = {"images": 60, "checked_images": 200, "eps": {"linf": (2 / 255, 16 / 255), "l2": (1.0,)}}
    honest, masked = (measured(head, "pgd", "linf", **options).notes for head in ("own", "rounded"))
    assert [note for note in honest if "none raised" in note]
    assert not [note for note in honest if "MASKING FLAG" in note]
    masked = [note for note in masked if "MASKING FLAG" in note]
    assert any("zero gradients" in note for note in masked)
    assert any("square stronger" in note for note in masked)
    assert all("n = 12" in note and "\n" not in note for note in masked)


def test_a_network_without_gradients_is_named() -> None:
    with pytest.raises(UsageError, match="not differentiable"):
        measured("detached", "pgd", "linf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": (("pgdd", "linf"),)}, "pgd"),
        ({"attacks": (("pgd", "l3"),)}, "pgd:l3"),
        ({"attacks": (("square", "l2"),)}, "linf"),
        ({"attacks": (("foolbox:LinfDeepFoolAttack", ""),)}, "--backend reference"),
        ({"attacks": (("foolbox:LinfDeepFool", ""),), "backend": "reference"}, "LinfDeepFoolAttack"),
        ({"attacks": (("foolbox:L1FMNAttack", ""),), "backend": "reference"}, "eps in l1"),
        ({"attacks": (("bim", "linf"),), "backend": "reference"}, "no bim"),
        ({"attacks": (("fgsm", "linf"),), "restarts": 2}, "none of the attacks takes restarts"),
        ({"eps": {"linf": (0.2, 0.1), "l2": (1.0,)}}, "rising"),
        ({"eps": {"linf": (-0.1,), "l2": (1.0,)}}, "0 or more"),
        ({"eps": {"linf": (1.5,), "l2": (1.0,)}}, "8/255"),
        ({"steps": 0}, "steps of 1"),
        ({"step_size": -1.0}, "step_size above 0"),
        ({"loss": "mse"}, "ce"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Attacks(**options)
    assert "\n" not in str(caught.value)


def test_names_on_the_command_line() -> None:
    assert pairs(("pgd", "apgd:l2")) == (("pgd", "linf"), ("apgd", "l2"))
    assert Attacks(pairs(("foolbox:L2FastGradientAttack",)), backend="reference").attacks[0][1] == "l2"
    assert Attacks().eps == {"linf": LINF_EPS, "l2": L2_EPS}


def test_the_minimum_tries_each_image_from_its_largest_eps_downwards() -> None:
    robust = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    truth = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)  # by the second attack
    tried = []

    def again(eps: float, rows: torch.Tensor) -> torch.Tensor:
        tried.extend((eps, int(row)) for row in rows)
        return truth[round(eps) - 1, rows]

    first = Verdicts("pgd", "linf", (1.0, 2.0, 3.0), torch.tensor([True, True, True, False]), robust)
    assert torch.equal(first.minimum(again).robust, robust & truth)
    assert sorted(tried) == [(1.0, 0), (1.0, 1), (1.0, 2), (2.0, 0), (2.0, 1), (3.0, 0)]
