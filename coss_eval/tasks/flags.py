"""The types of options that are lists or numbers as people write them: a task's fields are its command's flags.

Importing this imports no torch. Every type reads the values after a flag; the flag may be repeated, too.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from coss_eval.errors import UsageError


def numbers(texts: Iterable[str]) -> tuple[float, ...]:
    """Numbers as people write them: 8/255 or 0.031, separated by commas or blanks.

    >>> numbers(["1/255,2/255", "0.5"]) == (1 / 255, 2 / 255, 0.5)
    True
    """
    values = []
    for text in ",".join(texts).split(","):
        numerator, _, denominator = text.strip().partition("/")
        try:
            values.append(float(numerator) / float(denominator or 1))
        except (ValueError, ZeroDivisionError):
            raise UsageError(f"expected numbers such as 0.5/255 or 0.031, got {text!r}") from None
    return tuple(values)


def _fractions(_type: Any, tokens: Any) -> tuple[float, ...]:
    return numbers(token.value for token in tokens)


def _fraction(_type: Any, tokens: Any) -> float:
    (value,) = numbers(token.value for token in tokens[:1])
    return value


def _as_typed(values: tuple[Any, ...]) -> str | None:
    """A list flag's default for the help, as one would type it; None where there is none to show."""
    return shlex.join(map(str, values)) or None


_SEVERAL = Parameter(consume_multiple=1, show_default=_as_typed)
Words = Annotated[tuple[str, ...], _SEVERAL]
Integers = Annotated[tuple[int, ...], _SEVERAL]
Floats = Annotated[tuple[float, ...], _SEVERAL]
Fractions = Annotated[tuple[float, ...] | None, Parameter(converter=_fractions, consume_multiple=1, n_tokens=-1)]
Fraction = Annotated[float | None, Parameter(converter=_fraction)]
BackendFlag = Annotated[
    Literal["native", "reference"], Parameter(help="reference: imagecorruptions and foolbox do the work, not our code.")
]
