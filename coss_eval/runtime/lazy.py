"""Modules that are imported when they are first used, so that reading what there is by name need not wait for torch."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from coss_eval.runtime.imports import needing


def lazy(name: str) -> Any:
    """The module of that name, imported when something in it is first asked for.

    For the modules of a registry, which declare entries that ``coss-eval list`` shows, beside the code that needs
    torch. Type checkers are told the truth by an import under TYPE_CHECKING. Raises CossError where it cannot be had.
    """
    return _Lazy(name)


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        with needing(self.__name__):
            found = getattr(import_module(self.__name__), name)
        setattr(self, name, found)  # found at once from now on
        return found
