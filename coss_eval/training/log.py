"""What a run writes down: one JSON object a line, TensorBoard beside it where that is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coss_eval.errors import CossError
from coss_eval.runtime.disk import write_atomically


class RunLog:
    """Lines appended to out/log.jsonl. A resumed run drops the lines after its checkpoint first.

    Raises CossError where they cannot be written.
    """

    def __init__(self, out: Path, steps_done: int) -> None:
        self._path = out / "log.jsonl"
        if self._path.exists():
            kept = [line for line in _lines(self._path) if line["step"] <= steps_done] if steps_done else []
            with self._written():
                write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._board: Any = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            with self._written():
                self._board = SummaryWriter(str(out / "tensorboard"), purge_step=steps_done + 1)  # type: ignore[no-untyped-call]

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line {"kind", "step", ...}; numbers also go to TensorBoard as kind/name."""
        with self._written(), self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._board is not None:
            with self._written():
                for name, value in values.items():
                    if isinstance(value, (int, float)):
                        self._board.add_scalar(f"{kind}/{name}", value, step)

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CossError(f"cannot write {self._path}: {error.strerror}; make room and --resume") from error

    def close(self) -> None:
        if self._board is not None:
            with self._written():
                self._board.close()


def read(out: Path) -> list[dict[str, Any]]:
    """All lines of a run's log."""
    return _lines(out / "log.jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line; the last one may have been cut by a kill."""
    found = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        found.append(line)
    return found
