"""What a person sees while a command works."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from small_networks import Convolutional, scramble

from coss_eval import cli
from coss_eval.runtime.live import fitted

SHOW = """
from coss_eval.runtime.live import live_line, say
with live_line() as line:
    for step in range(3):
        line(f"{step} " + "many words " * 30, step == 2)
        say(f"note {step}")
"""


def everything(terminal: int) -> str:
    """What was written to a pseudo-terminal whose other end is closed."""
    chunks = []
    try:
        while chunk := os.read(terminal, 65536):
            chunks.append(chunk)
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(terminal)
    return b"".join(chunks).decode()


@pytest.mark.parametrize("columns", [40, 120])
def test_on_a_terminal_one_line_is_rewritten_and_notes_stand_above_it(columns: int) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"}
    done = subprocess.run([sys.executable, "-c", SHOW], stdout=theirs, stderr=theirs, env=environment, timeout=60)
    os.close(theirs)
    seen = everything(ours)
    assert done.returncode == 0
    rows = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r", "\n", seen).splitlines()
    assert max(map(len, rows)) == columns
    assert [row for row in rows if row.startswith("note")] == ["note 0", "note 1", "note 2"]


def test_notes_go_into_a_file_where_only_the_line_has_a_terminal() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], stdout=subprocess.PIPE, stderr=theirs, env=environment, timeout=60, check=True
    )
    os.close(theirs)
    assert done.stdout.decode().split() == ["note", "0", "note", "1", "note", "2"]
    assert "note" not in everything(ours)


def test_elsewhere_plain_lines_come_seldom_and_whole() -> None:
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n") == ["note 0", "note 1", "note 2", ""]
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["0", "2"]  # the first, and the last
    assert len(done.stderr.splitlines()[0]) > 300


def test_long_lines_are_broken_between_words_below_their_first() -> None:
    line = "note        " + "some words that say more than a terminal shows " * 3
    shown = fitted(line, 40).splitlines()
    assert max(map(len, shown)) <= 40
    assert all(one.startswith(" " * 12) for one in shown[1:])
    assert " ".join(fitted(line, 40).split()) == " ".join(line.split())
    path = "report      " + "/folder" * 20
    assert fitted(path, 40).split() == path.split()  # a path is never broken
    assert fitted(line, None) == line


def test_an_error_is_one_line_and_fits_the_terminal() -> None:
    """On a terminal it is broken between words; in a file it is one line."""
    call = [sys.executable, "-m", "coss_eval", "compare", "a_folder_that_is_not_there_at_all"]
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(call, stdout=theirs, stderr=theirs, env=environment | {"COLUMNS": "60"}, timeout=60)
    os.close(theirs)
    shown = everything(ours).split("\r\n")
    assert done.returncode == 2
    assert len(shown) > 2
    assert max(map(len, shown)) <= 60
    plain = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=60)
    assert plain.stderr.count("\n") == 1
    assert " ".join(shown).split() == plain.stderr.split()
    assert "B is missing: coss-eval compare A B" in plain.stderr


@pytest.mark.parametrize(("variables", "expected"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_are_for_terminals_that_want_them(variables: dict[str, str], expected: bool) -> None:
    show = [sys.executable, "-c", "from coss_eval.runtime.live import coloured; print(coloured())"]
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment |= {"TERM": "xterm", **variables}
    ours, theirs = pty.openpty()
    subprocess.run(show, stdout=theirs, env=environment, timeout=60, check=True)
    os.close(theirs)
    assert everything(ours).strip() == str(expected)
    assert subprocess.run(show, capture_output=True, text=True, env=environment, check=True).stdout.strip() == "False"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the commands of a first session print at 80 columns, by name: four tiny networks of long names."""
    folder = tmp_path_factory.mktemp("session")
    names = [f"{method}_resnet18_cifar10_1000_epochs_seed_0" for method in ("byol", "co_byol", "supervised")]
    for seed, name in enumerate(names):
        network = Convolutional()
        scramble(network, seed)
        torch.save(network.state_dict(), folder / f"{name}.pth")
    one = ["--arch", "small_networks:Convolutional", "--data", "digits", "--limit", "30", "--device", "cpu"]
    networks = ["--ckpt", *(f"{name}.pth" for name in names), "--untrained", "1", *one]
    calls = {
        "evaluate": ["evaluate", "--tasks", "probe", "redundancy", *networks, "--out", "out"],
        "similarity": ["similarity", *networks, "--sites", "prepool", "--out", "similar"],
        "extract": ["extract", *networks, "--out", "features"],
        "check": ["check", "--tasks", "probe", *networks[: networks.index("--limit")]],
        "compare": ["compare", f"out::{names[0]}", f"out::{names[1]}"],
        "info": ["info", "out"],
        "consistency": ["consistency", "out"],
        "relate": ["relate", "out", "--x", "linear probe", "--y", "redundancy", "--out", "related"],
        "receptive-field": ["receptive-field", "--arch", "small_networks:Convolutional", "--size", "32"],
        "report": ["report", "out", "--models", "co_*", "byol*"],
        "leaderboard": ["report", "out", "similar/../out", "--out", "board"],
        "list": ["list"],
    }
    shown = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "80")
        for name, call in calls.items():
            patch.setattr(sys, "argv", ["coss-eval", *call])
            with redirect_stdout(StringIO()) as out, pytest.raises(SystemExit) as stop:
                cli.main()
            assert stop.value.code == 0, name
            shown[name] = out.getvalue()
    return shown


@pytest.mark.slow
def test_what_commands_print_fits_80_columns_and_speaks_plainly(session: dict[str, str]) -> None:
    for name, shown in session.items():
        long = [line for line in shown.splitlines() if len(line) > 80 and len(line.split()) > 1]
        assert not long, (name, long)
        assert "{'" not in shown, name
        assert '{"' not in shown, name
    for name, last in [
        ("evaluate", "out/report.md"),
        ("similarity", "similar/report.md"),
        ("relate", "related/report.md"),
    ]:
        assert session[name].splitlines()[-1].split() == ["report", last]
    assert session["report"].splitlines()[-1] == "out/report.html"


@pytest.mark.slow
def test_key_reports_say_which_checkpoint_they_are_of(session: dict[str, str]) -> None:
    lines = session["evaluate"].splitlines()
    places = [i for i, line in enumerate(lines) if line.startswith("layout ")]
    assert [lines[i - 1].split()[1].partition("_resnet18")[0] for i in places] == ["byol", "co_byol", "supervised"]
