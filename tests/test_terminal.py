"""What a person sees while a command works."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

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
