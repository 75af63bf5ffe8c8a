"""What a person sees: lines as wide as the terminal, and how far a run is, on one line that is rewritten there."""

from __future__ import annotations

import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from coss_eval.errors import CossError, visible

if TYPE_CHECKING:
    from coss_eval.evaluation import Progress
    from coss_eval.training.loop import TrainingProgress

Line = Callable[[str, bool], None]

BETTER, WORSE, STRONG, PLAIN = "\x1b[1;34m", "\x1b[1;33m", "\x1b[1m", "\x1b[0m"  # blue and orange as in the page
_COLOUR = re.compile("(" + "|".join(map(re.escape, (BETTER, WORSE, STRONG, PLAIN))) + ")")
SILENT = 3.0  # seconds that a single call takes before it says how far it is
PARTED = 75  # exit code of one of them that stopped because another has ended: EX_TEMPFAIL of sysexits.h
TOGETHER = "COSS_TOGETHER"  # in the environment of processes that one command has started: a folder that they share


class Parted(CossError):
    """Another process of the run has ended, and says why itself."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this run has ended; what was done is stored, the same command goes on from there"
        )


def speaks() -> bool:
    """Whether this process speaks for its run: of several, as torchrun starts them, the first one."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def say(text: str) -> None:
    """A line of a command's output, or several, broken between words where the terminal is narrower."""
    if speaks():
        _write(sys.stdout, text)


def complain(error: Exception, line: str) -> None:
    """Tell what went wrong; of several processes that one command has started, the first that comes to it does.

    What one of them was stopped by because another has ended is no news.
    """
    if (folder := os.environ.get(TOGETHER)) is not None:
        if isinstance(error, Parted):
            return
        try:
            os.close(os.open(Path(folder) / "told", os.O_CREAT | os.O_EXCL))
        except OSError:  # another has told; or the command that started all has ended
            return
    tell(line)


def tell(text: str) -> None:
    """A plain line beside results, for a person."""
    _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    """A line, of which nothing can steer the terminal; what its encoding has no letters for is written as escapes."""
    encoding, ours = stream.encoding or "utf-8", stream is sys.stdout and coloured()
    parts = _COLOUR.split(fitted(text, width(stream))) if ours else [fitted(text, width(stream))]
    safe = "".join(part if ours and _COLOUR.fullmatch(part) else visible(part) for part in parts)
    stream.write(safe.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def width(stream: TextIO | None = None) -> int | None:
    """How many characters a line of the terminal has that ``stream`` (standard output) goes to.

    COLUMNS, where that is set; None where it is not and the output goes to no terminal.
    """
    set_ = os.environ.get("COLUMNS", "")
    if set_.isdecimal() and int(set_) > 0:
        return int(set_)
    try:
        return os.get_terminal_size((stream or sys.stdout).fileno()).columns or None
    except (OSError, ValueError):  # a file, a pipe, or what only looks like a stream
        return None


def coloured() -> bool:
    """Whether standard output shows colours: a terminal, and nobody has set NO_COLOR (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def fitted(text: str, within: int | None) -> str:
    """Lines no longer than ``within``, broken between words; what goes on stands below the words after a label.

    >>> print(fitted("out         a folder of results", 24))
    out         a folder of
                results
    """
    if within is None:
        return text
    lines = []
    for line in text.split("\n"):
        label = re.match(r" *\S+ {2,}| +", line)
        indent = " " * min(2 if label is None else label.end(), within // 2)
        folded = textwrap.wrap(line, within, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        lines += folded if len(_COLOUR.sub("", line)) > within else [line]
    return "\n".join(lines)


def say_report(path: Path, also: str) -> None:
    """The last lines of a command that writes a report: what ``also`` is in its folder, and where it is."""
    say(f"also        {also} beside it")
    say(f"report      {path}")


def facts_html(title: str, facts: Mapping[str, str]) -> str:
    """A heading and a table of facts, for a notebook."""
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in facts.items()
    )
    return f"<div><b>{escape(title)}</b><table>{rows}</table></div>"


def duration(seconds: float) -> str:
    """Seconds as people say them: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def live_line() -> Iterator[Line]:
    """One line, shown by (text, is it the last), rewritten on a terminal and in a notebook; elsewhere a plain line
    every 10 seconds.

    On a terminal it is cut to the width, and what is printed meanwhile stands above it.
    """
    if (notebook := _notebook()) is not None:
        yield notebook
        return
    if not sys.stderr.isatty():
        last = -math.inf

        def print_seldom(text: str, final: bool) -> None:
            nonlocal last
            if final or time.monotonic() - last >= 10:
                last = time.monotonic()
                tell(text)

        yield print_seldom
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console, together = Console(stderr=True), sys.stdout.isatty()  # what goes into a file stays there
    with Live(console=console, auto_refresh=False, redirect_stdout=together) as live:
        yield lambda text, _: live.update(Text(visible(text), no_wrap=True, overflow="ellipsis"), refresh=True)


def _notebook() -> Line | None:
    """A line in the output of a notebook's cell, replaced in place; None where this process serves no notebook.

    By Jupyter's own display, which every front end has; rich's needs ipywidgets.
    """
    shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if getattr(shell, "kernel", None) is None:
        return None
    display = import_module("IPython.display").display
    handle: Any = None

    def show(text: str, _final: bool) -> None:
        nonlocal handle
        if handle is None:
            handle = display({"text/plain": text}, raw=True, display_id=True)
        else:
            handle.update({"text/plain": text}, raw=True)

    return show


@contextmanager
def progress_line(*, quiet: bool = False) -> Iterator[Callable[[Progress], None] | None]:
    """The progress of an evaluation on a live line; None where nothing is to be shown."""
    if quiet:
        yield None
        return
    started = time.monotonic()
    with live_line() as line:

        def show(progress: Progress) -> None:
            done, total, left = progress.done, progress.total, progress.seconds_left
            if left is None and 0 < done < total:
                left = (time.monotonic() - started) / done * (total - done)
            share = "" if progress.share is None or done == total else f", {100 * progress.share:.0f} %"
            eta = "" if left is None or done == total else f", {duration(left)} left"
            line(f"[{done}/{total} steps{share}{eta}] {progress.label}", done == total)

        yield show


@contextmanager
def image_line(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None] | None]:
    """How far a pass over images is, on a live line, once it has taken SILENT seconds; None where nothing is shown."""
    if quiet:
        yield None
        return
    started = time.monotonic()
    with live_line() as line:

        def show(label: str, done: int, total: int) -> None:
            passed = time.monotonic() - started
            if passed >= SILENT:
                left = f", {duration(passed / done * (total - done))} left" if 0 < done < total else ""
                where = f"{label}: {done:,} of {total:,} images{left}" if done else f"{label} on {total:,} images"
                line(where, done == total)

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
