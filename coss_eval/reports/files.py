"""Writing a report's files, each whole or not at all."""

from __future__ import annotations

from pathlib import Path

from coss_eval.errors import CossError
from coss_eval.runtime.disk import write_atomically


def write_file(path: Path, content: str | bytes) -> Path:
    """Write one file and its folder; the path. Raises CossError where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise CossError(f"cannot write {path}: {error.strerror}; give another --out") from error
    return path
