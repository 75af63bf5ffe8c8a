"""The identity of code that is not the package's: it decides numbers as weights do, so it stands in their keys."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterable
from typing import Any

PACKAGES = ("coss_eval", "torch", "torchvision", "timm")
"""Code whose changes are told by versions: of algorithms (ours), and of the packages in run.json (the others')."""
UNKNOWN = "unknown"


def is_foreign(module: str) -> bool:
    """Whether a module is neither this package's nor one of those its networks are built from."""
    return module.partition(".")[0] not in PACKAGES


def code_identity(things: Iterable[Any]) -> str | None:
    """16 hex digits of all code that the classes or functions among ``things`` stand in; None where none is foreign.

    ``things``: classes, functions, or names of imported modules. One with a ``version`` attribute is named by that.
    Of the others the source text of their whole module counts (helpers beside a class decide numbers, too), or where
    that cannot be read, as in a notebook, of the thing itself. UNKNOWN where the source of one cannot be read at all.
    """
    found = {_of(thing) for thing in things if is_foreign(_module_of(thing))}
    if not found:
        return None
    return UNKNOWN if UNKNOWN in found else hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()[:16]


def _of(thing: Any) -> str:
    version = getattr(thing, "version", None)
    if isinstance(version, str | int | float):
        return f"{_name(thing)} version {version}"
    module = sys.modules.get(_module_of(thing))
    # the main module's file is the script that asks for numbers: changing how many it asks for changes none of them
    sources = [thing] if not isinstance(thing, str) and _module_of(thing) == "__main__" else [module, thing]
    for source in sources:
        try:
            return f"{_name(thing)} {hashlib.sha256(inspect.getsource(source).encode()).hexdigest()}"  # type: ignore[arg-type]
        except (OSError, TypeError):  # no file, as in `python -c`, or nothing that has one
            continue
    return UNKNOWN


def _module_of(thing: Any) -> str:
    return thing if isinstance(thing, str) else str(getattr(thing, "__module__", "") or "")


def _name(thing: Any) -> str:
    return thing if isinstance(thing, str) else f"{_module_of(thing)}.{getattr(thing, '__qualname__', '')}"
