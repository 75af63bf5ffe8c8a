"""The registry of tasks: what each entry says, what lists, checks and README make of it, and tasks from outside."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coss_eval import cli, tasks
from coss_eval.cli.app import app
from coss_eval.cli.describe import list_lines
from coss_eval.errors import UsageError
from coss_eval.store import Store

ENTRIES = {entry.name: entry for entry in tasks.built_in()}
README = Path(__file__).parents[2] / "README.md"

MINE = '''
from dataclasses import KW_ONLY, dataclass
from coss_eval.store import Cell
from coss_eval.tasks.task import Result, Task

@dataclass(frozen=True)
class Dark(Task):
    """Accuracy on darkened images.

    One cell.
    """

    name = "dark"
    small = {"factor": 0.9}
    factor: float = 0.5

    def cells(self, subject, seed):
        return [Cell(self.name, {"factor": self.factor})]

    def measure(self, cell, subject):
        ids, right = [], []
        for batch in subject.batches():
            logits = subject.classifier(cell.params["factor"] * batch.images.float() / 255)
            ids += batch.ids.tolist()
            right += (logits.argmax(1) == batch.labels).tolist()
        import numpy as np
        return Result.of_verdicts("accuracy", np.array(ids), [({"factor": self.factor}, np.array(right))])

class NoTask:
    pass

@dataclass(frozen=True)
class Unnamed(Dark):
    name = "probe"

@dataclass(frozen=True)
class Asking(Dark):
    name = "asking"
    _: KW_ONLY
    needed: float
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a module of tasks in it; what it registers is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "_REGISTERED", {})
    monkeypatch.delitem(sys.modules, "my_tasks", raising=False)
    (tmp_path / "my_tasks.py").write_text(MINE)
    return tmp_path


def test_the_order_is_that_of_a_report() -> None:
    assert list(ENTRIES) == ["probe", "corruptions", "attacks", "internal", "crops", "redundancy"]


@pytest.mark.slow
def test_entries_and_help_import_neither_torch_nor_pandas() -> None:
    code = (
        "import sys\nfrom coss_eval import tasks\n"
        "from coss_eval.cli import app\n"
        "for entry in tasks.built_in():\n"
        "    assert app([entry.name, '--help'], result_action='return_value') is None\n"
        "heavy = {'torch', 'pandas', 'torchvision', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_readme_has_a_row_for_each_task() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| (.*) \|$", README.read_text(), re.MULTILINE)
    assert rows == [(entry.name, entry.source) for entry in ENTRIES.values()]


def _flags(of: Any) -> list[Any]:
    return [argument for argument in of.assemble_argument_collection(parse_docstring=True) if argument.show]


def _commands() -> dict[str, Any]:
    found = {name: app[name] for name in app if not name.startswith("-")}
    return found | {f"figures {name}": found["figures"][name] for name in ("gallery", "curves")}


@pytest.mark.parametrize(("name", "command"), _commands().items(), ids=list(_commands()))
def test_every_flag_is_explained(name: str, command: Any) -> None:
    unexplained = [argument.name for argument in _flags(command) if not argument.parameter.help]
    assert not unexplained


@pytest.mark.parametrize("name", [*ENTRIES, "robustness", "evaluate", "train", "check"])
def test_flags_stand_in_named_groups(name: str) -> None:
    groups = {group.name for argument in _flags(app[name]) for group in argument.parameter.group}
    assert groups <= {"Task", "Model", "Data", "Run"}


def run(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["coss-eval", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return int(str(stop.value.code))


@pytest.mark.slow
def test_a_task_from_outside_runs_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ckpt", "pixels:8", "--limit", "20", "--out", "out", "--quiet"]
    assert run("evaluate", "--tasks", "redundancy", "my_tasks:Dark", *flags) == 0, capsys.readouterr().err
    records = {record["task"]: record for record in Store(folder / "out").records()}
    assert set(records) == {"redundancy", "dark"}
    assert records["dark"]["protocol"]["code"]  # its source is in its cells' keys
    (accuracy,) = records["dark"]["measurements"]
    assert accuracy["metric"] == "accuracy"
    assert accuracy["n"] == 20
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]

    assert tasks.entry("dark").about == "Accuracy on darkened images"
    # the column is as wide as the longest name of any kind
    assert ["dark", "Accuracy on darkened images"] in [line.split(maxsplit=1) for line in list_lines("tasks")]
    assert run("check", "--ckpt", "pixels:8", "--tasks", "my_tasks:Dark") == 0
    assert "dark        ok, 1 cells" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_task:Dark", "cannot import my_task"),
        ("my_tasks:Drak", "did you mean Dark"),
        ("my_tasks:NoTask", "a task is a subclass of coss_eval.tasks.task.Task"),
        ("my_tasks:Unnamed", "there is a task called probe"),
        ("coss_eval.tasks.task:Task", "lacks cells and measure and name"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_is_no_task_from_outside_is_one_line(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        tasks.entry(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("folder")
def test_options_without_defaults_are_named() -> None:
    with pytest.raises(UsageError, match="'needed'"):
        tasks.entry("my_tasks:Asking").make()
