"""The trainer's state on disk: written whole or not at all, and enough to go on bit for bit."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from coss_eval.errors import CossError, UsageError
from coss_eval.runtime.disk import write_atomically
from coss_eval.training.config import Config

VERSION = 2
READ = (1, VERSION)  # 1 has no states from inside an epoch, which a program of its time would take for finished ones


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace ``path``; where the disk is full the old file stays, and a CossError says so."""
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **state}, buffer)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        kept = f"; {path} still holds the last good state" if path.exists() else ""
        raise CossError(f"cannot write {path}: {error.strerror}{kept}; make room and --resume") from error


def load(path: Path) -> dict[str, Any]:
    """The state that ``save`` wrote, on the CPU: AdamW's counts of steps belong there. Nothing in the file is run."""
    if not zipfile.is_zipfile(path):  # what torch.save writes
        raise CossError(f"{path} is no trainer state; remove it to start anew")
    try:
        with zipfile.ZipFile(path) as archive:  # torch checks no sums
            damaged = archive.testzip()
        if damaged is not None:
            raise CossError(f"{path} is damaged (in {damaged}); remove it to start anew")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, UnpicklingError, zipfile.BadZipFile) as error:
        raise CossError(
            f"{path} is no trainer state ({str(error).splitlines()[0]}); remove it to start anew"
        ) from error
    if not isinstance(state, dict) or "version" not in state:
        raise CossError(f"{path} is no trainer state; remove it to start anew")
    if state["version"] not in READ:
        raise CossError(f"{path} is of version {state['version']}, this program writes {VERSION}; start anew")
    return state


def refuse_other(state: dict[str, Any], config: Config, data: str, path: Path) -> None:
    """Raise UsageError that lists every difference where ``state`` is of another configuration or other images."""
    differences = config.differences(Config.from_dict(state["config"]))  # an older one lacks fields at their default
    if state["data"] != data:
        differences.append("the training images are others")
    if differences:
        raise UsageError(
            f"{path.parent} holds a run of another configuration ({'; '.join(differences)}); resume with the same one, "
            "or choose another folder"
        )
