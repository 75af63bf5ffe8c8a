"""A checkpoint layout in one file outside the package: named on the command line, or registered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from coss_eval.checkpoints import layouts
from coss_eval.checkpoints.layouts import Layout, register
from coss_eval.checkpoints.load import load_model, save_model
from coss_eval.cli.app import app
from coss_eval.errors import UsageError
from coss_eval.models.architecture import Architecture

OWN = """
from coss_eval.checkpoints.layouts import Layout

ROBOT = Layout(
    "Robot's memory",
    {"online": ("brain.awake.",), "target": ("brain.asleep.",)},
    default="target",
    heads=("mouth.",),
    moments=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    cifar_stem="solo-cifar",
)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of an invented layout: two networks and a head under names that no framework has."""
    networks = [Architecture("resnet18", "cifar", 8).network(seed) for seed in (1, 2)]
    for network in networks:
        network.fc = nn.Identity()
    state = {}
    for root, network in zip(("brain.awake.", "brain.asleep."), networks, strict=True):
        state |= {root + key: value for key, value in network.state_dict().items()}
    head = {f"mouth.{key}": value for key, value in nn.Linear(64, 5).state_dict().items()}
    torch.save({"age": 3, "memory": state | head}, tmp_path / "robot.pth")
    (tmp_path / "own_robot.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "robot.pth"


@pytest.fixture
def registered() -> Iterator[Layout]:
    before = list(layouts.LAYOUTS)
    yield register(Layout("Robot's", {"online": ("brain.awake.",), "target": ("brain.asleep.",)}, marks=(r"^age$",)))
    layouts.LAYOUTS[:] = before


def test_a_layout_of_ones_own_is_read(file: Path) -> None:
    model = load_model(file, file_layout="own_robot:ROBOT")
    assert model.report is not None
    assert model.layout == "Robot's memory"
    assert (model.report.branch, model.report.branches) == ("target", ("online", "target"))
    assert model.head is not None
    assert (model.preprocessing.mean, model.preprocessing.source) == ((0.1, 0.2, 0.3), "layout")
    assert model.architecture == Architecture("resnet18", "solo-cifar", 8)
    kept = torch.load(file)["memory"]["brain.asleep.conv1.weight"]
    assert torch.equal(model.backbone.state_dict()["network.conv1.weight"], kept)


def test_it_is_named_on_the_command_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ckpt", str(file), "--file-layout", "own_robot:ROBOT", "--limit", "20", "--dry-run"]
    assert app(["probe", *flags], result_action="return_value") == 0
    assert "Robot's memory" in capsys.readouterr().out


def test_a_registered_layout_is_recognised_by_its_marks(file: Path, registered: Layout) -> None:
    assert load_model(file).layout == registered.name
    assert load_model(file, weights="teacher").report.branch == "target"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("MoCo v4", "did you mean MoCo v3"),
        ("DINO", "not laid out as DINO: its networks are at .*brain.awake"),
        ("own_robot:ROBO", "did you mean ROBOT"),
        ("own_robot:Layout", "must be a coss_eval.checkpoints.layouts.Layout"),
    ],
)
def test_what_is_no_layout_of_the_file_is_refused(file: Path, name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_model(file, file_layout=name)


def test_our_own_files_have_no_other_layout(file: Path) -> None:
    save_model(load_model(file, file_layout="own_robot:ROBOT"), file.parent / "model.safetensors")
    with pytest.raises(UsageError, match="leave --file-layout out"):
        load_model(file.parent / "model.safetensors", file_layout="own_robot:ROBOT")
