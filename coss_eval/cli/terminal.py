"""What commands print: plain lines, and one progress line that is plain where there is no terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coss_eval.evaluation import Progress
    from coss_eval.training.loop import TrainingProgress


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """Seconds as people say them: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def live_line() -> Iterator[Callable[[str, bool], None]]:
    """One line, shown by (text, is it the last), rewritten on a terminal; elsewhere a plain line every 10 seconds.

    On a terminal it is cut to the width, and what is printed meanwhile stands above it.
    """
    if not sys.stderr.isatty():
        last = -math.inf

        def print_seldom(text: str, final: bool) -> None:
            nonlocal last
            if final or time.monotonic() - last >= 10:
                last = time.monotonic()
                sys.stderr.write(f"{text}\n")
                sys.stderr.flush()

        yield print_seldom
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console, together = Console(stderr=True), sys.stdout.isatty()  # what goes into a file stays there
    with Live(console=console, auto_refresh=False, redirect_stdout=together) as live:
        yield lambda text, _: live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)


@contextmanager
def progress_line(*, quiet: bool = False) -> Iterator[Callable[[Progress], None] | None]:
    """The progress of an evaluation on a live line; None where nothing is to be shown."""
    if quiet:
        yield None
        return
    started = time.monotonic()
    with live_line() as line:

        def show(progress: Progress) -> None:
            done, total = progress.done, progress.total
            left = (time.monotonic() - started) / done * (total - done) if 0 < done < total else None
            eta = "" if left is None else f", {duration(left)} left"
            line(f"[{done}/{total}{eta}] {progress.label}", done == total)

        yield show


@contextmanager
def training_line(name: str, *, quiet: bool = False) -> Iterator[Callable[[TrainingProgress], None] | None]:
    """The progress of a training run on a live line; None where nothing is to be shown."""
    if quiet:
        yield None
        return
    with live_line() as line:

        def show(now: TrainingProgress) -> None:
            knn = "" if now.knn is None else f"   kNN {100 * now.knn:.1f} %"
            where = f"{name}   epoch {now.epoch}/{now.epochs}   loss {now.loss:.4f}"
            speed = f"{now.images_per_second:,.0f} images/s   {duration(now.seconds_left)} left"
            line(f"{where}{knn}   {speed}", now.step == now.steps)

        yield show
