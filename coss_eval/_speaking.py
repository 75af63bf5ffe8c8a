"""The public functions as a person calls them: what the command line prints besides, they give as CossWarning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

from coss_eval.checkpoints.normalisation import normalisation_note
from coss_eval.errors import CossWarning
from coss_eval.models.model import Model

P = ParamSpec("P")
R = TypeVar("R")


def speaking(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` with a warning for each note it has: from its ``on_note``, unless one is given or it is
    to be ``quiet``, else its result."""
    tells = "on_note" in signature(function).parameters

    @wraps(function)
    def spoken(*args: P.args, **kwargs: P.kwargs) -> R:
        if tells and not kwargs.get("quiet"):
            kwargs.setdefault("on_note", _warn_in_function)
        if tells:
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        for line in _notes(result):
            warnings.warn(line, CossWarning, stacklevel=2)
        return result

    return spoken


def _notes(result: Any) -> list[str]:
    """What is assumed of a model, and what its key report notes."""
    if not isinstance(result, Model):
        return []
    report = result.report
    partial = [] if report is None or not report.missing else [f"{len(report.missing)} tensors missing in the file"]
    assumed = [normalisation_note(result)] if result.preprocessing.said_by is None else []
    noted = [] if report is None else report.notes
    return [*assumed, *(f"{result.name}: {line}" for line in (*partial, *noted))]


def _warn_in_function(line: str) -> None:
    """A warning at the line of the caller's code: that which called the wrapper, however deep below it the note is."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals is not globals():
        frame, level = frame.f_back, level + 1
    warnings.warn(line, CossWarning, stacklevel=level + 1)
