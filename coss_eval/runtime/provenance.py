"""What a run was made with: the same few facts for an evaluation's run.json and a training run's log."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coss_eval import __version__

if TYPE_CHECKING:
    import torch


def _program() -> str:
    """What a person types to start it: "coss-eval" for ``python -m coss_eval`` too."""
    script = Path(sys.argv[0])
    return "coss-eval" if script.parts[-2:] == ("coss_eval", "__main__.py") else script.name


def made_with(device: torch.device) -> dict[str, Any]:
    """Command, time, versions, device and threads, as JSON has them."""
    import numpy  # here: the store asks for the commit only, and imports nothing heavy
    import torch
    import torchvision

    return {
        "command": shlex.join([_program(), *map(portable, sys.argv[1:])]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {
            "coss_eval": __version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
        },
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
    }


def portable(word: str) -> str:
    """A word of a command without the machine's own folders, which tell a reader nothing and should not be published.

    Paths are written from the current folder, or from ~, the person's; of others the last two names stay, after "...":
    "NAME=/scratch/me/study/a.pth" is "NAME=.../study/a.pth".
    """
    return _ABSOLUTE.sub(lambda match: _without_machine(match[0]), word)


def _without_machine(path: str) -> str:
    for folder, shown in ((os.getcwd(), "."), (os.path.expanduser("~"), "~")):
        if path == folder or path.startswith(f"{folder}{os.sep}"):
            return os.path.normpath(f"{shown}{path[len(folder) :]}")
    return os.sep.join(["...", *[name for name in path.split(os.sep) if name][-2:]])


_ABSOLUTE = re.compile(r"(?<![^=,:])/(?!/)[^=,:]*")  # at the word's beginning or after what parts it; no "https://"


def git_commit() -> str | None:
    """The commit this package runs from, with "+" where files differ from it; None where nothing tells.

    The environment variable COSS_COMMIT says it of a copy of a checkout, which has no .git or that of another commit.
    """
    if said := os.environ.get("COSS_COMMIT"):
        return said
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
