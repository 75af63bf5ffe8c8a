"""The attack on the representation as a task: farther with eps, no labels needed, read by a probe and by kNN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small_subjects import digits, subject

from coss_eval.errors import UsageError
from coss_eval.tasks.attacks.task import Attacks
from coss_eval.tasks.task import Result, Subject

EPS = {"linf": (0.02, 0.1), "l2": (0.5, 2.0)}


def measured(norm: str, on: Subject) -> Result:
    (cell,) = (task := Attacks((("pgd", norm),), EPS, steps=4, images=24, target="representation")).cells(on, seed=0)
    return task.measure(cell, on)


def curve(result: Result, metric: str, attack: str) -> list[float]:
    return [m.value for m in result.measurements if (m.metric, m.condition["attack"]) == (metric, attack)]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_moves_farther_with_eps_and_accuracy_falls(norm: str) -> None:
    result = measured(norm, subject("probe"))
    moved, cosine = (curve(result, metric, "representation") for metric in ("moved", "cosine"))
    assert moved[0] == 0 < moved[1] < moved[2]
    assert cosine[0] == pytest.approx(1, abs=1e-5)
    assert cosine[2] < cosine[0]
    for reader in ("probe", "knn"):
        accuracy = curve(result, "robust_accuracy", f"representation:{reader}")
        assert len(accuracy) == 3
        assert (np.diff(accuracy) <= 0).all()
        assert accuracy[0] > 0.25  # chance is 0.1


def test_it_needs_neither_labels_nor_a_training_split() -> None:
    data = digits()
    unlabelled = replace(data, train=None, test=replace(data.test, labels=np.zeros_like(data.test.labels)))
    alone = Subject(subject("probe").model, unlabelled, subject("probe").compute)
    task = Attacks((("pgd", "linf"),), EPS, steps=3, images=None, target="representation")
    results = [task.measure(task.cells(on, 0)[0], on) for on in (alone, subject("probe"))]
    assert curve(results[0], "moved", "representation") == curve(results[1], "moved", "representation")
    assert not curve(results[0], "robust_accuracy", "representation:knn")
    assert any("no training split" in note for note in results[0].notes)
    assert task.uses_head is False


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attacks": (("bim", "linf"),)}, "--attack bim"),
        ({"attacks": (("fgsm", "linf"),)}, "add --attack pgd:linf"),
        ({"loss": "dlr"}, "--loss dlr"),
        ({"backend": "reference"}, "--backend reference"),
        ({"eps": {"linf": (0.2, 0.1)}}, "rising"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(given: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"attacks": (("pgd", "linf"),), "target": "representation"}
    with pytest.raises(UsageError, match=message):
        Attacks(**options | given)
