"""The doors: a task, a corruption, an attack, a method and a checkpoint layout, each one file, through the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from coss_eval import attacks, tasks
from coss_eval.checkpoints.load import make_model, save_model
from coss_eval.cli.app import app
from coss_eval.corruptions.registry import CORRUPTIONS
from coss_eval.models.architecture import Architecture
from coss_eval.store import Store

TASK = '''
from dataclasses import dataclass

import numpy as np

from coss_eval.store import Cell
from coss_eval.tasks.task import Result, Task


@dataclass(frozen=True)
class Mirror(Task):
    """Accuracy on mirrored images."""

    name = "mirror"

    def cells(self, subject, seed):
        return [Cell(self.name, {})]

    def measure(self, cell, subject):
        ids, right = [], []
        for batch in subject.batches():
            logits = subject.classifier(batch.images.flip(-1).float() / 255)
            ids += batch.ids.tolist()
            right += (logits.argmax(1) == batch.labels).tolist()
        return Result.of_verdicts("accuracy", np.array(ids), [({"mirrored": 1}, np.array(right))])
'''

CORRUPTION = '''
def darker(images, condition, draws):
    """By a tenth more at each severity."""
    return images.float() * (1 - 0.1 * condition.severity)
'''

ATTACK = '''
from dataclasses import dataclass

from coss_eval.attacks import Stepwise, attack


@attack
@dataclass(frozen=True, kw_only=True)
class Signs(Stepwise):
    """Steps of eps / 4 along the gradient's sign (a test's)."""

    name = "signs"
    about = "steps of eps / 4 along the gradient's sign (a test's)"
    norms = ("linf",)
    random = False
    steps: int = 3

    def advance(self, view, memory):
        return self.ball.project(view.pixels + view.eps / 4 * view.gradient.sign(), view.clean, view.eps)
'''

METHOD = '''
from dataclasses import dataclass

from torch import nn

from coss_eval.training.method import Comparison, Heads, Method


class SquaredDistance(Comparison):
    def forward(self, online, target, index):
        return (online - target[index]).square().mean()


@dataclass(frozen=True, kw_only=True)
class Regression(Method):
    """The other view's projection by a linear map."""

    out: int = 8

    def heads(self, dim):
        return Heads(nn.Linear(dim, self.out), nn.Linear(self.out, self.out))

    def comparison(self):
        return SquaredDistance()
'''

LAYOUT = """
from coss_eval.checkpoints.layouts import Layout

BRAIN = Layout("a brain", {"online": ("brain.",)})
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes the one file, mine.py, into the current folder, beside a small network; what it registers is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "_REGISTERED", {})
    before = dict(attacks.ATTACKS), dict(CORRUPTIONS)
    save_model(make_model("resnet18", stem="cifar", width=4), tmp_path / "small.safetensors")
    yield lambda text: (tmp_path / "mine.py").write_text(text) and None
    for registry, known in zip((attacks.ATTACKS, CORRUPTIONS), before, strict=True):
        registry.clear()
        registry.update(known)
    sys.modules.pop("mine", None)


def command(*words: str) -> int:
    code: int = app(words, result_action="return_value")
    return code


def measured(task: str) -> list[dict[str, object]]:
    """A task's conditions in the results of the command, which has a section for it in the report."""
    assert f"## {task.capitalize()}" in Path("out/report.md").read_text()
    records = [record for record in Store(Path("out")).records() if record["task"] == task]
    return [dict(m["condition"]) for record in records for m in record["measurements"]]


RUN = ("--ckpt", "small.safetensors", "--limit", "40", "--out", "out", "--quiet")


@pytest.mark.slow
def test_a_task(write: Callable[[str], None]) -> None:
    write(TASK)
    assert command("evaluate", "--tasks", "mine:Mirror", *RUN) == 0
    assert {"mirrored": 1} in measured("mirror")
    assert any(Path("out/figures").glob("mirror*.png"))


@pytest.mark.slow
def test_a_corruption(write: Callable[[str], None]) -> None:
    write(CORRUPTION)
    assert command("corruptions", "--names", "fog", "mine:darker", "--severities", "2", *RUN) == 0
    assert {"corruption": "darker", "severity": 2} in measured("corruptions")
    assert "darker" in Path("out/report.md").read_text()


@pytest.mark.slow
def test_an_attack(write: Callable[[str], None]) -> None:
    write(ATTACK)
    assert command("attacks", "--attack", "mine:Signs", "--eps", "1/255", *RUN) == 0
    assert {"attack": "mine:Signs", "norm": "linf", "eps": 1 / 255} in measured("attacks")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mine:Regression", "co-mine:Regression"])
def test_a_method(method: str, write: Callable[[str], None]) -> None:
    write(METHOD)
    options = ("--preset", "digits-tiny", "--epochs", "1", "--width", "4", "--out", "made")
    assert command("train", "--method", method, *options) == 0
    assert command("probe", "--ckpt", "made/model.safetensors", *RUN[2:]) == 0


@pytest.mark.slow
def test_a_layout(write: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    write(LAYOUT)
    network = Architecture("resnet18", "cifar", 4).network(0)
    torch.save({f"brain.{key}": value for key, value in network.state_dict().items()}, "brain.pth")
    words = ("probe", "--ckpt", "brain.pth", "--file-layout", "mine:BRAIN", "--limit", "40", "--out", "out")
    assert command(*words) == 0
    assert "a brain" in capsys.readouterr().out
