"""Errors meant for a person: one line that says what was expected, what came and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_CONTROLS = {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {0x09, 0x0A}
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _CONTROLS}


class CossError(Exception):
    """A failure the user can mend; the CLI prints its message alone, without a traceback."""


class CossWarning(UserWarning):
    """What the command line prints before and after a run, for Python: assumptions, warnings, cells not done.

    Silenced as any warning: ``warnings.simplefilter("ignore", coss_eval.errors.CossWarning)``.
    """


class UsageError(CossError):
    """A wrong call (unknown name, value out of range, flags that do not fit): exit code 2."""


def visible(text: str) -> str:
    """Text as it may go to a terminal: control characters, which could move its cursor or retitle it, as escapes.

    So are marks that turn the direction of writing. Line breaks and tabs stay.

    >>> visible("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return text.translate(_ESCAPES)


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """The error for a name that is not among ``choices``, with the nearest ones suggested."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {shown(known, 12)}"
    return UsageError(f"unknown {kind} {name!r}; {hint}")


def shown(names: Sequence[str], most: int = 30) -> str:
    """The names with commas between them; of a long list the first, and how many more there are."""
    rest = f", ... and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
