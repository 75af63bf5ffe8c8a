"""A checkpoint of every layout goes through `coss-eval robustness`' own pipe: loaded, evaluated, reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_files import FILES, save

import coss_eval as ce
from coss_eval.data.dataset import Dataset
from coss_eval.store import Store
from coss_eval.tasks.attacks.task import Attacks
from coss_eval.tasks.corruptions.task import Corruptions
from coss_eval.tasks.internal.task import Internal
from coss_eval.tasks.probe.task import Probe
from coss_eval.tasks.redundancy.task import Redundancy

TASKS = [
    Probe(fractions=(0.1,)),
    Corruptions(("fog",), (3,)),
    Attacks(attacks=(("pgd", "linf"),), eps={"linf": (1 / 255,)}, steps=2),
    Internal(kinds=("channel",), levels=(0.5,), seeds=1),
    Redundancy(),
]


@pytest.fixture(scope="module")
def few_digits() -> Dataset:
    data = ce.load_dataset("digits")
    assert data.train is not None
    return replace(data, train=data.train.limited(60, 0), test=data.test.limited(20, 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_layout_is_evaluated_with_every_task(name: str, few_digits: Dataset, tmp_path: Path) -> None:
    save(FILES[name]().content, tmp_path / "file.pth")
    # 64 px: the global representation of an ImageNet-stem ResNet needs more than one location to be redundant
    model = ce.load_model(tmp_path / "file.pth", img_size=64, head="probe")
    run = ce.evaluate(model, few_digits, TASKS, out=tmp_path / "results", batch_size=20)
    assert run.failures == ()
    assert {record["task"] for record in Store(run.path).records()} == {task.name for task in TASKS}
    assert any(path.name == "report.md" for path in run.report())
