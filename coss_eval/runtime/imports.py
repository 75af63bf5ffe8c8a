"""Code that a person names on the command line, as "package.module:name"."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coss_eval.errors import CossError, UsageError, unknown_name
from coss_eval.runtime.code_identity import edited

INSTALL = {
    "cv2": "pip install opencv-python-headless, which needs none of the system's libGL, in opencv-python's place",
    "skimage": "pip install scikit-image",
}


@contextmanager
def needing(module: str) -> Iterator[None]:
    """Imports of a package that not everything needs: CossError, with what to install, where they fail."""
    try:
        yield
    except ImportError as error:
        why = str(error).partition("\n")[0]
        raise CossError(
            f"{module} cannot be imported ({why}): {INSTALL.get(module, f'pip install {module}')}"
        ) from error


def imported(spec: str, kind: str, attribute_kind: str = "name") -> Any:
    """What "package.module:name" names, looked for in the current directory first.

    ``kind`` ("task") and ``attribute_kind`` ("class") are for errors. Raises UsageError where there is none,
    and where its code was edited after it had been imported.
    """
    module_name, _, attribute = spec.partition(":")
    with current_directory_first():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise UsageError(f"{kind} {spec!r}: cannot import {module_name} ({error})") from error
    if changed := edited(module_name):
        raise UsageError(
            f"{kind} {spec!r}: the file of {changed[0]} was edited since this process imported it, and does not "
            f"run yet; start Python anew, or importlib.reload(sys.modules[{changed[0]!r}]) and what imports it"
        )
    if not hasattr(module, attribute):
        known = [name for name in vars(module) if not name.startswith("_")]
        raise unknown_name(f"{attribute_kind} in {module_name}", attribute, known)
    return getattr(module, attribute)


@contextmanager
def current_directory_first() -> Iterator[None]:
    """Imports inside look into the current directory before anything else."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
