"""People's own code by name: "package.module:name", where modules in the current directory come first."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coss_eval.errors import UsageError, unknown_name


def own_object(spec: str, flag: str, kind: str) -> Any:
    """What the module of that name calls so; ``flag`` ("arch") and ``kind`` ("factory") say in errors what it is for.

    Raises UsageError where the module cannot be imported, or has nothing of that name.
    """
    module_name, _, attribute = spec.partition(":")
    with current_directory_first():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise UsageError(f"{flag} {spec!r}: cannot import {module_name} ({error})") from error
    found = getattr(module, attribute, None)
    if found is None:
        raise unknown_name(f"{kind} in {module_name}", attribute, [name for name in vars(module) if name[0] != "_"])
    return found


@contextmanager
def current_directory_first() -> Iterator[None]:
    """Imports run inside find modules in the current directory before all others."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
