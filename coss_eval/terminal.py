"""What commands print: plain lines, and one progress line that is plain where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coss_eval.evaluation import Progress


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """Seconds as people say them: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress_line(*, quiet: bool = False) -> Iterator[Callable[[Progress], None] | None]:
    """One line that is rewritten on a terminal; elsewhere a plain line now and then."""
    if quiet:
        yield None
        return
    started = time.monotonic()
    last = [0.0]
    live = sys.stderr.isatty()

    def show(progress: Progress) -> None:
        now = time.monotonic()
        finished = progress.done == progress.total
        if not live and not finished and now - last[0] < 10:
            return
        last[0] = now
        left = (now - started) / progress.done * (progress.total - progress.done) if progress.done else None
        eta = "" if left is None or finished else f", {duration(left)} left"
        line = f"[{progress.done}/{progress.total}{eta}] {progress.label}"
        sys.stderr.write(f"\r\033[K{line[:110]}" if live else f"{line}\n")
        sys.stderr.flush()

    yield show
    if live:
        sys.stderr.write("\n")
