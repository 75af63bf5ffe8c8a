"""The former place of coss_eval.receptive_field: the same names, with a DeprecationWarning."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    found = getattr(import_module("coss_eval.receptive_field"), name)
    text = f"coss_eval.models.receptive_field.{name} has moved: import it from coss_eval.receptive_field"
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    return found
